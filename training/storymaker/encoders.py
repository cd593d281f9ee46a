"""The frozen encoders of training: SDXL's text encoders and VAE, and CLIP ViT-H for the references; with a cache.

Every text and picture is encoded alone, so that its encoding does not depend on the rest of its batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from ...models.files import write_whole
from ...standalone.text import TextEncoders, tokenize

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""Colours with which CLIP was trained."""


@dataclass(frozen=True, eq=False)
class Encoders:
    """text: SDXL's two encoders; vae: `diffusers.AutoencoderKL`; vision: `transformers.CLIPVisionModelWithProjection`.

    All of them are frozen.
    """

    text: TextEncoders
    vae: nn.Module
    vision: nn.Module

    def caption(self, text: str) -> tuple[Tensor, Tensor]:
        """Context [77, C] and pooled text [P], float32 on the CPU. Only the first 75 tokens of the text count."""
        context, rest = self.text({key: windows[:1] for key, windows in tokenize(text).items()})
        return context[0], rest["pooled_output"][0]

    def move_text(self, device: torch.device | str) -> None:
        """Move the text encoders to a device."""
        for encoder in self.text.encoders.values():
            encoder.to(device)
        self.text.device = torch.device(device)

    @torch.no_grad()
    def latents(self, picture: np.ndarray) -> Tensor:
        """The mean latents [4, H / 8, W / 8] of a picture [H, W, 3], scaled for the UNet; float32 on the CPU."""
        pixels = torch.tensor(picture).movedim(-1, 0)[None].to(self.vae.device, self.vae.dtype) / 127.5 - 1
        return (self.vae.encode(pixels).latent_dist.mode() * self.vae.config.scaling_factor)[0].float().cpu()

    @torch.no_grad()
    def features(self, picture: np.ndarray) -> Tensor:
        """Penultimate features [257, 1280] of a picture [224, 224, 3]; float32 on the CPU."""
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
        pixels = (torch.tensor(picture).movedim(-1, 0) / 255 - mean) / std
        seen = self.vision(pixels[None].to(self.vision.device, self.vision.dtype), output_hidden_states=True)
        return seen.hidden_states[-2][0].float().cpu()


class Cache:
    """Encodings in a folder, one file per key. folder: None keeps nothing; scope: a text that is part of each key."""

    def __init__(self, folder: Path | None, scope: str = ""):
        self.folder, self.scope = folder, scope
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def get(self, content: bytes, compute: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The tensors for some content: those in the folder, otherwise those that `compute` returns, which are kept.

        A file that cannot be read is written again.
        """
        if self.folder is None:
            return dict(compute())
        path = self.folder / f"{hashlib.sha256(self.scope.encode() + bytes(1) + content).hexdigest()}.safetensors"
        try:
            return load(path.read_bytes())
        except (OSError, SafetensorError):
            tensors = {name: tensor.contiguous() for name, tensor in compute().items()}
            write_whole(path, save(tensors))
            return tensors
