"""The content of a picture of the story world, as plain data."""

from __future__ import annotations

from dataclasses import dataclass

SIZE = 24
"""Width and height of a picture, in its own (large) pixels."""

Colour = tuple[int, int, int]

FURS: dict[str, Colour] = {
    "red": (232, 112, 40),
    "brown": (146, 84, 42),
    "grey": (146, 150, 160),
    "white": (240, 236, 226),
    "black": (52, 48, 58),
    "pink": (248, 124, 178),
}
CLOTHES: dict[str, Colour] = {
    "red": (214, 40, 48),
    "yellow": (248, 212, 48),
    "green": (44, 160, 70),
    "blue": (40, 84, 214),
    "purple": (164, 50, 172),
    "white": (246, 246, 246),
}
SPECIES = ("cat", "fox", "rabbit", "bear", "robot", "girl")
HATS = ("none", "cap", "crown", "top hat")
ACTIONS = ("standing", "running", "jumping", "sitting", "waving", "sleeping")
PROPS = ("none", "balloon", "umbrella", "book", "lantern")
PLACES = ("meadow", "snow", "beach", "city", "forest", "desert", "cave", "bedroom", "train")

LOOKS: dict[str, tuple[str, ...]] = {
    "fur": tuple(FURS),
    "shirt": tuple(CLOTHES),
    "trousers": tuple(CLOTHES),
    "hat": HATS,
}
"""Attributes of a character that a caption may leave open, with their values."""

TOGETHER = ("standing", "jumping", "sitting", "waving")
"""Actions that a picture of two characters can show; such a picture has no props."""


@dataclass(frozen=True)
class Figure:
    """One character as drawn: `species` from SPECIES, the other values from LOOKS."""

    species: str
    fur: str
    shirt: str
    trousers: str
    hat: str


@dataclass(frozen=True)
class Scene:
    """One picture. figures: one or two, left to right, with the same action. Two figures have no prop."""

    place: str
    action: str
    prop: str
    figures: tuple[Figure, ...]
