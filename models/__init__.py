"""Networks and the demo model. Knows no host; only torch."""
