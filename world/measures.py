"""How well pictures of stories follow their text, and how alike they show a character where the text leaves it open.

Two pictures of unrelated stories agree now and then, and more often where a method draws everybody alike. What counts
is the gain: agreement within stories above that chance.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np

from .scene import LOOKS, Figure, Scene
from .stories import WorldStory
from .words import FigureTold

RATES = ("place", "action", "prop", "figures", "species", "looks")


@dataclass(frozen=True)
class StoryPictures:
    """What was told and what its pictures show. scenes: one per frame, as read."""

    story: WorldStory
    scenes: tuple[Scene, ...]

    def __post_init__(self) -> None:
        frames, scenes = len(self.story.frames), len(self.scenes)
        if frames != scenes:
            raise ValueError(f"Every frame of a story needs one picture: got {frames} frames and {scenes} pictures.")

    def cast(self, frame: int) -> dict[int, Figure | None]:
        """Identity -> the figure that shows it in a frame, None where none is left for it."""
        told = self.story.told(frame)
        return dict(zip(self.story.shown[frame], match(told, self.scenes[frame].figures), strict=True))


@dataclass(frozen=True)
class Estimate:
    """A mean over n stories and the ends of its 95 % interval; nan without stories."""

    mean: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Effect:
    """What a method does to stories, or how much more of it than another method.

    alignment: frames that show everything that was told. consistency: agreement of open looks between the frames of a
    story. chance: the same between stories. gain: consistency - chance. rates: alignment by RATES.
    stories: all that were given; those that an estimate cannot be made of are missing from its n.
    """

    alignment: Estimate
    consistency: Estimate
    chance: Estimate
    gain: Estimate
    rates: Mapping[str, Estimate]
    stories: int


def match(told: Sequence[FigureTold], figures: Sequence[Figure]) -> tuple[Figure | None, ...]:
    """The figure for each identity: those that fit most species, then most named looks, then in the order of the text.

    Looks that are left open have no say.
    """

    def fit(chosen: tuple[Figure | None, ...]) -> tuple[int, int]:
        pairs = [(who, figure) for who, figure in zip(told, chosen, strict=True) if figure is not None]
        species = sum(who.species == figure.species for who, figure in pairs)
        looks = sum(getattr(figure, look) == value for who, figure in pairs for look, value in who.looks.items())
        return species, looks

    return max(permutations((*figures, *[None] * len(told)), len(told)), key=fit)


def aligned(pictures: StoryPictures, frame: int) -> dict[str, float]:
    """RATES of one frame: the share of what was told that the picture shows; nan where nothing was."""
    told, scene = pictures.story.frames[frame], pictures.scenes[frame]
    cast = pictures.cast(frame)
    people = [(pictures.story.identities[i], figure) for i, figure in cast.items()]
    species = [figure is not None and who.species == figure.species for who, figure in people]
    looks = [
        figure is not None and getattr(figure, look) == value
        for who, figure in people
        for look, value in who.looks.items()
    ]
    return {
        "place": float(scene.place == told.place),
        "action": float(scene.action == told.action),
        "prop": float(scene.prop == told.prop),
        "figures": float(len(scene.figures) == len(people)),
        "species": _mean(species),
        "looks": _mean(looks),
    }


def per_story(stories: Sequence[StoryPictures]) -> dict[str, np.ndarray]:
    """The fields of Effect that are estimates and RATES, one value per story: float [stories].

    A character's look that the identity leaves open counts by the share of pairs of frames in which it is the same. A
    character that a frame should show and does not agrees with nobody. Consistency is the mean over a story's
    characters and their open looks; chance is that of pairs of one frame of this story and one of another story whose
    character leaves the look open too.
    nan: consistency, chance and gain where no character with an open look is in two frames; chance and gain also where
    no other story leaves such a look open; rates where nothing of the kind was told.
    """
    values: dict[str, list[float]] = {name: [] for name in ("alignment", *RATES)}
    for pictures in stories:
        frames = [aligned(pictures, frame) for frame in range(len(pictures.scenes))]
        values["alignment"].append(_mean([all(rate == 1 or np.isnan(rate) for rate in f.values()) for f in frames]))
        for name in RATES:
            values[name].append(_mean([f[name] for f in frames if not np.isnan(f[name])]))
    return {name: np.array(column) for name, column in values.items()} | _agreement(stories)


def _open_looks(pictures: StoryPictures) -> Iterator[tuple[str, int, np.ndarray]]:
    """For every character and look left open: the look, in how many frames it should show, in how many it has which
    value."""
    casts = [pictures.cast(frame) for frame in range(len(pictures.scenes))]
    for identity, who in enumerate(pictures.story.identities):
        figures = [cast[identity] for cast in casts if identity in cast]
        for look, values in LOOKS.items():
            if look not in who.looks and figures:
                shown = [getattr(figure, look) for figure in figures if figure is not None]
                yield look, len(figures), np.array([shown.count(value) for value in values])


def _agreement(stories: Sequence[StoryPictures]) -> dict[str, np.ndarray]:
    """Consistency, chance and gain of each story."""
    found = [list(_open_looks(pictures)) for pictures in stories]
    frames = np.zeros((len(LOOKS), len(stories)))
    counts = {look: np.zeros((len(stories), len(values))) for look, values in LOOKS.items()}
    rows = list(LOOKS)
    for story, looks in enumerate(found):
        for look, n, count in looks:
            frames[rows.index(look), story] += n
            counts[look][story] += count
    consistency, chance = np.full((2, len(stories)), np.nan)
    for story, looks in enumerate(found):
        same, by_chance = [], []
        for look, n, count in looks:
            if n < 2:
                continue
            others = frames[rows.index(look)].sum() - frames[rows.index(look), story]
            same.append(count @ (count - 1) / (n * (n - 1)))
            alike = count @ (counts[look].sum(0) - counts[look][story])
            by_chance.append(alike / (n * others) if others else np.nan)
        consistency[story], chance[story] = _mean(same), _mean(by_chance)
    return {"consistency": consistency, "chance": chance, "gain": consistency - chance}


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else float("nan")


def interval(values: Sequence[float], seed: int = 0, resamples: int = 2000) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean of values [n], one per story; nan, nan of none."""
    values = np.asarray(values, float)
    if not len(values):
        return float("nan"), float("nan")
    drawn = np.random.default_rng(seed).integers(len(values), size=(resamples, len(values)))
    low, high = np.quantile(values[drawn].mean(1), (0.025, 0.975))
    return float(low), float(high)


def _estimate(values: np.ndarray) -> Estimate:
    known = values[~np.isnan(values)]
    return Estimate(_mean(known), *interval(known), len(known))


def _effect(values: Mapping[str, np.ndarray]) -> Effect:
    estimates = {name: _estimate(column) for name, column in values.items()}
    rates = {name: estimates.pop(name) for name in RATES}
    return Effect(**estimates, rates=rates, stories=len(values["alignment"]))


def effect(stories: Sequence[StoryPictures]) -> Effect:
    """What a method did to these stories."""
    return _effect(per_story(stories))


def paired_difference(ours: Sequence[StoryPictures], theirs: Sequence[StoryPictures]) -> Effect:
    """How much more one method does than another on the same stories, each story compared with itself.

    ValueError if the methods were not given the same stories in the same order.
    """
    if [pictures.story for pictures in ours] != [pictures.story for pictures in theirs]:
        raise ValueError("Methods can be compared story by story only on the same stories in the same order.")
    one, other = per_story(ours), per_story(theirs)
    return _effect({name: one[name] - other[name] for name in one})
