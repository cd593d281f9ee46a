"""A story script while it is written: what is wrong with every line, and how many of a prompt's tokens it takes.

The parser and the counts are those of the encode nodes; here a fault is told at its line, and the other lines go on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache

from .casts import casts_of, own_words
from .script import Character, Frame, Story, StoryScriptError, frame_lines, identity_lines, parse_style
from .tokens import Tokenize, count_tokens, locate_frame, locate_story
from .windows import choose_windows


@dataclass(frozen=True)
class Fault:
    """What makes the script refused, outside the frame lines: the box, and the line there or None."""

    box: str
    line: int | None
    message: str


@dataclass(frozen=True)
class Line:
    """One line of the frames box.

    line        its number in the box, from 1
    number      its frame's number in the story, from 1
    characters  names of the characters in the frame
    caption     what a page prints
    own         tokens of the frame's own words, None where it has a fault
    told        tokens of identity, style and own words in one prompt, None where these are not known
    fault       why the script is refused, or ""
    warning     why an encode node refuses this frame, or ""
    """

    line: int
    number: int
    characters: tuple[str, ...] = ()
    caption: str = ""
    own: int | None = None
    told: int | None = None
    fault: str = ""
    warning: str = ""


@dataclass(frozen=True)
class Total:
    """Frames that one prompt tells together.

    characters  names of those whom the frames show
    frames      their numbers in the story, from 1
    tokens      what the identity and all of them take
    prompts     how many different prompts tell them: 1 where they fit into one
    """

    characters: tuple[str, ...]
    frames: tuple[int, ...]
    tokens: int
    prompts: int


@dataclass(frozen=True)
class Measured:
    """A story script, measured."""

    lines: tuple[Line, ...]
    totals: tuple[Total, ...]
    faults: tuple[Fault, ...]


def measure_script(tokenize: Tokenize, identity: str | None, frames: str | None, style: str | None) -> Measured:
    """Measure the three texts of a story script; None for one that is not known yet.

    tokenize: of SDXL, with weights. Windows are counted as "circular". Without a sound identity and style only the
    frames' own words are counted. Raises what `tokenize` raises, except ValueError.
    """
    tokenize = cache(tokenize)
    faults: list[Fault] = []
    characters = None if identity is None else _characters(identity, faults)
    around = None if style is None else _style(style, faults)
    parsed = [] if frames is None else list(frame_lines(frames, characters))
    if parsed and isinstance(parsed[0], StoryScriptError) and parsed[0].line is None:
        faults.append(_fault(parsed.pop()))
    story = None
    if characters is not None and around is not None:
        names = " and ".join(character.description for character in characters)
        story = Story(names, characters, (), around)
    lines = [_line(tokenize, story, number, frame) for number, frame in enumerate(parsed)]
    totals = _totals(tokenize, story, parsed, lines) if story else ()
    return Measured(tuple(lines), tuple(totals), tuple(faults))


def _fault(error: StoryScriptError) -> Fault:
    return Fault(error.box, error.line, error.message)


def _characters(identity: str, faults: list[Fault]) -> tuple[Character, ...] | None:
    found = list(identity_lines(identity))
    wrong = [_fault(one) for one in found if isinstance(one, StoryScriptError)]
    faults += wrong
    return None if wrong else tuple(found)


def _style(style: str, faults: list[Fault]) -> str | None:
    try:
        return parse_style(style)
    except StoryScriptError as error:
        faults.append(_fault(error))
        return None


def _line(tokenize: Tokenize, story: Story | None, number: int, frame: Frame | StoryScriptError) -> Line:
    """story: without frames, or None where it is not known."""
    if isinstance(frame, StoryScriptError):
        return Line(frame.line, number + 1, fault=frame.message)
    line = Line(frame.line, number + 1, frame.characters, frame.caption)
    name = f"frame {number + 1}"
    try:
        if not frame.characters:
            before, after = story.style_around if story else ("", "")
            found, _ = locate_frame(tokenize, frame, (before, after), name)
            (told,) = count_tokens(tokenize, [f"{before}{frame.text}{after}"], [name])
            return replace(line, own=sum(map(len, found.tokens.frames)), told=told if story else None)
        words = own_words(frame, number)
        (own,) = count_tokens(tokenize, [words], [name])
        line = replace(line, own=own)
        if story is None:
            return line
        (cast,) = casts_of(replace(story, frames=(frame,)))
        (shared,) = count_tokens(tokenize, [cast.identity], [cast.name])
        line = replace(line, told=shared + own)
        locate_story(tokenize, [cast.identity, words], [cast.name, name])
    except ValueError as error:
        return replace(line, warning=str(error))
    return line


def _totals(
    tokenize: Tokenize, story: Story, parsed: Sequence[Frame | StoryScriptError], lines: Sequence[Line]
) -> Iterator[Total]:
    """What the frames that an encode node takes come to, cast by cast."""
    numbers = [number for number, line in enumerate(lines) if line.characters and line.told and not line.warning]
    told = replace(story, frames=tuple(parsed[number] for number in numbers))
    for cast in casts_of(told):
        texts = [cast.identity, *cast.words]
        shared, *frames = count_tokens(tokenize, texts, [cast.name] * len(texts))
        windows = choose_windows(shared, frames, "circular")
        places = tuple(numbers[frame] + 1 for frame in cast.frames)
        yield Total(told.frames[cast.frames[0]].characters, places, shared + sum(frames), len(set(windows)))
