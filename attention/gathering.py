"""Attention over gathered keys and values: images that attend to tokens of other images, grouped by their number."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..runtime.chain import Chain
from ..runtime.memory import images_within, in_slices
from ..runtime.rows import Rows, assembled, grouped, named_rows

Attend = Callable[..., Tensor]


class ImageGroup(NamedTuple):
    """Images that attend to the same number of tokens.

    rows  their rows
    keys  [images, n] indices into the flattened [B, N] of the tokens that each attends to, its own first; None: only
          its own
    """

    rows: Rows
    keys: Tensor | None

    def of(self, part: Tensor) -> Tensor:
        """The keys or values that these images attend to. part: [B, N, C] of the whole batch."""
        return part[self.rows] if self.keys is None else part.flatten(0, 1)[self.keys]

    def within(self, limit: int, k: Tensor) -> list[ImageGroup]:
        """These images in slices, so that gathering for each slice takes at most `limit` bytes. k: [B, N, C]."""
        if self.keys is None and isinstance(self.rows, slice):
            return [self]
        images = images_within(limit, _count(self) or k.shape[1], k.shape[2], k.element_size())
        return [ImageGroup(*part) for part in in_slices(self.rows, self.keys, images)]


def group_images(
    subsets: Sequence[Tensor], sources: Sequence[Sequence[int]], tokens: int, device: torch.device, first: int = 0
) -> list[ImageGroup]:
    """Groups of images for consecutive rows of a batch. tokens: N; first: the row of the first image.

    Subsets that are on the device already are concatenated there: nothing is copied to it.
    """
    places = [torch.as_tensor(s, dtype=torch.long, device=device) + (first + j) * tokens for j, s in enumerate(subsets)]
    looking = enumerate(sources, start=first)
    groups = []
    for count, members in grouped(looking, key=lambda member: sum(len(subsets[j]) for j in member[1])).items():
        keys = None
        if count:
            each = ((torch.arange(i * tokens, (i + 1) * tokens, device=device), seen) for i, seen in members)
            keys = torch.stack([torch.cat([own, *(places[j] for j in seen)]) for own, seen in each])
        groups.append(ImageGroup(named_rows([image for image, _ in members], device), keys))
    return groups


def attend_in_groups(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    groups: Sequence[ImageGroup],
    attend: Attend,
    limit: int = sys.maxsize,
) -> Tensor:
    """Attention for every group of images; the groups' rows are all rows of q.

    limit: bytes of keys and values that are gathered at once. A group that needs more is computed in slices, with the
    same result: no image's attention depends on another row. The keys of one image are never split.
    """
    slices = [part for group in groups for part in group.within(limit, k)]
    if len(slices) == 1:
        (group,) = slices
        return attend(q, k, v, heads) if group.keys is None else attend(q, group.of(k), group.of(v), heads)
    parts = ((group.rows, attend(q[group.rows], group.of(k), group.of(v), heads)) for group in slices)
    return assembled(q, parts)


def attend_around(q: Tensor, k: Tensor, v: Tensor, heads: int, groups: Sequence[ImageGroup], inner: Chain) -> Tensor:
    """As attend_in_groups, for an attention that needs the whole batch in every call.

    Rows of other groups attend to repeats of their own tokens meanwhile. An attention that ignores q returns one row
    per value (PAG: the values themselves): it has nothing to share and is called as without the patch. One that records
    is called with the layer's own tokens at the end. Slices would not bound memory here: the whole batch is gathered
    for any number of rows.
    """
    alone = cache(lambda: inner(q, k, v, heads))

    def parts() -> Iterator[tuple[Rows, Tensor]]:
        for count in dict.fromkeys(_count(group) for group in groups):
            together = [group for group in groups if _count(group) == count]
            result = None
            if count:
                batch, tokens = k.shape[:2]
                first = torch.arange(0, batch * tokens, tokens, device=k.device)
                keys = first[:, None] + torch.arange(count, device=k.device) % tokens
                for group in together:
                    keys[group.rows] = group.keys
                everyone = ImageGroup(slice(0, batch), keys)
                result = inner(q, everyone.of(k), everyone.of(v), heads)
            if result is None or result.shape != q.shape:
                result = alone()
            for group in together:
                yield group.rows, result[group.rows]
        inner.settle(q, k, v)

    return assembled(q, parts())


def _count(group: ImageGroup) -> int:
    return 0 if group.keys is None else group.keys.shape[1]
