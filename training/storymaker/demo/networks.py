"""The demo model as it was trained, frozen, the narrow token network that learns beside it, and a pose ControlNet."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from ....models.demo import model as demo
from ....models.storymaker.ppr import PositionalPerceiverResampler
from ....standalone.unet import diffusers_names
from ...demo.networks import SHALLOW, DividedLinear, NarrowModel
from ..adapter import TrainedAdapter
from ..processors import StoryMakerProcessor

WIDTH = 2 * demo.NARROW
"""Width of the image tokens, as that of the text tokens: the halves of both text encoders."""
RANK = 8
DEPTH = 1
"""Layers of each resampler."""


class Norm(nn.Module):
    """A layer norm of vectors whose mean is 0 at the full width, with one number for all weights."""

    def __init__(self, width: int, **where):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, **where))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * self.weight


class Operations:
    """The layers of the narrow token network."""

    Linear = nn.Linear
    LayerNorm = Norm


class DividedUp(nn.Linear):
    """The last matrix of a LoRA on an output projection, whose share is divided as the projection's own."""

    repeats = 1

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / self.repeats


def narrow_ppr(device: str | None = None) -> PositionalPerceiverResampler:
    """The token network with the widths at which it is trained and stored."""
    return PositionalPerceiverResampler(
        width=WIDTH, image_width=demo.NARROW, id_width=demo.NARROW, depth=DEPTH, device=device, operations=Operations
    )


def frozen_model(path: Path | None = None) -> NarrowModel:
    """The shipped demo model at the widths at which it was trained. path: default the file that ships."""
    stored = {name: tensor.float() for name, tensor in load_file(path or demo.FILE).items()}
    net = NarrowModel(len(stored["vocabulary"]) + 1)
    net.repeat_blocks(max(demo.depths_of_widths().values()))
    originals = {name: original for original, name in diffusers_names(SHALLOW).items()}
    repeats = {name: layer.repeats for name, layer in net.named_modules() if isinstance(layer, DividedLinear)}
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            part, rest = name.split(".", 1)
            value = stored[f"unet.{originals[rest]}" if part == "unet" else name]
            parameter.copy_(value * repeats.get(name.rpartition(".")[0], 1))
    net.repeat_blocks(1)
    return net.eval().requires_grad_(False)


def new_adapter(net: NarrowModel, seed: int) -> TrainedAdapter:
    """An untrained adapter for the narrow model. The same seed gives the same weights."""
    adapter = TrainedAdapter(net.unet, narrow_ppr(), RANK, seed, attend=by_products)
    for processor in adapter.processors:
        up = processor.to_out_lora.up
        divided = DividedUp(up.in_features, up.out_features, bias=False)
        divided.weight = up.weight
        processor.to_out_lora.up = divided
    return adapter


def repeat_blocks(net: NarrowModel, adapter: TrainedAdapter, times: int) -> None:
    """Apply each transformer's block, with its processors, up to `times` times, see `NarrowModel.repeat_blocks`."""
    net.repeat_blocks(times)
    for transformer in net.transformers():
        block = transformer.transformer_blocks[0]
        for attention in (block.attn1, block.attn2):
            if isinstance(attention.processor, StoryMakerProcessor):
                attention.processor.to_out_lora.up.repeats = len(transformer.transformer_blocks)


def by_products(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """Attention as two matrix products, whose backward pass on a CPU is several times faster than the fused one."""
    q, k, v = (part.unflatten(2, (heads, -1)).transpose(1, 2) for part in (q, k, v))
    logits = q @ k.mT * q.shape[-1] ** -0.5
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf)
    return (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)


class PoseControl(nn.Module):
    """A ControlNet (arXiv 2302.05543) for the narrow UNet: a copy of its first half, which also sees a pose.

    Called like diffusers' ControlNetModel. Its outputs start at 0. The pose is averaged over squares of 8x8 pixels.
    """

    def __init__(self, unet: nn.Module):
        super().__init__()
        for name in ("time_proj", "time_embedding", "add_embedding", "conv_in", "down_blocks", "mid_block"):
            setattr(self, name, copy.deepcopy(getattr(unet, name)).requires_grad_(True))
        self.flip_sin_to_cos = unet.config.flip_sin_to_cos
        first = self.conv_in.out_channels
        self.hint = nn.Sequential(
            nn.Conv2d(3, first, 3, padding=1), nn.SiLU(), nn.Conv2d(first, first, 3, padding=1), nn.SiLU()
        )
        self.seen = zero(nn.Conv2d(first, first, 1))
        widths = [first]
        for block in self.down_blocks:
            widths += [resnet.out_channels for resnet in block.resnets]
            widths += [sampler.out_channels for sampler in block.downsamplers or ()]
        self.out = nn.ModuleList(zero(nn.Conv2d(width, width, 1)) for width in widths)
        self.middle = zero(nn.Conv2d(widths[-1], widths[-1], 1))

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        controlnet_cond: Tensor,
        added_cond_kwargs: dict[str, Tensor],
        return_dict: bool = False,
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """Residuals of the down blocks and of the middle block."""
        emb = self.time_embedding(self.time_proj(timestep).to(sample.dtype))
        emb = emb + self.add_embedding(added_cond_kwargs["text_embeds"])
        x = self.conv_in(sample) + self.seen(self.hint(F.avg_pool2d(controlnet_cond, 8)))
        states = [x]
        for block in self.down_blocks:
            if getattr(block, "has_cross_attention", False):
                x, new = block(hidden_states=x, temb=emb, encoder_hidden_states=encoder_hidden_states)
            else:
                x, new = block(hidden_states=x, temb=emb)
            states += new
        x = self.mid_block(x, emb, encoder_hidden_states=encoder_hidden_states)
        return tuple(out(state) for out, state in zip(self.out, states, strict=True)), self.middle(x)


def zero(layer: nn.Module) -> nn.Module:
    """The layer with all parameters 0."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer
