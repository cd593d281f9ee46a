"""Sizes of training pictures, and which pictures each batch contains.

Pictures of one batch have one size. An epoch contains every picture, some several times; its batches are a function of
the seed and the epoch's number, so that a resumed run sees the same ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

MULTIPLE = 64
"""Sides are multiples of this many pixels."""
SHORT, LONG = 960, 1286
"""Largest short and long side in pixels, as in StoryMaker's training."""
REPEATS = (1, 2, 5)
"""How many times an epoch contains a picture with one, two and three persons."""


def size_for(height: int, width: int, short: int = SHORT, long: int = LONG) -> tuple[int, int] | None:
    """Height and width for training, or None if the picture is too narrow.

    The picture is scaled, up or down, until its short side is `short` or its long side is `long`, whichever is smaller;
    each side is then rounded down to a multiple of 64.
    """
    small, large = min(height, width), max(height, width)
    over, under = (short, small) if short * large <= long * small else (long, large)
    size = tuple(side * over // under // MULTIPLE * MULTIPLE for side in (height, width))
    return size if min(size) else None


class Plan:
    """The pictures of every batch, by the batch's number.

    sizes    height and width of each picture
    persons  number of persons in each picture
    """

    def __init__(
        self,
        sizes: Sequence[tuple[int, int]],
        persons: Sequence[int],
        batch_size: int,
        seed: int,
        repeats: Sequence[int] = REPEATS,
    ):
        self.batch_size, self.seed = batch_size, seed
        self.buckets: dict[tuple[int, int], list[int]] = {}
        for number, (size, count) in enumerate(zip(sizes, persons, strict=True)):
            self.buckets.setdefault(size, []).extend([number] * repeats[count - 1])
        self.length = sum(-(-len(bucket) // batch_size) for bucket in self.buckets.values())
        """Number of batches in an epoch."""
        self.epoch = lru_cache(maxsize=2)(self._epoch)

    def batch(self, number: int) -> tuple[int, ...]:
        """Indices of the pictures in a batch; numbers count on through all epochs."""
        return self.epoch(number // self.length)[number % self.length]

    def _epoch(self, epoch: int) -> list[tuple[int, ...]]:
        """The batches of an epoch. A bucket's last batch is filled from the bucket's beginning."""
        random, batches = np.random.default_rng([self.seed, epoch]), []
        for bucket in self.buckets.values():
            order = [bucket[i] for i in random.permutation(len(bucket))]
            for first in range(0, len(order), self.batch_size):
                batches.append(tuple(order[(first + i) % len(order)] for i in range(self.batch_size)))
        return [batches[i] for i in random.permutation(len(batches))]
