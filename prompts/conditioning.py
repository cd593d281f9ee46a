"""The batched conditioning of a story: one row per frame, and the tag by which model patches know it again."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .tokens import StoryTokens

TAG = "storyloom"
"""Key of the StoryCond in a conditioning's dict."""

ENCODER_WIDTHS = (768, 1280)
"""Columns of CLIP-L and of CLIP-G in SDXL's context."""


@dataclass(frozen=True)
class StoryRow:
    """What one row of a story's conditioning holds.

    frame         number of the frame in the story, from 0
    characters    names of the characters in it ("" is the unnamed one)
    tokens        the rows of the text
    descriptions  rows that describe the characters, as runs of consecutive rows
    """

    frame: int
    characters: tuple[str, ...]
    tokens: StoryTokens
    descriptions: tuple[range, ...]


@dataclass(frozen=True)
class StoryCond:
    """Tag of a story's conditioning.

    rows     what its rows hold
    length   its context length; a row's own text repeats every tokens.length
    cast     names of all characters of the story as they appear one after the other, in whichever rows are left of it
    anchors  how many of the story's first frames begin every batch of it; None: it was not split into batches
    """

    rows: tuple[StoryRow, ...]
    length: int
    cast: tuple[str, ...] = ()
    anchors: int | None = None

    def identity_columns(self, row: int) -> tuple[int, ...]:
        """Context columns of a row that hold the start token and the identity; empty for a frame without anybody."""
        tokens, described = self.rows[row].tokens, self.rows[row].descriptions
        own = sorted({0, *(column for run in described for column in run)}) if described else []
        return tuple(start + column for start in range(0, self.length, tokens.length) for column in own)


def per_encoder(hidden: Tensor, edit: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply `edit` ([T, D] -> [T, D]) to each text encoder's part of SDXL's hidden states [T, 2048].

    Encoders of other widths in the same proportion are split likewise.
    """
    first = hidden.shape[-1] * ENCODER_WIDTHS[0] // sum(ENCODER_WIDTHS)
    return torch.cat([edit(hidden[..., :first]), edit(hidden[..., first:])], dim=-1)


def batch_contexts(contexts: Sequence[Tensor]) -> Tensor:
    """Stack contexts [1, T_i, D] of different length to [N, lcm(T_i), D] by repeating each along its rows.

    Cross-attention gives every copy of a row the same share, so repetition changes nothing; padding with zeros or with
    an empty prompt would.
    """
    length = math.lcm(*(context.shape[1] for context in contexts))
    return torch.cat([context.repeat(1, length // context.shape[1], 1) for context in contexts])
