"""A stand-in for StoryMaker's file and for its image encoder, made for the demo model, from a fixed seed.

Its numbers are random and mean nothing: pictures change with it, but nobody comes to look like anybody. It has the
parts of the real file, in the demo model's widths, so that a workflow can be tried without a download. Host-free:
whoever has the classes loads these weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from zlib import crc32

import torch
from torch import Tensor

from ..storymaker.ppr import PositionalPerceiverResampler
from ..storymaker.weights import CONTEXT, StoryMakerWeights, layers
from . import model as demo

SEED = 7
LORA_RANK = 4
VALUE_GAIN, LORA_GAIN = 2.0, 0.2
"""Sizes of the values and of the changes of the UNet: pictures change visibly and still show what they were told."""
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
    "projection_dim": 8,
}
"""CLIP ViT-H/14's picture and features, 257 of 1280 numbers, from two layers instead of 32."""


def demo_storymaker() -> StoryMakerWeights:
    """Random weights for the demo model, in float16: one layer of PPR, and the same keys and values in equal widths."""
    ppr = PositionalPerceiverResampler(depth=1, device="meta").state_dict()
    of_the_demo = tuple(layers(demo.UNET["model_channels"]))
    pairs = {
        width: (
            random_tensor(f"k.{width}", (width, CONTEXT)),
            random_tensor(f"v.{width}", (width, CONTEXT), VALUE_GAIN),
        )
        for width in {layer.width for layer in of_the_demo}
    }
    image_kv = {layer.key: pairs[layer.width] for layer in of_the_demo if layer.cross}
    lora = {}
    for layer in of_the_demo:
        for target, columns in layer.inputs.items():
            name = f"{layer.processor}.to_{target}_lora"
            lora[f"{name}.down.weight"] = random_tensor(f"{name}.down", (LORA_RANK, columns))
            lora[f"{name}.up.weight"] = random_tensor(f"{name}.up", (layer.width, LORA_RANK), LORA_GAIN)
    return StoryMakerWeights(random_weights(ppr), lora, image_kv)


def random_weights(shapes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict in float16 for a network with these names and shapes.

    Norms are neutral, feed-forward layers and biases zero, the rest is random.
    """
    weights = {}
    for name, like in shapes.items():
        feed_forward = ".1.1." in name or ".1.3." in name
        if like.ndim == 1 or feed_forward:
            norm = like.ndim == 1 and name.endswith("weight")
            weights[name] = (torch.ones if norm else torch.zeros)(like.shape, dtype=torch.float16)
        else:
            weights[name] = random_tensor(name, like.shape)
    return weights


def random_tensor(name: str, shape: Sequence[int], gain: float = 1.0) -> Tensor:
    """Normal numbers in float16, the same for the same name. A vector times such a matrix has `gain` times its size."""
    generator = torch.Generator().manual_seed(SEED + crc32(name.encode()))
    deviation = gain / math.sqrt(math.prod(shape[1:]))
    return (torch.randn(*shape, generator=generator) * deviation).half()
