"""The pictures of the help pages and the pack's emblem, drawn by the demo model."""
