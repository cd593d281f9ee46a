"""The model that draws a story: the parts of a StableDiffusionXLPipeline, or of the demo model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..prompts.script import Story


@dataclass(frozen=True, eq=False)
class StoryModel:
    """An SDXL model in parts.

    unet            diffusers.UNet2DConditionModel
    text_encoder    transformers.CLIPTextModel, CLIP-L
    text_encoder_2  transformers.CLIPTextModelWithProjection, CLIP-G
    scheduler       any diffusers scheduler; its config holds the prediction type
    decode          latents [B, 4, h, w] -> pictures [B, 8h, 8w, 3] in 0..1 on the CPU
    width, height   default size in pixels
    device          where the networks run
    on_story        called with every story before it is drawn
    """

    unet: nn.Module
    text_encoder: nn.Module
    text_encoder_2: nn.Module
    scheduler: Any
    decode: Callable[[Tensor], Tensor]
    width: int
    height: int
    device: torch.device
    on_story: Callable[[Story], None] = lambda story: None


def model_of(pipeline) -> StoryModel:
    """The parts of a `diffusers.StableDiffusionXLPipeline`, which is not changed.

    Raises ValueError if the pipeline is of another family or has an IP-Adapter loaded.
    """
    for part in ("unet", "text_encoder", "text_encoder_2", "vae", "scheduler"):
        if getattr(pipeline, part, None) is None:
            raise ValueError(
                f"A story needs the parts of an SDXL pipeline, but this {type(pipeline).__name__} has no {part}. "
                "Load the checkpoint with StableDiffusionXLPipeline."
            )
    config = pipeline.unet.config
    if config.addition_embed_type != "text_time" or pipeline.text_encoder_2.config.hidden_size != 1280:
        raise ValueError("A story needs an SDXL checkpoint; the UNet or the text encoders of this one are not SDXL's.")
    if config.encoder_hid_dim_type is not None:
        raise ValueError("The pipeline has an IP-Adapter loaded: call its unload_ip_adapter() before drawing a story.")
    side = 8 * config.sample_size
    return StoryModel(
        unet=pipeline.unet,
        text_encoder=pipeline.text_encoder,
        text_encoder_2=pipeline.text_encoder_2,
        scheduler=pipeline.scheduler,
        decode=partial(_decode, pipeline.vae),
        width=side,
        height=side,
        device=pipeline._execution_device,
    )


@torch.no_grad()
def _decode(vae: nn.Module, latents: Tensor) -> Tensor:
    """Pictures [B, 8h, 8w, 3] decoded one by one with an AutoencoderKL, in float32 where float16 would overflow."""
    dtype = vae.dtype
    if dtype == torch.float16 and vae.config.force_upcast:
        vae.to(torch.float32)
    try:
        scaled = (latents / vae.config.scaling_factor).to(vae.dtype)
        pictures = [vae.decode(one[None], return_dict=False)[0].float().cpu() for one in scaled]
    finally:
        vae.to(dtype)
    return (torch.cat(pictures) / 2 + 0.5).clamp(0, 1).movedim(1, -1)
