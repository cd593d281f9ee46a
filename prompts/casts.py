"""Casts: frames of a story that show the same characters and can share one prompt."""

from __future__ import annotations

from dataclasses import dataclass

from .script import Frame, Story

JOINING = {"and", "&", ",", ", and"}


@dataclass(frozen=True)
class Cast:
    """Frames that show the same characters.

    name      how errors and reports refer to them: "the identity of [Fox] and [Owl]"
    identity  their descriptions in the order of the identity box, joined by "and", with the style around them
    frames    numbers of the frames in the story, from 0
    words     each frame's own words
    """

    name: str
    identity: str
    frames: tuple[int, ...]
    words: tuple[str, ...]


def casts_of(story: Story) -> tuple[Cast, ...]:
    """The casts of a story in order of appearance. Frames without a character belong to no cast.

    Raises ValueError for a frame without words of its own.
    """
    together: dict[frozenset[str], list[int]] = {}
    for number, frame in enumerate(story.frames):
        if frame.characters:
            together.setdefault(frozenset(frame.characters), []).append(number)
    return tuple(_cast(story, shown, numbers) for shown, numbers in together.items())


def _cast(story: Story, shown: frozenset[str], numbers: list[int]) -> Cast:
    before, after = story.style_around
    characters = [character for character in story.characters if character.name in shown]
    names = " and ".join(f"[{character.name}]" for character in characters if character.name)
    identity = " and ".join(character.description for character in characters)
    return Cast(
        name=f"the identity of {names}" if names else "the identity",
        identity=f"{before}{identity}{after}",
        frames=tuple(numbers),
        words=tuple(own_words(story.frames[number], number) for number in numbers),
    )


def own_words(frame: Frame, number: int) -> str:
    """A frame's own words, without an "and" between two names, which the identity already has.

    number: of the frame in the story, from 0. Raises ValueError for a frame without words of its own.
    """
    parts = frame.parts
    joining = {
        i
        for i in range(1, len(parts) - 1)
        if parts[i].text.casefold() in JOINING and len({parts[i - 1].character, parts[i + 1].character} - {None}) == 2
    }
    words = " ".join(part.text for i, part in enumerate(parts) if part.character is None and i not in joining)
    if not words:
        raise ValueError(f"Frame {number + 1} (line {frame.line}) has no words of its own. Write what happens in it.")
    return words
