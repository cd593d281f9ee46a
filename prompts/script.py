"""The story script: the artist's text, parsed into a `Story`.

identity   one description ("a red fox in a blue coat", lines are joined), or one character per line: `[Fox] a red fox`;
           `#` starts a comment
frames     one frame per line: `[Name]` inserts that character, `[NC]` marks a frame without characters,
           `#` starts the caption
style      optional text around `{prompt}`

The syntax is StoryDiffusion's (arXiv 2405.01434), so its scripts can be pasted in. `\\#` and `\\[` are literal.
The full-width signs \u3010 \u3011 \uff3b \uff3d \uff03 and \uff1a work like [ ] # and : do.
Grammar, result and errors share this one file, because it is all that a host without torch needs to import.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from typing import NoReturn, TypeVar

NO_CHARACTER = "NC"
PLACEHOLDER = "{prompt}"

MAX_TEXT = 1_000_000
"""Maximum length of a box in characters."""
MAX_FRAMES = 10_000
MAX_EXPANDED = 10_000_000
"""Maximum length of all prompts of a story in characters, with descriptions inserted for names."""
LISTED_NAMES = 8
"""Maximum number of names that an error lists."""

_OPEN, _CLOSE = r"\[\u3010\uff3b", r"\]\u3011\uff3d"
"""Brackets as Latin and as Chinese, Japanese and Korean keyboards type them."""
_NAME = rf"(?<!\\)[{_OPEN}]([^{_OPEN}{_CLOSE}]*)[{_CLOSE}]([:\uff1a]?)"
_CAPTION = r"(?<!\\)[#\uff03]"
_ESCAPED = rf"\\([#\uff03{_OPEN}{_CLOSE}])"
_SCHEDULED = r"[^:]*:[^:]*:?\s*[\d.]+"
"""Prompt scheduling of other packs, between brackets: `a:b:0.5`, `a:10`."""
_HALF = r"[\ud800-\udfff]"
_STRAY = rf"(?<!\\)[{_OPEN}{_CLOSE}]"


Parsed = TypeVar("Parsed")


class StoryScriptError(ValueError):
    """A fault in a story script. `box` is the name of the input, `line` the line in it (from 1) or None."""

    __module__ = "storyloom"  # ComfyUI shows it before the message, and would show the path of this file

    def __init__(self, box: str, line: int | None, message: str):
        self.box, self.line, self.message = box, line, message
        place = f"Story script, {box}" if line is None else f"Story script, {box}, line {line}"
        super().__init__(f"{place}: {message}")


@dataclass(frozen=True)
class Character:
    """A character of the story. `name` is "" if the identity is a single description without a name."""

    name: str
    description: str


@dataclass(frozen=True)
class Part:
    """A piece of a frame's text: the description of `character`, or the frame's own words (`character` is None)."""

    text: str
    character: str | None = None


@dataclass(frozen=True)
class Frame:
    """One picture of the story.

    text        the frame's own words, without any character's description
    characters  names of the characters in it, in order of appearance
    parts       the whole prompt in order, descriptions inserted; joined by spaces, the prompt without style
    caption     the caption on a page: the text after `#`, otherwise the line as typed, without brackets
    line        line in the frames box
    """

    text: str
    characters: tuple[str, ...]
    parts: tuple[Part, ...]
    caption: str
    line: int


@dataclass(frozen=True)
class Story:
    """A parsed story script. `identity` joins the descriptions of all characters."""

    identity: str
    characters: tuple[Character, ...]
    frames: tuple[Frame, ...]
    style: str = ""

    @property
    def style_around(self) -> tuple[str, str]:
        """Style text before and after the prompt, ("", "") without a style."""
        before, _, after = self.style.partition(PLACEHOLDER)
        return before, after

    @property
    def prompts(self) -> tuple[str, ...]:
        """Each frame's own prompt: descriptions and own words, with the style around them."""
        before, after = self.style_around
        return tuple(f"{before}{' '.join(part.text for part in frame.parts)}{after}" for frame in self.frames)


def parse_story(identity: str, frames: str, style: str = "") -> Story:
    """Parse the three texts of a story script.

    Raises StoryScriptError, with box, line and remedy, for: no frame, empty identity, unknown, reserved or duplicate
    name, `{prompt}` missing from the style, a frame that is only a caption, too much text.
    """
    characters = parse_identity(identity)
    return Story(
        identity=" and ".join(c.description for c in characters),
        characters=characters,
        frames=parse_frames(frames, characters),
        style=parse_style(style),
    )


def parse_identity(text: str) -> tuple[Character, ...]:
    """Characters of an identity text: named ones, or a single one without a name."""
    return tuple(_without_faults(identity_lines(text)))


def identity_lines(text: str) -> Iterator[Character | StoryScriptError]:
    """For every line of an identity text, its character or its fault."""
    try:
        lines = [(number, _plain(re.split(_CAPTION, line)[0])) for number, line in _lines("identity", text)]
    except StoryScriptError as fault:
        yield fault
        return
    lines = [(number, line) for number, line in lines if line]
    if not lines:
        yield StoryScriptError(
            "identity", None, 'it is empty. Describe who the story is about, for example "a red fox in a blue coat".'
        )
        return
    if not any(re.match(_NAME, line) for _, line in lines):
        yield Character("", _unescape(" ".join(line for _, line in lines)))
        return
    known: set[str] = set()
    for number, line in lines:
        try:
            character = _character(number, line, known)
        except StoryScriptError as fault:
            yield fault
        else:
            known.add(_key(character.name))
            yield character


def parse_frames(text: str, characters: tuple[Character, ...] | None) -> tuple[Frame, ...]:
    """Frames of a frames text. `characters` None: not known yet; any name is accepted as its own description."""
    return tuple(_without_faults(frame_lines(text, characters)))


def frame_lines(text: str, characters: tuple[Character, ...] | None) -> Iterator[Frame | StoryScriptError]:
    """For every frame line, its frame or its fault. `characters` as in `parse_frames`."""
    try:
        lines = [(number, line) for number, line in _lines("frames", text) if _plain(line)]
    except StoryScriptError as fault:
        yield fault
        return
    if not lines:
        yield StoryScriptError(
            "frames", None, 'there is no frame. Write one per line, for example "asleep in the snow".'
        )
    if len(lines) > MAX_FRAMES:
        message = f"there are {len(lines)} frames, but at most {MAX_FRAMES} are possible. Split the story."
        yield StoryScriptError("frames", None, message)
        return
    known = None if characters is None else {_key(c.name): c for c in characters}
    length = 0
    for number, line in lines:
        try:
            frame = _frame(number, line, known)
        except StoryScriptError as fault:
            yield fault
            continue
        length += sum(len(part.text) for part in frame.parts)
        if length > MAX_EXPANDED:
            message = (
                f"with its descriptions inserted, the story is longer than {MAX_EXPANDED} characters of text. Shorten "
                "the descriptions, or split the story."
            )
            yield StoryScriptError("frames", number, message)
            return
        yield frame


def parse_style(text: str) -> str:
    """A style text: empty, or with `{prompt}` exactly once."""
    style = " ".join(_plain(line) for _, line in _lines("style", text)).strip()
    count = style.count(PLACEHOLDER)
    if style and count != 1:
        fault = "has no {prompt}" if count == 0 else f"has {{prompt}} {count} times"
        _fail(
            "style",
            None,
            f'"{short(style)}" {fault}. Put {{prompt}} once where the frame goes: "ink drawing of {{prompt}}".',
        )
    return style


def _without_faults(lines: Iterable[Parsed | StoryScriptError]) -> Iterator[Parsed]:
    """The parsed lines. Raises the first fault."""
    for parsed in lines:
        if isinstance(parsed, StoryScriptError):
            raise parsed
        yield parsed


def _character(number: int, line: str, known: set[str]) -> Character:
    _refuse_stray_bracket("identity", number, line)
    match = re.match(_NAME, line)
    if match is None:
        _fail("identity", number, f'"{short(line)}" has no name. Begin the line with one, for example "[Fox] ...".')
    name, description = match[1].strip(), _unescape(line[match.end() :].strip())
    if not name:
        _fail("identity", number, "the name in [ ] is empty. Give the character a name.")
    if _key(name) == _key(NO_CHARACTER):
        _fail("identity", number, "[NC] is reserved for frames without a character. Choose another name.")
    if _key(name) in known:
        _fail("identity", number, f"[{short(name)}] is described twice. Give every character its own name.")
    if not description:
        _fail("identity", number, f"[{short(name)}] has no description. Write it after the name.")
    return Character(name, description)


def _frame(number: int, line: str, known: dict[str, Character] | None) -> Frame:
    """Parse a frame line. known: the characters by `_key` of their names; None accepts any name."""
    prompt, *caption = re.split(_CAPTION, line, maxsplit=1)
    prompt = _plain(prompt)
    if not prompt:
        _fail("frames", number, "the frame is only a caption. Write what it shows before the #.")
    _refuse_stray_bracket("frames", number, prompt)
    parts: list[Part] = []
    cast: list[str] = []
    without = False
    position = 0
    for match in re.finditer(_NAME, prompt):
        parts.append(Part(prompt[position : match.start()]))
        position = match.end()
        if _key(match[1]) == _key(NO_CHARACTER):
            without = True
            continue
        character = _named(match[1].strip(), known, number)
        parts.append(Part(character.description, character.name))
        cast.append(character.name)
    parts.append(Part(prompt[position:]))
    if without and cast:
        _fail("frames", number, f"[NC] means no character, but [{short(cast[0])}] is named too. Remove one of them.")
    if not cast and not without and known is not None and len(known) == 1:
        (only,) = known.values()
        parts.insert(0, Part(only.description, only.name))
        cast.append(only.name)

    cleaned = [Part(p.text if p.character is not None else _unescape(_plain(p.text)), p.character) for p in parts]
    cleaned = [p for p in cleaned if p.text]
    if not cleaned:
        _fail("frames", number, "the frame is empty. Write what it shows after [NC].")
    return Frame(
        text=" ".join(p.text for p in cleaned if p.character is None),
        characters=tuple(dict.fromkeys(cast)),
        parts=tuple(cleaned),
        caption=_unescape(_plain(_unbracketed(caption[0], known) if caption else _unbracketed(prompt))),
        line=number,
    )


def _named(name: str, known: dict[str, Character] | None, line: int) -> Character:
    if not name:
        _fail("frames", line, "the name in [ ] is empty. Write a character's name, or [NC] for no character.")
    if known is None:
        return Character(name, name)
    if _key(name) in known:
        return known[_key(name)]
    scheduled = re.fullmatch(_SCHEDULED, name)
    name = short(name)
    if scheduled:
        _fail(
            "frames",
            line,
            f"[{name}] looks like prompt scheduling, which a script does not support. Write one frame for each prompt, "
            "or \\[ and \\] for literal brackets.",
        )
    named = [f"[{short(c.name)}]" for c in known.values() if c.name]
    if not named:
        _fail(
            "frames",
            line,
            f'[{name}] is not known: the identity has no named characters. Begin an identity line with "[{name}]".',
        )
    names = ", ".join(named[:LISTED_NAMES])
    if len(named) > LISTED_NAMES:
        names += f", {len(named) - LISTED_NAMES} more"
    _fail(
        "frames",
        line,
        f"[{name}] is not known. Known: {names}, and [NC] for no character. Correct it or add it to the identity.",
    )


def _refuse_stray_bracket(box: str, line: int, text: str) -> None:
    if re.search(_STRAY, re.sub(_NAME, "", text)):
        _fail(
            box,
            line,
            f'a bracket in "{short(text)}" is unmatched. Add the other one, or write \\[ or \\] for a literal bracket.',
        )


def _unbracketed(text: str, known: Container[str] | None = None) -> str:
    """Text without [NC] and without the brackets of names. known: `_key` of the names; None: all."""

    def without_brackets(match: re.Match) -> str:
        key = _key(match[1])
        if key == _key(NO_CHARACTER):
            return " "
        return match[1] + match[2] if known is None or key in known else match[0]

    return re.sub(_NAME, without_brackets, text)


def _lines(box: str, text: str) -> list[tuple[int, str]]:
    if len(text) > MAX_TEXT:
        _fail(box, None, f"it is {len(text)} characters long, but at most {MAX_TEXT} are possible. Shorten it.")
    lines = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n").split("\n")
    numbered = list(enumerate(lines, start=1))
    for number, line in numbered if re.search(_HALF, text) else ():
        if half := re.search(_HALF, line):
            _fail(
                box,
                number,
                f"character {half.start() + 1} is an unpaired surrogate, which cannot be encoded. Delete it.",
            )
    return numbered


def _plain(text: str) -> str:
    return " ".join(text.split())


def _unescape(text: str) -> str:
    return re.sub(_ESCAPED, r"\1", text)


def _key(name: str) -> str:
    return _plain(name).casefold()


def short(text: str, limit: int = 60) -> str:
    """The beginning of a text on one line, for errors."""
    shown = "".join(sign if sign.isprintable() else " " for sign in text[: limit + 1])
    return shown if len(shown) <= limit else shown[: limit - 3] + "..."


def _fail(box: str, line: int | None, message: str) -> NoReturn:
    raise StoryScriptError(box, line, message)
