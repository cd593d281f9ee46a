"""The pose of a picture's figures, as a hint for a ControlNet: where head, body and legs are, without any looks."""

from __future__ import annotations

import numpy as np

from .canvas import EMPTY
from .draw import compose
from .scene import CLOTHES, FURS, SIZE, Figure, Scene

PLAIN = Figure("nobody", "pink", "purple", "green", "none")
"""A figure without ears, tail and hat, whose parts have colours that nothing else has."""
PARTS = {FURS[PLAIN.fur]: (255, 0, 0), CLOTHES[PLAIN.shirt]: (0, 255, 0), CLOTHES[PLAIN.trousers]: (0, 0, 255)}
"""Colour of a part in the plain figure -> its colour in the hint: head and hands, body and arms, legs."""


def pose(scene: Scene, shifts: list[int]) -> np.ndarray:
    """The hint uint8 [24, 24, 3], black where no figure is. shifts: as in `draw.compose`."""
    empty = np.full((SIZE, SIZE, 3), EMPTY, np.int16)
    plain = Scene(scene.place, scene.action, scene.prop, (PLAIN,) * len(scene.figures))
    drawn = compose(empty, plain, shifts)
    hint = np.zeros((SIZE, SIZE, 3), np.uint8)
    for colour, part in PARTS.items():
        hint[(drawn == colour).all(-1)] = part
    return hint
