"""The places of the story world, drawn without figures; their details are random."""

from __future__ import annotations

import numpy as np

from .canvas import WHITE, fill_box
from .scene import SIZE

GROUND = 16
"""Row where the ground of most places begins."""


def background(place: str, random: np.random.Generator) -> np.ndarray:
    """A place without figures, uint8 [24, 24, 3]."""
    image = np.zeros((SIZE, SIZE, 3), np.uint8)
    PAINTERS[place](image, random)
    return image


def _meadow(image, random):
    image[:GROUND] = (132, 206, 250)
    image[GROUND:] = (104, 192, 76)
    fill_box(image, *_sun_box(random), (255, 236, 90))
    for _ in range(7):
        flower = ((255, 120, 160), (255, 240, 120), WHITE)[random.integers(3)]
        image[random.integers(GROUND + 1, SIZE), random.integers(SIZE)] = flower


def _snow(image, random):
    image[:GROUND] = (176, 198, 220)
    image[GROUND:] = (244, 248, 255)
    x = random.choice((1, 18))
    for k in range(5):
        fill_box(
            image, x + 2 - (k + 1) // 2, GROUND - 10 + 2 * k, x + 3 + (k + 1) // 2, GROUND - 8 + 2 * k, (36, 96, 84)
        )
    image[random.integers(0, GROUND, 12), random.integers(0, SIZE, 12)] = (255, 255, 255)


def _beach(image, random):
    image[:] = (120, 220, 250)
    image[GROUND - 5 : GROUND] = (24, 120, 200)
    image[GROUND:] = (246, 222, 150)
    for _ in range(3):
        x, y = random.integers(SIZE - 3), random.integers(GROUND - 4, GROUND - 1)
        fill_box(image, x, y, x + 3, y + 1, (190, 230, 250))
    x = random.choice((1, 18))
    leaf = (40, 150, 60)
    fill_box(image, x + 2, GROUND - 9, x + 3, GROUND + 2, (140, 92, 48))
    fill_box(image, x, GROUND - 11, x + 5, GROUND - 9, leaf)
    fill_box(image, x - 1, GROUND - 10, x + 1, GROUND - 8, leaf)
    fill_box(image, x + 4, GROUND - 10, x + 6, GROUND - 8, leaf)


def _city(image, random):
    image[:] = (22, 24, 60)
    image[GROUND + 2 :] = (74, 74, 86)
    x = -int(random.integers(3))
    while x < SIZE:
        width, height = random.integers(4, 7), random.integers(5, 12)
        fill_box(image, x, GROUND + 2 - height, x + width, GROUND + 2, ((58, 52, 96), (44, 44, 78))[random.integers(2)])
        for y in range(GROUND + 3 - height, GROUND + 1, 2):
            for column in range(max(0, x + 1), min(SIZE, x + width - 1), 2):
                if random.random() < 0.7:
                    image[y, column] = (255, 220, 90)
        x += width + 1
    x = random.choice((2, 18))
    fill_box(image, x, 1, x + 3, 4, (250, 246, 210))


def _forest(image, random):
    image[:] = (46, 96, 66)
    image[GROUND:] = (72, 66, 38)
    x = int(random.integers(3))
    while x < SIZE:
        fill_box(image, x, 0, x + 2, GROUND + 1, (84, 54, 34))
        x += random.integers(4, 7)
    image[:3] = (24, 70, 40)
    image[random.integers(3, 5, 10), random.integers(0, SIZE, 10)] = (24, 70, 40)


def _desert(image, random):
    image[:] = (252, 178, 96)
    image[GROUND:] = (226, 156, 80)
    x = random.choice((2, 17))
    fill_box(image, 18 - x, 1, 22 - x, 5, (255, 240, 190))
    cactus = (40, 120, 64)
    fill_box(image, x + 1, GROUND - 8, x + 3, GROUND + 1, cactus)
    fill_box(image, x - 1, GROUND - 5, x + 1, GROUND - 4, cactus)
    fill_box(image, x - 1, GROUND - 7, x, GROUND - 4, cactus)
    fill_box(image, x + 3, GROUND - 4, x + 5, GROUND - 3, cactus)
    fill_box(image, x + 4, GROUND - 6, x + 5, GROUND - 3, cactus)


def _cave(image, random):
    image[:] = (62, 54, 74)
    image[GROUND + 1 :] = (40, 34, 50)
    for x in range(0, SIZE, 4):
        left, height = x + random.integers(2), random.integers(2, 6)
        fill_box(image, left, 0, left + 3, height - 1, (36, 30, 44))
        fill_box(image, left + 1, height - 1, left + 2, height + 1, (36, 30, 44))
    x = random.choice((1, 18))
    for crystal in (x, x + 3):
        fill_box(image, crystal, GROUND - 3 - random.integers(2), crystal + 2, GROUND + 1, (70, 230, 220))
        image[GROUND - 2, crystal] = (210, 255, 250)


def _bedroom(image, random):
    image[:] = (236, 196, 186)
    image[GROUND + 1 :] = (160, 104, 64)
    left = random.random() < 0.5
    window, bed = (16, 0) if left else (2, 15)
    fill_box(image, window, 2, window + 6, 9, WHITE)
    fill_box(image, window + 1, 3, window + 5, 8, (120, 180, 240))
    fill_box(image, window + 3, 3, window + 4, 8, WHITE)
    fill_box(image, bed, GROUND - 1, bed + 9, GROUND + 3, (90, 110, 200))
    pillow = bed if left else bed + 6
    fill_box(image, pillow, GROUND - 2, pillow + 3, GROUND, (255, 255, 255))


def _train(image, random):
    image[:] = (206, 214, 178)
    image[12:GROUND] = (150, 86, 62)
    image[GROUND:] = (96, 88, 92)
    for x in range(-int(random.integers(6)), SIZE, 9):
        fill_box(image, x, 3, x + 7, 9, (92, 92, 100))
        fill_box(image, x + 1, 4, x + 6, 8, (156, 216, 240))
        fill_box(image, x + 1, 7, x + 6, 8, (116, 180, 92))
    image[GROUND + 2, :: int(random.integers(2, 4))] = (120, 112, 116)


def _sun_box(random) -> tuple[int, int, int, int]:
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
