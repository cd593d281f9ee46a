"""The attention layers of a diffusers UNet under ComfyUI's names, with processors that replace them.

ComfyUI's options reach every layer through diffusers' `cross_attention_kwargs`. A layer that has a replacement there
calls it as ComfyUI would; any other layer runs the pipeline's own attention processor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..runtime.blocks import Blocks, Key, choose_blocks

OPTIONS = "transformer_options"
SLOTS = ("attn1", "attn2")
"""Self-attention and cross-attention of a transformer block."""


@dataclass(frozen=True, eq=False)
class Transformer:
    """A spatial transformer. block: as in ("input", 4); level: how often its image is halved; blocks: its layers."""

    block: Key
    level: int
    blocks: nn.ModuleList


def transformers(unet: nn.Module) -> Iterator[Transformer]:
    """Spatial transformers of a `diffusers.UNet2DConditionModel`, numbered as in the original SDXL code."""
    number, last = 1, len(unet.down_blocks) - 1
    for level, block in enumerate(unet.down_blocks):
        yield from _transformers(block, "input", number, level)
        number += len(block.resnets) + len(block.downsamplers or ())
    if unet.mid_block is not None:
        yield from _transformers(unet.mid_block, "middle", 0, last)
    number = 0
    for distance, block in enumerate(unet.up_blocks):
        yield from _transformers(block, "output", number, last - distance)
        number += len(block.resnets)


def _transformers(block: nn.Module, part: str, first: int, level: int) -> Iterator[Transformer]:
    for number, attention in enumerate(getattr(block, "attentions", None) or (), start=first):
        if attention is not None:
            yield Transformer((part, number), level, attention.transformer_blocks)


def attention_depths(unet: nn.Module) -> dict[Key, int]:
    """Block -> number of its attention layers, for the blocks of a UNet that have any."""
    return {transformer.block: len(transformer.blocks) for transformer in transformers(unet)}


def blocks_of(unet: nn.Module, text: str) -> Blocks:
    """The blocks of `unet` that a block string names. Raises ValueError for a block that it does not have."""
    return choose_blocks(text, attention_depths(unet))


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None, options: Mapping[str, Any]) -> Tensor:
    """Attention as diffusers runs it. q: [B, N, C]; k, v: [B, T, C]; mask: broadcastable to [B, heads, N, T]."""
    q, k, v = (part.unflatten(2, (heads, -1)).transpose(1, 2) for part in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


class Cached:
    """A function of tensors that returns its last output again for the same tensor objects."""

    def __init__(self, function: Callable[..., Tensor]):
        self.function = function
        self.inputs: tuple[Tensor, ...] = ()
        self.output: Tensor | None = None

    def __call__(self, *tensors: Tensor) -> Tensor:
        if len(tensors) != len(self.inputs) or any(a is not b for a, b in zip(tensors, self.inputs, strict=True)):
            self.output = self.function(*tensors)
            self.inputs = tensors
        return self.output


@contextmanager
def caching(module: nn.Module) -> Iterator[None]:
    """Within this context, `module` is Cached."""
    own = vars(module).get("forward")  # set by accelerate's offloading
    module.forward = Cached(module.forward)
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


@contextmanager
def replaceable_attention(unet: nn.Module) -> Iterator[None]:
    """Within this context, the attention layers of `unet` follow `patches_replace`; their processors are then restored.

    Keys and values of a text are computed once if every step passes the same tensor, so no weight may change.
    """
    with ExitStack() as stack:
        for number, transformer in enumerate(transformers(unet)):
            for index, block in enumerate(transformer.blocks):
                for slot in SLOTS:
                    layer = getattr(block, slot)
                    stack.callback(layer.set_processor, layer.processor)
                    layer.set_processor(LayerProcessor(layer.processor, slot, transformer, number, index))
                for projection in (block.attn2.to_k, block.attn2.to_v):
                    stack.enter_context(caching(projection))
        yield


@dataclass(frozen=True, eq=False)
class LayerProcessor:
    """Attention processor of layer `index` of the UNet's spatial transformer `number`, around the pipeline's own."""

    original: Any
    slot: str
    transformer: Transformer
    number: int
    index: int

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        transformer_options: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """hidden_states: [B, N, C]; encoder_hidden_states: [B, T, D], None in self-attention. Returns [B, N, C]."""
        options = transformer_options or {}
        replacements = options.get("patches_replace", {}).get(self.slot, {})
        replacement = replacements.get((*self.transformer.block, self.index), replacements.get(self.transformer.block))
        if replacement is None:
            return self.original(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
        if encoder_hidden_states is not None:  # cached, and a replacement may write into them
            k, v = k.clone(), v.clone()
        out = replacement(q, k, v, self.replacement_options(options, attn.heads, q))
        for part in attn.to_out:
            out = part(out)
        return out

    def replacement_options(self, options: Mapping[str, Any], heads: int, q: Tensor) -> dict[str, Any]:
        """The options that a replacement at this layer receives, as in ComfyUI."""
        size = options["original_shape"][2:]
        for _ in range(self.transformer.level):
            size = [(side + 1) // 2 for side in size]
        return {
            **{key: value for key, value in options.items() if key not in ("patches", "patches_replace")},
            "transformer_index": self.number,
            "block": self.transformer.block,
            "block_index": self.index,
            "activations_shape": [q.shape[0], q.shape[2], *size],
            "n_heads": heads,
            "dim_head": q.shape[2] // heads,
            "attn_precision": None,
        }


# diffusers inspects it for every layer in every step; computing it each time takes longer than a small layer
LayerProcessor.__call__.__signature__ = signature(LayerProcessor.__call__)
