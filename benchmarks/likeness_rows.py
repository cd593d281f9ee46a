"""The rows of `likeness.py`: who is drawn, how each character is made, with which settings, and what is measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from ..models.storymaker.characters import CharacterReference, blend
from ..world.likeness import (
    CLOTHES,
    HEAD,
    Portrayal,
    aligned,
    leak,
    leak_by_chance,
    shared,
    shared_by_chance,
    swapped,
)
from ..world.references import Reference, all_differ, random_reference, story_about
from ..world.scene import Figure
from ..world.stories import NICKNAMES, WorldStory
from .portraits import Portraits

Measure = Callable[[Sequence[Portrayal]], np.ndarray]
SHIPPED, NO_ATTENTION_LOSS, NO_POSE = "shipped", "without-attention-loss", "without-pose"
"""Adapters: the one measured, and those of two ablations of its training."""
BLEND = "blend"
RATIOS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True, eq=False)
class Case:
    """references: the pictures; story: its text names only species; expected: as in Portrayal."""

    references: tuple[Reference, ...]
    story: WorldStory
    expected: tuple[Figure, ...]

    def portrayal(self, pictures) -> Portrayal:
        return Portrayal(pictures, self.expected, tuple(reference.scene for reference in self.references))


def one(number: int, frames: int) -> Case:
    """The character of reference `number`, alone."""
    first, _ = _references(number)
    return Case((first,), _story((first.figure,), (first,), number, frames), (first.figure,))


def two(number: int, frames: int) -> Case:
    """Two characters of different species and looks in one picture."""
    references = _references(number, lambda one, other: one.species != other.species)
    figures = tuple(reference.figure for reference in references)
    return Case(references, _story(figures, references, number, frames), figures)


def outfit(number: int, frames: int) -> Case:
    """The character of the first reference in the clothes of the second."""
    first, second = _references(number)
    expected = replace(first.figure, **{look: getattr(second.figure, look) for look in CLOTHES})
    return Case((first, second), _story((first.figure,), (first, second), number, frames), (expected,))


def blended(number: int, frames: int) -> Case:
    """A blend of two characters of the same species. expected: the first, then the second."""
    references = _references(number, lambda one, other: one.species == other.species)
    figures = tuple(reference.figure for reference in references)
    return Case(references, _story(figures[:1], references, number, frames), figures)


def _references(
    number: int, pair: Callable[[Figure, Figure], bool] = lambda one, other: True
) -> tuple[Reference, Reference]:
    """Reference `number` and a second one without a common look. pair: what else the two figures have to fulfil."""
    random = np.random.default_rng([number, 3])
    first = random_reference(random)
    return first, random_reference(random, lambda other: all_differ(first.figure, other) and pair(first.figure, other))


def _story(figures: Sequence[Figure], references: Sequence[Reference], number: int, frames: int) -> WorldStory:
    scenes = [reference.scene for reference in references]
    return story_about(figures, scenes, frames, np.random.default_rng([number, 4]))


LOOKS_AND_TEXT: Mapping[str, Measure] = {
    "looks": shared,
    "chance": shared_by_chance,
    "aligned": aligned,
    "leak": leak,
    "leak by chance": leak_by_chance,
}
PARTS: Mapping[str, Measure] = {
    "head": partial(shared, looks=HEAD),
    "head by chance": partial(shared_by_chance, looks=HEAD),
    "clothes": partial(shared, looks=CLOTHES),
    "clothes by chance": partial(shared_by_chance, looks=CLOTHES),
    "aligned": aligned,
}


BLENDED: Mapping[str, Measure] = {"first": shared, "second": swapped, "aligned": aligned}


def _first(portraits: Portraits, case: Case) -> tuple[CharacterReference, ...]:
    return (portraits.whole(case.references[0]),)


def _both(portraits: Portraits, case: Case) -> tuple[CharacterReference, ...]:
    return tuple(portraits.whole(*each) for each in zip(case.references, NICKNAMES, strict=True))


def _face(portraits: Portraits, case: Case) -> tuple[CharacterReference, ...]:
    return (portraits.face_only(case.references[0]),)


def _dressed(portraits: Portraits, case: Case) -> tuple[CharacterReference, ...]:
    return (portraits.dressed(*case.references),)


def _between(ratio: float, portraits: Portraits, case: Case) -> tuple[CharacterReference, ...]:
    return (blend(*map(portraits.whole, case.references), ratio, ""),)


@dataclass(frozen=True)
class Row:
    """A row of the table.

    title          in the table
    measures       name -> measure
    case           function of the reference's number and the number of frames
    characters     function of Portraits and the case
    compared       row and measure that this row is compared with, case by case
    method         of StoryPipeline
    tokens, lora   factors of the two strengths
    adapter        SHIPPED or that of an ablation
    story          whether its frames are a story of its own length
    """

    title: str
    measures: Mapping[str, Measure]
    case: Callable[[int, int], Case] = one
    characters: Callable[[Portraits, Case], tuple[CharacterReference, ...]] = _first
    compared: tuple[str, str] | None = None
    method: str = "frames"
    tokens: float = 1.0
    lora: float = 1.0
    adapter: str = SHIPPED
    story: bool = False


_TWO = {**LOOKS_AND_TEXT, "swapped": swapped}
ROWS: Mapping[str, Row] = {
    "one": Row("one character", LOOKS_AND_TEXT),
    "off": Row("both strengths 0", LOOKS_AND_TEXT, tokens=0.0, lora=0.0),
    "lora": Row("LoRA alone", LOOKS_AND_TEXT, tokens=0.0),
    "tokens": Row("image tokens alone", LOOKS_AND_TEXT, lora=0.0),
    "two": Row("two characters", _TWO, two, _both),
    "two-without-attention-loss": Row(
        "two, trained without attention loss", _TWO, two, _both, ("two", "looks"), adapter=NO_ATTENTION_LOSS
    ),
    "one-without-pose": Row("one, trained without pose", LOOKS_AND_TEXT, compared=("one", "leak"), adapter=NO_POSE),
    "outfit": Row("head of one, clothes of another", PARTS, outfit, _dressed),
    "face-only": Row("face only", PARTS, one, _face),
    **{
        f"{BLEND} {ratio:g}": Row(f"blend, {100 * ratio:g} % of the second", BLENDED, blended, partial(_between, ratio))
        for ratio in RATIOS
    },
    "with-csa-ipca-svr": Row(
        "with CSA, IPCA and SVR, in a story",
        LOOKS_AND_TEXT,
        compared=("one", "looks"),
        method="csa+svr+ipca",
        story=True,
    ),
}
"""In the table's order."""
