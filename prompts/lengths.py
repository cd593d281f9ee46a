"""Prompts of different length in one conditioning: how long the common context may become.

A text encoder reads a prompt in chunks of 75 tokens. Contexts of different length are repeated to their least common
multiple, which is exact, but 3, 4, 5 and 7 chunks would become 420.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from .tokens import ROOM, in_tokens

ROWS = ROOM + 2
"""Rows of one chunk: the text between a start and an end token."""

MOST = 24 * ROWS
"""Largest number of rows of the common context: 24 chunks."""

ALWAYS_FITS = 4
"""Prompts of up to so many chunks always fit together: their least common multiple is at most 12."""

SHORT_ENOUGH = 275
"""Tokens that never take more than ALWAYS_FITS chunks; an encoder may leave 7 places empty rather than split a word."""

NAMED = 6
"""Number of frames that an error names."""


class Length(NamedTuple):
    """Length of one frame's prompt: the frame's number from 0, tokens of its text, rows of its context."""

    frame: int
    used: int
    rows: int


def check_lengths(prompts: Sequence[Length]) -> None:
    """Raises ValueError when the prompts of a story's frames have a common context of more than MOST rows."""
    common = math.lcm(*(prompt.rows for prompt in prompts))
    if common <= MOST:
        return
    chunks = sorted({prompt.rows // ROWS for prompt in prompts})
    long = [prompt for prompt in prompts if prompt.rows > ALWAYS_FITS * ROWS]
    named = [f"frame {prompt.frame + 1} ({in_tokens(prompt.used)})" for prompt in long[:NAMED]]
    named += [f"{len(long) - NAMED} more"] if len(long) > NAMED else []
    raise ValueError(
        f"The frames' prompts take {_listed(chunks)} chunks of {ROOM} tokens. One conditioning for all of them would "
        f"need {common} rows of text for each frame; at most {MOST} are possible. Shorten the prompts of "
        f"{_listed(named)} to {SHORT_ENOUGH} tokens or less: up to {ALWAYS_FITS} chunks always fit together."
    )


def _listed(things: Sequence[object]) -> str:
    *first, last = map(str, things)
    return f"{', '.join(first)} and {last}" if first else last
