"""Draws a scene as 24x24 pixel art.

The attributes of a scene always look the same; the positions of figures and the details of the background are random.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .backgrounds import background
from .canvas import EMPTY, OUTLINE
from .figures import HEAD, figure, head_row
from .scene import SIZE, Scene

HALF = SIZE // 2
SHIFTS = {1: range(5, 12), 2: range(3, 4)}
"""Number of figures -> possible columns of the left edge of a head, in its half of the picture if there are two."""


@dataclass(frozen=True, eq=False)
class Drawing:
    """A picture and where its figures are.

    picture  uint8 [24, 24, 3]
    shifts   one of SHIFTS per figure
    masks    booleans [24, 24] of each figure with its outline
    heads    of each figure, (row, column) of the top left corner of its head, below ears and hat
    """

    picture: np.ndarray
    shifts: tuple[int, ...]
    masks: tuple[np.ndarray, ...]
    heads: tuple[tuple[int, int], ...]


def draw(scene: Scene, random: np.random.Generator) -> np.ndarray:
    """A picture of the scene, uint8 [24, 24, 3]."""
    shifts = _shifts(scene, random)
    return compose(background(scene.place, random), scene, shifts)


def draw_parts(scene: Scene, random: np.random.Generator) -> Drawing:
    """The picture that `draw` makes with the same random numbers, and where its figures are."""
    shifts = _shifts(scene, random)
    picture = compose(background(scene.place, random), scene, shifts)
    masks, heads = [], []
    for number, (who, at) in enumerate(zip(scene.figures, shifts, strict=True)):
        right, width = number == 1, SIZE // len(scene.figures)
        body, _ = figure(who, scene.action, scene.prop, at, width)
        mask = np.zeros((SIZE, SIZE), bool)
        mask[:, :width] = _outlined(body[..., 0] != EMPTY)
        masks.append(mask[:, ::-1].copy() if right else mask)
        heads.append((head_row(scene.action), SIZE - at - HEAD if right else at))
    return Drawing(picture, tuple(shifts), tuple(masks), tuple(heads))


def _shifts(scene: Scene, random: np.random.Generator) -> list[int]:
    return [int(random.choice(SHIFTS[len(scene.figures)])) for _ in scene.figures]


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
    picture[_outlined(mask)] = OUTLINE
    picture[mask] = body[mask]


def _outlined(mask: np.ndarray) -> np.ndarray:
    """A body's pixels and their neighbours."""
    around = mask.copy()
    around[1:] |= mask[:-1]
    around[:-1] |= mask[1:]
    around[:, 1:] |= mask[:, :-1]
    around[:, :-1] |= mask[:, 1:]
    return around
