"""Models of training, read from files without a network: SDXL, CLIP ViT-H and a ControlNet."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...models.files import read_weights
from ...standalone.checkpoint import load_checkpoint
from ...standalone.demo import build_with_weights
from ...standalone.text import TextEncoders
from .encoders import Encoders
from .objective import Objective

HEAD_WIDTH = 80
"""Channels of an attention head of CLIP ViT-H."""
AGAIN = "download it again"
CHOOSE = "choose CLIP ViT-H's file, such as CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors"


class ModelFileError(ValueError):
    """A model's file cannot be used. The message is one sentence for the user."""


def load_sdxl(path: Path, device: torch.device, dtype: torch.dtype) -> Any:
    """A frozen `diffusers.StableDiffusionXLPipeline` on a device; the VAE in float32, where float16 would overflow.

    path: a single file in the original layout, or a folder saved by diffusers. Raises ValueError if it is not SDXL.
    """
    pipeline = load_checkpoint(path, device=device, dtype=dtype)
    pipeline.vae.to(torch.float32)
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2):
        part.requires_grad_(False).train(False)
    return pipeline


def objective_of(pipeline: Any, noise_offset: float) -> Objective:
    """The noise levels and the prediction type for which a pipeline's checkpoint was trained."""
    signal = pipeline.scheduler.alphas_cumprod.double().cpu()
    kind = "v" if pipeline.scheduler.config.prediction_type == "v_prediction" else "epsilon"
    return Objective(signal.sqrt().float(), (1 - signal).sqrt().float(), kind, noise_offset)


def encoders_of(pipeline: Any, vision: nn.Module) -> Encoders:
    """The frozen encoders: those of a pipeline, and the image encoder."""
    text = TextEncoders(pipeline.text_encoder, pipeline.text_encoder_2, pipeline.unet.device)
    return Encoders(text, pipeline.vae, vision)


def load_image_encoder(path: Path, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A frozen `transformers.CLIPVisionModelWithProjection`.

    path: its weights in transformers' layout, as in IP-Adapter's and ComfyUI's files, or a folder that it was saved in.
    Raises ModelFileError if it cannot be loaded.
    """
    from transformers import CLIPVisionModelWithProjection

    if path.is_dir():
        try:
            vision = CLIPVisionModelWithProjection.from_pretrained(path, local_files_only=True)
        except Exception as error:  # damaged files make the loader raise all kinds of errors
            reason = str(error).strip().partition("\n")[0]
            raise ModelFileError(
                f'"{path}" contains no image encoder that can be loaded ({reason}): {CHOOSE}.'
            ) from error
    else:
        vision = _vision_of(path)
    return vision.to(device, dtype).requires_grad_(False).train(False)


def _vision_of(path: Path) -> nn.Module:
    """The image encoder of a single file; its sizes are read from the tensors' shapes."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    tensors = read_weights(path, ModelFileError, CHOOSE, AGAIN)
    first = "vision_model.embeddings.patch_embedding.weight"
    if not isinstance(tensors, dict) or first not in tensors:
        raise ModelFileError(f'"{path}" has no {first}, so it is no image encoder in transformers\' layout: {CHOOSE}.')
    tensors = {name: value.float() for name, value in tensors.items() if name.startswith(("vision_model.", "visual_"))}
    tensors.pop("vision_model.embeddings.position_ids", None)
    try:
        config = CLIPVisionConfig(**_vision_sizes(tensors, first), hidden_act="gelu")
        return build_with_weights(partial(CLIPVisionModelWithProjection, config), tensors)
    except Exception as error:  # as above
        reason = " ".join(str(error).split())[:200]
        raise ModelFileError(f'"{path}" is not a complete CLIP ViT-H ({reason}): {CHOOSE}.') from error


def _vision_sizes(tensors: dict[str, Tensor], first: str) -> dict[str, int]:
    width, _, patch, _ = tensors[first].shape
    numbers = [int(name.split(".")[3]) for name in tensors if name.startswith("vision_model.encoder.layers.")]
    return {
        "hidden_size": width,
        "patch_size": patch,
        "num_hidden_layers": max(numbers) + 1,
        "num_attention_heads": width // HEAD_WIDTH,
        "intermediate_size": len(tensors["vision_model.encoder.layers.0.mlp.fc1.bias"]),
        "projection_dim": len(tensors["visual_projection.weight"]),
    }


def load_controlnet(path: Path, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A frozen `diffusers.ControlNetModel` from a folder saved by diffusers. Raises ModelFileError."""
    from diffusers import ControlNetModel

    try:
        network = ControlNetModel.from_pretrained(path, local_files_only=True)
    except Exception as error:  # as above
        reason = str(error).strip().partition("\n")[0]
        raise ModelFileError(
            f'"{path}" contains no ControlNet that can be loaded ({reason}): choose a folder in the layout of '
            "diffusers, with config.json and diffusion_pytorch_model.safetensors."
        ) from error
    return network.to(device, dtype).requires_grad_(False).train(False)
