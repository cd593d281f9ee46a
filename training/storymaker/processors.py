"""Trainable attention processors of a diffusers UNet: LoRA on all projections, and attention to image tokens."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class ImageContext:
    """Image tokens for one UNet call, passed as `cross_attention_kwargs={"image": ...}`.

    tokens    [B, M, W], 20 for the background, then 20 for each character
    keep      booleans [B, M], False for absent characters; None keeps all
    maps      a list to which each cross-attention layer appends [B, 4, h, w], see `losses.attention_loss`; or None
    size      height and width of the latents; only maps need it, and None stands for a square
    strength  factor of the image attention
    lora      factor of the LoRA
    """

    tokens: Tensor
    keep: Tensor | None
    maps: list[Tensor] | None = None
    size: tuple[int, int] | None = None
    strength: float = 1.0
    lora: float = 1.0
