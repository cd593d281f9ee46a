"""StoryMaker: its file, its networks, and the features of characters."""
