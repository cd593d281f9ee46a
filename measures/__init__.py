"""How similar the frames of a story are, and how well they match its text."""
