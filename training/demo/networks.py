"""The networks that are trained: narrow text encoders, the attribute heads that teach them, and a shallow UNet."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...models.demo import model as demo
from ...standalone.layers import Cached
from ...standalone.unet import build_unet
from ...world.captions import FigureCaption, FrameCaption
from ...world.scene import ACTIONS, LOOKS, PLACES, PROPS, SPECIES

SHALLOW = {
    **demo.UNET,
    "transformer_depth": [0, 0, 1, 1, 1, 1],
    "transformer_depth_middle": 1,
    "transformer_depth_output": [0, 0, 0, 1, 1, 1, 1, 1, 1],
    "context_dim": 2 * demo.NARROW,
}
RESIDUAL = ("attn1.to_out.0", "attn2.to_out.0", "ff.net.2")
"""The layers of a transformer block whose outputs are added to its input."""


class NarrowEncoder(nn.Module):
    """CLIP's text model with width `demo.NARROW`: pre-norm, causal, norms without parameters."""

    def __init__(self, vocabulary: int, layers: int, heads: int, hidden: int, quick: bool):
        super().__init__()
        width = demo.NARROW
        self.heads, self.quick = heads, quick
        self.embedding = nn.Parameter(torch.randn(vocabulary, width))
        self.position = nn.Parameter(torch.randn(77, width) * 0.3)

        def matrices(rows: int, columns: int, gain: float) -> nn.ParameterList:
            return nn.ParameterList(torch.randn(rows, columns) * gain / math.sqrt(columns) for _ in range(layers))

        self.qkv, self.out = matrices(3 * width, width, 1.0), matrices(width, width, 0.7)
        self.fc1, self.fc2 = matrices(hidden, width, 1.0), matrices(width, hidden, 0.5)

    def forward(self, rows: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
        """Penultimate states [B, 77, R], and the normed last state at `end` [B, R]. rows: [B, 77]."""
        batch, length = rows.shape
        future = torch.ones(length, length, dtype=torch.bool, device=rows.device).triu(1)
        x = self.embedding[rows] + self.position
        penultimate = x
        for qkv, out, fc1, fc2 in zip(self.qkv, self.out, self.fc1, self.fc2, strict=True):
            penultimate = x
            q, k, v = F.linear(_normed(x), qkv).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            scores = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).masked_fill(future, -1e9)
            x = x + F.linear((scores.softmax(-1) @ v).transpose(1, 2).flatten(2), out)
            hidden = F.linear(_normed(x), fc1)
            hidden = hidden * torch.sigmoid(1.702 * hidden) if self.quick else F.gelu(hidden)
            x = x + F.linear(hidden, fc2)
        return penultimate, _normed(x)[torch.arange(batch, device=rows.device), end]


def _normed(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)


ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "place": PLACES,
    "action": ACTIONS,
    "prop": PROPS,
    "species": SPECIES,
    **{look: ("unsaid", *values) for look, values in LOOKS.items()},
}
"""The attributes of a caption that the encoders learn to recognise, with their values."""


class AttributeHeads(nn.Module):
    """Linear classifiers for ATTRIBUTES, on text tokens [N, 2R] and on pooled text [N, R]."""

    def __init__(self):
        super().__init__()
        values = sum(map(len, ATTRIBUTES.values()))
        self.of_tokens, self.of_pooled = nn.Linear(2 * demo.NARROW, values), nn.Linear(demo.NARROW, values)

    def loss(self, logits: Tensor, labels: Sequence[Mapping[str, str]]) -> Tensor:
        """Mean cross entropy of the attributes, in nats. logits: [N, all values]; labels: the attributes of N texts."""
        errors, sizes = [], list(map(len, ATTRIBUTES.values()))
        for (name, values), part in zip(ATTRIBUTES.items(), logits.split(sizes, 1), strict=True):
            labelled = [i for i, label in enumerate(labels) if name in label]
            targets = torch.tensor([values.index(labels[i][name]) for i in labelled], device=logits.device)
            if labelled:
                errors.append(F.cross_entropy(part[labelled], targets))
        return sum(errors) / len(errors)


def attributes_of(frame: FrameCaption | None, figure: FigureCaption | None) -> dict[str, str]:
    """The values of ATTRIBUTES for a text about a frame, a figure or both."""
    attributes = {"place": frame.place, "action": frame.action, "prop": frame.prop} if frame else {}
    if figure:
        attributes |= {"species": figure.species, **{look: figure.looks.get(look, "unsaid") for look in LOOKS}}
    return attributes


class PooledOnly(nn.Linear):
    """SDXL's label embedding for the pooled text alone; the picture sizes that follow it are ignored."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[:, : self.in_features])


class DividedLinear(nn.Linear):
    """A linear layer whose output is divided by `repeats`, the number of times that its block is applied."""

    repeats = 1

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight / self.repeats, self.bias / self.repeats)


class MatmulAttention:
    """Attention as two matrix products, whose backward pass on a CPU is several times faster than the fused one."""

    def __call__(self, attn, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **_) -> Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
        batch, tokens, width = q.shape

        def split(x: Tensor) -> Tensor:
            return x.view(batch, -1, attn.heads, width // attn.heads).transpose(1, 2).flatten(0, 1)

        q, k, v = split(q), split(k), split(v)
        weights = (torch.bmm(q, k.transpose(1, 2)) * q.shape[-1] ** -0.5).softmax(-1).to(v.dtype)
        out = torch.bmm(weights, v).view(batch, attn.heads, tokens, -1).transpose(1, 2).reshape(batch, tokens, width)
        return attn.to_out[0](out)


class NarrowModel(nn.Module):
    """Both text encoders and the UNet at the widths at which they are trained and stored."""

    def __init__(self, vocabulary: int):
        super().__init__()
        self.l, self.g = (
            NarrowEncoder(
                vocabulary, numbers["num_hidden_layers"], demo.NARROW_HEADS, numbers["intermediate_size"], quick
            )
            for numbers, quick in ((demo.CLIP_L, True), (demo.CLIP_G, False))
        )
        self.unet = build_unet(SHALLOW, demo.HEAD_CHANNELS)
        self.unet.set_attn_processor(MatmulAttention())
        first = self.unet.add_embedding.linear_1
        self.unet.add_embedding.linear_1 = PooledOnly(demo.NARROW, first.out_features)
        with torch.no_grad():
            for name, parameter in self.unet.named_parameters():
                if name.endswith(("conv2.weight", "proj_out.weight", "conv_out.weight")):
                    parameter.mul_(0.05)
        for transformer in self.transformers():
            block = transformer.transformer_blocks[0]
            for name in RESIDUAL:
                layer = block.get_submodule(name)
                block.set_submodule(name, DividedLinear(layer.in_features, layer.out_features))
            for projection in (block.attn2.to_k, block.attn2.to_v):  # of the text: the same in every repetition
                projection.forward = Cached(projection.forward)

    def transformers(self) -> list[nn.Module]:
        """The UNet's spatial transformers, in order."""
        from diffusers.models.transformers.transformer_2d import Transformer2DModel

        return [module for module in self.unet.modules() if isinstance(module, Transformer2DModel)]

    def repeat_blocks(self, times: int) -> None:
        """Apply the block of every transformer `times` times, but no more often than SDXL has blocks there."""
        depths = demo.depths_of_widths()
        for transformer in self.transformers():
            block, depth = transformer.transformer_blocks[0], min(times, depths[transformer.inner_dim])
            transformer.transformer_blocks = nn.ModuleList([block] * depth)
            for name in RESIDUAL:
                block.get_submodule(name).repeats = depth

    def encode(self, rows_l: Tensor, rows_g: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
        """Text tokens [B, 77, 2R] and pooled text [B, R]."""
        states_l, _ = self.l(rows_l, end)
        states_g, pooled = self.g(rows_g, end)
        return torch.cat([states_l, states_g], -1), pooled

    def predict(self, x: Tensor, t: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
        """v [B, 4, h, w] for noisy latents at timesteps t [B]."""
        sizes = torch.zeros(x.shape[0], 6, device=x.device)
        return self.unet(x, t, context, added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes}).sample
