"""Figures of the story world: species, clothes, actions and props as boxes of pixels."""

from __future__ import annotations

from functools import partial

import numpy as np

from .canvas import EMPTY, OUTLINE, WHITE, fill_box
from .scene import CLOTHES, FURS, SIZE, Figure

FOOT = 23
"""Row just below the shoes of a standing figure."""
HEAD = 8
"""Width of a head."""
SKIN = (250, 208, 170)


def figure(who: Figure, action: str, prop: str, at: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """A figure facing right: its body (without outline) and the effects around it, int16 [24, width, 3], else EMPTY.

    at: column of the left edge of the head, which is HEAD pixels wide.
    """
    body = np.full((SIZE, width, 3), EMPTY, np.int16)
    effects = body.copy()
    fur, shirt, trousers = FURS[who.fur], CLOTHES[who.shirt], CLOTHES[who.trousers]
    skin = SKIN if who.species == "girl" else fur
    box = partial(_shifted_box, body, at)
    head = head_row(action)
    torso, legs = head + 5, head + 10
    _tail(box, who.species, fur, torso)
    _legs(box, partial(_shifted_box, effects, at), action, trousers, legs)
    _arms(box, action, prop, shirt, skin, torso)
    box(1, torso, 7, torso + 5, shirt)
    asleep = action == "sleeping"
    _head(box, who, fur, head, asleep)
    _hat(box, who.hat, head)
    if asleep:
        _snore(partial(_shifted_box, effects, at), head)
    _prop(box, prop, head, torso)
    return body, effects


def head_row(action: str) -> int:
    """The top row of a figure's head, which is 5 pixels high, below its ears and hat."""
    return FOOT - 14 - {"jumping": 2, "sitting": -2, "sleeping": -2}.get(action, 0)


def _shifted_box(image, at, x0, y0, x1, y1, colour) -> None:
    fill_box(image, at + x0, y0, at + x1, y1, colour)


def _tail(box, species, fur, torso):
    if species == "fox":
        box(-2, torso + 2, 1, torso + 5, fur)
        box(-3, torso, -1, torso + 3, fur)
        box(-3, torso - 1, -1, torso + 1, WHITE)
    elif species == "cat":
        box(-2, torso + 3, 1, torso + 4, fur)
        box(-2, torso, -1, torso + 4, fur)
    elif species == "rabbit":
        box(-1, torso + 3, 1, torso + 5, WHITE)


def _legs(box, effect, action, trousers, legs):
    if action in ("sitting", "sleeping"):
        foot = 10 if action == "sleeping" else 8
        box(1, legs, foot + 1, legs + 2, trousers)
        box(foot, legs - 1, foot + 2, legs + 2, OUTLINE)
    elif action == "running":
        box(1, legs, 7, legs + 2, trousers)
        box(-1, legs + 1, 3, legs + 3, trousers)
        box(5, legs + 1, 9, legs + 3, trousers)
        box(-2, legs + 1, -1, legs + 4, OUTLINE)
        box(8, legs + 3, 10, legs + 4, OUTLINE)
        for y in (FOOT - 6, FOOT - 3):
            effect(-6, y, -3, y + 1, WHITE)
    elif action == "jumping":
        box(0, legs, 8, legs + 2, trousers)
        box(-1, legs + 1, 2, legs + 3, trousers)
        box(6, legs + 1, 9, legs + 3, trousers)
        box(-2, legs + 2, -1, legs + 4, OUTLINE)
        box(9, legs + 2, 10, legs + 4, OUTLINE)
        effect(0, FOOT, 8, FOOT + 1, (44, 38, 48))
    else:
        box(1, legs, 7, legs + 1, trousers)
        for x in (1, 4):
            box(x, legs, x + 3, legs + 3, trousers)
            box(x, legs + 3, x + 3, legs + 4, OUTLINE)
        box(3, legs + 2, 5, legs + 4, EMPTY)


def _arms(box, action, prop, shirt, skin, torso):
    if action in ("jumping", "waving"):
        box(-2, torso - 2, -1, torso + 2, shirt)
        box(-2, torso + 1, 1, torso + 2, shirt)
        box(-2, torso - 4, -1, torso - 2, skin)
        if action == "waving":
            box(-3, torso - 5, -1, torso - 3, skin)
    else:
        box(0, torso, 1, torso + 3, shirt)
        box(0, torso + 3, 1, torso + 4, skin)
    if prop in ("balloon", "umbrella") or (action == "jumping" and prop == "none"):
        box(7, torso + 1, 10, torso + 2, shirt)
        box(9, torso - 2, 10, torso + 2, shirt)
        box(9, torso - 4, 10, torso - 2, skin)
    else:
        box(7, torso, 8, torso + 3, shirt)
        box(7, torso + 3, 8, torso + 4, skin)


def _head(box, who, fur, head, asleep):
    box(0, head, 8, head + 5, fur)
    eye = WHITE if who.fur == "black" and who.species != "girl" else OUTLINE
    if who.species == "girl":
        box(1, head + 1, 8, head + 5, SKIN)
        box(-1, head, 1, head + 8, fur)
        box(7, head, 8, head + 2, fur)
    elif who.species == "robot":
        box(1, head + 1, 8, head + 4, (30, 40, 60))
        box(0, head - 2, 1, head, (120, 120, 130))
        box(0, head - 3, 1, head - 2, (255, 60, 60))
        eye = (80, 255, 250)
    top = head + 3 if asleep else head + 1 if who.species == "robot" else head + 2
    for x in (3, 6):
        box(x - asleep, top, x + 1, head + 4 - (who.species == "robot" and not asleep), eye)
    if who.species == "fox":
        _pointed_ears(box, fur, head, 2)
        box(0, head + 4, 8, head + 5, WHITE)
        box(7, head + 3, 8, head + 4, OUTLINE)
    elif who.species == "cat":
        _pointed_ears(box, fur, head, 1)
        box(5, head + 4, 6, head + 5, (255, 120, 150))
    elif who.species == "rabbit":
        for x, inner in ((0, 1), (6, 6)):
            box(x, head - 4, x + 2, head, fur)
            box(inner, head - 3, inner + 1, head, (255, 190, 200))
        box(4, head + 4, 6, head + 5, WHITE)
    elif who.species == "bear":
        for x in (-1, 6):
            box(x, head - 2, x + 3, head + 1, fur)
            box(x + 1, head - 1, x + 2, head, (200, 150, 120))
        box(3, head + 3, 8, head + 5, (224, 190, 150))
        box(5, head + 3, 7, head + 4, OUTLINE)


def _pointed_ears(box, fur, head, height):
    for x, tip in ((0, 0), (6, 7)):
        box(x, head - height, x + 2, head, fur)
        box(tip, head - height - 1, tip + 1, head - height, fur)


def _hat(box, hat, head):
    if hat == "cap":
        colour = (240, 90, 200)
        box(2, head - 2, 6, head, colour)
        box(2, head, 9, head + 1, colour)
        box(3, head - 1, 4, head, WHITE)
    elif hat == "crown":
        gold = (255, 204, 20)
        box(2, head - 1, 6, head + 1, gold)
        box(2, head - 2, 3, head - 1, gold)
        box(5, head - 2, 6, head - 1, gold)
        box(4, head, 5, head + 1, (60, 220, 255))
    elif hat == "top hat":
        box(2, head - 3, 6, head, (112, 64, 190))
        box(1, head, 7, head + 1, (112, 64, 190))
        box(2, head - 1, 6, head, (60, 200, 160))


def _snore(effect, head):
    for row, letter in enumerate(("#####", "...#.", "..#..", ".#...", "#####")):
        for column, dot in enumerate(letter):
            if dot == "#":
                effect(column - 6, head + row - 4, column - 5, head + row - 3, (230, 60, 200))


def _prop(box, prop, head, torso):
    if prop == "balloon":
        box(9, head - 1, 10, torso - 4, (90, 80, 80))
        box(8, head - 6, 12, head - 1, (255, 70, 110))
        box(9, head - 5, 10, head - 4, (255, 220, 230))
    elif prop == "umbrella":
        box(9, head - 4, 10, torso - 1, (90, 60, 40))
        box(1, head - 7, 12, head - 6, (40, 200, 190))
        box(-1, head - 6, 14, head - 4, (40, 200, 190))
        for x in (1, 5, 9):
            box(x, head - 6, x + 2, head - 4, WHITE)
    elif prop == "book":
        box(4, torso + 1, 10, torso + 4, (250, 244, 220))
        box(7, torso + 1, 8, torso + 4, (150, 60, 40))
    elif prop == "lantern":
        box(8, torso + 4, 11, torso + 8, (255, 214, 60))
        box(9, torso + 5, 10, torso + 7, (255, 255, 230))
        box(8, torso + 4, 11, torso + 5, (90, 60, 40))
