"""The view of one UNet call: which rows belong to which conditioning, and to which frames of a story.

A host calls the UNet with several conditionings stacked along the rows ("chunks"), in any order and split over several
calls as memory allows.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import lcm
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..prompts.conditioning import StoryCond
from .cache import RunCache
from .layout import RowSource
from .rows import Rows, grouped, named_rows

CPU = torch.device("cpu")

KEY = "storyloom"
"""Key of the SamplerCall in the transformer_options of a call."""


@dataclass(frozen=True)
class Conditioning:
    """One conditioning before it is batched.

    story     its story, if any
    length    its own context length
    positive  whether guidance leads towards it or away from it
    area      (height, width, top, left) in latent pixels of the part of the image that it is for, None: all of it
    """

    story: StoryCond | None
    length: int
    positive: bool = True
    area: tuple[int, ...] | None = None


@dataclass(frozen=True, eq=False)
class SamplerCall:
    """One evaluation of the model by a sampler.

    sigma           noise level
    conditionings   by the guider's number and the uuid: for regions the host adds a copy with the same uuid and another
                    context to the guider's other list
    images          batch indices of the images in each chunk; None: the whole batch
    step, steps     number of the run's step at this sigma, and the number of steps
    story           the run's story, beside which conditionings without a story are sampled
    cache           values that patches compute once for the whole run, on any card
    size            height and width of the whole image's latents
    latents         [B, C, height, width] of the evaluation, None: unknown
    contexts        text context [rows, T, D] of each conditioning, as far as it has one
    wrapped         whether another node calls the UNet, in its own way
    taken           rows that were recognised in earlier UNet calls of this evaluation
    """

    sigma: float
    conditionings: Mapping[tuple[int, Any], Conditioning]
    images: tuple[int, ...] | None
    step: int = 0
    steps: int = 1
    story: StoryCond | None = None
    cache: RunCache = field(default_factory=RunCache, repr=False)
    size: tuple[int, int] = (0, 0)
    latents: Tensor | None = field(default=None, repr=False)
    contexts: Mapping[tuple[int, Any], Tensor] = field(default_factory=dict, repr=False)
    wrapped: bool = False
    taken: set[RowSource] = field(default_factory=set, repr=False)


@dataclass(frozen=True)
class Chunk:
    """One conditioning's rows in a UNet call.

    images   batch indices of their images; None: those of the call
    tile     (height, width, top, left) in latent pixels of the part of the image that another node has cut out
    located  whether that part is known
    whole    whether all images of the evaluation are in it
    foreign  whether another node added these rows, with a context of its own
    unknown  whether rows cannot be matched to images and conditionings: patches that need to know raise ValueError
    """

    rows: range
    conditioning: Conditioning
    images: tuple[int, ...] | None = None
    tile: tuple[int, ...] | None = None
    located: bool = True
    whole: bool = True
    foreign: bool = False
    unknown: bool = False

    @property
    def area(self) -> tuple[int, ...] | None:
        """(height, width, top, left) in latent pixels of the part of the image that the rows are, None: all of it."""
        return self.conditioning.area if self.tile is None else self.tile


class IdentityGroup(NamedTuple):
    """Rows of a call with the same identity columns among the first `length` keys (None: among all keys)."""

    rows: Rows
    columns: tuple[int, ...]
    length: int | None


class Image(NamedTuple):
    """The image of a row in a chunk.

    number       in the story, or in the batch when there is no story
    characters   names of the characters in it, None: unknown
    batch_index  in the latent batch
    """

    number: int
    characters: tuple[str, ...] | None
    batch_index: int

    def shares_a_character(self, other: Image) -> bool:
        """Whether a character is in both images. True when the characters of either are unknown."""
        if self.characters is None or other.characters is None:
            return True
        return not set(self.characters).isdisjoint(other.characters)


def batch_images(story: StoryCond | None, indices: Iterable[int]) -> list[Image]:
    """The images at these indices of a batch, of a story or without one."""
    if story is None:
        return [Image(index, None, index) for index in indices]
    return [Image(story.rows[index].frame, story.rows[index].characters, index) for index in indices]


@dataclass(frozen=True, eq=False)
class UNetCall:
    """One call of the UNet. `step`, `steps`, `story`, `cache` and `size` as in SamplerCall.

    images: of an ordinary chunk; device: of its tensors; call_cache: values that patches compute once for this call.
    """

    sigma: float
    chunks: tuple[Chunk, ...]
    images: tuple[int, ...] | None
    step: int = 0
    steps: int = 1
    story: StoryCond | None = None
    cache: RunCache = field(default_factory=RunCache, repr=False)
    size: tuple[int, int] = (0, 0)
    device: torch.device = CPU
    call_cache: RunCache = field(default_factory=RunCache, repr=False)

    @cached_property
    def context_length(self) -> int:
        """Key columns of the call: contexts of different length are repeated to their least common multiple."""
        return lcm(*(chunk.conditioning.length for chunk in self.chunks))

    @property
    def rows(self) -> int:
        return self.chunks[-1].rows.stop

    def cached(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """The value of `make`, computed in the first layer of this call that needs it."""
        return self.call_cache.get_or_make(key, make)

    def cached_by_layout(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """As `cached`, for all calls of the sampling run with the same rows of whole images, on the same device."""
        if any(chunk.tile for chunk in self.chunks):  # tiles may differ in every step
            return self.cached(key, make)
        layout = self.chunks, self.images, self.device
        return self.cached("layout", lambda: self.cache.get_or_make(layout, RunCache)).get_or_make(key, make)

    def cached_for_run(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """As `cached`, for all calls of the sampling run on all cards: a tensor on a card has the card in its key."""
        return self.cache.get_or_make(key, make)

    def images_of(self, chunk: Chunk) -> list[Image]:
        """The images of a chunk's rows: of its own story, else of the run's, else of the batch.

        Raises ValueError when the numbers of rows and images differ.
        """
        if chunk.unknown:
            raise unmatched_rows(len(chunk.rows))
        story = chunk.conditioning.story or self.story
        known = len(chunk.rows) if story is None else len(story.rows)
        indices = self._indices(chunk, known)
        if len(indices) != len(chunk.rows):
            raise unknown_images(len(chunk.rows), len(indices))
        return batch_images(story, indices)

    def _indices(self, chunk: Chunk, known: int) -> Sequence[int]:
        """Batch indices of a chunk's images, out of `known` ones if there is no other way to tell."""
        images = self.images if chunk.images is None else chunk.images
        return range(known) if images is None else images

    def identity_groups(self, cut: bool) -> list[IdentityGroup]:
        """Rows that have identity columns, grouped by these columns.

        cut: for keys cut back to each conditioning's own length. Otherwise for keys as the host makes them, repeated to
        `context_length`: the columns of every repeat.
        """
        return self.cached_by_layout(("identity groups", cut), lambda: self._grouped(cut))

    def rows_without_identity(self) -> Rows | None:
        """Rows of the call that are in no identity group, None when there are none."""
        return self.cached_by_layout("rows without identity", self._without_identity)

    def _grouped(self, cut: bool) -> list[IdentityGroup]:
        known = [(row, columns, own) for row, columns, own in self._columns_by_row() if columns]
        groups = []
        for (columns, own), members in grouped(known, key=lambda member: member[1:]).items():
            rows = named_rows([row for row, *_ in members], self.device)
            if not cut:
                columns = tuple(start + c for start in range(0, self.context_length, own) for c in columns)
            groups.append(IdentityGroup(rows, columns, own if cut else None))
        return groups

    def _without_identity(self) -> Rows | None:
        others = [row for row, columns, _ in self._columns_by_row() if not columns]
        return named_rows(others, self.device) if others else None

    def _columns_by_row(self) -> Iterator[tuple[int, tuple[int, ...], int]]:
        """Every row with its identity columns and its own context length."""
        for chunk in self.chunks:
            if chunk.unknown:
                raise unmatched_rows(len(chunk.rows))
            story = chunk.conditioning.story
            columns = [()] * len(chunk.rows) if story is None else self._identity_columns(chunk)
            for row, own in zip(chunk.rows, columns, strict=True):
                yield row, own, chunk.conditioning.length

    def _identity_columns(self, chunk: Chunk) -> list[tuple[int, ...]]:
        story = chunk.conditioning.story
        images = self._indices(chunk, len(story.rows))
        if len(chunk.rows) == len(images):
            return [story.identity_columns(image) for image in images]
        everywhere = {story.identity_columns(row) for row in range(len(story.rows))}
        if len(everywhere) > 1:
            raise unknown_images(len(chunk.rows), len(story.rows))
        return [*everywhere] * len(chunk.rows)


def unknown_images(rows: int, images: int) -> ValueError:
    return ValueError(
        f"The model is called with {rows} images for a story of {images} frames, so their frames are unknown. "
        "Another node changes the images or their text on the way to the model (tiled sampling?): remove it."
    )


def unmatched_rows(rows: int) -> ValueError:
    return ValueError(
        f"Another node calls the model with {rows} rows that are not those of the batch and its prompts, so their "
        "images are unknown (tiled sampling with changed texts?). Remove that node."
    )
