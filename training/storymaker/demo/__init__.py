"""StoryMaker's training on the demo model and the story world."""
