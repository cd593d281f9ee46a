"""Validation pictures: what the adapter draws during training, beside its references."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .adapter import TrainedAdapter
from .batch import Batch
from .drops import Dropped
from .processors import ImageContext


@dataclass(frozen=True)
class Drawing:
    """How validation pictures are drawn. The defaults are those of StoryMaker's program.

    steps: of the UniPC sampler; guidance: scale of classifier-free guidance; strength: of image tokens and LoRA;
    negative: text to draw away from; seed: of the noise
    """

    steps: int = 25
    guidance: float = 7.5
    strength: float = 0.8
    negative: str = "bad quality, NSFW, low quality, ugly, disfigured, deformed"
    seed: int = 0


@torch.no_grad()
def draw(pipeline: Any, adapter: TrainedAdapter, batch: Batch, negative: tuple[Tensor, Tensor], how: Drawing) -> Tensor:
    """One picture [H, W, 3] in 0..1 on the CPU, of the size of the batch's latents, without its pose.

    batch: of one picture, on the device of the UNet; negative: context [T, C] and pooled text [P] of `how.negative`.
    """
    from diffusers import UniPCMultistepScheduler

    device, dtype = batch.latents.device, batch.latents.dtype
    scheduler = UniPCMultistepScheduler.from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(how.steps, device=device)
    both = _twice(batch, negative)
    nothing = torch.tensor([True, False])
    one = torch.ones(sum(both.counts))
    tokens, keep = adapter.tokens(both, Dropped(torch.zeros(2, dtype=torch.bool), nothing, one, one))
    image = ImageContext(tokens, keep, None, tuple(batch.latents.shape[-2:]), how.strength, how.strength)
    added = {"text_embeds": both.pooled, "time_ids": both.time_ids}
    generator = torch.Generator().manual_seed(how.seed)
    x = torch.randn(batch.latents.shape, generator=generator).to(device, dtype) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        predicted = pipeline.unet(
            scheduler.scale_model_input(torch.cat([x, x]), t),
            t,
            both.context,
            added_cond_kwargs=added,
            cross_attention_kwargs={"image": image},
        ).sample
        without, with_text = predicted.float().chunk(2)
        x = scheduler.step(without + how.guidance * (with_text - without), t, x).prev_sample
    decoded = pipeline.vae.decode((x / pipeline.vae.config.scaling_factor).to(pipeline.vae.dtype)).sample
    return (decoded[0].float().cpu() / 2 + 0.5).clamp(0, 1).movedim(0, -1)


def _twice(batch: Batch, negative: tuple[Tensor, Tensor]) -> Batch:
    """The picture under the negative text, and under its own."""
    pairs = {name: torch.cat([getattr(batch, name)] * 2) for name in ("latents", "time_ids", "masks")}
    pairs |= {name: torch.cat([getattr(batch, name)] * 2) for name in ("id_embeds", "face", "character")}
    own = {"context": batch.context, "pooled": batch.pooled}
    pairs |= {
        name: torch.cat([value[None].to(own[name]), own[name]]) for name, value in zip(own, negative, strict=True)
    }
    return replace(batch, counts=batch.counts * 2, pose=None, crops=None, **pairs)


def sheet(rows: list[list[np.ndarray]], path: Path, height: int = 384) -> None:
    """Write pictures [H, W, 3], 8-bit, as a PNG: rows of pictures scaled to one height."""
    images = [
        [Image.fromarray(each).resize((max(1, each.shape[1] * height // each.shape[0]), height)) for each in row]
        for row in rows
    ]
    width = max(sum(image.width for image in row) for row in images)
    page = Image.new("RGB", (width, height * len(images)), "white")
    for number, row in enumerate(images):
        left = 0
        for image in row:
            page.paste(image, (left, number * height))
            left += image.width
    unfinished = path.with_suffix(".tmp.png")
    page.save(unfinished)
    unfinished.replace(path)
