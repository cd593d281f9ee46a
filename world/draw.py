"""Draws a scene as 24x24 pixel art.

The attributes of a scene always look the same; the positions of figures and the details of the background are random.
"""

from __future__ import annotations

import numpy as np

from .backgrounds import background
from .canvas import EMPTY, OUTLINE
from .figures import figure
from .scene import SIZE, Scene

HALF = SIZE // 2
SHIFTS = {1: range(5, 12), 2: range(3, 4)}
"""Number of figures -> possible columns of the left edge of a head, in its half of the picture if there are two."""


def draw(scene: Scene, random: np.random.Generator) -> np.ndarray:
    """A picture of the scene, uint8 [24, 24, 3]."""
    shifts = [int(random.choice(SHIFTS[len(scene.figures)])) for _ in scene.figures]
    return compose(background(scene.place, random), scene, shifts)


def compose(picture: np.ndarray, scene: Scene, shifts: list[int]) -> np.ndarray:
    """A copy of `picture` [24, 24, 3] with the figures of a scene drawn on it.

    picture: integers, signed where pixels may be EMPTY. shifts: one of SHIFTS per figure.
    """
    picture = picture.copy()
    if len(scene.figures) == 1:
        _paste(picture, *figure(scene.figures[0], scene.action, scene.prop, shifts[0], SIZE))
        return picture
    left, right = (
        figure(who, scene.action, scene.prop, at, HALF) for who, at in zip(scene.figures, shifts, strict=True)
    )
    _paste(picture[:, :HALF], *left)
    _paste(picture[:, HALF:], *(layer[:, ::-1] for layer in right))
    return picture


def _paste(picture: np.ndarray, body: np.ndarray, effects: np.ndarray) -> None:
    """Draw effects, then the body with an outline around it, onto a view of the picture."""
    shown = effects[..., 0] != EMPTY
    picture[shown] = effects[shown]
    mask = body[..., 0] != EMPTY
    around = np.zeros_like(mask)
    around[1:] |= mask[:-1]
    around[:-1] |= mask[1:]
    around[:, 1:] |= mask[:, :-1]
    around[:, :-1] |= mask[:, 1:]
    picture[around & ~mask] = OUTLINE
    picture[mask] = body[mask]
