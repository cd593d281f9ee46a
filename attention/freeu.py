"""FreeU (arXiv 2309.11497) by block: a stronger backbone and weaker low frequencies in the skips of a UNet.

The published code tests for SD 1.5's channel counts. Here the factors go by output block, as in the published story
programs, so that a block means the same stage in every UNet.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..prompts.conditioning import StoryCond
from ..runtime.patch import OUTPUT_BLOCKS


def scale_backbone(h: Tensor, scale: float) -> Tensor:
    """The first half of the channels times `scale`. h: [B, C, H, W]; the new tensor keeps its memory format.

    Returns h itself for scale 1.
    """
    if scale == 1:
        return h
    out = h.clone()
    out[:, : h.shape[1] // 2] *= scale
    return out


def scale_low_frequencies(x: Tensor, scale: float) -> Tensor:
    """The lowest frequencies, the central 2 x 2 bins of a shifted FFT, times `scale`.

    x: [B, C, H, W]. Returns a new tensor of its dtype and memory format (channels last stays so), computed in float32
    or better, or x itself for scale 1.
    Those bins hold the frequencies -1 and 0 of each axis. The real part of their share of an image is a sum of eight
    waves, weighted by the image's inner products with them. So two thin matrix products give exactly the result of the
    published transforms.
    """
    if scale == 1:
        return x
    height, width = x.shape[-2:]
    precise = torch.promote_types(x.dtype, torch.float32)
    waves = low_waves(height, width, precise, x.device)
    images = x.to(precise).reshape(-1, height * width)
    out = torch.addmm(images, images @ waves.T, waves, alpha=(scale - 1) / (height * width))
    return torch.empty_like(x).copy_(out.view(x.shape))


def low_waves(height: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Cosines and sines of the frequencies 0 and 1 of each axis, [8, H * W]. An axis of length 1 has only 0."""
    a = torch.arange(height, dtype=dtype, device=device)[:, None] * (2 * math.pi / height)
    b = torch.arange(width, dtype=dtype, device=device) * (2 * math.pi / width)
    phases = torch.stack([i * a + j * b for i in range(min(height, 2)) for j in range(min(width, 2))]).flatten(1)
    return torch.cat([phases.cos(), phases.sin()])


class Stage(NamedTuple):
    """Output blocks of one resolution, with the factors of backbone and skip there."""

    blocks: Sequence[int]
    b: float
    s: float


@dataclass(frozen=True, eq=False)
class FreeU:
    """Settings of a FreeU node: factors by stage, and when it acts (percent of the schedule)."""

    stages: tuple[Stage, ...]
    start_percent: float
    end_percent: float
    name = "Story FreeU"
    slot = OUTPUT_BLOCKS
    skip_first_steps = 0

    @property
    def neutral(self) -> bool:
        return all(stage.b == stage.s == 1 for stage in self.stages)

    def no_effect_reason(self, story: StoryCond | None, images: int) -> None:
        """None: it acts on any batch, with or without a story."""

    def join(self, h: Tensor, skip: Tensor | None, block: int) -> tuple[Tensor, Tensor | None]:
        """Scaled backbone and skip of an output block; unchanged where another node has joined them already."""
        for blocks, b, s in self.stages:
            if block in blocks and skip is not None:
                h, skip = scale_backbone(h, b), scale_low_frequencies(skip, s)
        return h, skip
