"""The demo's image encoder: CLIP ViT-H/14's input and features in shape, with fixed weights that are not trained.

Each patch of 14x14 pixels gets the colours of its four quarters and its position, mapped by fixed random matrices to
128 numbers, which a layer norm scales. The demo's orthonormal basis maps them to 1280. All of it is linear but the
norm, so that colours and positions can be read from the features linearly. In CLIP's network this is the embedding and
its norm; the first layer changes nothing, and the second adds the mean of all tokens to each, for `image_embeds`.
Host-free: the host builds a CLIP vision model from VISION and loads `state_dict`.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from .model import NARROW, basis

SEED = 11
VISION = {
    "model_type": "clip_vision_model",
    "hidden_act": "gelu",
    "hidden_size": 1280,
    "image_size": 224,
    "intermediate_size": 64,
    "num_attention_heads": 16,
    "num_channels": 3,
    "num_hidden_layers": 2,
    "patch_size": 14,
    "projection_dim": 64,
}
"""CLIP ViT-H/14's input size and features [257, 1280], with two layers instead of 32."""
MEAN = (0.48145466, 0.4578275, 0.40821073)
DEVIATION = (0.26862954, 0.26130258, 0.27577711)
"""CLIP's normalisation of the colours."""

PATCH = VISION["patch_size"]
PATCHES = VISION["image_size"] // PATCH
"""Patches per row and column."""
QUARTER = PATCH // 2
COLOURS = 3 * 4
FREQUENCIES = 8
"""Cosines per axis that describe a position."""
POSITION = 5.0
"""Typical norm of a position; that of a patch's colours, normalised as CLIP does, is about as large."""
EPSILON = 1e-4
"""What the layer norm at the full width, with epsilon 1e-5, adds to the mean square of the narrow vector."""


def features(images: Tensor) -> Tensor:
    """CLIP's penultimate features, float32 [B, 257, 1280], of images [B, 224, 224, 3] in 0..1."""
    return narrow_features(images) @ _widening().T.to(images.device)


def narrow_features(images: Tensor) -> Tensor:
    """The same features before they are mapped to 1280: float32 [B, 257, 128], each row with mean square 1.

    images: [B, 224, 224, 3] in 0..1, rounded to 8 bits as ComfyUI does. First the class token, then rows of patches.
    """
    pixels = (images.float() * 255).clamp(0, 255).round() / 255
    return quarter_features(avg_pool2d(pixels.permute(0, 3, 1, 2), QUARTER).permute(0, 2, 3, 1))


def quarter_features(quarters: Tensor) -> Tensor:
    """The narrow features of images whose mean colours in squares of 7x7 pixels are these: [B, 32, 32, 3] in 0..1."""
    mean, deviation = (torch.tensor(values, device=quarters.device) for values in (MEAN, DEVIATION))
    normed = (quarters - mean) / deviation
    split = normed.unflatten(2, (PATCHES, 2)).unflatten(1, (PATCHES, 2))  # B, row, 2, column, 2, 3
    colours = split.permute(0, 1, 3, 5, 2, 4).flatten(3).flatten(1, 2)
    patches = colours @ _colour_matrix().T.to(colours) + _positions().to(colours)
    tokens = torch.cat([_class_token().to(colours).expand(len(quarters), 1, -1), patches], 1)
    return tokens / (tokens.square().mean(2, keepdim=True) + EPSILON).sqrt()


def state_dict() -> dict[str, Tensor]:
    """Weights in float32 for ComfyUI's CLIP vision model of the configuration VISION."""
    width, inner = VISION["hidden_size"], VISION["intermediate_size"]
    out = basis(width)
    kernel = _colour_matrix().view(NARROW, 3, 2, 2).repeat_interleave(QUARTER, 2).repeat_interleave(QUARTER, 3)
    ones, zeros = torch.ones(width), torch.zeros(width)
    positions = torch.cat([torch.zeros(1, NARROW), _positions()])
    weights = {
        "embeddings.class_embedding": out @ _class_token(),
        "embeddings.patch_embedding.weight": torch.einsum("wn,ncyx->wcyx", out, kernel / QUARTER**2),
        "embeddings.position_embedding.weight": positions @ out.T,
    }
    for name in ("pre_layrnorm", "post_layernorm"):
        weights |= {f"{name}.weight": ones, f"{name}.bias": zeros}
    for number in range(VISION["num_hidden_layers"]):
        layer = f"encoder.layers.{number}"
        through = torch.zeros(width, width) if number == 0 else torch.eye(width)
        for name in ("layer_norm1", "layer_norm2"):
            weights |= {f"{layer}.{name}.weight": ones, f"{layer}.{name}.bias": zeros}
        for name in "qkv":
            weights[f"{layer}.self_attn.{name}_proj.weight"] = through if name == "v" else torch.zeros(width, width)
            weights[f"{layer}.self_attn.{name}_proj.bias"] = zeros
        weights |= {
            f"{layer}.self_attn.out_proj.weight": through,
            f"{layer}.self_attn.out_proj.bias": zeros,
            f"{layer}.mlp.fc1.weight": torch.zeros(inner, width),
            f"{layer}.mlp.fc1.bias": torch.zeros(inner),
            f"{layer}.mlp.fc2.weight": torch.zeros(width, inner),
            f"{layer}.mlp.fc2.bias": zeros,
        }
    projection = _random(4, VISION["projection_dim"], NARROW) @ out.T
    return {"visual_projection.weight": projection} | {f"vision_model.{name}": each for name, each in weights.items()}


@cache
def _widening() -> Tensor:
    """Features [128] to [1280], which keeps the mean square."""
    return basis(VISION["hidden_size"]) * math.sqrt(VISION["hidden_size"] / NARROW)


@cache
def _colour_matrix() -> Tensor:
    """[128, 12]: the colours of a patch's quarters, first by channel, then by row and column. It about keeps norms."""
    return _random(1, NARROW, COLOURS)


@cache
def _positions() -> Tensor:
    """[256, 128]: cosines of row and column, slow ones stronger, so that neighbours are alike."""
    frequencies = torch.arange(1, FREQUENCIES + 1)
    places = torch.arange(PATCHES) + 0.5
    strengths = 1 / (1 + frequencies / 2)
    cosines = torch.cos(math.pi / PATCHES * places[:, None] * frequencies) * strengths
    rows, columns = (cosines @ _random(2 + axis, NARROW, FREQUENCIES).T for axis in (0, 1))
    both = rows[:, None] + columns
    return POSITION * (both / both.square().sum(2).mean().sqrt()).flatten(0, 1)


@cache
def _class_token() -> Tensor:
    """[128], of the size of a patch's vector."""
    return _random(5, NARROW, 1)[:, 0] * math.sqrt(2) * POSITION


def _random(number: int, rows: int, columns: int) -> Tensor:
    """A fixed normal matrix, whose columns have a norm of about 1."""
    generator = torch.Generator().manual_seed(SEED * 100 + number)
    return torch.randn(rows, columns, generator=generator) / math.sqrt(rows)
