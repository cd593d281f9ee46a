"""Memory for gathered keys and values: its size, its limit, and how it enters the host's estimate.

Consistent self-attention gathers keys and values [images, keys, C] for one layer at a time, and the number of keys
grows with the number of images: in half precision at 1024 x 1024 it is 100 MiB for four images, 360 for eight, 1360
for sixteen, 5280 for thirty-two. Above GATHER_LIMIT they are gathered for a few images at a time. The host loads as
much of a model as its memory estimate for the batch allows, so this memory is added to the estimate.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import ceil, prod
from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from ..prompts.conditioning import TAG, StoryCond
from ..prompts.tag import tag_of

PREPARE_SAMPLING = "prepare_sampling"
"""ComfyUI's name for the function that estimates a run's memory and loads its models."""

MEMORY_KEY = "storyloom_memory"
"""Key of our wrapper around it."""

GATHER_LIMIT = 256 * 2**20
"""Bytes of keys and values that are gathered at once, or those of one image if that is more. In half precision at
1024 x 1024 that is four images of four, five of eight, three of sixteen, one of thirty-two. A constant, about
ComfyUI's estimate for one image of this size: free memory would differ between runs, and querying it synchronises."""


class Level(NamedTuple):
    """Attention layers of one resolution: their channels, and how often the latents are halved there."""

    channels: int
    halvings: int

    def tokens(self, size: Sequence[int]) -> int:
        """Tokens of an image. size: height and width of its latents."""
        return prod(ceil(side / 2**self.halvings) for side in size)


def gathered_bytes(images: int, keys: int, channels: int, itemsize: int) -> int:
    """Bytes of keys and values, [images, keys, channels] each. itemsize: bytes per element."""
    return 2 * images * keys * channels * itemsize


def images_within(limit: int, keys: int, channels: int, itemsize: int) -> int:
    """Number of images whose keys and values fit `limit` bytes; at least 1, since one image is never split."""
    return max(1, limit // gathered_bytes(1, keys, channels, itemsize))


def in_slices(rows: slice | Tensor, keys: Tensor | None, images: int) -> list[tuple[slice | Tensor, Tensor | None]]:
    """Rows, and their keys [rows, n] if any, in slices of `images` rows."""
    if isinstance(rows, slice):
        parts = [slice(first, min(first + images, rows.stop)) for first in range(rows.start, rows.stop, images)]
    else:
        parts = rows.split(images)
    return [*zip(parts, [None] * len(parts) if keys is None else keys.split(images), strict=True)]


def most_gathered(
    sources: Iterable[int], levels: Iterable[Level], rate: float, size: Sequence[int], itemsize: int, whole: bool
) -> int:
    """Most bytes that a layer gathers at once.

    sources: for each image, the number of images that it attends to (0 gathers nothing); rate: fraction of their
    tokens; size: height and width of the latents; whole: all images at once instead of those that fit GATHER_LIMIT.
    """
    groups = Counter(sources)
    images = groups.total()
    most = 0
    for level, (others, together) in product(levels, groups.items()):
        tokens = level.tokens(size)
        layer = tokens + others * int(rate * tokens), level.channels, itemsize
        if others:
            together = images if whole else min(together, images_within(GATHER_LIMIT, *layer))
            most = max(most, gathered_bytes(together, *layer))
    return most


@runtime_checkable
class Gathering(Protocol):
    """A patch with which images attend to each other."""

    def warning(self, story: StoryCond | None) -> str | None:
        """The conflict between its settings and the story of a run, None when they agree."""

    def gathers(self, story: StoryCond | None, images: int, size: Sequence[int], itemsize: int, whole: bool) -> int:
        """Most bytes that a layer gathers at once for one conditioning of a run.

        size: height and width of its latents; whole: another node's attention gets the whole batch in every call.
        """


@dataclass(frozen=True, eq=False)
class MemoryWrapper:
    """PREPARE_SAMPLING wrapper: makes the host reserve the memory that patches gather, by estimating a wider image.

    Like core's context windows, it changes the noise shape, which the host uses only for its estimate. It changes the
    width, because context windows of another node change the batch, before or after.
    """

    patches: tuple[Gathering, ...]

    def __call__(self, executor, model, noise_shape: Sequence[int], conds, *args, model_options=None, **kwargs):
        images, *rest = noise_shape
        window = (model_options or {}).get("context_handler")
        if window is not None and window.dim == 0:
            images = min(images, window.context_length)
        itemsize, whole = model.model.get_dtype_inference().itemsize, _is_owned(model_options or {})
        story = next((s for s in _stories(conds) if len(s.rows) == images), None)
        more = max(patch.gathers(story, images, rest[-2:], itemsize, whole) for patch in self.patches)
        if more:
            *rest, width = rest
            estimate = model.model.memory_required([images, *rest, width])
            noise_shape = [noise_shape[0], *rest, ceil(width * (1 + more / estimate))]
        return executor(model, noise_shape, conds, *args, model_options=model_options, **kwargs)


def _is_owned(model_options: Mapping[str, Any]) -> bool:
    """Whether another node replaces self-attention somewhere."""
    return bool(model_options.get("transformer_options", {}).get("patches_replace", {}).get("attn1"))


def _stories(conds: Mapping[str, Iterable[Mapping[str, Any]]]) -> Iterable[StoryCond]:
    return (tag_of(cond) for group in conds.values() for cond in group if TAG in cond)
