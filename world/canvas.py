"""What the drawings of places and of figures share: colours, the empty pixel and filled boxes."""

from __future__ import annotations

import numpy as np

OUTLINE = (26, 20, 30)
WHITE = (250, 250, 250)
EMPTY = -1
"""Value of all three channels of an empty pixel."""


def fill_box(image: np.ndarray, x0: int, y0: int, x1: int, y1: int, colour) -> None:
    """Fill columns x0 to x1 and rows y0 to y1 (ends excluded), clipped at the borders."""
    if x1 > 0 and y1 > 0:
        image[max(0, y0) : y1, max(0, x0) : x1] = colour
