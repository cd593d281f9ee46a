"""Comic pages. Independent of any host; needs Pillow and numpy only."""
