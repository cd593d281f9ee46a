"""PhotoMaker (arXiv 2312.04461) in a story: the word that it fuses with photos, and the token rows of that word.

A trigger word marks the class noun of one character ("a man photomaker in a blue coat"). As in the published pipeline,
the prompt does not contain the trigger, the noun is repeated once per photo ("a man man in a blue coat" for two), and
the last token row of each repetition is fused with the embedding of one photo.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

from .script import Character, Frame, Story, short
from .tokens import Tokenize, count_tokens
from .windows import FramePrompt

TRIGGER = "photomaker"
EXAMPLE = f'for example "a man {TRIGGER} in a blue coat"'

_TRIGGER = rf"(?i)\b{TRIGGER}\b"
_MARKED = rf"(?i)(\w+)\s+{TRIGGER}\b"

PhotoRows = tuple[tuple[int, ...], ...]
"""Rows of an encoded prompt to fuse: for each mention of the character, one row per photo."""


@dataclass(frozen=True)
class PhotoCharacter:
    """The character of a story that has photos.

    name        its name, "" without one
    noun        its class noun
    beginnings  its description up to and including each repetition of the noun: one per photo
    """

    name: str
    noun: str
    beginnings: tuple[str, ...]


def photo_story(story: Story, photos: int) -> tuple[Story, PhotoCharacter]:
    """The story without the trigger word and with the class noun once per photo, and the character with the photos.

    Raises ValueError if the trigger is not exactly once in the descriptions, after a class noun, or is elsewhere.
    """
    marked = _marked(story)
    match = re.search(_MARKED, marked.description)
    if match is None:
        raise ValueError(
            f'In the identity "{short(marked.description)}", "{TRIGGER}" does not follow a noun. Write it directly '
            f"after the noun for what the photo shows (man, woman, girl, cat), {EXAMPLE}."
        )
    before, noun, after = marked.description[: match.start()], match[1], marked.description[match.end() :]
    beginnings = tuple(before + " ".join([noun] * count) for count in range(1, photos + 1))
    described = replace(marked, description=beginnings[-1] + after)
    characters = tuple(described if character is marked else character for character in story.characters)
    plain = replace(
        story,
        identity=" and ".join(character.description for character in characters),
        characters=characters,
        frames=tuple(_with_description(frame, described) for frame in story.frames),
    )
    return plain, PhotoCharacter(marked.name, noun, beginnings)


def rows_frame_by_frame(
    tokenize: Tokenize, story: Story, person: PhotoCharacter, *, weights: bool = True
) -> list[PhotoRows]:
    """Rows to fuse in every frame's own prompt. story, person: from `photo_story`; weights: as in `locate_frame`."""
    before, _ = story.style_around
    return [
        _rows(tokenize, text, (before + words for words in _mentions(frame, person)), person, weights)
        for text, frame in zip(story.prompts, story.frames, strict=True)
    ]


def rows_in_one_prompt(
    tokenize: Tokenize, story: Story, person: PhotoCharacter, prompts: Sequence[FramePrompt], *, weights: bool = True
) -> list[PhotoRows]:
    """The rows to fuse in the shared prompt of every frame.

    story, person: from `photo_story`; prompts: of that story, from `frame_prompts`. weights: as there.
    """
    before, _ = story.style_around
    rows: list[PhotoRows] = []
    for prompt in prompts:
        shown = [character for character in story.characters if character.name in prompt.characters]
        earlier = takewhile(lambda character: character.name != person.name, shown)
        start = before + "".join(f"{character.description} and " for character in earlier)
        starts = [start] if person.name in prompt.characters else []
        rows.append(_rows(tokenize, prompt.text, starts, person, weights))
    return rows


def photo_report(person: PhotoCharacter, rows: Sequence[PhotoRows]) -> str:
    """One line: which rows of which frames are fused with photos. rows: of all frames."""
    photos = len(person.beginnings)
    frames: dict[PhotoRows, list[str]] = {}
    for number, mentions in enumerate(rows, start=1):
        if mentions:
            frames.setdefault(mentions, []).append(str(number))
    fused = [
        f"row{'s' if len(mentions) * photos > 1 else ''} {', '.join(str(row) for rows in mentions for row in rows)} "
        f"(frame{'s' if len(numbers) > 1 else ''} {', '.join(numbers)})"
        for mentions, numbers in frames.items()
    ]
    return (
        f'PhotoMaker: "{person.noun}" of {f"[{person.name}]" if person.name else "the identity"} is fused with '
        f"{photos} photo{'s' if photos > 1 else ''}: {'; '.join(fused) or 'in no frame'}"
    )


def has_trigger(story: Story) -> bool:
    """Whether a description contains the trigger word."""
    return any(re.search(_TRIGGER, character.description) for character in story.characters)


def without_trigger(text: str) -> str:
    """A text in which the trigger word, a mark for PhotoMaker, is left out."""
    return re.sub(rf"(?i)\s*\b{TRIGGER}\b", "", text)


def _marked(story: Story) -> Character:
    """The one character whose description contains the trigger, once."""
    for place, text in (("the style", story.style), *((f"frame {i + 1}", f.text) for i, f in enumerate(story.frames))):
        if re.search(_TRIGGER, text):
            raise ValueError(
                f'The word "{TRIGGER}" is in {place} ("{short(text)}"). Remove it there: it belongs in the identity, '
                f"after the noun for what the photo shows, {EXAMPLE}."
            )
    marked = [character for character in story.characters for _ in re.findall(_TRIGGER, character.description)]
    if not marked:
        raise ValueError(
            f'A photo is connected, but the identity has no word "{TRIGGER}". Write it after the noun for what the '
            f"photo shows, {EXAMPLE}."
        )
    if len(marked) > 1:
        names = ", ".join(dict.fromkeys(f"[{short(character.name)}]" for character in marked if character.name))
        raise ValueError(
            f'The word "{TRIGGER}" occurs {len(marked)} times in the identity{f" ({names})" if names else ""}. One '
            f"character of a story can have photos, and its description contains the word once, {EXAMPLE}."
        )
    return marked[0]


def _with_description(frame: Frame, character: Character) -> Frame:
    parts = (
        replace(part, text=character.description) if part.character == character.name else part for part in frame.parts
    )
    return replace(frame, parts=tuple(parts))


def _mentions(frame: Frame, person: PhotoCharacter) -> Iterator[str]:
    """The text of a frame before each description of this character."""
    before = ""
    for part in frame.parts:
        if part.character == person.name:
            yield before
        before += f"{part.text} "


def _rows(tokenize: Tokenize, text: str, starts: Iterable[str], person: PhotoCharacter, weights: bool) -> PhotoRows:
    """The rows of the class noun in a prompt. starts: the text of the prompt before each description."""
    words = [row for row, (*_, word) in enumerate(t for chunk in tokenize(text)["l"] for t in chunk) if word]
    return tuple(
        tuple(words[_count(tokenize, start + beginning, weights) - 1] for beginning in person.beginnings)
        for start in starts
    )


def _count(tokenize: Tokenize, beginning: str, weights: bool) -> int:
    """Tokens in the beginning of a prompt, whose open parentheses are closed if they are parsed as weights."""
    if weights:
        plain = beginning.replace("\\(", "").replace("\\)", "")
        beginning += ")" * (plain.count("(") - plain.count(")"))
    (count,) = count_tokens(tokenize, [beginning], ["the text up to the class noun"], weights=weights)
    return count
