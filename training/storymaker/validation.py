"""Pictures that are drawn during training, written as one sheet per validation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .adapter import TrainedAdapter
from .data.batches import Batches
from .data.references import character_picture
from .sample import Drawing, draw, sheet


class Validation:
    """The first `count` pictures of the data, drawn again from their captions and references.

    pipeline: a `diffusers.StableDiffusionXLPipeline` in whose UNet the adapter is installed.
    """

    def __init__(self, pipeline: Any, adapter: TrainedAdapter, batches: Batches, count: int, how: Drawing):
        self.pipeline, self.adapter, self.batches, self.how = pipeline, adapter, batches, how
        self.chosen = range(min(count, len(batches.index.items)))

    def write(self, path: Path) -> None:
        """Draw with the present weights, and write a PNG: a row each of picture, references and drawing."""
        path.parent.mkdir(exist_ok=True)
        negative = self.batches.encoders.caption(self.how.negative)
        sheet([self._row(number, negative) for number in self.chosen], path)

    def _row(self, number: int, negative: tuple[torch.Tensor, torch.Tensor]) -> list[np.ndarray]:
        example, batch = self.batches.alone(number)
        where = self.adapter.ppr.bg_embed
        how = replace(self.how, seed=self.how.seed + number)
        drawn = draw(self.pipeline, self.adapter, batch.to(where.device, where.dtype), negative, how)
        references = [character_picture(person.crop, 0) for person in example.persons]
        return [example.picture, *references, (drawn.numpy() * 255).round().astype(np.uint8)]
