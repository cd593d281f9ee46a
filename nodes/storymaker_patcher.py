"""StoryMaker's networks under ComfyUI's memory management."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import torch
from torch import Tensor

from ..models.storymaker.adapter import StoryMakerAdapter
from ..models.storymaker.weights import StoryMakerWeights

EVERYTHING = 1e30
"""Bytes to free on a device: more than any device has."""


@dataclass(frozen=True, eq=False)
class StoryMaker:
    """The value of STORYMAKER links: the networks under ComfyUI's memory management, and the LoRA for the UNet."""

    patcher: comfy.model_patcher.ModelPatcher
    lora: dict[str, Tensor] = field(repr=False)  # ComfyUI logs all inputs of a node that fails

    @property
    def adapter(self) -> StoryMakerAdapter:
        return self.patcher.model

    @contextmanager
    def resident(self) -> Iterator[torch.device]:
        """Load the networks onto the device, as far as it has room, and unload them at the end. Yields the device."""
        try:
            comfy.model_management.load_models_gpu([self.patcher])
            yield self.patcher.load_device
        finally:
            unload(self.patcher)


def unload(patcher: comfy.model_patcher.ModelPatcher) -> None:
    """Remove a model from its device and from ComfyUI's list of loaded models, and leave the others there."""
    management = comfy.model_management
    others = [
        each for each in management.current_loaded_models if each.model is None or not patcher.is_clone(each.model)
    ]
    management.free_memory(EVERYTHING, patcher.load_device, others)


def storymaker_of(weights: StoryMakerWeights) -> StoryMaker:
    adapter = StoryMakerAdapter(weights, comfy.ops.manual_cast)
    patcher = comfy.model_patcher.CoreModelPatcher(
        adapter,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )
    return StoryMaker(patcher, weights.lora)
