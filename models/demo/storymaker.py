"""A stand-in for StoryMaker's file and image encoder, made for the demo model from a fixed seed.

Its weights are random: images change with it, but do not come to resemble the character. It has the parts of the real
file, in the demo model's widths, so that a workflow can be tried without a download. Host-free: the host builds the
classes and loads these weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from zlib import crc32

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..storymaker.ppr import PositionalPerceiverResampler
from ..storymaker.weights import CONTEXT, StoryMakerFileError, StoryMakerWeights, layers
from . import model as demo
from .wide import widened

SEED = 7
LORA_RANK = 4
VALUE_GAIN, LORA_GAIN = 2.0, 0.2
"""Gain of the values and of the LoRA: images change visibly, but still follow the prompt."""


def demo_storymaker(path: Path | None = None) -> StoryMakerWeights:
    """StoryMaker's weights for the demo model. path: of a file from `training.storymaker.demo`, None for random ones.

    Raises StoryMakerFileError.
    """
    return random_storymaker() if path is None else read_narrow(path)


def read_narrow(path: Path) -> StoryMakerWeights:
    """The weights of a file from `training.storymaker.demo` at full width. Raises StoryMakerFileError."""
    try:
        return widened(load_file(path))
    except (SafetensorError, OSError, KeyError, RuntimeError) as error:
        raise StoryMakerFileError(
            f"{path.name} is not an adapter of the demo model ({error}): train it again."
        ) from error


def random_storymaker() -> StoryMakerWeights:
    """Random float16 weights for the demo model: PPR with one layer; layers of equal width share keys and values."""
    ppr = PositionalPerceiverResampler(depth=1, device="meta").state_dict()
    demo_layers = tuple(layers(demo.UNET["model_channels"]))
    pairs = {
        width: (
            random_tensor(f"k.{width}", (width, CONTEXT)),
            random_tensor(f"v.{width}", (width, CONTEXT), VALUE_GAIN),
        )
        for width in {layer.width for layer in demo_layers}
    }
    image_kv = {layer.key: pairs[layer.width] for layer in demo_layers if layer.cross}
    lora = {}
    for layer in demo_layers:
        for target, columns in layer.inputs.items():
            name = f"{layer.processor}.to_{target}_lora"
            lora[f"{name}.down.weight"] = random_tensor(f"{name}.down", (LORA_RANK, columns))
            lora[f"{name}.up.weight"] = random_tensor(f"{name}.up", (layer.width, LORA_RANK), LORA_GAIN)
    return StoryMakerWeights(random_weights(ppr), lora, image_kv)


def random_weights(shapes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A float16 state dict for a network with these names and shapes.

    Norms are neutral, feed-forward layers and biases zero, everything else random.
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
    """A float16 normal tensor, seeded by its name. Multiplication by it scales a vector's size by `gain`."""
    generator = torch.Generator().manual_seed(SEED + crc32(name.encode()))
    deviation = gain / math.sqrt(math.prod(shape[1:]))
    return (torch.randn(*shape, generator=generator) * deviation).half()
