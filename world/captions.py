"""Captions of the story world: what they specify, random ones, and their text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from .scene import ACTIONS, LOOKS, PLACES, PROPS, SPECIES, TOGETHER
from .words import (
    ACTION_WORDS,
    ADJECTIVES,
    ADVERBS,
    CLOTH_WORDS,
    FUR_NOUNS,
    FUR_WORDS,
    HAT_WORDS,
    NAMES,
    PLACE_WORDS,
    PROP_WORDS,
    SHIRT_WORDS,
    SPECIES_WORDS,
    TROUSERS_WORDS,
)


@dataclass(frozen=True)
class FrameCaption:
    """The content of one frame's caption; prop is "none" where it names none."""

    place: str
    action: str
    prop: str = "none"


@dataclass(frozen=True)
class FigureCaption:
    """The content of an identity: species, named looks, and adjectives and names that bias the open looks."""

    species: str
    looks: Mapping[str, str] = field(default_factory=dict)
    adjectives: tuple[str, ...] = ()
    names: tuple[str, ...] = ()


def any_figure(random: np.random.Generator, named: float = 0.35) -> FigureCaption:
    """A random identity, often with an adjective or a name. named: probability that it names a look."""
    looks = {look: str(random.choice(values)) for look, values in LOOKS.items() if random.random() < named}
    adjectives = (str(random.choice(ADJECTIVES)),) if random.random() < 0.45 else ()
    names = (str(random.choice(NAMES)),) if random.random() < 0.3 else ()
    return FigureCaption(str(random.choice(SPECIES)), looks, adjectives, names)


def any_frame(random: np.random.Generator, together: bool = False) -> FrameCaption:
    """A random frame: a place with an action, a prop or both. together: for two figures."""
    place = str(random.choice(PLACES))
    if together:
        return FrameCaption(place, str(random.choice(TOGETHER)))
    kind = random.random()
    prop = str(random.choice(PROPS[1:])) if kind < 0.5 else "none"
    if kind < 0.3:
        return FrameCaption(place, "standing", prop)
    action = str(random.choice(ACTIONS[:-1] if prop != "none" else ACTIONS))
    return FrameCaption(place, action, prop)


def frame_words(frame: FrameCaption, random: np.random.Generator | None = None, adverbs: bool = False) -> str:
    """The text of a frame. Without a generator, the first phrase of every list."""
    phrases = []
    if frame.action != "standing" or frame.prop == "none" or (random is not None and random.random() < 0.3):
        phrases.append(_one(ACTION_WORDS[frame.action], random))
    if frame.prop != "none":
        phrases.append(_one(PROP_WORDS[frame.prop], random))
    if adverbs and random is not None and random.random() < 0.2:
        phrases.insert(int(random.integers(len(phrases) + 1)), _one(ADVERBS, random))
    phrases.append(_one(PLACE_WORDS[frame.place], random))
    return " ".join(phrases)


def figure_words(who: FigureCaption, random: np.random.Generator | None = None) -> str:
    """The text of an identity. Without a generator, the first phrase of every list."""
    noun = _one(SPECIES_WORDS[who.species], random)
    fur = _one(FUR_WORDS[who.looks["fur"]], random) if "fur" in who.looks else ""
    before = [*who.adjectives]
    after = []
    if fur:
        nouns = FUR_NOUNS.get(who.species, ("fur",))
        if who.species == "girl" or _chance(random, 0.35):
            after.append(f"with {fur} {_one(nouns, random)}")
        else:
            before.append(fur)
    clothes = [
        (look, _one(CLOTH_WORDS[who.looks[look]], random), _one(words, random))
        for look, words in (("shirt", SHIRT_WORDS), ("trousers", TROUSERS_WORDS))
        if look in who.looks
    ]
    worn = " and ".join(
        f"a {colour} {word}" if look == "shirt" else f"{colour} {word}" for look, colour, word in clothes
    )
    if worn:
        after.append(f"{_one(('in', 'with', 'wearing'), random)} {worn}")
    if "hat" in who.looks:
        after.append(_one(HAT_WORDS[who.looks["hat"]], random))
    plain = " ".join([*before, noun])
    article = "an" if plain[0] in "aeiou" else "a"
    described = plain if _chance(random, 0.12) else f"{article} {plain}"
    if who.names:
        name = " ".join(who.names)
        described = (
            f"{described} {_one(('called', 'named'), random)} {name}"
            if _chance(random, 0.5)
            else f"{name}, {described}"
        )
    return " ".join([described, *after])


def _one(words: Sequence[str], random: np.random.Generator | None) -> str:
    return words[0] if random is None else words[int(random.integers(len(words)))]


def _chance(random: np.random.Generator | None, probability: float) -> bool:
    return random is not None and random.random() < probability
