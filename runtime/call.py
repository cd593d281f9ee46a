"""The view of one UNet call: which rows belong to which conditioning, and what a story says about them.

The only place that learns rows and images from the host's `transformer_options`. A host calls the UNet with several
conditionings stacked along the rows ("chunks"), in any order and split over several calls as memory allows. Chunks are
known by the uuid that the host gives every conditioning, never by their place or number alone: what is 0 in one guider
is the negative in another.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import lcm
from typing import Any, NamedTuple

import torch

from ..prompts.conditioning import StoryCond
from .kept import Kept
from .rows import Rows, grouped, named_rows

CPU = torch.device("cpu")

KEY = "storyloom"
"""Where a SamplerCall travels in the transformer_options of a call."""


@dataclass(frozen=True)
class Conditioning:
    """What is known of one conditioning before it is batched. Equal ones are alike in all of it.

    story     its story, if any
    length    its own context length
    positive  whether it asks for the picture, or is what guidance leads away from
    area      (height, width, top, left) in latent pixels of the part of the picture that it is for, None: all of it
    """

    story: StoryCond | None
    length: int
    positive: bool = True
    area: tuple[int, ...] | None = None


@dataclass(frozen=True, eq=False)
class SamplerCall:
    """One evaluation asked for by a sampler.

    sigma           noise level
    conditionings   by the guider's number and the uuid: for regions the host puts a copy with the same uuid and another
                    context into the guider's other list
    images          numbers, in the latent batch, of the images that a chunk holds; None: of the whole batch
    step, steps     number of the run's step at this noise level, and how many there are
    story           the run's story, which conditionings without one are sampled beside
    kept            what patches have made once for the whole run, whichever card they work on
    size            height and width of the whole picture's latents
    """

    sigma: float
    conditionings: Mapping[tuple[int, Any], Conditioning]
    images: tuple[int, ...] | None
    step: int = 0
    steps: int = 1
    story: StoryCond | None = None
    kept: Kept = field(default_factory=Kept, repr=False)
    size: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Chunk:
    """One conditioning's rows in a UNet call."""

    rows: range
    conditioning: Conditioning


class IdentityGroup(NamedTuple):
    """Rows of a call whose identity stands in the same columns of the first `length` keys (None: of all keys)."""

    rows: Rows
    columns: tuple[int, ...]
    length: int | None


class Image(NamedTuple):
    """What a row of a chunk draws.

    number      of the image in the story, or in the batch where there is none
    characters  who is in it, None: nobody knows
    place       of the image in the batch
    """

    number: int
    characters: tuple[str, ...] | None
    place: int

    def shares_a_character(self, other: Image) -> bool:
        """Whether somebody is in both images, or nobody knows."""
        if self.characters is None or other.characters is None:
            return True
        return not set(self.characters).isdisjoint(other.characters)


def batch_images(story: StoryCond | None, places: Iterable[int]) -> list[Image]:
    """The images at these places of a batch that draws a story, or of any batch."""
    if story is None:
        return [Image(place, None, place) for place in places]
    return [Image(story.rows[place].frame, story.rows[place].characters, place) for place in places]


@dataclass(frozen=True, eq=False)
class UNetCall:
    """One call of the UNet. `images`, `step`, `steps`, `story`, `kept` and `size` as in SamplerCall.

    device: where its tensors are.
    """

    sigma: float
    chunks: tuple[Chunk, ...]
    images: tuple[int, ...] | None
    step: int = 0
    steps: int = 1
    story: StoryCond | None = None
    kept: Kept = field(default_factory=Kept, repr=False)
    size: tuple[int, int] = (0, 0)
    device: torch.device = CPU
    made: Kept = field(default_factory=Kept, repr=False)

    @cached_property
    def context_length(self) -> int:
        """Key columns of the call: conditionings of different length are repeated to their least common multiple."""
        return lcm(*(chunk.conditioning.length for chunk in self.chunks))

    @property
    def rows(self) -> int:
        return self.chunks[-1].rows.stop

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What `make` gives, made for the first layer of this call that asks and kept for the others."""
        return self.made.once(key, make)

    def once_in_a_layout(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """As `once`, kept for all calls of the sampling run whose rows are the same, on the same device."""
        layout = self.chunks, self.images, self.device
        return self.once("layout", lambda: self.kept.once(layout, Kept)).once(key, make)

    def once_in_a_run(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """As `once`, kept for all calls of the sampling run, on all cards: what lies on one has it in its key."""
        return self.kept.once(key, make)

    def images_of(self, chunk: Chunk) -> list[Image]:
        """The images that a chunk's rows draw: of its own story, else of the run's, else of any batch.

        Raises ValueError when it has not as many rows as there are images.
        """
        story = chunk.conditioning.story or self.story
        known = len(chunk.rows) if story is None else len(story.rows)
        places = range(known) if self.images is None else self.images
        if len(places) != len(chunk.rows):
            raise _unknown_images(len(chunk.rows), len(places))
        return batch_images(story, places)

    def identity_groups(self, cut: bool) -> list[IdentityGroup]:
        """Rows that tell of a story's identity, grouped by the key columns that do.

        cut: for keys that are cut back to each conditioning's own length. Otherwise for keys as the host makes them,
        repeated to `context_length`: the columns of every repeat.
        """
        return self.once_in_a_layout(("identity groups", cut), lambda: self._grouped(cut))

    def rows_without_identity(self) -> Rows | None:
        """Rows of the call that are in none of these groups, None when there are none."""
        return self.once_in_a_layout("rows without identity", self._without_identity)

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
        """Every row, its identity's columns and its context's own length."""
        for chunk in self.chunks:
            story = chunk.conditioning.story
            columns = [()] * len(chunk.rows) if story is None else self._identity_columns(chunk)
            for row, own in zip(chunk.rows, columns, strict=True):
                yield row, own, chunk.conditioning.length

    def _identity_columns(self, chunk: Chunk) -> list[tuple[int, ...]]:
        story = chunk.conditioning.story
        images = range(len(story.rows)) if self.images is None else self.images
        if len(chunk.rows) == len(images):
            return [story.identity_columns(image) for image in images]
        everywhere = {story.identity_columns(row) for row in range(len(story.rows))}
        if len(everywhere) > 1:
            raise _unknown_images(len(chunk.rows), len(story.rows))
        return [*everywhere] * len(chunk.rows)


def _unknown_images(rows: int, images: int) -> ValueError:
    return ValueError(
        f"The model is called with {rows} images for a story of {images} frames, so it is unknown which frame is "
        "which. Another node splits or repeats the images (tiled sampling?): remove it."
    )


def window_images(options: Mapping[str, Any], rows: int) -> tuple[int, ...] | None:
    """Numbers, in the latent batch, of the images that one evaluation holds.

    None, which is all of them in order, unless the host slides a context window over the batch. Raises ValueError when
    a window does not have as many images as there are rows.
    """
    window = options.get("context_window")
    if window is None or window.dim != 0:
        return None
    anchor = getattr(window, "causal_anchor_index", None)
    images = (*([] if anchor is None or anchor < 0 else [anchor]), *window.index_list)
    if len(images) != rows:
        raise ValueError(
            f"A context window over the batch names {len(images)} images but the model is called with {rows}. "
            "Use context windows over the batch (dim 0) without retained latents, or remove the context window node."
        )
    return images


def read_call(options: Mapping[str, Any], rows: int, device: torch.device = CPU) -> UNetCall | None:
    """The view of a UNet call with `rows` rows, or None when it was not made by a sampler that StoryLoom follows.

    device: where its tensors are.
    """
    sampler: SamplerCall | None = options.get(KEY)
    if sampler is None:
        return None
    keys = list(zip(options["cond_or_uncond"], options["uuids"], strict=True))
    each = rows // len(keys)
    unknown = Conditioning(None, 1, positive=False)
    chunks = (
        Chunk(range(i * each, (i + 1) * each), sampler.conditionings.get(key, unknown)) for i, key in enumerate(keys)
    )
    return UNetCall(
        sampler.sigma,
        tuple(chunks),
        sampler.images,
        sampler.step,
        sampler.steps,
        sampler.story,
        sampler.kept,
        sampler.size,
        device,
    )


def nearest_step(sigma: float, sigmas: Sequence[float]) -> int:
    """Number of the step that begins nearest to a noise level; some samplers evaluate between two steps.

    sigmas: noise levels at which the steps of a run begin.
    """
    return min(range(len(sigmas)), key=lambda step: abs(sigmas[step] - sigma), default=0)
