"""Which rows of an encoded prompt belong to which part of the story: counted, never searched for.

Every part of a prompt is tokenized on its own and its length is the number of rows it takes in the joined prompt, so
words that the identity and the frames share, sub-words, punctuation and embeddings all keep the right rows.

A tokenizer here is a function text -> {"l": chunks, "g": chunks}; a chunk is a list of (token, weight, word id), the
word id is 0 for start, end and padding. It is ComfyUI's own SDXL tokenizer with `return_word_ids=True`.
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
"""Tokens of text that one window of the encoders holds, between its start and its end token."""
START, END = 49406, 49407
NESTED = 100
"""How deep parentheses may stand in each other: hosts read one level after the other and give up near 1,000."""
PADDING = {"l": END, "g": 0}
"""Token ids of CLIP's vocabulary: around the text of a window, and what each of SDXL's encoders fills it up with."""


@dataclass(frozen=True)
class StoryTokens:
    """Rows of an encoded prompt. Row 0 is the start token.

    identity  rows of the identity
    frames    rows of every frame's own words, in prompt order
    eot       the first end-of-text row; it and all rows after it up to `length` are end and padding
    length    number of rows
    """

    identity: range
    frames: tuple[range, ...]
    eot: int
    length: int


@dataclass(frozen=True)
class FrameTokens:
    """Rows of one frame's own prompt: as StoryTokens (first description, own words) plus all descriptions."""

    tokens: StoryTokens
    descriptions: tuple[range, ...]


class StoryTooLongError(ValueError):
    """An identity and the frames behind it do not fit into one prompt."""

    __module__ = "storyloom"  # ComfyUI shows it before the message, and would show the path of this file


def count_tokens(tokenize: Tokenize, parts: Sequence[str], names: Sequence[str], *, weights: bool = True) -> list[int]:
    """How many tokens each of these texts takes. names: how errors call them. Raises ValueError as `locate_story`."""
    return [len(words["l"]) for words in _separate(tokenize, parts, names, weights)]


def locate_story(
    tokenize: Tokenize, parts: Sequence[str], names: Sequence[str], *, weights: bool = True
) -> tuple[StoryTokens, Tokens]:
    """Tokenize identity and frames joined by single spaces, and say which rows each of them takes.

    parts: the identity, then the frames; names: how errors call them. weights: whether the tokenizer reads
    "(words:1.2)". Returns the rows and the tokens of the joined text. Raises StoryTooLongError when it takes more than
    one window, ValueError when a part has no tokens, when its parentheses are open, or when CLIP-L and CLIP-G count it
    differently.
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
    """Tokenize one frame's own prompt with the style around it, and say which rows describe its characters.

    Text over 75 tokens takes further windows of 77 rows, as in the stock node. name: how errors call the frame.
    Raises ValueError as `locate_story` does.
    """
    before, after = style
    described: list[range] = []
    own: list[range] = []
    said = [(part.text, own if part.character is None else described) for part in frame.parts]
    text = before + " ".join(words for words, _ in said) + after
    try:
        apart = [(before, []), *said, (after, [])]
        pieces = [(words, kind) for words, kind in apart if words.strip()]
        joined, lengths = _measure(tokenize, [words for words, _ in pieces], [name] * len(pieces), weights, text)
    except _MergedError:  # a frame that ends with "." before a style that begins with ","
        pieces = list(said)
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
    """The same tokens as the text encoders take them: (token, weight)."""
    return {
        key: [[(token, weight) for token, weight, _ in chunk] for chunk in chunks] for key, chunks in tokens.items()
    }


class _MergedError(ValueError):
    """Two parts share a token where they meet."""


def _measure(
    tokenize: Tokenize, parts: Sequence[str], names: Sequence[str], weights: bool, text: str
) -> tuple[Tokens, list[int]]:
    """Tokens of `text`, which is the parts in order, and how many each part takes. names: how errors call the parts."""
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
    """The words of every part, tokenized alone."""
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
    """Ascending row numbers as runs of consecutive ones."""
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
        if depth > NESTED:
            raise ValueError(
                f'The parentheses in {name} ("{short(text)}") are nested more than {NESTED} deep: write a '
                "weight as (words:1.2)."
            )
        if depth < 0:
            break
    if depth:
        raise ValueError(
            f'The parentheses in {name} ("{short(text)}") are not balanced. A weight such as (words:1.2) must begin '
            "and end within the identity or within a frame's own words, and cannot enclose [Name]: put the weight into "
            "the identity. Write \\( and \\) for plain parentheses."
        )


def _too_long(lengths: Sequence[int], names: Sequence[str]) -> str:
    """lengths: tokens of the identity and of every frame."""
    alone = lengths[0] > ROOM
    total = lengths[0] if alone else sum(lengths)
    counted = [f"{name} ({in_tokens(n)})" for name, n in zip(names, lengths, strict=True)]
    told = f"{counted[0]} alone is" if alone else f"{', '.join(counted[:-1])} and {counted[-1]} together are"
    return (
        f"{first_upper(told)} {in_tokens(total - ROOM)} too long for one prompt ({total} of {ROOM}). Shorten "
        f'{names[0] if alone else "one of them"}, or use "Encode story frame by frame".'
    )


def in_tokens(count: int) -> str:
    """A number of tokens in words."""
    return f"{count} token{'s' if count != 1 else ''}"


def first_upper(text: str) -> str:
    """A text as the beginning of a sentence."""
    return text[0].upper() + text[1:]
