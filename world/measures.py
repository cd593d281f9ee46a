"""How well pictures of stories follow their text, and how consistent a character's looks are where it leaves them open.

Pictures of unrelated stories sometimes agree by chance, more often if a method draws all characters alike. The measure
to compare is the gain: agreement within stories above that chance.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np

from .captions import FigureCaption
from .scene import LOOKS, Figure, Scene
from .stories import WorldStory

RATES = ("place", "action", "prop", "figures", "species", "looks")


@dataclass(frozen=True)
class StoryPictures:
    """A story and its pictures. scenes: as the reader returns them, one per frame."""

    story: WorldStory
    scenes: tuple[Scene, ...]

    def __post_init__(self) -> None:
        frames, scenes = len(self.story.frames), len(self.scenes)
        if frames != scenes:
            raise ValueError(f"Every frame of a story needs one picture: got {frames} frames and {scenes} pictures.")

    def figures_in(self, frame: int) -> dict[int, Figure | None]:
        """Index of each identity in a frame -> the figure that shows it, None if there is none."""
        identities = self.story.identities_in(frame)
        return dict(zip(self.story.shown[frame], match(identities, self.scenes[frame].figures), strict=True))


@dataclass(frozen=True)
class Estimate:
    """A mean over n stories and the bounds of its 95 % interval; nan without stories."""

    mean: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Effect:
    """The measures of a method's pictures, or their difference from another method's.

    alignment: share of frames that show everything in their text. consistency: agreement of open looks between the
    frames of a story. chance: the same between stories. gain: consistency - chance. rates: alignment by RATES.
    stories: number of all stories; an estimate's n counts only those for which it is defined.
    """

    alignment: Estimate
    consistency: Estimate
    chance: Estimate
    gain: Estimate
    rates: Mapping[str, Estimate]
    stories: int


def match(identities: Sequence[FigureCaption], figures: Sequence[Figure]) -> tuple[Figure | None, ...]:
    """The figure for each identity, None where there are too few figures.

    Chosen to fit the most species, then the most named looks, then the order of the text. Open looks do not matter.
    """

    def fit(chosen: tuple[Figure | None, ...]) -> tuple[int, int]:
        pairs = [(who, figure) for who, figure in zip(identities, chosen, strict=True) if figure is not None]
        species = sum(who.species == figure.species for who, figure in pairs)
        looks = sum(getattr(figure, look) == value for who, figure in pairs for look, value in who.looks.items())
        return species, looks

    return max(permutations((*figures, *[None] * len(identities)), len(identities)), key=fit)


def aligned(pictures: StoryPictures, frame: int) -> dict[str, float]:
    """RATES of one frame: the share of the text's values that the picture shows; nan where the text names none."""
    caption, scene = pictures.story.frames[frame], pictures.scenes[frame]
    people = [(pictures.story.identities[i], figure) for i, figure in pictures.figures_in(frame).items()]
    species = [figure is not None and who.species == figure.species for who, figure in people]
    looks = [
        figure is not None and getattr(figure, look) == value
        for who, figure in people
        for look, value in who.looks.items()
    ]
    return {
        "place": float(scene.place == caption.place),
        "action": float(scene.action == caption.action),
        "prop": float(scene.prop == caption.prop),
        "figures": float(len(scene.figures) == len(people)),
        "species": _mean(species),
        "looks": _mean(looks),
    }


def per_story(stories: Sequence[StoryPictures]) -> dict[str, np.ndarray]:
    """The estimates of Effect and its RATES, one value per story: float [stories].

    An open look of a character scores the share of pairs of frames in which it is the same. A character missing from a
    frame's picture agrees with no other. Consistency is the mean over a story's characters and their open looks; chance
    is the same for pairs of one frame of this story and one of another story whose character leaves the look open too.
    nan: consistency, chance and gain where no character with an open look is in two frames; chance and gain also where
    no other story leaves such a look open; rates where the text names no such value.
    """
    values: dict[str, list[float]] = {name: [] for name in ("alignment", *RATES)}
    for pictures in stories:
        frames = [aligned(pictures, frame) for frame in range(len(pictures.scenes))]
        values["alignment"].append(_mean([all(rate == 1 or np.isnan(rate) for rate in f.values()) for f in frames]))
        for name in RATES:
            values[name].append(_mean([f[name] for f in frames if not np.isnan(f[name])]))
    return {name: np.array(column) for name, column in values.items()} | _agreement(stories)


def _open_looks(pictures: StoryPictures) -> Iterator[tuple[str, int, np.ndarray]]:
    """(look, number of frames that should show it, number of frames by its value) of every character's open looks."""
    frames = [pictures.figures_in(frame) for frame in range(len(pictures.scenes))]
    for identity, who in enumerate(pictures.story.identities):
        figures = [frame[identity] for frame in frames if identity in frame]
        for look, values in LOOKS.items():
            if look not in who.looks and figures:
                shown = [getattr(figure, look) for figure in figures if figure is not None]
                yield look, len(figures), np.array([shown.count(value) for value in values])


def _agreement(stories: Sequence[StoryPictures]) -> dict[str, np.ndarray]:
    """Consistency, chance and gain of each story."""
    open_looks = [list(_open_looks(pictures)) for pictures in stories]
    frames = np.zeros((len(LOOKS), len(stories)))
    counts = {look: np.zeros((len(stories), len(values))) for look, values in LOOKS.items()}
    rows = list(LOOKS)
    for story, looks in enumerate(open_looks):
        for look, n, count in looks:
            frames[rows.index(look), story] += n
            counts[look][story] += count
    consistency, chance = np.full((2, len(stories)), np.nan)
    for story, looks in enumerate(open_looks):
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
    """95 % percentile bootstrap interval of the mean of values [n], one per story; (nan, nan) without values."""
    values = np.asarray(values, float)
    if not len(values):
        return float("nan"), float("nan")
    drawn = np.random.default_rng(seed).integers(len(values), size=(resamples, len(values)))
    low, high = np.quantile(values[drawn].mean(1), (0.025, 0.975))
    return float(low), float(high)


def estimate(values: np.ndarray) -> Estimate:
    """The mean of values [n], one per story, without those that are nan."""
    known = values[~np.isnan(values)]
    return Estimate(_mean(known), *interval(known), len(known))


def _effect(values: Mapping[str, np.ndarray]) -> Effect:
    estimates = {name: estimate(column) for name, column in values.items()}
    rates = {name: estimates.pop(name) for name in RATES}
    return Effect(**estimates, rates=rates, stories=len(values["alignment"]))


def effect(stories: Sequence[StoryPictures]) -> Effect:
    """The measures of these stories' pictures."""
    return _effect(per_story(stories))


def paired_difference(ours: Sequence[StoryPictures], theirs: Sequence[StoryPictures]) -> Effect:
    """The difference between two methods on the same stories, each story compared with itself.

    Raises ValueError unless both have the same stories in the same order.
    """
    if [pictures.story for pictures in ours] != [pictures.story for pictures in theirs]:
        raise ValueError("A paired comparison needs the same stories in the same order for both methods.")
    one, other = per_story(ours), per_story(theirs)
    return _effect({name: one[name] - other[name] for name in one})
