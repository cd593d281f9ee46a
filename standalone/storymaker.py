"""StoryMaker on a diffusers UNet: its networks, its LoRA, and the characters of a sampling run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..attention.storymaker import ImageConditioning
from ..models.storymaker.adapter import StoryMakerAdapter
from ..models.storymaker.characters import CharacterReference
from ..models.storymaker.weights import StoryMakerWeights
from ..runtime.patch import check_percents
from ..runtime.sampling import with_patch
from .layers import attend, blocks_of, transformers
from .patcher import UNET_KEY, UNetPatcher
from .unet import diffusers_names, unet_numbers

UP, DOWN, PROCESSOR = "_lora.up.weight", "_lora.down.weight", ".processor."


class _CastingLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x), None if self.bias is None else self.bias.to(x))


class _CastingNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x), self.bias.to(x), self.eps)


CASTING = SimpleNamespace(Linear=_CastingLinear, LayerNorm=_CastingNorm)
"""Layers whose weights are cast to the dtype and device of their input."""


@dataclass(frozen=True, eq=False)
class StoryMaker:
    """The networks, and the LoRA for the UNet as in `StoryMakerWeights.lora`."""

    adapter: Any
    lora: Mapping[str, Tensor] = field(repr=False)


@dataclass(frozen=True, eq=False)
class Characters:
    """The characters of a drawing, with the inputs of the node Apply StoryMaker.

    storymaker              the adapter; it has to fit the UNet
    references              the characters that may appear, 1 to 3
    regions                 per character None, or masks [masks, H, W] in 0..1; (): none has a region
    token_strength, lora_strength        of the image tokens and of the LoRA; 0 is off
    face_strength, appearance_strength   factors of each character's face and appearance tokens
    start_percent, end_percent           when the image tokens act
    """

    storymaker: StoryMaker
    references: tuple[CharacterReference, ...]
    regions: tuple[Tensor | None, ...] = ()
    token_strength: float = 0.8
    lora_strength: float = 0.8
    face_strength: float = 1.0
    appearance_strength: float = 1.0
    start_percent: float = 0.0
    end_percent: float = 1.0


def storymaker_of(weights: StoryMakerWeights) -> StoryMaker:
    """StoryMaker with these weights, which are neither copied nor converted."""
    return StoryMaker(StoryMakerAdapter(weights, CASTING), weights.lora)


def with_characters(model: UNetPatcher, characters: Characters) -> UNetPatcher:
    """A clone of `model` that draws these characters. Raises ValueError if the adapter does not fit the UNet."""
    check_percents(characters.start_percent, characters.end_percent)
    unet, adapter = model.get_model_object("diffusion_model"), characters.storymaker.adapter
    check_fit(unet, adapter)
    adapter.check_characters(characters.references)
    patch = ImageConditioning(
        adapter,
        characters.references,
        characters.regions or (None,) * len(characters.references),
        characters.token_strength,
        characters.face_strength,
        characters.appearance_strength,
        characters.start_percent,
        characters.end_percent,
        blocks_of(unet, "all"),
    )
    patched = with_patch(model, patch, attend)
    if characters.lora_strength:
        patched.add_patches(lora_patches(characters.storymaker.lora, unet), characters.lora_strength)
    return patched


def check_fit(unet: nn.Module, adapter: Any) -> None:
    """Raise ValueError unless the UNet has the cross-attention layers and the text width of the adapter."""
    layers = {
        (*transformer.block, index): block.attn2
        for transformer in transformers(unet)
        for index, block in enumerate(transformer.blocks)
    }
    widths = {key: layer.to_q.out_features for key, layer in layers.items()}
    contexts = {layer.to_k.in_features for layer in layers.values()}
    if contexts != {adapter.context} or widths != adapter.widths:
        raise ValueError(
            f"StoryMaker needs the {len(adapter.widths)} cross-attention layers of SDXL and text tokens of width "
            f"{adapter.context}, but the {len(widths)} layers of this UNet differ: load an SDXL checkpoint."
        )


def lora_patches(lora: Mapping[str, Tensor], unet: nn.Module) -> dict[str, tuple[str, tuple]]:
    """StoryMaker's LoRA as weight patches for `UNetPatcher.add_patches`. Raises ValueError if a layer is missing."""
    originals = {name: original for original, name in diffusers_names(unet_numbers(unet.config)).items()}
    patches = {}
    for name, up in lora.items():
        if not name.endswith(UP):
            continue
        layer, _, target = name.removesuffix(UP).partition(PROCESSOR)
        weight = f"{layer}.{'to_out.0' if target == 'to_out' else target}.weight"
        if weight not in originals:
            raise ValueError(f"This UNet has no layer {weight}, which StoryMaker's LoRA changes: load SDXL.")
        patches[UNET_KEY + originals[weight]] = ("lora", (up, lora[name.removesuffix(UP) + DOWN], None))
    return patches
