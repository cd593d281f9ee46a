"""Trainable attention processors of a diffusers UNet: LoRA on all projections, and attention to image tokens.

A layer computes what StoryMaker's file means: q = x(Wq + ΔWq); o = attention to text tokens with LoRA on their keys and
values, plus attention of the same q to image tokens with matrices of their own; y = o(Wo + ΔWo) + b.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...attention.decoupled import decoupled_cross_attention
from ...models.storymaker.ppr import CHARACTERS, TOKENS

Attend = Callable[[Tensor, Tensor, Tensor, int, Tensor | None], Tensor]
"""(q [B, N, C], k and v [B, T, C], heads, mask or None) -> [B, N, C]."""


@dataclass(frozen=True, eq=False)
class ImageContext:
    """Image tokens for one UNet call, passed as `cross_attention_kwargs={"image": ...}`.

    tokens    [B, M, W], 20 for the background, then 20 for each character
    keep      booleans [B, M], False for absent characters; None keeps all
    maps      a list to which each cross-attention layer appends [B, 4, h, w], see `losses.attention_loss`; or None
    size      height and width of the latents; only maps need it, and None is for square ones
    strength  factor of the image attention
    lora      factor of the LoRA
    """

    tokens: Tensor
    keep: Tensor | None
    maps: list[Tensor] | None = None
    size: tuple[int, int] | None = None
    strength: float = 1.0
    lora: float = 1.0


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """Attention as diffusers runs it. q: [B, N, C]; k, v: [B, T, C]; mask: broadcastable to [B, heads, N, T]."""
    q, k, v = (part.unflatten(2, (heads, -1)).transpose(1, 2) for part in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


def probabilities(q: Tensor, k: Tensor, heads: int, keep: Tensor | None) -> Tensor:
    """Attention probabilities [B, heads, N, M], at least float32. q: [B, N, C]; k: [B, M, C]; keep: [B, M] or None."""
    q, k = (part.unflatten(2, (heads, -1)).transpose(1, 2) for part in (q, k))
    scale = q.shape[-1] ** -0.25  # on both, so that the product fits half precision
    logits = (q * scale) @ (k * scale).mT
    if keep is not None:
        logits = logits.masked_fill(~keep[:, None, None], -torch.inf)
    return logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def group_maps(weights: Tensor, size: tuple[int, int] | None) -> Tensor:
    """Mean over the heads, and sum over the tokens of the background and of each character: [B, 4, h, w].

    weights: [B, heads, N, M]; size: of the latents, of which N is the number of pixels after some halvings.
    """
    groups = weights.mean(1).unflatten(-1, (-1, TOKENS)).sum(-1).mT
    groups = F.pad(groups, (0, 0, 0, 1 + CHARACTERS - groups.shape[1]))
    return groups.unflatten(-1, grid(groups.shape[-1], size))


def grid(pixels: int, size: tuple[int, int] | None) -> tuple[int, int]:
    """Height and width of a layer with this number of pixels. size: of the latents; None for a square.

    Raises ValueError if no number of halvings leads from the latents to the layer.
    """
    height, width = size or (math.isqrt(pixels),) * 2
    while height * width > pixels:
        height, width = -(-height // 2), -(-width // 2)
    if height * width != pixels:
        raise ValueError(f"A layer has {pixels} pixels, which latents of {size} cannot have: pass the latents' size.")
    return height, width


class LowRank(nn.Module):
    """The change of a projection, up(down(x)), which starts at 0."""

    def __init__(self, source: int, width: int, rank: int, **where):
        super().__init__()
        self.down = nn.Linear(source, rank, bias=False, **where)
        self.up = nn.Linear(rank, width, bias=False, **where)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x))


class StoryMakerProcessor(nn.Module):
    """What one attention layer learns, named as in StoryMaker's file, and the computation of the layer.

    width: channels of the layer; source: width of the inputs of its keys and values; image_width: of the image tokens,
    None for self-attention; attend: computes attention to the text or to the picture itself.
    """

    def __init__(self, width: int, source: int, rank: int, image_width: int | None, attend: Attend = attend, **where):
        super().__init__()
        self.attend = attend
        for target, inputs in (("q", width), ("k", source), ("v", source), ("out", width)):
            setattr(self, f"to_{target}_lora", LowRank(inputs, width, rank, **where))
        if image_width is not None:
            self.to_k_ip = nn.Linear(image_width, width, bias=False, **where)
            self.to_v_ip = nn.Linear(image_width, width, bias=False, **where)
        self.cross = image_width is not None

    def __call__(  # diffusers reads the names of its parameters, which nn.Module's own hides
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image: ImageContext | None = None,
    ) -> Tensor:
        lora = 1.0 if image is None else image.lora
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q = changed(attn.to_q, self.to_q_lora, hidden_states, lora)
        k = changed(attn.to_k, self.to_k_lora, context, lora)
        v = changed(attn.to_v, self.to_v_lora, context, lora)
        if attention_mask is not None:
            batch, tokens = k.shape[:2]
            attention_mask = attn.prepare_attention_mask(attention_mask, tokens, batch)
            attention_mask = attention_mask.view(batch, attn.heads, -1, tokens)
        out = self.attend(q, k, v, attn.heads, attention_mask)
        if self.cross and image is not None:
            out = self._with_image(out, q, attn.heads, image)
        return attn.to_out[1](changed(attn.to_out[0], self.to_out_lora, out, lora))

    def _with_image(self, out: Tensor, q: Tensor, heads: int, image: ImageContext) -> Tensor:
        """The attention to text tokens [B, N, C] and, times the strength, the one to image tokens."""
        if not image.strength and image.maps is None:
            return out
        k, v = self.to_k_ip(image.tokens), self.to_v_ip(image.tokens)
        keep = image.keep

        def plain(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
            return attend(q, k, v, heads, None if keep is None else keep[:, None, None])

        def recorded(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
            weights = probabilities(q, k, heads, keep)
            record(image.maps, group_maps(weights, image.size))
            return (weights.to(v.dtype) @ v.unflatten(2, (heads, -1)).transpose(1, 2)).transpose(1, 2).flatten(2)

        return decoupled_cross_attention(out, q, k, v, heads, image.strength, plain if image.maps is None else recorded)


def changed(base: nn.Module, low_rank: LowRank, x: Tensor, factor: float) -> Tensor:
    """base(x) + factor * low_rank(x); base(x) itself where the factor is 0."""
    return base(x) + factor * low_rank(x) if factor else base(x)


def record(maps: list[Tensor], of_layer: Tensor) -> None:
    """Append a layer's maps, unless gradient checkpointing is just computing the layer again for the backward pass."""
    if torch._C._current_graph_task_id() == -1:
        maps.append(of_layer)
