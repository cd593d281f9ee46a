"""Captions as lines: cleaned, wrapped at a width in pixels, truncated with an ellipsis."""

from __future__ import annotations

import bisect
import math
import unicodedata
from collections.abc import Iterator
from itertools import islice

from .fonts import Typeface, clusters

MAX_LINES = 6
NOT_FIRST = frozenset(
    "\u3001\u3002\uff0c\uff0e\u30fb\uff1a\uff1b\uff1f\uff01"  # punctuation
    "\u30fc\u301c\u2026\u2025\u3005"  # marks that lengthen or repeat
    "\u2019\u201d\uff09\uff3d\uff5d\u3015\u3009\u300b\u300d\u300f\u3011"  # closing quotation marks and brackets
    "\u3041\u3043\u3045\u3047\u3049\u3063\u3083\u3085\u3087\u308e"  # small hiragana
    "\u30a1\u30a3\u30a5\u30a7\u30a9\u30c3\u30e3\u30e5\u30e7\u30ee\u30f5\u30f6"  # small katakana
    ",.:;!?)]}%"
)
"""Characters that must not begin a line in Chinese or Japanese."""
NOT_LAST = frozenset("\uff08\uff3b\uff5b\u3014\u3008\u300a\u300c\u300e\u3010\u2018\u201c([{")
"""Characters that must not end one."""


def clean(text: str) -> str:
    """The text without control characters and surrogates, with uniform line breaks."""
    text = "\n".join(text.splitlines()).strip()
    return "".join(" " if unicodedata.category(c) in ("Cc", "Cs") and c != "\n" else c for c in text)


def wrap(text: str, typeface: Typeface, width: int, most: int = MAX_LINES) -> list[str]:
    """Lines of a text, at most `width` pixels wide; a text of more than `most` lines is truncated with an ellipsis.

    Line breaks are kept. Lines break at spaces, and between characters in Chinese and Japanese unless their typography
    forbids it. A longer word is broken anywhere, but not inside a cluster.
    """
    if not text:
        return []
    lines = list(islice(_lines(text, typeface, width), most + 1))
    if len(lines) > most:
        ellipsis = typeface.printable("…")
        last = clusters(lines[most - 1])
        while last and typeface.length("".join(last) + ellipsis) > width:
            last.pop()
        lines[most - 1 :] = ["".join(last).rstrip() + ellipsis]
    return lines


def line_height(size: int) -> int:
    """Line height in pixels for a font size."""
    return math.ceil(1.25 * size)


def padding(size: int) -> int:
    """Pixels between a text and the edges of its band."""
    return math.ceil(0.5 * size)


def band(lines: int, size: int) -> int:
    """Height in pixels of the space for a number of lines, 0 for none."""
    return lines * line_height(size) + 2 * padding(size) if lines else 0


def fitting_lines(height: int, size: int) -> int:
    """Number of lines that fit into a height: at least 1, at most MAX_LINES."""
    return min(MAX_LINES, max(1, (height - 2 * padding(size)) // line_height(size)))


def _lines(text: str, typeface: Typeface, width: int) -> Iterator[str]:
    for paragraph in text.split("\n"):
        line = ""
        for piece, glued in _pieces(paragraph):
            longer = f"{line}{piece}" if glued or not line else f"{line} {piece}"
            if typeface.length(longer) <= width:
                line = longer
                continue
            if line:
                yield line
            rest = clusters(piece)
            while typeface.length("".join(rest)) > width and len(rest) > 1:
                cut = _fitting(rest, typeface, width)
                yield "".join(rest[:cut])
                rest = rest[cut:]
            line = "".join(rest)
        yield line


def _pieces(paragraph: str) -> Iterator[tuple[str, bool]]:
    """The unbreakable pieces of a paragraph, and whether each follows the previous one without a space."""
    for word in paragraph.split():
        piece, glued = "", False
        for cluster in clusters(word):
            if piece and _may_break(piece[-1], cluster[0]):
                yield piece, glued
                piece, glued = "", True
            piece += cluster
        yield piece, glued


def _may_break(before: str, after: str) -> bool:
    return (_ideographic(before) or _ideographic(after)) and before not in NOT_LAST and after not in NOT_FIRST


def _ideographic(c: str) -> bool:
    """Whether a line may break next to a character: wide ones, except Korean, which is written with spaces."""
    return unicodedata.east_asian_width(c) in "WF" and not "\uac00" <= c <= "\ud7a3"


def _fitting(parts: list[str], typeface: Typeface, width: int) -> int:
    counts = range(1, min(len(parts), width) + 1)
    return max(1, bisect.bisect_right(counts, width, key=lambda count: typeface.length("".join(parts[:count]))))
