"""Attention maths and the view of one UNet call. Knows no host; only torch."""
