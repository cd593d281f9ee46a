"""Recognises the rows of a UNet call by their content, where another node calls the UNet in its own way.

A sampler calls the UNet with all images of one conditioning after another. Nodes for tiled or low-memory sampling call
it with parts of the image, with several parts at a time, or row by row. They cut and repeat tensors but do not change
them, so a row's text context is equal to that of one conditioning and image, and its latents are an exact part of the
latents that the sampler passed in. The comparison waits for the device; ordinary calls need none.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor


class RowSource(NamedTuple):
    """Where a row comes from.

    conditioning   number of its conditioning
    image          number of its image among those that the sampler passed in
    tile           (height, width, top, left) of its part of the image in latent pixels; None: unknown
    """

    conditioning: int
    image: int
    tile: tuple[int, int, int, int] | None


class RowSpan(NamedTuple):
    """Consecutive rows with the same conditioning and the same part of the image, None: of another node."""

    rows: range
    conditioning: int | None
    images: tuple[int, ...]
    tile: tuple[int, int, int, int] | None


def rows_by_content(
    latents: Tensor | None,
    context: Tensor,
    whole: Tensor,
    contexts: Sequence[Tensor],
    images: Sequence[int] | None = None,
    taken: set[RowSource] | None = None,
) -> list[RowSource | None]:
    """The source of every row, None for a row with a context that no conditioning has.

    latents: [R, C, h, w] of the rows, None: unknown, so that the contexts alone decide; context: [R, T, D] of the rows;
    whole: [B, C, H, W] as passed in by the sampler; contexts: [1 or more, T, D] of each conditioning, which the host
    repeats along the rows up to B, and along the tokens; images: those of each conditioning's rows, None: all B in
    order; taken: sources of earlier rows of the same evaluation, to which these are added. Where several sources are
    possible, as with equal noise and text, the next one in order that is not taken is assumed.
    """
    taken = set() if taken is None else taken
    images = range(len(whole)) if images is None else images
    texts = torch.stack([_equal_contexts(context, known, len(whole)) for known in contexts], dim=1).tolist()
    places = [{} for _ in texts] if latents is None else _places(latents, whole)
    sources = []
    for row, (known, where) in enumerate(zip(texts, places, strict=True)):
        possible = [
            (number, image)
            for number, equal in enumerate(known)
            for image in images
            if equal[image] and (image in where or not where)
        ]
        expected = row // len(images) % len(contexts), images[row % len(images)]
        each = [RowSource(*one, (*latents.shape[-2:], *where[one[1]]) if one[1] in where else None) for one in possible]
        order = partial(_order, expected, taken)
        sources.append(min(each, key=order, default=None))
        taken.update(sources[-1:])
    return sources


def _order(expected: tuple[int, int], taken: set[RowSource], source: RowSource) -> tuple:
    """Sort key of the possible sources of a row: the best first."""
    number, image = expected
    return source in taken, source.image != image, source.conditioning != number, source[:2]


def spans_of(sources: Sequence[RowSource | None]) -> list[RowSpan]:
    """Spans of rows with one conditioning and one part of the image, in which no image occurs twice."""
    spans: list[RowSpan] = []
    kinds = groupby(enumerate(sources), key=lambda each: each[1] and (each[1].conditioning, each[1].tile))
    for kind, members in kinds:
        numbered = list(members)
        if kind is None:
            spans.append(RowSpan(range(numbered[0][0], numbered[-1][0] + 1), None, (), None))
            continue
        part: list[tuple[int, RowSource]] = []
        for member in [*numbered, None]:
            if part and (member is None or member[1].image in {source.image for _, source in part}):
                images = tuple(source.image for _, source in part)
                spans.append(RowSpan(range(part[0][0], part[-1][0] + 1), kind[0], images, kind[1]))
                part = []
            if member is not None:
                part.append(member)
    return spans


def _equal_contexts(context: Tensor, known: Tensor, images: int) -> Tensor:
    """Whether each row has a conditioning's context for each image, [R, B]."""
    tokens = known.shape[1]
    if context.shape[1] % tokens or context.shape[2] != known.shape[2]:
        return context.new_zeros(len(context), images, dtype=torch.bool)
    known = known.to(context)
    equal = torch.stack([(context[:, :tokens] == row).flatten(1).all(1) for row in known], dim=1)
    return equal[:, [image % len(known) for image in range(images)]]


def _places(latents: Tensor, whole: Tensor) -> list[dict[int, tuple[int, int]]]:
    """For every row the images that contain its latents, each with (top, left) of the first place."""
    height, width = latents.shape[-2:]
    rows, columns = whole.shape[-2] - height + 1, whole.shape[-1] - width + 1
    found: list[dict[int, tuple[int, int]]] = [{} for _ in latents]
    if rows < 1 or columns < 1 or latents.shape[1] != whole.shape[1]:
        return found
    whole = whole.to(latents)
    equal = latents.new_ones(len(latents), len(whole), rows, columns, dtype=torch.bool)
    corners = [(0, 0), (0, width - 1), (height - 1, 0), (height - 1, width - 1), (height // 2, width // 2)]
    for y, x in dict.fromkeys(corners):
        for channel in range(whole.shape[1]):
            there = whole[:, channel, y : y + rows, x : x + columns]
            equal &= there[None] == latents[:, channel, y, x, None, None, None]
    for row, image, top, left in equal.nonzero().tolist():
        found[row].setdefault(image, (top, left))
    return found
