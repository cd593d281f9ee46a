"""A diffusers UNet with the part of ComfyUI's ModelPatcher that StoryLoom uses; both hosts share the methods."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .unet import diffusers_names, unet_numbers

UNET_KEY = "diffusion_model."
"""Prefix of a UNet parameter's name in ComfyUI's weight patches."""


class UNetPatcher:
    """A UNet with attention replacements, wrappers and weight patches. Clones share the UNet.

    unet: `diffusers.UNet2DConditionModel`; model_sampling: its `ModelSampling`. The UNet is changed only while it
    samples and restored afterwards.
    """

    def __init__(self, unet: nn.Module, model_sampling):
        self.objects = {"diffusion_model": unet, "model_sampling": model_sampling}
        self.model_options: dict[str, Any] = {"transformer_options": {}}
        self.wrappers: dict[str, dict[str, list[Callable]]] = {}
        self.patches: dict[str, list[tuple[float, tuple]]] = {}

    def clone(self) -> UNetPatcher:
        other = UNetPatcher(self.objects["diffusion_model"], self.objects["model_sampling"])
        other.model_options = copied(self.model_options)
        other.wrappers = copied(self.wrappers)
        other.patches = copied(self.patches)
        return other

    def get_model_object(self, name: str) -> Any:
        """ "diffusion_model" or "model_sampling"."""
        return self.objects[name]

    def set_model_attn1_replace(self, patch: Callable, block_name: str, number: int, transformer_index=None) -> None:
        self._replace("attn1", patch, block_name, number, transformer_index)

    def set_model_attn2_replace(self, patch: Callable, block_name: str, number: int, transformer_index=None) -> None:
        self._replace("attn2", patch, block_name, number, transformer_index)

    def _replace(self, slot: str, patch: Callable, *key) -> None:
        slots = self.model_options["transformer_options"].setdefault("patches_replace", {})
        slots.setdefault(slot, {})[key if key[2] is not None else key[:2]] = patch

    def add_wrapper_with_key(self, wrapper_type: str, key: str, wrapper: Callable) -> None:
        self.wrappers.setdefault(wrapper_type, {}).setdefault(key, []).append(wrapper)

    def get_wrappers(self, wrapper_type: str, key: str) -> list[Callable]:
        return self.wrappers.get(wrapper_type, {}).get(key, [])

    def remove_wrappers_with_key(self, wrapper_type: str, key: str) -> None:
        self.wrappers.get(wrapper_type, {}).pop(key, None)

    def add_patches(self, patches: Mapping[str, tuple], strength_patch: float = 1.0) -> list[str]:
        """Add weight patches for sampling. Returns the names that the UNet has; other names are ignored.

        patches: original name, `diffusion_model.input_blocks.4.1...weight` -> (difference,), ("diff", (difference,))
        or ("lora", (up, down, alpha)), where alpha None means the rank.
        """
        known = {UNET_KEY + name for name in diffusers_names(unet_numbers(self.objects["diffusion_model"].config))}
        taken = [name for name in patches if name in known]
        for name in taken:
            self.patches.setdefault(name, []).append((strength_patch, patches[name]))
        return taken

    def run_options(self) -> dict[str, Any]:
        """A copy of model_options for one sampling run, with the wrappers inside, as ComfyUI prepares it."""
        options = copied(self.model_options)
        options["transformer_options"]["wrappers"] = copied(self.wrappers)
        return options

    @contextmanager
    def patched_weights(self) -> Iterator[None]:
        """Within this context, the UNet's weights are patched; the original tensors are then restored."""
        unet = self.objects["diffusion_model"]
        names = diffusers_names(unet_numbers(unet.config)) if self.patches else {}
        parameters = dict(unet.named_parameters()) if self.patches else {}
        originals: list[tuple[nn.Parameter, Tensor]] = []
        try:
            for name, patches in self.patches.items():
                parameter = parameters[names[name.removeprefix(UNET_KEY)]]
                originals.append((parameter, parameter.data))
                changes = (strength * _difference(value).to(parameter.data) for strength, value in patches)
                parameter.data = sum(changes, start=parameter.data)
            yield
        finally:
            for parameter, data in originals:
                parameter.data = data


def _difference(value: tuple) -> Tensor:
    kind, data = value if len(value) == 2 else ("diff", value)
    if kind == "diff":
        return data[0]
    up, down, alpha = data[:3]
    scale = 1.0 if alpha is None else alpha / down.shape[0]
    dtype = torch.promote_types(up.dtype, torch.float32)
    return scale * (up.flatten(1).to(dtype) @ down.flatten(1).to(dtype))


def copied(value: Any) -> Any:
    """A copy of nested dicts and lists that shares their items."""
    if isinstance(value, dict):
        return {key: copied(inner) for key, inner in value.items()}
    return list(value) if isinstance(value, list) else value


def wrapped(original: Callable, kind: str, transformer_options: Mapping[str, Any]) -> Callable:
    """`original` inside the wrappers of a kind, the first outermost."""
    by_key = transformer_options.get("wrappers", {}).get(kind, {})
    for wrapper in reversed([wrapper for wrappers in by_key.values() for wrapper in wrappers]):
        original = partial(wrapper, original)
    return original
