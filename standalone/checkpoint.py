"""SDXL checkpoints from disk, without a hub: single files in the original layout and diffusers folders."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from ..models.demo import model as demo
from ..prompts.tokens import END, ROOM, START
from .unet import unet_config

UNET = {**demo.UNET, "model_channels": 320}
HEAD_CHANNELS = 64
CLIP = {
    "vocab_size": demo.TOKENS,
    "max_position_embeddings": ROOM + 2,
    "bos_token_id": START,
    "eos_token_id": END,
}
CLIP_L = {
    "hidden_size": 768,
    "projection_dim": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "quick_gelu",
}
CLIP_G = {
    "hidden_size": 1280,
    "projection_dim": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
}
VAE = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 1024,
    "scaling_factor": 0.13025,
    "force_upcast": True,
}
SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "timestep_spacing": "leading",
    "steps_offset": 1,
    "prediction_type": "epsilon",
}


def load_checkpoint(path: Path, device: torch.device | str | None = None, dtype: torch.dtype | None = None):
    """A `diffusers.StableDiffusionXLPipeline`.

    path: an SDXL .safetensors file, or a folder saved by diffusers; device: default a GPU if there is one, else the
    CPU; dtype: default float16 on a GPU, else float32. Raises ValueError if it cannot be loaded.
    """
    from diffusers import StableDiffusionXLPipeline

    if not path.exists():
        raise ValueError(f'There is no checkpoint at "{path}".')
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or (torch.float32 if torch.device(device).type == "cpu" else torch.float16)
    settings = {"torch_dtype": dtype, "local_files_only": True}
    try:
        if path.is_dir():
            pipeline = StableDiffusionXLPipeline.from_pretrained(path, **settings)
        else:
            names = tensor_names(path)
            check_is_sdxl(names)
            with TemporaryDirectory() as folder:
                write_configs(Path(folder), schedule(names))
                settings |= {"config": folder, "tokenizer": None, "tokenizer_2": None}
                pipeline = StableDiffusionXLPipeline.from_single_file(str(path), **settings)
    except Exception as error:  # a damaged file can make the loaders raise anything
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f'The checkpoint "{path}" cannot be read as SDXL: {reason}') from error
    return pipeline.to(device)


def tensor_names(path: Path) -> set[str]:
    """Names of the tensors in a safetensors file. Raises SafetensorError for any other file."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return set(file.keys())


def check_is_sdxl(names: set[str]) -> None:
    """Raise ValueError if a checkpoint lacks SDXL's UNet or its second text encoder."""
    for part, prefix in (
        ("UNet", "model.diffusion_model.label_emb."),
        ("second text encoder", "conditioner.embedders.1."),
    ):
        if not any(name.startswith(prefix) for name in names):
            raise ValueError(f"it has no {part} of SDXL ({prefix}*).")


def schedule(names: set[str]) -> dict[str, Any]:
    """The scheduler config of a checkpoint; the empty tensors `v_pred` and `ztsnr` mark its prediction type."""
    if "v_pred" not in names:
        return SCHEDULER
    # arXiv 2305.08891; trailing spacing starts at the last timestep
    zero_snr = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return SCHEDULER | {"prediction_type": "v_prediction"} | (zero_snr if "ztsnr" in names else {})


def write_configs(folder: Path, scheduler: Mapping[str, Any]) -> None:
    """Write the diffusers configs of SDXL base, as a hub would provide them."""
    parts = {
        "unet": ("diffusers", "UNet2DConditionModel", unet_config(UNET, HEAD_CHANNELS)),
        "vae": ("diffusers", "AutoencoderKL", VAE),
        "text_encoder": ("transformers", "CLIPTextModel", CLIP | CLIP_L),
        "text_encoder_2": ("transformers", "CLIPTextModelWithProjection", CLIP | CLIP_G),
        "scheduler": ("diffusers", "EulerDiscreteScheduler", scheduler),
    }
    index = {"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": True}
    for name, (library, kind, config) in parts.items():
        index[name] = [library, kind]
        (folder / name).mkdir()
        file = "scheduler_config.json" if name == "scheduler" else "config.json"
        model = {"model_type": "clip_text_model"} if library == "transformers" else {}
        (folder / name / file).write_text(json.dumps({"_class_name": kind, **model, **config}))
    (folder / "model_index.json").write_text(json.dumps(index))
