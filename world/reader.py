"""Reads a scene back from its picture by drawing every scene and comparing: nothing here is trained.

A picture is explained by figures in every pose, the colours of their looks and the drawings of a place; the scene that
leaves the smallest error is what the picture shows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import product

import numpy as np

from .draw import HALF, NOTHING, SHIFTS, background, compose
from .scene import ACTIONS, CLOTHES, FURS, LOOKS, PLACES, PROPS, SIZE, SPECIES, TOGETHER, Figure, Scene

CLIP = 0.2
"""Largest squared colour distance (sum over red, green and blue in 0..1) that one pixel can count."""
SURPRISE = 0.0128
"""Squared distance that a pixel of a place costs per nat of how rarely it is drawn so: 2 x (noise of 0.08) squared."""
DRAWINGS = 160
"""Drawings of a place that tell how often each of its pixels has which colour."""
MARKED = Figure("cat", "pink", "purple", "green", "none")
"""Its looks have colours that nothing else on a figure has."""
DARK = "black"
"""The fur on which details are drawn in other colours than on the rest."""

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
    """What a picture shows, and how badly that explains it.

    error: mean over the pixels of the squared colour distance (sum over three channels in 0..1), each at most CLIP.
    """

    scene: Scene
    error: float


@dataclass(frozen=True)
class Poses:
    """Every pose in which a figure can stand in some columns of the picture, T of them, each moved in M ways.

    keys: (action, prop, species, hat) of each pose, ordered by action. moves: columns to the right.
    masks: "covered" and the looks with colours -> float32 [T, P], the pixels that show the figure and that look.
    fixed: for fur that is not DARK and for fur that is, (flat indices into distances [C, P], where each pose begins).
    """

    columns: slice
    keys: list[tuple[str, str, str, str]]
    moves: tuple[int, ...]
    masks: dict[str, np.ndarray]
    fixed: tuple[tuple[np.ndarray, np.ndarray], ...]


@dataclass(frozen=True)
class Tables:
    """What a Reader compares pictures with.

    colours: float32 [C, 3]; looks: look -> [values] rows of colours; places: per place, its K rows of colours and
    their cost [K, 24 * 24] in squared distance; one, left, right: a single figure and the halves of a picture of two.
    """

    colours: np.ndarray
    looks: dict[str, np.ndarray]
    places: list[tuple[np.ndarray, np.ndarray]]
    one: Poses
    left: Poses
    right: Poses


def _codes(pictures: np.ndarray) -> np.ndarray:
    """Each colour of a signed picture [..., 3] as one number, negative where nothing is drawn."""
    red, green, blue = np.moveaxis(pictures.astype(np.int32), -1, 0)
    return (red << 16) + (green << 8) + blue


def _draw(actions: Iterable[str], props: Iterable[str], shifts: Iterable[int], count: int) -> tuple[list, np.ndarray]:
    """(action, prop, species, hat) of T poses, ordered by action, and their codes [2, T, 24, 24], MARKED and DARK."""
    empty = np.full((SIZE, SIZE, 3), NOTHING, np.int16)
    keys, drawn = [], ([], [])
    for action, prop, species, hat, at in product(actions, props, SPECIES, LOOKS["hat"], shifts):
        keys.append((action, prop, species, hat))
        for fur, pictures in zip((MARKED.fur, DARK), drawn, strict=True):
            who = Figure(species, fur, MARKED.shirt, MARKED.trousers, hat)
            pictures.append(compose(empty, Scene(PLACES[0], action, prop, (who,) * count), [at] * count))
    return keys, np.stack([_codes(np.stack(pictures)) for pictures in drawn])


def _poses(columns: slice, keys: list, moves: tuple[int, ...], drawn: np.ndarray, colours: np.ndarray) -> Poses:
    """Poses from codes [2, T, 24, 24], of which only some columns count; colours: sorted codes [C]."""
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
    """Draw everything once; takes less than a second.

    A single figure is drawn in the middle, where the borders cut nothing, and moved.
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
        seen = np.unique(codes)
        often = np.stack([(codes == code).mean(0) for code in seen])
        often = (DRAWINGS * often + often.mean(1, keepdims=True)) / (DRAWINGS + 1)
        places.append((np.searchsorted(colours, seen), (-SURPRISE * np.log(often)).astype(np.float32)))
    return Tables(
        (np.stack([colours >> 16, colours >> 8 & 255, colours & 255], -1) / 255).astype(np.float32),
        {look: np.searchsorted(colours, codes) for look, codes in palettes.items()},
        places,
        _poses(slice(0, SIZE), keys, tuple(at - middle for at in SHIFTS[1]), drawn, colours),
        _poses(slice(0, HALF), keys_of_two, (0,), drawn_of_two, colours),
        _poses(slice(HALF, SIZE), keys_of_two, (0,), drawn_of_two, colours),
    )


class Reader:
    """Reads pictures. The tables are built by the first one and shared."""

    def __init__(self) -> None:
        self._tables = tables()

    def read(self, picture: np.ndarray) -> Reading:
        """The scene of a picture, floats in 0..1 [S, S, 3] where S is a multiple of 24; ValueError for any other."""
        table = self._tables
        pixels = _small(picture)
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

        one, left, right = (
            _Explained(poses, table, distances, scenery) for poses in (table.one, table.left, table.right)
        )
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
        return Reading(scene, max(0.0, sum(part.error(pose, bare[place]) for part, pose in chosen) / SIZE**2))

    def read_all(self, pictures: Iterable[np.ndarray]) -> list[Reading]:
        """Readings of pictures [N, S, S, 3]."""
        return [self.read(picture) for picture in pictures]


class _Explained:
    """How well each pose, moved in each way, and each colour of a look explain some columns of one picture.

    totals: cost [T * M, places]. Moving a figure to the right is done by moving the picture to the left.
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
        """Sums of costs [V, 24, 24] over the pixels that a pose leaves free [T * M, V]."""
        costs = costs[..., self._poses.columns]
        return costs.sum((1, 2)) - _sums(self._poses.masks["covered"], _moved(costs, self._poses.moves))

    def key(self, pose: int) -> tuple[str, str, str, str]:
        return self._poses.keys[pose // len(self._poses.moves)]

    def figure(self, pose: int) -> Figure:
        _, _, species, hat = self.key(pose)
        colours = {look: LOOKS[look][int(costs[pose].argmin())] for look, costs in self._looks.items()}
        return Figure(species, **colours, hat=hat)

    def error(self, pose: int, bare: np.ndarray) -> float:
        """Squared distance that is left; bare: that of the place alone [24, 24]."""
        return float(self._body[pose] + self._behind(bare[None])[pose, 0])


def _moved(costs: np.ndarray, moves: tuple[int, ...]) -> np.ndarray:
    """Costs [V, 24, W] moved by columns to the left, 0 where nothing was: [M, V, 24 * W]."""
    width = costs.shape[-1]
    moved = np.zeros((len(moves), *costs.shape), np.float32)
    for to, by in zip(moved, moves, strict=True):
        to[..., max(0, -by) : width - max(0, by)] = costs[..., max(0, by) : width - max(0, -by)]
    return moved.reshape(*moved.shape[:2], -1)


def _sums(masks: np.ndarray, costs: np.ndarray) -> np.ndarray:
    """Sums of costs [M, V, P] over masks [T, P]: [T * M, V]."""
    moves, values, pixels = costs.shape
    return (masks @ costs.reshape(-1, pixels).T).reshape(-1, values)


def _small(picture: np.ndarray) -> np.ndarray:
    """Means of blocks, float32 [24, 24, 3]."""
    picture = np.asarray(picture)
    shape = picture.shape
    if len(shape) != 3 or shape[0] != shape[1] or shape[0] == 0 or shape[0] % SIZE or shape[2] != 3:
        raise ValueError(f"The reader needs a square picture [S, S, 3] with S a multiple of {SIZE}, got {list(shape)}.")
    if not np.issubdtype(picture.dtype, np.floating):
        raise ValueError(f"The reader needs colours as floats from 0 to 1, got {picture.dtype}: divide by 255.")
    block = shape[0] // SIZE
    small = picture.reshape(SIZE, block, SIZE, block, 3).mean((1, 3)).astype(np.float32)
    if not np.isfinite(small).all():
        raise ValueError("The reader needs colours from 0 to 1, got some that are not finite.")
    return small


def confusion(pairs: Iterable[tuple[Scene, Scene]]) -> dict[str, tuple[tuple, np.ndarray]]:
    """How often each value of an attribute was read as which: attribute -> (labels, counts [true, read]).

    pairs: true and read scenes. Attributes of figures count where both scenes have as many, from left to right.
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
    """The share of each attribute that `confusion` counted on the diagonal; nan where it counted nothing."""
    return {
        attribute: float(matrix.trace() / matrix.sum()) if matrix.sum() else float("nan")
        for attribute, (_, matrix) in counts.items()
    }
