"""Identity-preserving cross-attention (IPCA) of One-Prompt-One-Story (arXiv 2501.13554), without its second pass.

The published method samples the identity prompt once more to store its keys and values, and appends those of the start
and identity tokens to every frame's. They depend on the text alone, and the causal text encoders make the identity rows
of the whole story equal to those of the identity prompt. So the stored columns are copies of columns that are there
already: IPCA is ordinary cross-attention in which the identity columns count `weight` times (published: 2).

This holds because reweighting leaves the identity rows as they are. If the identity is enhanced as well
(`SVRSettings.enhance_identity`), they differ from the identity prompt's and between frames. IPCA then counts each
frame's own, enhanced columns; the published second pass would have added the columns of the plain identity prompt.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial

import torch
from torch import Tensor

from ..prompts.conditioning import StoryCond
from ..prompts.tokens import consecutive
from ..runtime.blocks import Blocks
from ..runtime.call import IdentityGroup, UNetCall
from ..runtime.chain import Chain
from ..runtime.rows import Rows, assembled, counted_up, grouped, named_rows

Attend = Callable[..., Tensor]

COUNTED_DENOMINATOR = 4
"""Weights in quarters repeat columns, because a mask rules out the fast kernels. Finer weights use a mask."""

MAX_DENOMINATOR = 16
"""Weights are products of quarters; finer ones are rounded where a mask is not possible."""


def identity_cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    columns: Sequence[int] | Sequence[Sequence[int]],
    weight: float,
    attend: Attend,
) -> Tensor:
    """Cross-attention in which some key columns count `weight` times before normalisation.

    q: [B, N, C]; k, v: [B, T, C]; columns: the columns for all rows, or one sequence of columns per row, for example
    `range(0, 1 + identity length)`, ascending; weight: above 0, 1 is ordinary attention.
    attend(q, k, v, heads, mask=None) -> [B, N, C].
    One-Prompt-One-Story (arXiv 2501.13554), equation 5 with its stored keys and values. Weights above 1 in quarters
    repeat columns (any kernel), others add log(weight) to their logits. Rows with equal columns share a call.
    """
    if weight == 1 or not columns:
        return attend(q, k, v, heads)
    if not isinstance(columns, range) and not isinstance(columns[0], int):
        together = grouped(range(len(columns)), key=lambda row: tuple(columns[row]))
        named = ((named_rows(numbers, q.device), own) for own, numbers in together.items())
        parts = (
            (rows, identity_cross_attention(q[rows], k[rows], v[rows], heads, own, weight, attend))
            for rows, own in named
        )
        return assembled(q, parts)
    exact = Fraction(weight)
    if exact > 1 and exact.denominator <= COUNTED_DENOMINATOR:
        return attend(q, *duplicate_columns(k, v, columns, exact), heads)
    bias = q.new_zeros(1, 1, 1, k.shape[1])
    for run in consecutive(columns):
        bias[..., run.start : run.stop].fill_(math.log(weight))
    return attend(q, k, v, heads, mask=bias)


def duplicate_columns(k: Tensor, v: Tensor, columns: Sequence[int] | Tensor, weight: Fraction) -> tuple[Tensor, Tensor]:
    """Keys and values in which `columns` count `weight` times as much as the others, exactly and without a mask.

    k, v: [B, T, C]; columns: ascending, for all rows, or a tensor [B, n] with those of each row; weight at least 1. A
    weight p/q repeats these columns p times and all others q times: a common factor cancels in the softmax.
    """
    p, q = weight.numerator, weight.denominator

    def chosen(part: Tensor) -> list[Tensor]:
        if isinstance(columns, Tensor):
            return [part.take_along_dim(columns[..., None], dim=1)]
        return [part[:, run.start : run.stop] for run in consecutive(columns)]

    return tuple(torch.cat([part] * q + chosen(part) * (p - q), dim=1) for part in (k, v))


@dataclass(frozen=True, eq=False)
class IdentityPreserving:
    """Settings of an IPCA node: the weight, when it acts (percent of the schedule) and in which blocks."""

    weight: float
    start_percent: float
    end_percent: float
    blocks: Blocks
    name = "Identity-preserving cross-attention"
    slot = "attn2"
    adds = False
    skip_first_steps = 0

    @property
    def neutral(self) -> bool:
        return self.weight == 1

    def combine(self, other: object) -> IdentityPreserving | None:
        """Two IPCA nodes on one layer at one time: their weights multiply."""
        if not isinstance(other, IdentityPreserving):
            return None
        return replace(self, weight=self.weight * other.weight)

    def no_effect_reason(self, story: StoryCond | None, images: int) -> str | None:
        """Why a run has no identity columns, None when it has some."""
        return None if story else "no conditioning comes from a StoryLoom encode node"

    def attend(self, q: Tensor, k: Tensor, v: Tensor, heads: int, call: UNetCall, inner: Chain) -> Tensor:
        """Cross-attention of one layer of one UNet call; only rows of a story's conditioning change.

        q: [rows, N, C]; k, v: [rows, T, C] with the chunks of the call along the rows. Rows are cut back to their own
        context where the host has repeated it, unless other nodes have appended columns or need the whole batch: then
        the identity counts in every repeat, which is equivalent.
        """
        groups = call.identity_groups(cut=inner.takes_rows and k.shape[1] == call.context_length)
        if not groups:
            return inner(q, k, v, heads)
        parts = self._in_rows if inner.takes_rows else self._in_whole_batches
        return assembled(q, parts(q, k, v, heads, call, inner, groups))

    def _in_rows(
        self, q: Tensor, k: Tensor, v: Tensor, heads: int, call: UNetCall, inner: Chain, groups: list[IdentityGroup]
    ) -> Iterator[tuple[Rows, Tensor]]:
        rest = call.rows_without_identity()
        if rest is not None:
            yield rest, inner(q[rest], k[rest], v[rest], heads)
        for rows, columns, length in groups:
            keys, values = k[rows, :length], v[rows, :length]
            yield rows, identity_cross_attention(q[rows], keys, values, heads, columns, self.weight, inner)

    def _in_whole_batches(
        self, q: Tensor, k: Tensor, v: Tensor, heads: int, call: UNetCall, inner: Chain, groups: list[IdentityGroup]
    ) -> Iterator[tuple[Rows, Tensor]]:
        rest = call.rows_without_identity()
        if rest is not None:
            yield rest, inner(q, k, v, heads)[rest]
        weight = Fraction(self.weight).limit_denominator(MAX_DENOMINATOR)
        for count, together in grouped(groups, key=lambda group: len(group.columns)).items():
            columns = call.cached_by_layout(("columns", count), partial(_columns_of, together, call))
            result = inner(q, *duplicate_columns(k, v, columns, weight), heads)
            for rows, _, _ in together:
                yield rows, result[rows]
        inner.settle(q, k, v)


def _columns_of(groups: Sequence[IdentityGroup], call: UNetCall) -> Sequence[int] | Tensor:
    """Columns to duplicate in one call for the whole batch, for groups with the same number of columns.

    One sequence when there is one group, else a tensor [rows, n] with those of each row (arbitrary for other rows).
    """
    if len(groups) == 1:
        return groups[0].columns
    columns = counted_up(groups[0].columns, call.device).repeat(call.rows, 1)
    for group in groups[1:]:
        columns[group.rows] = counted_up(group.columns, call.device)
    return columns
