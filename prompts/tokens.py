"""Which rows of an encoded prompt belong to which part of the story, found by counting, not by searching.

Every part of a prompt is tokenized separately, and its length is the number of its rows in the joined prompt, so that
words shared by identity and frames, sub-words, punctuation and embeddings are all assigned to the right rows.

A tokenizer is a function text -> {"l": chunks, "g": chunks}; a chunk is a list of (token, weight, word id), with word
id 0 for start, end and padding. It is ComfyUI's own SDXL tokenizer with `return_word_ids=True`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from torch import Tensor

from .script import Frame, short

Chunk = list[tuple]
Tokens = dict[str, list[Chunk]]
Tokenize = Callable[[str], Tokens]

ROOM = 75
"""Tokens of text in one chunk of the encoders, between its start and end tokens."""
START, END = 49406, 49407
MAX_NESTING = 100
"""Maximum depth of nested parentheses: hosts parse them recursively and fail near 1,000."""
PADDING = {"l": END, "g": 0}
"""Token ids of CLIP's vocabulary: around the text of a chunk, and the padding of each of SDXL's encoders."""


@dataclass(frozen=True)
class StoryTokens:
    """Token rows of an encoded prompt. Row 0 is the start token.

    identity  rows of the identity
    frames    rows of every frame's own words, in prompt order
    eot       the first end-of-text row; it and all later rows are end and padding
    length    number of rows
    """

    identity: range
    frames: tuple[range, ...]
    eot: int
    length: int


@dataclass(frozen=True)
class FrameTokens:
    """Token rows of one frame's own prompt: as StoryTokens (first description, own words), plus all descriptions."""

    tokens: StoryTokens
    descriptions: tuple[range, ...]


class StoryTooLongError(ValueError):
    """An identity and its frames do not fit into one prompt."""

    __module__ = "storyloom"  # ComfyUI shows it before the message, and would show the path of this file


def count_tokens(tokenize: Tokenize, parts: Sequence[str], names: Sequence[str], *, weights: bool = True) -> list[int]:
    """The number of tokens in each text. names: of the parts in errors. Raises ValueError as `locate_story` does."""
    return [len(words["l"]) for words in _separate(tokenize, parts, names, weights)]


def count_words(tokens: Tokens) -> int:
    """Number of tokens of text, without start, end and padding."""
    return len(_words(tokens["l"]))


def locate_story(
    tokenize: Tokenize, parts: Sequence[str], names: Sequence[str], *, weights: bool = True
) -> tuple[StoryTokens, Tokens]:
    """Tokenize identity and frames, joined by single spaces, and locate the rows of each.

    parts: the identity, then the frames; names: of the parts in errors. weights: whether the tokenizer parses
    "(words:1.2)". Returns the rows, and the tokens of the joined text. Raises StoryTooLongError if it does not fit into
    one chunk, ValueError if a part has no tokens or unbalanced parentheses, or if its token count differs between
    CLIP-L and CLIP-G.
    """
    joined, lengths = _measure(tokenize, parts, names, weights, " ".join(parts))
    if sum(lengths) > ROOM:
        raise StoryTooLongError(_too_long(lengths, names))
    starts = list(accumulate(lengths, initial=1))
    spans = tuple(range(start, start + n) for start, n in zip(starts, lengths, strict=False))
    return StoryTokens(spans[0], spans[1:], starts[-1], len(joined["l"][0])), joined


def locate_frame(
    tokenize: Tokenize, frame: Frame, style: tuple[str, str], name: str, *, weights: bool = True
) -> tuple[FrameTokens, Tokens]:
    """Tokenize one frame's own prompt with the style around it, and locate the rows that describe its characters.

    Text over 75 tokens uses several chunks of 77 rows, as in the stock node. name: of the frame in errors.
    Raises ValueError as `locate_story` does.
    """
    before, after = style
    described: list[range] = []
    own: list[range] = []
    inner = [(part.text, own if part.character is None else described) for part in frame.parts]
    text = before + " ".join(words for words, _ in inner) + after
    try:
        outer = [(before, []), *inner, (after, [])]
        pieces = [(words, kind) for words, kind in outer if words.strip()]
        joined, lengths = _measure(tokenize, [words for words, _ in pieces], [name] * len(pieces), weights, text)
    except _MergedError:  # a frame that ends with "." before a style that begins with ","
        pieces = list(inner)
        pieces[0] = (before + pieces[0][0], pieces[0][1])
        pieces[-1] = (pieces[-1][0] + after, pieces[-1][1])
        joined, lengths = _measure(tokenize, [words for words, _ in pieces], [name] * len(pieces), weights, text)
    rows = [row for row, (_, _, word) in enumerate(t for chunk in joined["l"] for t in chunk) if word]
    start = 0
    for (_, kind), n in zip(pieces, lengths, strict=True):
        kind.extend(consecutive(rows[start : start + n]))
        start += n
    first = joined["l"][0]
    eot = 1 + sum(1 for token in first if token[2])
    tokens = StoryTokens(described[0] if described else range(1, 1), tuple(own), eot, sum(map(len, joined["l"])))
    return FrameTokens(tokens, tuple(described)), joined


def without_word_ids(tokens: Tokens) -> dict[str, list[list[tuple]]]:
    """The same tokens in the format of the text encoders: (token, weight)."""
    return {
        key: [[(token, weight) for token, weight, _ in chunk] for chunk in chunks] for key, chunks in tokens.items()
    }


class _MergedError(ValueError):
    """The parts merge into different tokens where they meet."""


def _measure(
    tokenize: Tokenize, parts: Sequence[str], names: Sequence[str], weights: bool, text: str
) -> tuple[Tokens, list[int]]:
    """Tokens of `text`, which consists of the parts in order, and the number in each part. names: in errors."""
    separate = _separate(tokenize, parts, names, weights)
    joined = tokenize(text)
    for key, chunks in joined.items():
        if not _same(_words(chunks), [token for words in separate for token in words[key]]):
            raise _MergedError(
                f'"{short(text)}" is tokenized differently as a whole than in parts (style, identity, frames). Remove '
                "unusual characters where the parts meet."
            )
    return joined, [len(words["l"]) for words in separate]


def _separate(tokenize: Tokenize, parts: Sequence[str], names: Sequence[str], weights: bool) -> list[dict[str, Chunk]]:
    """The tokens of every part, tokenized separately, without start, end and padding."""
    if weights:
        for part, name in zip(parts, names, strict=True):
            _check_parentheses(part, name)
    separate = [{key: _words(chunks) for key, chunks in tokenize(part).items()} for part in parts]
    for words, part, name in zip(separate, parts, names, strict=True):
        if len(words["l"]) != len(words["g"]):
            raise ValueError(
                f'{first_upper(name)} ("{short(part)}") takes {len(words["l"])} tokens in CLIP-L but '
                f"{len(words['g'])} in CLIP-G. An embedding in it has different lengths for the two encoders: use one "
                "made for SDXL."
            )
        if not words["l"]:
            raise ValueError(f'{first_upper(name)} ("{short(part)}") produces no tokens. Describe it in words.')
    return separate


def _words(chunks: list[Chunk]) -> Chunk:
    return [token for chunk in chunks for token in chunk if token[2]]


def _same(a: Chunk, b: Chunk) -> bool:
    def equal(x, y):
        return bool((x == y).all()) if isinstance(x, Tensor) and isinstance(y, Tensor) else x is y or x == y

    return len(a) == len(b) and all(equal(x[0], y[0]) and x[1] == y[1] for x, y in zip(a, b, strict=True))


def consecutive(rows: Sequence[int]) -> list[range]:
    """Ascending row numbers as ranges of consecutive rows."""
    runs: list[range] = []
    for row in rows:
        if runs and runs[-1].stop == row:
            runs[-1] = range(runs[-1].start, row + 1)
        else:
            runs.append(range(row, row + 1))
    return runs


def _check_parentheses(text: str, name: str) -> None:
    depth = 0
    for sign in text.replace("\\(", "").replace("\\)", ""):
        depth += (sign == "(") - (sign == ")")
        if depth > MAX_NESTING:
            raise ValueError(
                f'The parentheses in {name} ("{short(text)}") are nested more than {MAX_NESTING} deep: write a '
                "weight as (words:1.2)."
            )
        if depth < 0:
            break
    if depth:
        raise ValueError(
            f'The parentheses in {name} ("{short(text)}") are not balanced. A weight such as (words:1.2) must begin '
            "and end within the identity or within a frame's own words, and cannot enclose [Name]: put the weight into "
            "the identity. Write \\( and \\) for literal parentheses."
        )


def _too_long(lengths: Sequence[int], names: Sequence[str]) -> str:
    """lengths: tokens of the identity and of every frame."""
    alone = lengths[0] > ROOM
    total = lengths[0] if alone else sum(lengths)
    counted = [f"{name} ({in_tokens(n)})" for name, n in zip(names, lengths, strict=True)]
    subject = f"{counted[0]} alone is" if alone else f"{', '.join(counted[:-1])} and {counted[-1]} together are"
    return (
        f"{first_upper(subject)} {in_tokens(total - ROOM)} too long for one prompt ({total} of {ROOM}). Shorten "
        f'{names[0] if alone else "one of them"}, or use "Encode story frame by frame".'
    )


def in_tokens(count: int) -> str:
    """A number of tokens as text: "1 token", "2 tokens"."""
    return f"{count} token{'s' if count != 1 else ''}"


def first_upper(text: str) -> str:
    """The text with its first letter in upper case."""
    return text[0].upper() + text[1:]
