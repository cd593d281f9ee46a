"""Parses a typed story in the words of the story world, so that its pictures can be measured.

The inverse of `captions.py`. Articles do not count, and unknown words are ignored, as the demo model ignores them. A
text with two values of one kind (two places, a cat that is a bear) is rejected: no single picture could show it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from ..prompts.script import parse_story
from .captions import FigureCaption, FrameCaption
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
)

ARTICLES = {"a", "an", "the"}
NEGATIONS = {"no", "without"}

Phrases = dict[tuple[str, ...], tuple[str, str]]
"""Words of a phrase -> (kind, value)."""


def _words(text: str) -> tuple[str, ...]:
    return tuple(word for word in re.findall(r"\w+", text.lower()) if word not in ARTICLES)


def _phrases(kind: str, table: Mapping[str, Sequence[str]]) -> Phrases:
    return {_words(phrase): (kind, value) for value, phrases in table.items() for phrase in phrases}


def _with_nouns(kind: str, table: Mapping[str, Sequence[str]]) -> Phrases:
    """The phrases, and each without its first word: "with a cap" also counts as "cap"."""
    whole = _phrases(kind, table)
    nouns = {words[1:]: meaning for words, meaning in whole.items() if words[1:] and meaning[1] != "none"}
    return nouns | whole


FRAME_PHRASES: Phrases = (
    _phrases("place", PLACE_WORDS) | _phrases("action", ACTION_WORDS) | _with_nouns("prop", PROP_WORDS)
)
COLOURS = {word for table in (FUR_WORDS, CLOTH_WORDS) for words in table.values() for word in words}
IDENTITY_PHRASES: Phrases = (
    _phrases("species", SPECIES_WORDS)
    | _with_nouns("hat", HAT_WORDS)
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


def _read(text: str, phrases: Phrases) -> Iterator[tuple[str, str]]:
    """(kind, value) of every phrase in order, longest match first; ("", word) for an unknown word.

    A phrase right after "no" or "without" does not count.
    """
    words, at = _words(text), 0
    longest = max(map(len, phrases))
    while at < len(words):
        ends = range(min(at + longest, len(words)), at, -1)
        end = next((end for end in ends if words[at:end] in phrases), at + 1)
        negated = at and words[at - 1] in NEGATIONS
        yield ("", words[at]) if negated else phrases.get(words[at:end], ("", words[at]))
        at = end


def parse_frame(text: str) -> FrameCaption | None:
    """The content of a frame; None when it names no place, neither an action nor a prop, or two of a kind.

    The action of a frame with a prop and no action is "standing".
    """
    values: dict[str, set[str]] = {"place": set(), "action": set(), "prop": set()}
    for kind, value in _read(text, FRAME_PHRASES):
        if kind:
            values[kind].add(value)
    places, actions, props = values["place"], values["action"], values["prop"]
    if not places or not (actions or props) or max(map(len, values.values())) > 1:
        return None
    (place,), (action,), (prop,) = places, actions or {"standing"}, props or {"none"}
    return FrameCaption(place, action, prop)


def parse_identity(text: str) -> FigureCaption | None:
    """The content of an identity; None when it names no species, two species, or two values of a look.

    A colour belongs to the next noun; only adjectives, names and further colours may come between. A garment without a
    colour, or with an unknown one, leaves its look open.
    """
    species: set[str] = set()
    looks: dict[str, set[str]] = {}
    adjectives, names, colours = [], [], []
    for kind, value in _read(text, IDENTITY_PHRASES):
        if kind == "colour":
            colours.append(value)
        elif kind == "adjective":
            adjectives.append(value)
        elif kind == "name":
            names.append(value)
        elif kind == "hat":
            looks.setdefault("hat", set()).add(value)
        elif kind or value != "and":  # a noun takes the colours before it, an unknown word ends them
            look = "fur" if kind == "species" else kind
            named = {COLOUR_OF[look][colour] for colour in colours if colour in COLOUR_OF[look]} if look else set()
            if named:
                looks.setdefault(look, set()).update(named)
            species |= {value} if kind == "species" else set()
            colours = []
    if len(species) != 1 or any(len(values) > 1 for values in looks.values()):
        return None
    return FigureCaption(*species, {look: value for look, (value,) in looks.items()}, tuple(adjectives), tuple(names))


def parse_error(identity_text: str, frames: Sequence[str]) -> str:
    """Why a story cannot be measured: one sentence about the first part that cannot be parsed, "" when all can.

    identity_text, frames: as in a story script, one frame per item. Raises StoryScriptError for a faulty script.
    """
    story = parse_story(identity_text, "\n".join(frames))
    for character in story.characters:
        if parse_identity(character.description) is None:
            species = ", ".join(SPECIES_WORDS)
            return f'"{character.description}" is not one of {species}, with at most one colour for each thing.'
    for number, frame in enumerate(story.frames, start=1):
        caption = parse_frame(frame.text)
        if caption is None:
            return f'Frame {number}, "{frame.text}", needs one place and an action or a prop that the demo model knows.'
        if len(frame.characters) not in (1, 2):
            return f"Frame {number} shows {len(frame.characters)} characters; the demo model draws one or two."
        if len(frame.characters) == 2 and (caption.action not in TOGETHER or caption.prop != "none"):
            return f"Frame {number}: two characters can only be {', '.join(TOGETHER)}, without a prop."
    return ""


def parse_world_story(identity_text: str, frames: Sequence[str]) -> WorldStory | None:
    """A typed story for the measures; None when `parse_error` gives a reason. Raises StoryScriptError as it does."""
    if parse_error(identity_text, frames):
        return None
    story = parse_story(identity_text, "\n".join(frames))
    numbers = {character.name: number for number, character in enumerate(story.characters)}
    return WorldStory(
        tuple(parse_identity(character.description) for character in story.characters),
        tuple(parse_frame(frame.text) for frame in story.frames),
        tuple(tuple(numbers[name] for name in frame.characters) for frame in story.frames),
    )
