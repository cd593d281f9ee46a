"""Heads in the demo model's images: where they are, an aligned crop, and an identity vector, without a network.

The story world's reader finds the figures; a head that does not look like its drawing is rejected. The identity vector
is computed from the head's colours, and only from what stays with a character: species, fur and hat. Eyes, which close
in sleep, are left out. It takes the place of ArcFace's vector for the demo's StoryMaker.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import product

import numpy as np
import torch
from torch import Tensor

from ...world.canvas import EMPTY
from ...world.draw import compose
from ...world.figures import HEAD, figure, head_row
from ...world.reader import CLIP, Reader, background_cost, small
from ...world.scene import ACTIONS, FURS, HATS, PROPS, SIZE, SPECIES, Figure, Scene
from ..storymaker.characters import IDENTITY, unit_identity
from ..storymaker.crops import ARCFACE, ARCFACE_SIDE
from ..storymaker.faces import Face, FaceAnalysis
from .model import NARROW, basis

ABOVE, TALL = 4, 5
"""Rows of ears or hat above a head, and rows of the head itself."""
SQUARE = 11
"""Side of the square around head, ears and hat that the aligned crop shows."""
EYES = ((1, 3), (2, 3), (3, 3), (1, 6), (2, 6), (3, 6), (3, 2), (3, 5))
"""Row and column in the head of every pixel that an open or closed eye can have."""
MAX_ERROR, MAX_SHARE = 0.075, 0.6
"""Highest mean squared colour distance (sum over three channels, each pixel at most CLIP) between a head and its
drawing, and its highest share of the distance to the background of the place."""
SEED = 11
WAVES, BANDWIDTH = 16, 0.25
"""Random Fourier features per pixel, and the colour distance at which two colours become different ones."""
PRIOR = 400
"""The drawing's own colour counts as much as this many pixels: the demo model's colours differ from frame to frame."""
EVENNESS = 0.5
"""0: plain features; 1: every direction in which the world's heads differ counts the same."""


@dataclass(frozen=True, eq=False)
class Head(Face):
    """A head in an image. who: the figure as read; pixels: float32 [9, 10, 3] in 0..1, turned to face right."""

    who: Figure
    pixels: np.ndarray


class DemoFaces(FaceAnalysis):
    """Face analysis of images from the demo model: squares whose side is a multiple of 24 pixels."""

    name = "demo heads"

    def __init__(self) -> None:
        self._reader = Reader()

    def find(self, picture: np.ndarray) -> tuple[list[Face], None]:
        """The heads in an 8-bit RGB image [S, S, 3], from left to right. Raises ValueError for another shape."""
        pixels = picture.astype(np.float32) / 255
        try:
            reading = self._reader.read(pixels)
        except ValueError as error:
            raise ValueError(
                f"Demo heads are found only in images from the Demo model ({error}) For other images, choose another "
                "pack in Load face analysis."
            ) from error
        pixels, row = small(pixels), head_row(reading.scene.action)
        behind = background_cost(pixels, reading.scene.place)
        heads = []
        for number, (who, column) in enumerate(zip(reading.scene.figures, reading.heads, strict=True)):
            window = slice(row - ABOVE, row + TALL), slice(column - 1, column + HEAD + 1)
            seen = pixels[window][:, ::-1] if number else pixels[window]
            if _is_head(seen, who, reading.scene, behind[window][:, ::-1] if number else behind[window]):
                heads.append(_head(who, seen, column, row, len(picture) // SIZE))
        return heads, None

    def id_embed(self, picture: np.ndarray, face: Head) -> Tensor:
        """The identity vector [512] with norm 1 of a head that `find` returned."""
        return identity(face.who, face.pixels)


def landmarks(row: int, column: int, block: int) -> np.ndarray:
    """Landmarks [5, 2] of a head with this top left corner in large pixels, which are `block` pixels wide.

    They put a square that holds head, ears and hat on the aligned crop.
    """
    corner = np.array([column + (HEAD - SQUARE) / 2, row + TALL + 1.5 - SQUARE])
    return ((corner + ARCFACE / ARCFACE_SIDE * SQUARE) * block - 0.5).astype(np.float32)


def _head(who: Figure, seen: np.ndarray, column: int, row: int, block: int) -> Head:
    """A head in an image whose large pixels are `block` wide."""
    box = np.array([column, row, column + HEAD, row + TALL], np.float32) * block
    return Head(box, landmarks(row, column, block), who, seen)


def _is_head(seen: np.ndarray, who: Figure, scene: Scene, behind: np.ndarray) -> bool:
    """Whether pixels [9, 10, 3] look like the drawing of a head, and not like the background, whose cost is [9, 10]."""
    drawn = drawing(who, scene)
    shown = drawn[..., 0] != EMPTY
    error = np.square(seen - drawn / 255).sum(-1).clip(max=CLIP)[shown].mean()
    return bool(error <= min(MAX_ERROR, MAX_SHARE * behind[shown].mean()))


def drawing(who: Figure, scene: Scene) -> np.ndarray:
    """A head facing right as drawn in a scene, with its outline: int16 [9, 10, 3], else EMPTY."""
    row, at = head_row(scene.action), (SIZE - HEAD) // 2
    empty = np.full((SIZE, SIZE, 3), EMPTY, np.int16)
    picture = compose(empty, Scene(scene.place, scene.action, scene.prop, (who,)), [at])
    return picture[row - ABOVE : row + TALL, at - 1 : at + HEAD + 1]


def identity(who: Figure, pixels: np.ndarray) -> Tensor:
    """The identity vector [512], norm 1, of a head's pixels [9, 10, 3] in 0..1.

    who: decides which pixels belong to the head, and which of them have the same colour.
    """
    middle, even = _population()
    narrow = (_features(who, pixels) - middle) @ even
    return unit_identity(basis(*IDENTITY).double() @ narrow)


@cache
def _paint(species: str, fur: str, hat: str) -> np.ndarray:
    """The colours [9, 10, 3] of a head that no action and no prop changes, else EMPTY."""
    row, at = head_row(ACTIONS[0]), (SIZE - HEAD) // 2
    body, _ = figure(Figure(species, fur, "red", "red", hat), ACTIONS[0], PROPS[0], at, SIZE)
    paint = body[row - ABOVE : row + TALL, at - 1 : at + HEAD + 1].copy()
    paint[:, -1] = EMPTY  # a balloon covers a part of it
    for y, x in EYES:
        paint[ABOVE + y, 1 + x] = EMPTY
    return paint


@cache
def _waves() -> tuple[Tensor, Tensor, Tensor]:
    """Frequencies [3, WAVES] and phases [WAVES] of the colours' features, and their projection to NARROW numbers."""
    generator = torch.Generator().manual_seed(SEED)
    frequencies = torch.randn(3, WAVES, generator=generator) / BANDWIDTH
    phases = 2 * torch.pi * torch.rand(WAVES, generator=generator)
    projection = torch.randn((ABOVE + TALL) * (HEAD + 2) * WAVES, NARROW, generator=generator)
    return frequencies.double(), phases.double(), projection.double()


def _features(who: Figure, pixels: np.ndarray) -> Tensor:
    """NARROW numbers from a head's colours at fixed places. Pixels of one paint have one colour: see PRIOR."""
    paint = _paint(who.species, who.fur, who.hat)
    shown = paint[..., 0] != EMPTY
    _, numbers = np.unique(paint[shown], axis=0, return_inverse=True)
    numbers = torch.from_numpy(numbers.reshape(-1))
    colours = torch.from_numpy(pixels[shown].astype(np.float64))
    sums = torch.zeros(int(numbers.max()) + 1, 3, dtype=torch.float64).index_add_(0, numbers, colours)
    drawn = torch.from_numpy(np.unique(paint[shown], axis=0) / 255)
    means = (sums + PRIOR * drawn) / (torch.bincount(numbers)[:, None] + PRIOR)
    frequencies, phases, projection = _waves()
    features = torch.zeros(*shown.shape, WAVES, dtype=torch.float64)
    features[torch.from_numpy(shown)] = torch.cos(means[numbers] @ frequencies + phases)
    return features.flatten() @ projection


@cache
def _population() -> tuple[Tensor, Tensor]:
    """Mean [NARROW] of the features of every head in the world, and the matrix that makes their spread more even."""
    rows = []
    for species, fur, hat in product(SPECIES, FURS, HATS):
        who = Figure(species, fur, "red", "red", hat)
        rows.append(_features(who, _paint(species, fur, hat) / 255))
    features = torch.stack(rows)
    middle = features.mean(0)
    spread, directions = torch.linalg.eigh((features - middle).T @ (features - middle) / len(rows))
    spread = spread.clamp(min=0.01 * spread.max())
    return middle, (directions * spread ** (-EVENNESS / 2)) @ directions.T
