"""The tag of a story's conditioning as text, and how to read it.

ComfyUI's Save Conditioning accepts only tensors, numbers and strings in a conditioning's dict, so the tag is stored as
compact JSON. Within a run it may be the `StoryCond` itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

from .conditioning import TAG, StoryCond, StoryRow
from .tokens import StoryTokens

VERSION = 1
"""Of the text; it changes when older versions of the pack could not read the tag any more."""

LARGEST = 1_000_000
"""Largest number in a tag: far above the limits of scripts and contexts."""


def tag_text(story: StoryCond) -> str:
    """A story's tag as text, which `read_tag` reads."""
    rows = [
        [row.frame, row.characters, *_spans([row.tokens.identity]), _spans(row.tokens.frames)]
        + [row.tokens.eot, row.tokens.length, _spans(row.descriptions)]
        for row in story.rows
    ]
    content = {"version": VERSION, "length": story.length, "cast": story.cast, "anchors": story.anchors, "rows": rows}
    return json.dumps(content, separators=(",", ":"))


@lru_cache(maxsize=64)
def read_tag(text: str) -> StoryCond:
    """The story of a tag's text. Raises ValueError for any other text."""
    try:
        return _story(**json.loads(text))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(
            "The conditioning has a story tag that this version of StoryLoom cannot read: it was saved by a newer "
            "version, or its file is damaged. Update StoryLoom, or encode the story again."
        ) from error


def tag_of(info: Mapping[str, Any]) -> StoryCond | None:
    """The story in a conditioning's dict, None without one. Raises ValueError as `read_tag` does."""
    tag = info.get(TAG)
    return tag if tag is None or isinstance(tag, StoryCond) else read_tag(str(tag))


def story_of(cond: Mapping[str, Any]) -> StoryCond | None:
    """The story of a conditioning that is not encoded for the UNet yet; None also when its context is all zeros."""
    context = cond.get("cross_attn")
    return tag_of(cond) if TAG in cond and context is not None and context.any() else None


def _story(version: Any, length: Any, cast: Any, anchors: Any, rows: Any) -> StoryCond:
    _require(version == VERSION and isinstance(rows, list) and rows)
    anchors = None if anchors is None else _number(anchors)
    story = StoryCond(tuple(_row(*row) for row in rows), _number(length, least=1), _names(cast), anchors)
    _require(all(story.length % row.tokens.length == 0 for row in story.rows))
    return story


def _row(frame: Any, characters: Any, identity: Any, frames: Any, eot: Any, length: Any, descriptions: Any) -> StoryRow:
    length = _number(length, least=1)
    tokens = StoryTokens(_span(identity, length), _ranges(frames, length), _number(eot, length), length)
    return StoryRow(_number(frame), _names(characters), tokens, _ranges(descriptions, length))


def _spans(rows: Iterable[range]) -> list[list[int]]:
    return [[span.start, span.stop] for span in rows]


def _ranges(value: Any, most: int) -> tuple[range, ...]:
    _require(isinstance(value, list))
    return tuple(_span(span, most) for span in value)


def _span(value: Any, most: int) -> range:
    start, stop = value
    return range(_number(start, most), _number(stop, most, least=start))


def _number(value: Any, most: int = LARGEST, least: int = 0) -> int:
    _require(type(value) is int and least <= value <= most)
    return value


def _names(value: Any) -> tuple[str, ...]:
    _require(isinstance(value, list) and all(isinstance(name, str) for name in value))
    return tuple(value)


def _require(valid: Any) -> None:
    if not valid:
        raise ValueError
