"""StoryMaker: its file, its networks, and character references."""
