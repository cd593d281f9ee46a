"""Comic pages. Knows no host; only Pillow and numpy."""
