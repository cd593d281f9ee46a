"""Draws a scene as 24x24 pixel art.

What the attributes say is always drawn alike; where a figure stands and the details of the background are random.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from .scene import CLOTHES, FURS, SIZE, Figure, Scene

GROUND = 16
"""Row where the ground of most places begins."""
FOOT = 23
HALF = SIZE // 2
SHIFTS = {1: range(5, 12), 2: range(3, 4)}
"""Where the left edge of a head may be, in a picture of one figure and in each half of a picture of two."""

OUTLINE = (26, 20, 30)
SKIN = (250, 208, 170)
WHITE = (250, 250, 250)
NOTHING = -1


def draw(scene: Scene, random: np.random.Generator) -> np.ndarray:
    """The picture as uint8 [24, 24, 3]."""
    shifts = [int(random.choice(SHIFTS[len(scene.figures)])) for _ in scene.figures]
    return compose(background(scene.place, random), scene, shifts)


def compose(picture: np.ndarray, scene: Scene, shifts: list[int]) -> np.ndarray:
    """Put the figures of a scene, at given places, onto a copy of `picture` [24, 24, 3] of any signed type."""
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
    shown = effects[..., 0] != NOTHING
    picture[shown] = effects[shown]
    mask = body[..., 0] != NOTHING
    around = np.zeros_like(mask)
    around[1:] |= mask[:-1]
    around[:-1] |= mask[1:]
    around[:, 1:] |= mask[:, :-1]
    around[:, :-1] |= mask[:, 1:]
    picture[around & ~mask] = OUTLINE
    picture[mask] = body[mask]


def _box(image: np.ndarray, x0: int, y0: int, x1: int, y1: int, colour) -> None:
    """Fill columns x0 to x1 and rows y0 to y1 (ends excluded), cut at the borders."""
    if x1 > 0 and y1 > 0:
        image[max(0, y0) : y1, max(0, x0) : x1] = colour


def background(place: str, random: np.random.Generator) -> np.ndarray:
    """A place without anybody, uint8 [24, 24, 3]."""
    image = np.zeros((SIZE, SIZE, 3), np.uint8)
    PAINTERS[place](image, random)
    return image


def _meadow(image, random):
    image[:GROUND] = (132, 206, 250)
    image[GROUND:] = (104, 192, 76)
    _box(image, *_sun_at(random), (255, 236, 90))
    for _ in range(7):
        flower = ((255, 120, 160), (255, 240, 120), WHITE)[random.integers(3)]
        image[random.integers(GROUND + 1, SIZE), random.integers(SIZE)] = flower


def _snow(image, random):
    image[:GROUND] = (176, 198, 220)
    image[GROUND:] = (244, 248, 255)
    x = random.choice((1, 18))
    for k in range(5):
        _box(image, x + 2 - (k + 1) // 2, GROUND - 10 + 2 * k, x + 3 + (k + 1) // 2, GROUND - 8 + 2 * k, (36, 96, 84))
    image[random.integers(0, GROUND, 12), random.integers(0, SIZE, 12)] = (255, 255, 255)


def _beach(image, random):
    image[:] = (120, 220, 250)
    image[GROUND - 5 : GROUND] = (24, 120, 200)
    image[GROUND:] = (246, 222, 150)
    for _ in range(3):
        x, y = random.integers(SIZE - 3), random.integers(GROUND - 4, GROUND - 1)
        _box(image, x, y, x + 3, y + 1, (190, 230, 250))
    x = random.choice((1, 18))
    leaf = (40, 150, 60)
    _box(image, x + 2, GROUND - 9, x + 3, GROUND + 2, (140, 92, 48))
    _box(image, x, GROUND - 11, x + 5, GROUND - 9, leaf)
    _box(image, x - 1, GROUND - 10, x + 1, GROUND - 8, leaf)
    _box(image, x + 4, GROUND - 10, x + 6, GROUND - 8, leaf)


def _city(image, random):
    image[:] = (22, 24, 60)
    image[GROUND + 2 :] = (74, 74, 86)
    x = -int(random.integers(3))
    while x < SIZE:
        width, height = random.integers(4, 7), random.integers(5, 12)
        _box(image, x, GROUND + 2 - height, x + width, GROUND + 2, ((58, 52, 96), (44, 44, 78))[random.integers(2)])
        for y in range(GROUND + 3 - height, GROUND + 1, 2):
            for column in range(max(0, x + 1), min(SIZE, x + width - 1), 2):
                if random.random() < 0.7:
                    image[y, column] = (255, 220, 90)
        x += width + 1
    x = random.choice((2, 18))
    _box(image, x, 1, x + 3, 4, (250, 246, 210))


def _forest(image, random):
    image[:] = (46, 96, 66)
    image[GROUND:] = (72, 66, 38)
    x = int(random.integers(3))
    while x < SIZE:
        _box(image, x, 0, x + 2, GROUND + 1, (84, 54, 34))
        x += random.integers(4, 7)
    image[:3] = (24, 70, 40)
    image[random.integers(3, 5, 10), random.integers(0, SIZE, 10)] = (24, 70, 40)


def _desert(image, random):
    image[:] = (252, 178, 96)
    image[GROUND:] = (226, 156, 80)
    x = random.choice((2, 17))
    _box(image, 18 - x, 1, 22 - x, 5, (255, 240, 190))
    cactus = (40, 120, 64)
    _box(image, x + 1, GROUND - 8, x + 3, GROUND + 1, cactus)
    _box(image, x - 1, GROUND - 5, x + 1, GROUND - 4, cactus)
    _box(image, x - 1, GROUND - 7, x, GROUND - 4, cactus)
    _box(image, x + 3, GROUND - 4, x + 5, GROUND - 3, cactus)
    _box(image, x + 4, GROUND - 6, x + 5, GROUND - 3, cactus)


def _cave(image, random):
    image[:] = (62, 54, 74)
    image[GROUND + 1 :] = (40, 34, 50)
    for x in range(0, SIZE, 4):
        left, height = x + random.integers(2), random.integers(2, 6)
        _box(image, left, 0, left + 3, height - 1, (36, 30, 44))
        _box(image, left + 1, height - 1, left + 2, height + 1, (36, 30, 44))
    x = random.choice((1, 18))
    for crystal in (x, x + 3):
        _box(image, crystal, GROUND - 3 - random.integers(2), crystal + 2, GROUND + 1, (70, 230, 220))
        image[GROUND - 2, crystal] = (210, 255, 250)


def _bedroom(image, random):
    image[:] = (236, 196, 186)
    image[GROUND + 1 :] = (160, 104, 64)
    left = random.random() < 0.5
    window, bed = (16, 0) if left else (2, 15)
    _box(image, window, 2, window + 6, 9, WHITE)
    _box(image, window + 1, 3, window + 5, 8, (120, 180, 240))
    _box(image, window + 3, 3, window + 4, 8, WHITE)
    _box(image, bed, GROUND - 1, bed + 9, GROUND + 3, (90, 110, 200))
    pillow = bed if left else bed + 6
    _box(image, pillow, GROUND - 2, pillow + 3, GROUND, (255, 255, 255))


def _train(image, random):
    image[:] = (206, 214, 178)
    image[12:GROUND] = (150, 86, 62)
    image[GROUND:] = (96, 88, 92)
    for x in range(-int(random.integers(6)), SIZE, 9):
        _box(image, x, 3, x + 7, 9, (92, 92, 100))
        _box(image, x + 1, 4, x + 6, 8, (156, 216, 240))
        _box(image, x + 1, 7, x + 6, 8, (116, 180, 92))
    image[GROUND + 2, :: int(random.integers(2, 4))] = (120, 112, 116)


def _sun_at(random) -> tuple[int, int, int, int]:
    x = random.choice((1, 18))
    return x, 1, x + 4, 5


PAINTERS = {
    "meadow": _meadow,
    "snow": _snow,
    "beach": _beach,
    "city": _city,
    "forest": _forest,
    "desert": _desert,
    "cave": _cave,
    "bedroom": _bedroom,
    "train": _train,
}


def figure(who: Figure, action: str, prop: str, at: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """A figure that looks right: its body (to be outlined) and effects around it, int16 [24, width, 3], -1 empty.

    at: column of the left edge of the head, which is 8 wide.
    """
    body = np.full((SIZE, width, 3), NOTHING, np.int16)
    effects = body.copy()
    fur, shirt, trousers = FURS[who.fur], CLOTHES[who.shirt], CLOTHES[who.trousers]
    skin = SKIN if who.species == "girl" else fur
    box = partial(_shifted_box, body, at)
    rise = {"jumping": 2, "sitting": -2, "sleeping": -2}.get(action, 0)
    head = FOOT - 14 - rise
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


def _shifted_box(image, at, x0, y0, x1, y1, colour) -> None:
    _box(image, at + x0, y0, at + x1, y1, colour)


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
        box(3, legs + 2, 5, legs + 4, NOTHING)


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
