"""How much the figures in pictures look like those of reference pictures, where the text names no look.

Every measure has one value per case, so that intervals are over cases; nan where it is not defined. Chance is the same
measure against the references of the other cases, which the pictures were not drawn from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .captions import FrameCaption
from .measures import StoryPictures, per_story
from .scene import LOOKS, Figure, Scene

HEAD, CLOTHES = ("fur", "hat"), ("shirt", "trousers")
"""The looks of a face reference, and those of an image of clothes."""
ALL = tuple(LOOKS)


@dataclass(frozen=True)
class Portrayal:
    """A case: pictures of a story whose characters come from references.

    expected    the figure that each of the story's identities should look like
    references  what the reference pictures show
    """

    pictures: StoryPictures
    expected: tuple[Figure, ...]
    references: tuple[Scene, ...]


def aligned(cases: Sequence[Portrayal]) -> np.ndarray:
    """Share of frames that show everything in their text."""
    return per_story([case.pictures for case in cases])["alignment"]


def shared(cases: Sequence[Portrayal], looks: Sequence[str] = ALL) -> np.ndarray:
    """Share of looks in which a figure is as expected, 0 if it is missing. Looks that the text names do not count."""
    return np.array(
        [_mean(_agreement(case, looks, lambda identity, case=case: [case.expected[identity]])) for case in cases]
    )


def shared_by_chance(cases: Sequence[Portrayal], looks: Sequence[str] = ALL) -> np.ndarray:
    """The same against the figures that the other cases expect."""
    values = []
    for number, case in enumerate(cases):
        others = [figure for i, other in enumerate(cases) if i != number for figure in other.expected]
        values.append(_mean(_agreement(case, looks, lambda identity, others=others: others)))
    return np.array(values)


def swapped(cases: Sequence[Portrayal]) -> np.ndarray:
    """Share of looks that a figure has from another character in its picture, where the two differ."""
    return np.array([_mean(_agreement(case, ALL, lambda _, case=case: case.expected, distinct=True)) for case in cases])


def leak(cases: Sequence[Portrayal]) -> np.ndarray:
    """Share of frames that show the place or the action of a reference although the text names others."""
    return np.array([_mean(_leaks(case.pictures, case.references)) for case in cases])


def leak_by_chance(cases: Sequence[Portrayal]) -> np.ndarray:
    """The same against the references of the other cases, where the text names others too."""
    values = []
    for number, case in enumerate(cases):
        others = [other.references for i, other in enumerate(cases) if i != number]
        values.append(_mean([shown for references in others for shown in _leaks(case.pictures, references)]))
    return np.array(values)


def _agreement(
    case: Portrayal, looks: Sequence[str], figures_for: Callable[[int], Sequence[Figure]], distinct: bool = False
) -> list[bool]:
    """Whether each open look of each figure shown equals that of each of `figures_for` its identity.

    distinct: count only looks in which such a figure differs from the expected one.
    """
    same = []
    for frame in range(len(case.pictures.scenes)):
        for identity, figure in case.pictures.figures_in(frame).items():
            named, expected = case.pictures.story.identities[identity].looks, case.expected[identity]
            for other in figures_for(identity):
                same += [
                    figure is not None and getattr(figure, look) == getattr(other, look)
                    for look in looks
                    if look not in named and not (distinct and getattr(other, look) == getattr(expected, look))
                ]
    return same


def _leaks(pictures: StoryPictures, references: Sequence[Scene]) -> list[bool]:
    """For each frame whose text names neither the place nor the action of a reference: whether it shows one."""
    shown = []
    for caption, scene in zip(pictures.story.frames, pictures.scenes, strict=True):
        if not any(_shares(caption, reference) for reference in references):
            shown.append(any(_shares(scene, reference) for reference in references))
    return shown


def _shares(frame: FrameCaption | Scene, reference: Scene) -> bool:
    return frame.place == reference.place or frame.action == reference.action


def _mean(values: Sequence[bool]) -> float:
    return float(np.mean(values)) if len(values) else float("nan")
