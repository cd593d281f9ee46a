"""Training batches: pictures are read, encoded and put together. A batch is a function of the seed and its number."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..batch import Batch
from ..encoders import Cache, Encoders
from .buckets import LONG, SHORT, Plan
from .reading import BadItem, Example, Limits, read_example
from .references import ROTATION, character_picture
from .scan import Index
from .sources import MOST, DataError, Source


@dataclass(frozen=True)
class Share:
    """How the batches of a step are counted. accumulation: batches per step and process; ranks: number of processes;
    rank: this process, which takes every batch whose number is `rank` modulo `ranks`."""

    accumulation: int = 1
    rank: int = 0
    ranks: int = 1


class Batches:
    """Calling it with a step and the number of a batch in that step, over all processes, returns the batch.

    rotation: largest rotation of the characters' crops, in degrees; time_ids: "size" for the sizes that hosts pass in
    drawing, "published" for those of StoryMaker's program, which always has the target 1286 x 960.
    """

    def __init__(
        self,
        source: Source,
        index: Index,
        limits: Limits,
        plan: Plan,
        encoders: Encoders,
        *,
        cache: Cache | None = None,
        share: Share | None = None,
        rotation: float = ROTATION,
        time_ids: str = "size",
    ):
        self.source, self.index, self.limits, self.plan, self.encoders = source, index, limits, plan, encoders
        self.cache, self.share = cache or Cache(None), share or Share()
        self.rotation, self.time_ids = rotation, time_ids
        self.empty = encoders.caption("")
        self._reader = ThreadPoolExecutor(1)
        self._ahead: dict[int, Future[list[Example]]] = {}

    def __call__(self, step: int, micro: int) -> Batch:
        """The batch. Raises DataError if a file has become unreadable since the scan."""
        number = step * self.share.accumulation * self.share.ranks + micro
        examples = self._read_ahead(number)
        random = np.random.default_rng([self.plan.seed, number, 1])
        degrees = random.uniform(-self.rotation, self.rotation, sum(len(example.persons) for example in examples))
        return self._together(self.plan.batch(number), examples, degrees)

    def alone(self, i: int) -> tuple[Example, Batch]:
        """A picture of the index, and a batch of it alone, with references that are not rotated."""
        example = self._example(i)
        return example, self._together((i,), [example], [0.0] * len(example.persons))

    def _together(self, chosen: Sequence[int], examples: Sequence[Example], degrees: Sequence[float]) -> Batch:
        """A batch of these pictures; degrees: the rotation of each person's crop."""
        encoded = [self._encoded(i, example) for i, example in zip(chosen, examples, strict=True)]
        persons = [person for example in examples for person in example.persons]
        crops = [character_picture(person.crop, angle) for person, angle in zip(persons, degrees, strict=True)]
        context, pooled = self.empty
        return Batch(
            latents=torch.stack([each["latents"] for each in encoded]),
            context=torch.stack([each["context"] for each in encoded]),
            pooled=torch.stack([each["pooled"] for each in encoded]),
            time_ids=torch.tensor([self._sizes(example.picture.shape[:2]) for example in examples]),
            empty_context=context[None],
            empty_pooled=pooled[None],
            counts=tuple(len(example.persons) for example in examples),
            masks=_stacked([example.masks for example in examples]),
            id_embeds=torch.stack([person.id_embed for person in persons]),
            face=torch.cat([each["face"] for each in encoded]),
            character=torch.stack([self.encoders.features(crop) for crop in crops]),
            pose=_hints(examples) if self.limits.pose else None,
            crops=torch.stack([person.grid for person in persons]),
        )

    @property
    def own(self) -> range:
        """The pictures that this process encodes for all."""
        return range(self.share.rank, len(self.index.items), self.share.ranks)

    def encode_all(self, progress: Callable[[], None]) -> None:
        """Encode this process's part of the pictures into the cache; training then needs neither VAE nor captions."""
        for i in self.own:
            self._encoded(i, self._example(i))
            progress()

    def _read_ahead(self, number: int) -> list[Example]:
        """The examples of a batch; those of the process's next batch are read meanwhile, in a thread of their own."""
        future = self._ahead.pop(number, None) or self._submit(number)
        following = number + self.share.ranks
        self._ahead = {following: self._ahead.get(following) or self._submit(following)}
        return future.result()

    def _submit(self, number: int) -> Future[list[Example]]:
        return self._reader.submit(lambda: [self._example(i) for i in self.plan.batch(number)])

    def _example(self, i: int) -> Example:
        try:
            return read_example(self.source, self.index.items[i], self.limits)
        except BadItem as fault:
            raise DataError(
                f"{fault.file} was usable when training began, but is not any more: {fault}. Restore it and resume."
            ) from fault

    def _encoded(self, i: int, example: Example) -> dict[str, Tensor]:
        """Latents, context and pooled text of a picture, and the face features of its persons [persons, F, width]."""
        caption = self.index.items[i].caption

        def compute() -> dict[str, Tensor]:
            context, pooled = self.encoders.caption(caption)
            faces = torch.stack([self.encoders.features(person.face) for person in example.persons])
            latents = self.encoders.latents(example.picture)
            return {"latents": latents, "context": context, "pooled": pooled, "face": faces}

        if self.cache.folder is None:
            return compute()
        pictures = [example.picture, *(person.face for person in example.persons)]
        sizes = str([picture.shape for picture in pictures]).encode()
        return self.cache.get(b"\0".join([caption.encode(), sizes, *(p.tobytes() for p in pictures)]), compute)

    def _sizes(self, size: tuple[int, int]) -> list[float]:
        """SDXL's original size, crop corner and target size, each height and width."""
        target = (LONG, SHORT) if self.time_ids == "published" else size
        return [float(value) for value in (*size, 0, 0, *target)]


def _stacked(masks: Sequence[Tensor]) -> Tensor:
    """Masks [persons, h, w] of pictures as [B, 3, h, w], zeros where a person is absent."""
    return torch.stack([torch.cat([each, each.new_zeros(MOST - len(each), *each.shape[1:])]) for each in masks])


def _hints(examples: Sequence[Example]) -> Tensor:
    """Pose pictures as ControlNet hints [B, 3, H, W] in 0..1."""
    return torch.stack([torch.tensor(example.pose).movedim(-1, 0) / 255 for example in examples])
