"""The demo model, its StoryMaker adapter and the reader of its images."""
