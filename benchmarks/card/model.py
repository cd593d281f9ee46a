"""The device benchmark's inputs: SDXL and StoryMaker with random weights, and a story of random hidden states.

No checkpoint is needed. The networks are ComfyUI's and the pack's own, in their published shapes or tiny ones. Weights
are drawn on the device, with a variance that layers preserve, so that half precision stays finite.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...models.storymaker.characters import CharacterFeatures, CharacterReference
from ...models.storymaker.ppr import PositionalPerceiverResampler
from ...models.storymaker.weights import LAYER_SLOTS, StoryMakerWeights
from ...prompts.conditioning import TAG, StoryCond, StoryRow
from ...prompts.options import StoryOptions
from ...prompts.tag import tag_text
from ...prompts.tokens import StoryTokens
from .. import svr
from ..cost import SDXL

TEXT = 60
"""Tokens of the story's text; a fifth of them is the identity."""

POOLED = 1280
SMALL = 0.05
"""Size of StoryMaker's random LoRA relative to the UNet's random weights."""


@dataclass(frozen=True)
class Scale:
    """Sizes of networks and pictures.

    layout               ComfyUI's config of the UNet
    side                 width and height of the latents
    face, picture        widths of a face vector and of a picture's features
    depth, rank          layers of StoryMaker's resamplers, rank of its LoRA
    """

    layout: dict[str, Any]
    side: int
    face: int
    picture: int
    depth: int
    rank: int


FULL = Scale(SDXL, side=128, face=512, picture=1280, depth=4, rank=128)
"""1024 x 1024 pixels."""

TINY = Scale(
    {
        **SDXL,
        "model_channels": 32,
        "num_head_channels": 16,
        "channel_mult": [1, 1, 2],
        "transformer_depth": [0, 0, 1, 1, 1, 1],
        "transformer_depth_middle": 1,
        "transformer_depth_output": [0, 0, 0, 1, 1, 1, 1, 1, 1],
    },
    side=8,
    face=32,
    picture=64,
    depth=1,
    rank=3,
)


def sdxl(scale: Scale, dtype: torch.dtype, device: torch.device):
    """A MODEL of ComfyUI's SDXL with random weights in `dtype`, made on `device`."""
    import comfy.model_management
    import comfy.model_patcher
    import comfy.supported_models

    config = comfy.supported_models.SDXL({**scale.layout, "dtype": dtype})
    config.unet_config |= scale.layout
    config.set_inference_dtype(dtype, None)
    model = config.get_model({}, "", device=device)
    _fill(model.diffusion_model, torch.Generator(device).manual_seed(0))
    offload = comfy.model_management.unet_offload_device()
    return comfy.model_patcher.CoreModelPatcher(model.to(device), load_device=device, offload_device=offload)


def _fill(module: torch.nn.Module, generator: torch.Generator) -> None:
    """Initialise every parameter, which ComfyUI leaves empty, so that the variance of the input is preserved."""
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(False)
        if parameter.ndim >= 2:
            parameter.normal_(0, 1 / math.sqrt(parameter[0].numel()), generator=generator)
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)


def storymaker(model, scale: Scale, dtype: torch.dtype, device: torch.device):
    """An adapter for this model as from Load StoryMaker adapter, with random weights on the CPU in `dtype`."""
    from ...nodes.patching import attention_widths
    from ...nodes.storymaker_patcher import storymaker_of

    generator = torch.Generator(device).manual_seed(1)

    def random(*shape: int, gain: float = 1.0) -> Tensor:
        drawn = torch.randn(shape, generator=generator, device=device) * (gain / math.sqrt(shape[-1]))
        return drawn.to("cpu", dtype)

    widths, context = attention_widths(model)
    named = {(slot.part, slot.number): slot.diffusers for slot in LAYER_SLOTS}
    lora, image_kv = {}, {}
    for (part, number, index), width in widths.items():
        image_kv[part, number, index] = random(width, context), random(width, context)
        for attention, source in (("attn1", width), ("attn2", context)):
            for target in ("q", "k", "v", "out"):
                inside = source if target in "kv" else width
                name = f"{named[part, number]}.transformer_blocks.{index}.{attention}.processor.to_{target}_lora"
                lora[f"{name}.down.weight"] = random(scale.rank, inside)
                lora[f"{name}.up.weight"] = random(width, scale.rank, gain=SMALL)
    network = PositionalPerceiverResampler(
        image_width=scale.picture, id_width=scale.face, depth=scale.depth, device="meta"
    )
    ppr = {name: random(*tensor.shape) for name, tensor in network.state_dict().items()}
    return storymaker_of(StoryMakerWeights(ppr, lora, image_kv))


def random_character(scale: Scale, seed: int) -> CharacterReference:
    """A character with random features."""
    generator = torch.Generator().manual_seed(seed)
    vector = torch.nn.functional.normalize(torch.randn(scale.face, generator=generator), dim=0)
    face, whole = torch.randn(2, 257, scale.picture, generator=generator)
    features = CharacterFeatures(vector, face, whole, has_face=True, has_character=True)
    return CharacterReference("", ((features, 1.0),), torch.zeros(1, 1, 3))


@dataclass(frozen=True, eq=False)
class Story:
    """Random hidden states instead of an encoded story.

    contexts   [frames, 77, 2048], one prompt reweighted by SVR; all share the rows of start token and identity
    identity   [1, 77, 2048], the identity prompt alone, with the same rows of start token and identity
    pooled     [1, 1280]
    tokens     positions of identity and frames
    """

    contexts: Tensor
    identity: Tensor
    pooled: Tensor
    tokens: StoryTokens

    @property
    def frames(self) -> int:
        return len(self.contexts)

    def tagged(self) -> list:
        """The CONDITIONING of all frames, with the story's tag for the patches."""
        rows = tuple(
            StoryRow(frame, ("",), self.tokens, (self.tokens.identity,)) for frame in range(len(self.contexts))
        )
        tag = StoryCond(rows, self.tokens.length, ("",))
        pooled = self.pooled.expand(self.frames, -1)
        return [[self.contexts, StoryOptions({"pooled_output": pooled, TAG: tag_text(tag)})]]

    def plain(self, contexts: Tensor) -> list:
        """The CONDITIONING of these contexts, without a tag."""
        return [[contexts, {"pooled_output": self.pooled.expand(len(contexts), -1)}]]


def zero_negative(positive: list) -> list:
    """An all-zero negative for this positive, as from ConditioningZeroOut."""
    ((context, _),) = positive
    return [[torch.zeros_like(context), {"pooled_output": torch.zeros(len(context), POOLED)}]]


def random_story(frames: int) -> Story:
    """A random story, always the same, on the CPU in float32."""
    tokens = svr.story_tokens(frames, TEXT)
    hidden = svr.hidden_states(tokens)
    contexts = svr.encode(hidden, tokens, "svr").float()
    alone = svr.hidden_states(tokens, seed=1).float()
    alone[: tokens.identity.stop] = contexts[0, : tokens.identity.stop]
    pooled = torch.randn(1, POOLED, generator=torch.Generator().manual_seed(2))
    return Story(contexts, alone[None], pooled, tokens)
