"""The demo model's story world: pictures with known attributes, their captions, and a reader that recovers both."""
