"""Understands a typed story as far as the world has words for it, so that its pictures can be measured.

Captions read backwards: what `words.py` says is heard again. Articles do not count, and words that the world does not
have are passed over, as the demo model passes them over. A text that says two different things of one kind (two places,
a cat that is a bear) is not heard at all: no single picture could show it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from ..prompts.script import parse_story
from .scene import TOGETHER
from .stories import WorldStory
from .words import (
    ACTION_WORDS,
    ADJECTIVES,
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
    FigureTold,
    FrameTold,
)

ARTICLES = {"a", "an", "the"}
DENIALS = {"no", "without"}

Phrases = dict[tuple[str, ...], tuple[str, str]]
"""Words of a phrase -> what kind of thing it says, and which."""


def _words(text: str) -> tuple[str, ...]:
    return tuple(word for word in re.findall(r"\w+", text.lower()) if word not in ARTICLES)


def _phrases(kind: str, table: Mapping[str, Sequence[str]]) -> Phrases:
    return {_words(phrase): (kind, value) for value, phrases in table.items() for phrase in phrases}


def _things(kind: str, table: Mapping[str, Sequence[str]]) -> Phrases:
    """The phrases and, whatever stands before them, what they are about: "with a cap" is about a cap."""
    whole = _phrases(kind, table)
    about = {words[1:]: said for words, said in whole.items() if words[1:] and said[1] != "none"}
    return about | whole


SAID_BY_FRAMES: Phrases = (
    _phrases("place", PLACE_WORDS) | _phrases("action", ACTION_WORDS) | _things("prop", PROP_WORDS)
)
COLOURS = {word for table in (FUR_WORDS, CLOTH_WORDS) for words in table.values() for word in words}
SAID_BY_IDENTITIES: Phrases = (
    _phrases("species", SPECIES_WORDS)
    | _things("hat", HAT_WORDS)
    | _phrases("fur", {"": ("fur", *(noun for nouns in FUR_NOUNS.values() for noun in nouns))})
    | _phrases("shirt", {"": SHIRT_WORDS})
    | _phrases("trousers", {"": TROUSERS_WORDS})
    | {(word,): ("colour", word) for word in COLOURS}
    | {(word,): ("adjective", word) for word in ADJECTIVES}
    | {(word,): ("name", word) for word in NAMES}
)
COLOUR_OF = {
    look: {word: value for value, words in table.items() for word in words}
    for look, table in (("fur", FUR_WORDS), ("shirt", CLOTH_WORDS), ("trousers", CLOTH_WORDS))
}


def _heard(text: str, phrases: Phrases) -> Iterator[tuple[str, str]]:
    """(kind, which) of every phrase in order, the longest first; ("", word) for a word that is in none.

    A phrase right after "no" or "without" is not said.
    """
    words, at = _words(text), 0
    longest = max(map(len, phrases))
    while at < len(words):
        ends = range(min(at + longest, len(words)), at, -1)
        end = next((end for end in ends if words[at:end] in phrases), at + 1)
        denied = at and words[at - 1] in DENIALS
        yield ("", words[at]) if denied else phrases.get(words[at:end], ("", words[at]))
        at = end


def hear_frame(text: str) -> FrameTold | None:
    """What a frame tells; None when it names no place, neither an action nor a prop, or two of a kind.

    Who names a prop and no action stands.
    """
    said: dict[str, set[str]] = {"place": set(), "action": set(), "prop": set()}
    for kind, which in _heard(text, SAID_BY_FRAMES):
        if kind:
            said[kind].add(which)
    if not said["place"] or not (said["action"] or said["prop"]) or any(len(values) > 1 for values in said.values()):
        return None
    (place,), (action,), (prop,) = said["place"], said["action"] or {"standing"}, said["prop"] or {"none"}
    return FrameTold(place, action, prop)


def hear_identity(text: str) -> FigureTold | None:
    """What an identity tells; None when it names no species, or two species, or two values of a look.

    A colour belongs to the next noun; only adjectives, names and further colours may stand between. A garment without a
    colour, or with one that the world does not have, leaves its look open.
    """
    species: set[str] = set()
    looks: dict[str, set[str]] = {}
    adjectives, names, colours = [], [], []
    for kind, which in _heard(text, SAID_BY_IDENTITIES):
        if kind == "colour":
            colours.append(which)
        elif kind == "adjective":
            adjectives.append(which)
        elif kind == "name":
            names.append(which)
        elif kind == "hat":
            looks.setdefault("hat", set()).add(which)
        elif kind or which != "and":  # a noun takes the colours before it, an unknown word ends them
            look = "fur" if kind == "species" else kind
            told = {COLOUR_OF[look][colour] for colour in colours if colour in COLOUR_OF[look]} if look else set()
            if told:
                looks.setdefault(look, set()).update(told)
            species |= {which} if kind == "species" else set()
            colours = []
    if len(species) != 1 or any(len(values) > 1 for values in looks.values()):
        return None
    return FigureTold(*species, {look: value for look, (value,) in looks.items()}, tuple(adjectives), tuple(names))


def unheard(identity_text: str, frames: Sequence[str]) -> str:
    """Why a story cannot be measured, one sentence about the first thing that is not heard; "" when all is.

    identity_text, frames: as in a story script, one frame per item. Raises StoryScriptError for a faulty script.
    """
    story = parse_story(identity_text, "\n".join(frames))
    for character in story.characters:
        if hear_identity(character.description) is None:
            return (
                f'"{character.description}" is not one of {", ".join(SPECIES_WORDS)}, with one colour for each thing.'
            )
    for number, frame in enumerate(story.frames, start=1):
        told = hear_frame(frame.text)
        if told is None:
            return f'Frame {number}, "{frame.text}", needs one place and an action or a prop that the demo model knows.'
        if len(frame.characters) not in (1, 2):
            return f"Frame {number} shows {len(frame.characters)} characters; the demo model draws one or two."
        if len(frame.characters) == 2 and (told.action not in TOGETHER or told.prop != "none"):
            return f"Frame {number}: two characters can only be {', '.join(TOGETHER)}, without a prop."
    return ""


def hear_story(identity_text: str, frames: Sequence[str]) -> WorldStory | None:
    """A typed story as the measures need it; None where `unheard` says why not. Raises StoryScriptError as it does."""
    if unheard(identity_text, frames):
        return None
    story = parse_story(identity_text, "\n".join(frames))
    numbers = {character.name: number for number, character in enumerate(story.characters)}
    return WorldStory(
        tuple(hear_identity(character.description) for character in story.characters),
        tuple(hear_frame(frame.text) for frame in story.frames),
        tuple(tuple(numbers[name] for name in frame.characters) for frame in story.frames),
    )
