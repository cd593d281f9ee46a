"""Rows of a UNet call: how they are grouped, and how they are indexed without a copy to the card.

A Python list used as an index becomes a CPU tensor at every use, and the card waits for its upload. Row numbers here
are a slice where they are consecutive, else a LongTensor that is made on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from ..prompts.tokens import consecutive

Rows = slice | Tensor
"""Row numbers of a UNet call: a slice where they are consecutive, else a LongTensor [n] on the call's device."""

Member = TypeVar("Member")


def grouped(members: Iterable[Member], key: Callable[[Member], Hashable]) -> dict[Hashable, list[Member]]:
    """Members by `key`, in the order of their first appearance."""
    groups: dict[Hashable, list[Member]] = {}
    for member in members:
        groups.setdefault(key(member), []).append(member)
    return groups


def named_rows(numbers: Sequence[int], device: torch.device) -> Rows:
    """Ascending row numbers, at least one, as an index for a tensor on this device."""
    first, last = numbers[0], numbers[-1]
    return slice(first, last + 1) if last - first + 1 == len(numbers) else counted_up(numbers, device)


def counted_up(numbers: Sequence[int], device: torch.device) -> torch.LongTensor:
    """Ascending numbers, at least one, as a LongTensor [n] made on the device without a copy."""
    return torch.cat([torch.arange(run.start, run.stop, device=device) for run in consecutive(numbers)])


def assembled(like: Tensor, parts: Iterable[tuple[Rows, Tensor]]) -> Tensor:
    """A tensor shaped like `like`, [rows, ...], from the values of disjoint rows that together are all of them.

    Raises ValueError if a row has no value, so that no result contains memory that nothing has written.
    """
    out, count = torch.empty_like(like), 0
    for rows, values in parts:
        out[rows] = values
        count += len(values)
    if count != len(like):
        raise ValueError(
            f"Attention was computed for {count} of {len(like)} rows: another node has changed the number of rows "
            "(regional prompts?). Remove that node."
        )
    return out
