"""Reads the rows and images of a UNet call from the host's `transformer_options`; the only place that does.

Chunks are identified by the uuid that the host gives every conditioning, never by position or number alone: number 0 is
the positive in one guider and the negative in another. A call that is not all images of each conditioning in turn comes
from another node, and its rows are recognised by their content.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from .cache import RunCache
from .call import KEY, Chunk, Conditioning, SamplerCall, UNetCall
from .layout import RowSource, rows_by_content, spans_of


def window_images(options: Mapping[str, Any], rows: int) -> tuple[int, ...] | None:
    """Batch indices of the images in one evaluation.

    None, which means all of them in order, unless the host slides a context window over the batch. Raises ValueError
    when the numbers of images and rows differ.
    """
    window = options.get("context_window")
    if window is None or window.dim != 0:
        return None
    anchor = getattr(window, "causal_anchor_index", None)
    images = (*([] if anchor is None or anchor < 0 else [anchor]), *window.index_list)
    if len(images) != rows:
        raise ValueError(
            f"A context window over the batch has {len(images)} images but the model is called with {rows}. "
            "Use context windows over the batch (dim 0) without retained latents, or remove the context window node."
        )
    return images


def read_call(options: Mapping[str, Any], latents: Tensor, context: Tensor | None = None) -> UNetCall | None:
    """The view of a UNet call, None when it does not come from a patched sampling run.

    latents: [rows, C, h, w]; context: [rows, T, D] of its text.
    """
    sampler: SamplerCall | None = options.get(KEY)
    if sampler is None:
        return None
    return UNetCall(
        sampler.sigma,
        tuple(_chunks(sampler, options, latents, context)),
        sampler.images,
        sampler.step,
        sampler.steps,
        sampler.story,
        sampler.cache,
        sampler.size,
        latents.device,
    )


def with_added_rows(call: UNetCall, options: Mapping[str, Any], context: Tensor) -> UNetCall:
    """The call as seen by a layer where another node has added rows. context: [rows, T, D] of the text of all its rows.

    Rows with the context of a conditioning belong to it; the others are that node's own.
    """
    sampler: SamplerCall = options[KEY]
    keys = [key for key in _keys(options) if key in sampler.contexts]
    contexts = [sampler.contexts[key] for key in keys]
    everyone = tuple(range(len(sampler.latents))) if sampler.images is None else sampler.images
    kinds = {chunk.images or everyone for chunk in call.chunks}
    images = [everyone.index(image) for image in (*kinds,)[0]] if len(kinds) == 1 else None
    sources = rows_by_content(None, context, sampler.latents, contexts, images)
    tiles = {chunk.tile for chunk in call.chunks}
    tile, located = (*tiles,)[0], len(tiles) == 1 and all(chunk.located for chunk in call.chunks)
    chunks = _recognised(sampler, keys, sources, context.shape[1])
    return replace(
        call,
        chunks=tuple(replace(chunk, tile=tile if located else None, located=located) for chunk in chunks),
        call_cache=RunCache(),
    )


def has_moved_rows(call: UNetCall, options: Mapping[str, Any], context: Tensor) -> bool:
    """Whether another node has put the rows of a layer into another order. context: as in `with_added_rows`.

    False where it has changed the text, so that rows cannot be recognised.
    """
    seen = with_added_rows(call, options, context)
    return not any(chunk.foreign for chunk in seen.chunks) and _assigned(seen) != _assigned(call)


def _assigned(call: UNetCall) -> list[tuple[int, int]]:
    """Conditioning (its id) and image of every row."""
    images = [chunk.images or call.images or range(len(chunk.rows)) for chunk in call.chunks]
    return [(id(chunk.conditioning), i) for chunk, own in zip(call.chunks, images, strict=True) for i in own]


def _keys(options: Mapping[str, Any]) -> list[tuple[int, Any]]:
    """The guider's number and the uuid of each conditioning in a call; of all, if another node has changed the list."""
    numbers, uuids = options["cond_or_uncond"], options["uuids"]
    return [*zip(numbers, uuids, strict=True)] if len(numbers) == len(uuids) else [*options[KEY].conditionings]


def _chunks(sampler: SamplerCall, options: Mapping[str, Any], latents: Tensor, context: Tensor | None) -> list[Chunk]:
    keys, rows, size = _keys(options), len(latents), tuple(latents.shape[-2:])
    images = rows // len(keys) if sampler.latents is None else len(sampler.latents)
    conditionings = [sampler.conditionings.get(key, Conditioning(None, 1, positive=False)) for key in keys]
    counted = rows == len(keys) * images
    fits = all(size == _size(each.area, sampler.size) for each in conditionings)
    if not (counted and fits) or sampler.wrapped:
        chunks = _by_content(sampler, keys, latents, context)
        if chunks is not None:
            return chunks
    if not counted:
        return [Chunk(range(rows), Conditioning(None, 1, positive=False), located=False, unknown=True)]
    return [Chunk(range(i * images, (i + 1) * images), each, located=fits) for i, each in enumerate(conditionings)]


def _by_content(
    sampler: SamplerCall, keys: Sequence[tuple[int, Any]], latents: Tensor, context: Tensor | None
) -> list[Chunk] | None:
    """The chunks of a call, None if a row is not recognised."""
    known = [key for key in keys if key in sampler.contexts]
    if not known or context is None or sampler.latents is None:
        return None
    contexts = [sampler.contexts[key] for key in known]
    sources = rows_by_content(latents, context, sampler.latents, contexts, taken=sampler.taken)
    return None if None in sources else [*_recognised(sampler, known, sources)]


def _recognised(
    sampler: SamplerCall, keys: Sequence[tuple[int, Any]], sources: Sequence[RowSource | None], tokens: int = 1
) -> Iterator[Chunk]:
    """Chunks of rows that were recognised by content. tokens: context length of rows that were not."""
    for span in spans_of(sources):
        if span.conditioning is None:
            yield Chunk(span.rows, Conditioning(None, tokens, positive=False), foreign=True)
            continue
        conditioning = sampler.conditionings[keys[span.conditioning]]
        images = span.images if sampler.images is None else tuple(sampler.images[image] for image in span.images)
        tile = None if span.tile == (*sampler.size, 0, 0) else span.tile
        yield Chunk(span.rows, conditioning, images, tile, span.tile is not None, len(images) == len(sampler.latents))


def _size(area: Sequence[int] | None, whole: tuple[int, int]) -> tuple[int, ...]:
    """Height and width of an area, which the host cuts off at the edge of the image."""
    if area is None:
        return whole
    return tuple(min(side, edge - start) for side, start, edge in zip(area[:2], area[2:], whole, strict=True))


def nearest_step(sigma: float, sigmas: Sequence[float]) -> int:
    """Number of the step whose start is nearest to a sigma; some samplers evaluate between two steps.

    sigmas: where the steps of a run begin.
    """
    return min(range(len(sigmas)), key=lambda step: abs(sigmas[step] - sigma), default=0)
