"""Networks and the demo model. Imports torch, but no host."""
