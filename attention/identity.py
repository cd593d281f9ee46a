"""Identity-preserving cross-attention (IPCA) of One-Prompt-One-Story (arXiv 2501.13554), without its second pass.

The published method samples the identity prompt once more to store its keys and values, and appends those of the start
and identity tokens to every frame's. They depend on the text alone, and the causal text encoders make the identity rows
of the whole story equal to those of the identity prompt. So the stored columns are copies of columns that are there
already: IPCA is ordinary cross-attention in which the identity columns count `weight` times (published: 2).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import torch
from torch import Tensor

from ..prompts.conditioning import StoryCond
from ..prompts.tokens import consecutive
from .blocks import Blocks
from .inner import Inner
from .unet_call import IdentityGroup, UNetCall

Attend = Callable[..., Tensor]

MAX_DENOMINATOR = 16
"""Weights are products of quarters; finer ones are rounded where columns are counted instead of masked."""


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
    One-Prompt-One-Story (arXiv 2501.13554), equation 5 with its stored keys and values. Whole weights for all rows
    alike duplicate the columns (any kernel), others add log(weight) to their logits.
    """
    if weight == 1:
        return attend(q, k, v, heads)
    shared = isinstance(columns, range) or not columns or isinstance(columns[0], int)
    if shared and weight > 1 and weight == int(weight):
        return attend(q, *duplicate_columns(k, v, columns, Fraction(weight)), heads)
    bias = q.new_zeros(1 if shared else len(columns), 1, 1, k.shape[1])
    for row, chosen in enumerate([columns] if shared else columns):
        for run in consecutive(chosen):
            bias[row, ..., run.start : run.stop] = math.log(weight)
    return attend(q, k, v, heads, mask=bias)


def duplicate_columns(k: Tensor, v: Tensor, columns: Sequence[int] | Tensor, weight: Fraction) -> tuple[Tensor, Tensor]:
    """Keys and values in which `columns` count `weight` times as often as the others, exactly and without a mask.

    k, v: [B, T, C]; columns: ascending, for all rows, or a tensor [B, n] with those of each row; weight at least 1. A
    weight p/q repeats these columns p times and all others q times, because softmax does not see a common factor.
    """
    p, q = weight.numerator, weight.denominator

    def chosen(part: Tensor) -> list[Tensor]:
        if isinstance(columns, Tensor):
            return [part.take_along_dim(columns[..., None], dim=1)]
        return [part[:, run.start : run.stop] for run in consecutive(columns)]

    return tuple(torch.cat([part] * q + chosen(part) * (p - q), dim=1) for part in (k, v))


@dataclass(frozen=True, eq=False)
class IdentityPreserving:
    """What an IPCA node asks of a model: the weight, when (percent of the schedule) and in which blocks."""

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

    def hindrance(self, story: StoryCond | None, images: int) -> str | None:
        """Why there is no identity to count in a run, None when there is one."""
        return None if story else "no conditioning comes from a StoryLoom encode node"

    def attend(self, q: Tensor, k: Tensor, v: Tensor, heads: int, call: UNetCall, inner: Inner) -> Tensor:
        """Attention of one layer of one UNet call, acting on the rows of a story's conditioning only.

        q: [rows, N, C]; k, v: [rows, T, C] with the chunks of the call along the rows. Rows are cut back to their own
        context where the host has repeated it, unless other nodes have appended columns or want the whole batch: then
        the identity counts in every repeat, which is the same.
        """
        groups = call.identity_groups(cut=inner.takes_rows and k.shape[1] == call.context_length)
        if not groups:
            return inner(q, k, v, heads)
        out = torch.empty_like(q)
        rest = call.rows_outside(groups)
        if inner.takes_rows:
            if rest is not None:
                out[rest] = inner(q[rest], k[rest], v[rest], heads)
            for rows, columns, length in groups:
                keys, values = k[rows, :length], v[rows, :length]
                out[rows] = identity_cross_attention(q[rows], keys, values, heads, columns, self.weight, inner)
        else:
            if rest is not None:
                out[rest] = inner(q, k, v, heads)[rest]
            weight = Fraction(self.weight).limit_denominator(MAX_DENOMINATOR)
            for together in _by_column_count(groups):
                answer = inner(q, *duplicate_columns(k, v, _columns_of(together, k), weight), heads)
                for rows, _, _ in together:
                    out[rows] = answer[rows]
        return out


def _by_column_count(groups: Sequence[IdentityGroup]) -> list[list[IdentityGroup]]:
    """Groups that one call for the whole batch can serve, because their rows gain equally many columns."""
    by_count: dict[int, list[IdentityGroup]] = {}
    for group in groups:
        by_count.setdefault(len(group.columns), []).append(group)
    return list(by_count.values())


def _columns_of(groups: Sequence[IdentityGroup], k: Tensor) -> Sequence[int] | Tensor:
    """Columns to duplicate for these groups: shared when there is one, else those of each row (others': any)."""
    if len(groups) == 1:
        return groups[0].columns
    columns = torch.tensor(groups[0].columns, device=k.device).repeat(k.shape[0], 1)
    for group in groups:
        columns[group.rows] = torch.tensor(group.columns, device=k.device)
    return columns
