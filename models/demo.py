"""The demo model: the numbers of a tiny SDXL and the random weights that fill it.

Blocks, transformer depths, context width 2048 and pooled width 2816 are SDXL's own (arXiv 2307.01952), so everything
that patches an SDXL UNet finds the same layers; only the channels are few. Host-free: whoever has the classes builds
them from these dicts, then calls `fill_` and `pass_noise_through_`.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import nn

SEED = 4
VAE_SEED = 401

HEAD_CHANNELS = 16
UNET = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "channel_mult": [1, 2, 4],
    "num_res_blocks": [2, 2, 2],
    "transformer_depth": [0, 0, 2, 2, 10, 10],
    "transformer_depth_middle": 10,
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    "context_dim": 2048,
    "num_classes": "sequential",
    "adm_in_channels": 2816,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": True,
    "use_temporal_attention": False,
    "use_temporal_resblock": False,
    "use_checkpoint": False,
    "legacy": False,
}
CLIP_L = {"hidden_size": 768, "num_attention_heads": 12, "num_hidden_layers": 3, "intermediate_size": 64}
CLIP_G = {"hidden_size": 1280, "num_attention_heads": 20, "num_hidden_layers": 3, "intermediate_size": 64}
VAE = {
    "embed_dim": 4,
    "ddconfig": {
        "double_z": True,
        "z_channels": 4,
        "resolution": 256,
        "in_channels": 3,
        "out_ch": 3,
        "ch": 32,
        "ch_mult": [1, 1, 1, 1],
        "num_res_blocks": 1,
        "attn_resolutions": [],
        "dropout": 0.0,
    },
}

BLUR = (0.25, 0.5, 0.25)
POOL = 1_048_573
"""Larger parameters repeat this many values; a prime, so that no two rows of an embedding table are equal."""
GAINS = {
    "to_out.0.weight": 0.5,
    "ff.net.2.weight": 0.5,
    "out_proj.weight": 0.5,
    "fc2.weight": 0.5,
    "proj_out.weight": 0.5,
    "conv_out.weight": 0.33,
    "position_embedding.weight": 0.3,
}
"""Residual branches are half as strong as the stream they join, so ten blocks in a row add up gently."""


def fill_(module: nn.Module, seed: int = SEED) -> nn.Module:
    """Write every parameter of `module` in place and return it.

    Values depend on the seed, the parameter's name and its shape alone: not on the order of construction, the process
    or the device. Norms become the identity, biases zero, embeddings have variance 1, other weights keep the variance
    of their input; 3x3 kernels blur, so that random pictures show soft shapes instead of static.
    """
    embeddings = {f"{name}.weight" for name, part in module.named_modules() if isinstance(part, nn.Embedding)}
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(_values(name, parameter.shape, seed, name in embeddings))
    return module


def pass_noise_through_(unet: nn.Module, strength: float = 0.1) -> nn.Module:
    """Wire a filled UNet to predict its own input plus what its blocks draw, and return it.

    A sampler then removes the noise and leaves the drawing (`strength`, in units of the noise, what the blocks add).
    Channels 0-7 of the first convolution carry +x and -x, the last block hands them on, and silu(x) - silu(-x) = x.
    unet: `UNET` in the layout of the original SDXL code (`input_blocks`, `output_blocks`, `out`).
    """
    first, last, out = unet.input_blocks[0][0], unet.output_blocks[-1][0], unet.out[2]
    latents, carriers = out.out_channels, 2 * out.out_channels
    signed = torch.cat([torch.eye(latents), -torch.eye(latents)])
    with torch.no_grad():
        first.weight[:carriers] = _centre_tap(signed)
        last.skip_connection.weight[:carriers] = 0
        last.skip_connection.weight[:carriers, -first.out_channels :][:, :carriers, 0, 0] = torch.eye(carriers)
        last.out_layers[-1].weight[:carriers] = 0
        out.weight *= strength
        out.weight[:, :carriers] = _centre_tap(signed.T)
    return unet


def _values(name: str, shape: torch.Size, seed: int, embedding: bool) -> torch.Tensor:
    if len(shape) < 2:
        return torch.full(shape, 0.0 if name.endswith("bias") else 1.0)
    if len(shape) == 4 and shape[2:] == (3, 3):
        blur = torch.outer(torch.tensor(BLUR), torch.tensor(BLUR))
        return _values(name, shape[:2], seed, embedding)[:, :, None, None] * blur / blur.square().sum().sqrt()
    fan_in = 1 if embedding else math.prod(shape[1:])
    gain = next((gain for suffix, gain in GAINS.items() if name.endswith(suffix)), 1.0)
    return _uniform(name, math.prod(shape), seed, gain * math.sqrt(3 / fan_in)).view(shape)


def _uniform(name: str, count: int, seed: int, bound: float) -> torch.Tensor:
    key = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key, "little"))
    pool = torch.empty(min(count, POOL)).uniform_(-bound, bound, generator=generator)
    return pool if count <= POOL else pool.repeat(-(-count // POOL))[:count]


def _centre_tap(matrix: torch.Tensor) -> torch.Tensor:
    return nn.functional.pad(matrix[:, :, None, None], (1, 1, 1, 1))
