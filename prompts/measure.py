"""Check a story script while it is edited: the faults and the token count of every line.

Parser and counts are those of the encode nodes, but a fault is reported at its line and the other lines are still
measured.
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
    """An error in the script outside the frame lines: its box, and its line there or None."""

    box: str
    line: int | None
    message: str


@dataclass(frozen=True)
class Line:
    """One line of the frames box.

    line        its number in the box, from 1
    number      its frame's number in the story, from 1
    characters  names of the characters in the frame
    caption     the caption on a page
    own         tokens of the frame's own words, None if the line has a fault
    used        tokens of identity, style and own words in one prompt, None if identity or style are unknown
    fault       why the script cannot run, or ""
    warning     why an encode node would reject this frame, or ""
    """

    line: int
    number: int
    characters: tuple[str, ...] = ()
    caption: str = ""
    own: int | None = None
    used: int | None = None
    fault: str = ""
    warning: str = ""


@dataclass(frozen=True)
class Total:
    """Frames with the same characters, which share prompts.

    characters  names of the characters
    frames      numbers of the frames in the story, from 1
    tokens      tokens of the identity and all frames
    prompts     number of different prompts: 1 if all fit into one
    """

    characters: tuple[str, ...]
    frames: tuple[int, ...]
    tokens: int
    prompts: int


@dataclass(frozen=True)
class ScriptMeasurement:
    """The result of `measure_script`."""

    lines: tuple[Line, ...]
    totals: tuple[Total, ...]
    faults: tuple[Fault, ...]


def measure_script(
    tokenize: Tokenize, identity: str | None, frames: str | None, style: str | None
) -> ScriptMeasurement:
    """Measure the three texts of a story script; None for a text that is not known yet.

    tokenize: SDXL's, with weights. Windows are counted as "circular". Without a valid identity and style, only the
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
    return ScriptMeasurement(tuple(lines), tuple(totals), tuple(faults))


def _fault(error: StoryScriptError) -> Fault:
    return Fault(error.box, error.line, error.message)


def _characters(identity: str, faults: list[Fault]) -> tuple[Character, ...] | None:
    lines = list(identity_lines(identity))
    errors = [_fault(line) for line in lines if isinstance(line, StoryScriptError)]
    faults += errors
    return None if errors else tuple(lines)


def _style(style: str, faults: list[Fault]) -> str | None:
    try:
        return parse_style(style)
    except StoryScriptError as error:
        faults.append(_fault(error))
        return None


def _line(tokenize: Tokenize, story: Story | None, number: int, frame: Frame | StoryScriptError) -> Line:
    """Measure one line. story: without frames, or None if identity or style are unknown."""
    if isinstance(frame, StoryScriptError):
        return Line(frame.line, number + 1, fault=frame.message)
    line = Line(frame.line, number + 1, frame.characters, frame.caption)
    name = f"frame {number + 1}"
    try:
        if not frame.characters:
            before, after = story.style_around if story else ("", "")
            spans, _ = locate_frame(tokenize, frame, (before, after), name)
            (used,) = count_tokens(tokenize, [f"{before}{frame.text}{after}"], [name])
            return replace(line, own=sum(map(len, spans.tokens.frames)), used=used if story else None)
        words = own_words(frame, number)
        (own,) = count_tokens(tokenize, [words], [name])
        line = replace(line, own=own)
        if story is None:
            return line
        (cast,) = casts_of(replace(story, frames=(frame,)))
        (shared,) = count_tokens(tokenize, [cast.identity], [cast.name])
        line = replace(line, used=shared + own)
        locate_story(tokenize, [cast.identity, words], [cast.name, name])
    except ValueError as error:
        return replace(line, warning=str(error))
    return line


def _totals(
    tokenize: Tokenize, story: Story, parsed: Sequence[Frame | StoryScriptError], lines: Sequence[Line]
) -> Iterator[Total]:
    """Totals of the frames that an encode node accepts, cast by cast."""
    numbers = [number for number, line in enumerate(lines) if line.characters and line.used and not line.warning]
    accepted = replace(story, frames=tuple(parsed[number] for number in numbers))
    for cast in casts_of(accepted):
        texts = [cast.identity, *cast.words]
        shared, *frames = count_tokens(tokenize, texts, [cast.name] * len(texts))
        windows = choose_windows(shared, frames, "circular")
        in_story = tuple(numbers[frame] + 1 for frame in cast.frames)
        yield Total(accepted.frames[cast.frames[0]].characters, in_story, shared + sum(frames), len(set(windows)))
