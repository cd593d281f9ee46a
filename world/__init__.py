"""The demo model's story world: pictures whose every attribute is known, their captions, and how to read them back."""
