"""The batched conditioning of a story: one row per frame, and the tag by which model patches recognise it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .tokens import StoryTokens

TAG = "storyloom"
"""Key of the StoryCond in a conditioning's dict, where it is text (`tag.tag_text`)."""

ENCODER_WIDTHS = (768, 1280)
"""Channels of CLIP-L and CLIP-G in SDXL's context."""


@dataclass(frozen=True)
class StoryRow:
    """One row of a story's conditioning.

    frame         number of the frame in the story, from 0
    characters    names of the characters in it ("" is the unnamed one)
    tokens        token rows of the text
    descriptions  token rows that describe the characters, as ranges of consecutive rows
    """

    frame: int
    characters: tuple[str, ...]
    tokens: StoryTokens
    descriptions: tuple[range, ...]


@dataclass(frozen=True)
class StoryCond:
    """Tag of a story's conditioning.

    rows     its rows
    length   its context length; the text of a row repeats every tokens.length
    cast     names of all characters of the whole story in order of appearance, even after rows were removed
    anchors  number of first frames that begin every batch; None: the story was not split into batches
    """

    rows: tuple[StoryRow, ...]
    length: int
    cast: tuple[str, ...] = ()
    anchors: int | None = None

    def identity_columns(self, row: int) -> tuple[int, ...]:
        """Context columns of a row that hold the start token and the identity; empty without characters."""
        tokens, described = self.rows[row].tokens, self.rows[row].descriptions
        own = sorted({0, *(column for run in described for column in run)}) if described else []
        return tuple(start + column for start in range(0, self.length, tokens.length) for column in own)


def per_encoder(hidden: Tensor, edit: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply `edit` ([T, D] -> [T, D]) to each text encoder's part of SDXL's hidden states [T, 2048].

    1280 channels are CLIP-G's alone, as in SDXL's refiner. Other widths are split in the same proportion as SDXL's.
    """
    if hidden.shape[-1] == ENCODER_WIDTHS[1]:
        return edit(hidden)
    first = hidden.shape[-1] * ENCODER_WIDTHS[0] // sum(ENCODER_WIDTHS)
    return torch.cat([edit(hidden[..., :first]), edit(hidden[..., first:])], dim=-1)


def batch_contexts(contexts: Sequence[Tensor]) -> Tensor:
    """Stack contexts [1, T_i, D] of different lengths to [N, lcm(T_i), D] by repeating each along its rows.

    Repeating all rows equally does not change cross-attention; padding with zeros or an empty prompt would.
    """
    length = math.lcm(*(context.shape[1] for context in contexts))
    return torch.cat([context.repeat(1, length // context.shape[1], 1) for context in contexts])
