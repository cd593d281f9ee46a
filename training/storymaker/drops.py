"""What a training step leaves out, so that guidance, face-only and outfit modes work (StoryMaker, arXiv 2409.12576)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Drops:
    """Probabilities. A picture loses its text, its references, or both; these three exclude each other.

    face, appearance: of each character alone, independently, that its face or its appearance tokens are multiplied by 0
    before the character embeddings are added. The defaults are the paper's; its program drops the text in 20 %.
    """

    text: float = 0.10
    picture: float = 0.05
    both: float = 0.05
    face: float = 0.10
    appearance: float = 0.10


NOTHING = Drops(0, 0, 0, 0, 0)


@dataclass(frozen=True, eq=False)
class Dropped:
    """text, picture: booleans [B], True where dropped; face, appearance: factors [M], 0 or 1."""

    text: Tensor
    picture: Tensor
    face: Tensor
    appearance: Tensor


def drawn(drops: Drops, counts: Sequence[int], generator: torch.Generator) -> Dropped:
    """What a batch loses, from a generator on the CPU. counts: number of characters of each picture."""
    which = torch.rand(len(counts), generator=generator)
    face, appearance = torch.rand(2, sum(counts), generator=generator)
    only_picture, both = drops.text + drops.picture, drops.text + drops.picture + drops.both
    return Dropped(
        text=(which < drops.text) | ((which >= only_picture) & (which < both)),
        picture=(which >= drops.text) & (which < both),
        face=(face >= drops.face).float(),
        appearance=(appearance >= drops.appearance).float(),
    )
