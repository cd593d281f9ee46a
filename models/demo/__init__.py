"""The demo model, its StoryMaker stand-in and the reader of its images."""
