"""Reads a scene back from its picture by comparing it with drawings of every scene; no part of it is trained.

Every combination of figures in all poses, colours of their looks and a place is compared with the picture; the scene
with the smallest error is returned.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import product

import numpy as np

from .backgrounds import background
from .canvas import EMPTY
from .draw import HALF, SHIFTS, compose
from .figures import HEAD
from .scene import ACTIONS, CLOTHES, FURS, LOOKS, PLACES, PROPS, SIZE, SPECIES, TOGETHER, Figure, Scene

CLIP = 0.2
"""Upper limit of one pixel's squared colour distance (sum over red, green and blue in 0..1)."""
SURPRISE = 0.0128
"""Squared distance added to a background pixel per nat of its colour's rarity: 2 x (noise of 0.08) squared."""
DRAWINGS = 160
"""Drawings of a place from which the frequency of each colour at each pixel is counted."""
MARKED = Figure("cat", "pink", "purple", "green", "none")
"""A figure whose looks have colours that no other part of a figure has."""
DARK = "black"
"""The fur on which details are drawn in different colours than on the others."""

VALUES: dict[str, tuple] = {
    "place": PLACES,
    "action": ACTIONS,
    "prop": PROPS,
    "figures": (1, 2),
    "species": SPECIES,
    **LOOKS,
}


@dataclass(frozen=True)
class Reading:
    """The scene of a picture and its error.

    error: mean over the pixels of the squared colour distance (sum over three channels in 0..1), each at most CLIP.
    heads: column of the left edge of each figure's head, in the picture's own (large) pixels.
    """

    scene: Scene
    error: float
    heads: tuple[int, ...]


@dataclass(frozen=True)
class Poses:
    """The T possible poses of a figure in some columns of the picture, each in M positions.

    keys: (action, prop, species, hat) of each pose, ordered by action. moves: columns to the right, one per position.
    masks: "covered" and the looks with colours -> float32 [T, P], the pixels that show the figure and that look.
    fixed: for fur other than DARK and for DARK, (flat indices into distances [C, P], start of each pose in them).
    """

    columns: slice
    keys: list[tuple[str, str, str, str]]
    moves: tuple[int, ...]
    masks: dict[str, np.ndarray]
    fixed: tuple[tuple[np.ndarray, np.ndarray], ...]


@dataclass(frozen=True)
class Tables:
    """The drawings that a Reader compares pictures with.

    colours: float32 [C, 3]; looks: look -> [values] indices into colours; places: per place, its K indices into colours
    and their cost [K, 24 * 24] in squared distance; one, left, right: poses of a single figure and of each half of a
    picture of two.
    """

    colours: np.ndarray
    looks: dict[str, np.ndarray]
    places: list[tuple[np.ndarray, np.ndarray]]
    one: Poses
    left: Poses
    right: Poses


def _codes(pictures: np.ndarray) -> np.ndarray:
    """Each colour of a signed picture [..., 3] as one number, negative for EMPTY pixels."""
    red, green, blue = np.moveaxis(pictures.astype(np.int32), -1, 0)
    return (red << 16) + (green << 8) + blue


def _draw(actions: Iterable[str], props: Iterable[str], shifts: Iterable[int], count: int) -> tuple[list, np.ndarray]:
    """(action, prop, species, hat) of T poses, ordered by action, and codes [2, T, 24, 24] in MARKED and DARK fur."""
    empty = np.full((SIZE, SIZE, 3), EMPTY, np.int16)
    keys, drawn = [], ([], [])
    for action, prop, species, hat, at in product(actions, props, SPECIES, LOOKS["hat"], shifts):
        keys.append((action, prop, species, hat))
        for fur, pictures in zip((MARKED.fur, DARK), drawn, strict=True):
            who = Figure(species, fur, MARKED.shirt, MARKED.trousers, hat)
            pictures.append(compose(empty, Scene(PLACES[0], action, prop, (who,) * count), [at] * count))
    return keys, np.stack([_codes(np.stack(pictures)) for pictures in drawn])


def _poses(columns: slice, keys: list, moves: tuple[int, ...], drawn: np.ndarray, colours: np.ndarray) -> Poses:
    """Poses from some columns of codes [2, T, 24, 24]; colours: sorted codes [C]."""
    marked, dark = drawn[..., columns].reshape(2, len(keys), -1)
    covered = marked >= 0
    looks = {
        "fur": marked == _codes(np.array(FURS[MARKED.fur])),
        "shirt": marked == _codes(np.array(CLOTHES[MARKED.shirt])),
        "trousers": marked == _codes(np.array(CLOTHES[MARKED.trousers])),
    }
    same = covered & ~(looks["fur"] | looks["shirt"] | looks["trousers"])
    pose, pixel = np.nonzero(same)
    begins = np.searchsorted(pose, np.arange(len(keys)))
    fixed = tuple(
        (np.searchsorted(colours, codes[pose, pixel]) * codes.shape[1] + pixel, begins) for codes in (marked, dark)
    )
    masks = {name: mask.astype(np.float32) for name, mask in {"covered": covered, **looks}.items()}
    return Poses(columns, keys, moves, masks, fixed)


@cache
def tables() -> Tables:
    """The tables, drawn once in less than a second.

    A single figure is drawn in the middle, where the borders clip no part of it, and moved.
    """
    middle = SHIFTS[1][len(SHIFTS[1]) // 2]
    keys, drawn = _draw(ACTIONS, PROPS, [middle], 1)
    keys_of_two, drawn_of_two = _draw(TOGETHER, PROPS[:1], SHIFTS[2], 2)
    random = np.random.default_rng(0)
    scenery = [
        _codes(np.stack([background(place, random) for _ in range(DRAWINGS)])).reshape(DRAWINGS, -1) for place in PLACES
    ]
    palettes = {
        "fur": _codes(np.array(list(FURS.values()))),
        "shirt": _codes(np.array(list(CLOTHES.values()))),
        "trousers": _codes(np.array(list(CLOTHES.values()))),
    }
    everything = [drawn, drawn_of_two, *scenery, *palettes.values()]
    colours = np.unique(np.concatenate([np.unique(codes) for codes in everything]))
    colours = colours[colours >= 0]
    places = []
    for codes in scenery:
        values = np.unique(codes)
        frequency = np.stack([(codes == code).mean(0) for code in values])
        frequency = (DRAWINGS * frequency + frequency.mean(1, keepdims=True)) / (DRAWINGS + 1)
        places.append((np.searchsorted(colours, values), (-SURPRISE * np.log(frequency)).astype(np.float32)))
    return Tables(
        (np.stack([colours >> 16, colours >> 8 & 255, colours & 255], -1) / 255).astype(np.float32),
        {look: np.searchsorted(colours, codes) for look, codes in palettes.items()},
        places,
        _poses(slice(0, SIZE), keys, tuple(at - middle for at in SHIFTS[1]), drawn, colours),
        _poses(slice(0, HALF), keys_of_two, (0,), drawn_of_two, colours),
        _poses(slice(HALF, SIZE), keys_of_two, (0,), drawn_of_two, colours),
    )


def background_cost(pixels: np.ndarray, place: str) -> np.ndarray:
    """How badly a place without figures explains each pixel of a picture [24, 24, 3]: squared distances [24, 24].

    The rarity of the best colour is included; see SURPRISE.
    """
    rows, surprise = tables().places[PLACES.index(place)]
    distances = np.square(pixels - tables().colours[rows, None, None]).sum(-1).clip(max=CLIP)
    return (distances + surprise.reshape(distances.shape)).min(0)


class Reader:
    """Reads pictures. All readers share one set of tables."""

    def __init__(self) -> None:
        self._tables = tables()

    def read(self, picture: np.ndarray) -> Reading:
        """The scene of a picture: floats in 0..1 [S, S, 3], S a multiple of 24. Raises ValueError for any other."""
        table = self._tables
        pixels = small(picture)
        distances = np.square(pixels - table.colours[:, None, None]).sum(-1).clip(max=CLIP)
        costs, errors = [], []
        for rows, surprise in table.places:
            near = distances[rows].reshape(len(rows), -1)
            cost = near + surprise
            best = cost.argmin(0)[None]
            costs.append(np.take_along_axis(cost, best, 0)[0])
            errors.append(np.take_along_axis(near, best, 0)[0])
        scenery = np.stack(costs).reshape(len(PLACES), SIZE, SIZE)
        bare = np.stack(errors).reshape(len(PLACES), SIZE, SIZE)

        one, left, right = (_Fit(poses, table, distances, scenery) for poses in (table.one, table.left, table.right))
        sides = [side.totals.reshape(len(TOGETHER), -1, len(PLACES)) for side in (left, right)]
        both = sides[0].min(1) + sides[1].min(1)
        if one.totals.min() <= both.min():
            pose, place = np.unravel_index(one.totals.argmin(), one.totals.shape)
            chosen = [(one, int(pose))]
        else:
            action, place = np.unravel_index(both.argmin(), both.shape)
            chosen = [
                (side, int(action) * totals.shape[1] + int(totals[action, :, place].argmin()))
                for side, totals in zip((left, right), sides, strict=True)
            ]
        part, pose = chosen[0]
        action, prop, _, _ = part.key(pose)
        scene = Scene(PLACES[place], action, prop, tuple(part.figure(pose) for part, pose in chosen))
        error = max(0.0, sum(part.error(pose, bare[place]) for part, pose in chosen) / SIZE**2)
        return Reading(scene, error, tuple(part.head(pose) for part, pose in chosen))

    def read_all(self, pictures: Iterable[np.ndarray]) -> list[Reading]:
        """Readings of pictures [N, S, S, 3]."""
        return [self.read(picture) for picture in pictures]


class _Fit:
    """How well each pose in each position, with the best colours of its looks, fits some columns of one picture.

    totals: cost [T * M, places]. Instead of moving the figure to the right, the picture is moved to the left.
    """

    def __init__(self, poses: Poses, table: Tables, distances: np.ndarray, scenery: np.ndarray) -> None:
        near = _moved(distances[..., poses.columns], poses.moves)
        self._poses = poses
        self._looks = {look: _sums(poses.masks[look], near[:, rows]) for look, rows in table.looks.items()}
        fixed = [np.add.reduceat(near.reshape(len(near), -1)[:, flat], begins, 1) for flat, begins in poses.fixed]
        for index, fur in enumerate(FURS):
            self._looks["fur"][:, index] += fixed[fur == DARK].T.ravel()
        self._body = sum(costs.min(1) for costs in self._looks.values())
        self.totals = self._body[:, None] + self._behind(scenery)

    def _behind(self, costs: np.ndarray) -> np.ndarray:
        """Sums [T * M, V] of costs [V, 24, 24] over the pixels that a pose does not cover."""
        costs = costs[..., self._poses.columns]
        return costs.sum((1, 2)) - _sums(self._poses.masks["covered"], _moved(costs, self._poses.moves))

    def key(self, pose: int) -> tuple[str, str, str, str]:
        return self._poses.keys[pose // len(self._poses.moves)]

    def figure(self, pose: int) -> Figure:
        _, _, species, hat = self.key(pose)
        colours = {look: LOOKS[look][int(costs[pose].argmin())] for look, costs in self._looks.items()}
        return Figure(species, **colours, hat=hat)

    def head(self, pose: int) -> int:
        """Column of the left edge of the head. The right one of two figures is mirrored."""
        if self._poses.columns.start:
            return SIZE - SHIFTS[2][0] - HEAD
        return SHIFTS[2][0] if self._poses.columns.stop == HALF else SHIFTS[1][pose % len(self._poses.moves)]

    def error(self, pose: int, bare: np.ndarray) -> float:
        """Remaining squared distance. bare: that of the place alone [24, 24]."""
        return float(self._body[pose] + self._behind(bare[None])[pose, 0])


def _moved(costs: np.ndarray, moves: tuple[int, ...]) -> np.ndarray:
    """Costs [V, 24, W] moved to the left by each number of columns, filled with 0: [M, V, 24 * W]."""
    width = costs.shape[-1]
    moved = np.zeros((len(moves), *costs.shape), np.float32)
    for to, by in zip(moved, moves, strict=True):
        to[..., max(0, -by) : width - max(0, by)] = costs[..., max(0, by) : width - max(0, -by)]
    return moved.reshape(*moved.shape[:2], -1)


def _sums(masks: np.ndarray, costs: np.ndarray) -> np.ndarray:
    """Sums [T * M, V] of costs [M, V, P] over masks [T, P]."""
    moves, values, pixels = costs.shape
    return (masks @ costs.reshape(-1, pixels).T).reshape(-1, values)


def small(picture: np.ndarray) -> np.ndarray:
    """The picture reduced to float32 [24, 24, 3] by block means. Raises ValueError for a wrong shape or type."""
    picture = np.asarray(picture)
    shape = picture.shape
    if len(shape) != 3 or shape[0] != shape[1] or shape[0] == 0 or shape[0] % SIZE or shape[2] != 3:
        raise ValueError(f"The reader expects a square image [S, S, 3] with S a multiple of {SIZE}, got {list(shape)}.")
    if not np.issubdtype(picture.dtype, np.floating):
        raise ValueError(f"The reader expects colours as floats from 0 to 1, got {picture.dtype}; divide by 255.")
    block = shape[0] // SIZE
    small = picture.reshape(SIZE, block, SIZE, block, 3).mean((1, 3)).astype(np.float32)
    if not np.isfinite(small).all():
        raise ValueError("The reader expects colours from 0 to 1, but some are not finite.")
    return small


def confusion(pairs: Iterable[tuple[Scene, Scene]]) -> dict[str, tuple[tuple, np.ndarray]]:
    """How often each value of an attribute was read as each other: attribute -> (labels, counts [true, read]).

    pairs: true and read scenes. Attributes of figures count if both scenes have equally many, from left to right.
    """
    counts: dict[str, tuple[tuple, np.ndarray]] = {
        attribute: (labels, np.zeros((len(labels), len(labels)), np.int64)) for attribute, labels in VALUES.items()
    }

    def count(attribute: str, true, read) -> None:
        labels, matrix = counts[attribute]
        matrix[labels.index(true), labels.index(read)] += 1

    for true, read in pairs:
        for attribute in ("place", "action", "prop"):
            count(attribute, getattr(true, attribute), getattr(read, attribute))
        count("figures", len(true.figures), len(read.figures))
        if len(true.figures) == len(read.figures):
            for one, other in zip(true.figures, read.figures, strict=True):
                for attribute in ("species", *LOOKS):
                    count(attribute, getattr(one, attribute), getattr(other, attribute))
    return counts


def accuracy(counts: Mapping[str, tuple[tuple, np.ndarray]]) -> dict[str, float]:
    """The share of each attribute's counts that is on the diagonal of `confusion`; nan without counts."""
    return {
        attribute: float(matrix.trace() / matrix.sum()) if matrix.sum() else float("nan")
        for attribute, (_, matrix) in counts.items()
    }
