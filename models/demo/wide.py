"""The demo's StoryMaker at full width: its narrow networks, as they are trained and stored, mapped to mask.bin's sizes.

A vector of the narrow networks is a vector of the wide ones in an orthonormal basis whose columns are orthogonal to the
constant vector, times the root of the ratio of the widths. It then has the same mean square, so a layer norm does the
same to both. Attention heads and hidden units that the narrow networks lack are zero. The results are the same numbers
in that basis.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..storymaker.ppr import FACE_TOKENS
from ..storymaker.weights import ADAPTER, CONTEXT, LAYER_SLOTS, PROJECTION, StoryMakerWeights
from . import model as demo

IDENTITY, FEATURES = 512, 1280
HIDDEN = 2 * IDENTITY
"""Hidden width of the network that makes queries from the identity vector."""
WIDTH = 2 * demo.NARROW
"""Narrow width of the image tokens: that of both text encoders together, in the same basis."""


@dataclass(frozen=True, eq=False)
class Space:
    """columns: [wide, narrow], orthonormal; a narrow vector x is the wide vector scale * columns @ x."""

    columns: Tensor
    scale: float

    @property
    def into(self) -> Tensor:
        """[wide, narrow], from narrow to wide vectors."""
        return self.columns * self.scale

    @property
    def out_of(self) -> Tensor:
        """[narrow, wide], from wide to narrow vectors."""
        return self.columns.T / self.scale


@cache
def tokens() -> Space:
    """Image tokens: the halves of the text encoders, each in its own basis."""
    halves = demo.basis(demo.CLIP_L["hidden_size"]), demo.basis(demo.CLIP_G["hidden_size"])
    return Space(torch.block_diag(*halves), math.sqrt(CONTEXT / WIDTH))


@cache
def features() -> Space:
    """Image features, see `vision`."""
    return Space(demo.basis(FEATURES), math.sqrt(FEATURES / demo.NARROW))


@cache
def identities() -> Space:
    """Identity vectors, which keep their norm."""
    return Space(demo.basis(IDENTITY), 1.0)


def widened(stored: Mapping[str, Tensor]) -> StoryMakerWeights:
    """StoryMaker's weights in float32 from the stored narrow ones, which have mask.bin's names with a dotted part.

    Layers are numbered as in mask.bin, with one block for each of SDXL's spatial transformers, which is repeated.
    """
    ppr = {name.removeprefix(f"{PROJECTION}."): x.float() for name, x in stored.items() if name.startswith(PROJECTION)}
    lora, image_kv = {}, {}
    for number, slot in enumerate(LAYER_SLOTS):
        for attention in (1, 2):
            prefix = f"{ADAPTER}.{2 * number + attention - 1}."
            layer = {name.removeprefix(prefix): x.float() for name, x in stored.items() if name.startswith(prefix)}
            for j in range(slot.depth):
                name = f"{slot.diffusers}.transformer_blocks.{j}.attn{attention}.processor"
                lora |= {f"{name}.{inside}": x for inside, x in _lora(layer, attention == 2, slot.depth).items()}
            if attention == 2:
                pair = tuple(layer[f"to_{part}_ip.weight"] @ tokens().out_of for part in "kv")
                image_kv |= {(slot.part, slot.number, j): pair for j in range(slot.depth)}
    return StoryMakerWeights(wide_ppr(ppr), lora, image_kv)


def _lora(layer: Mapping[str, Tensor], cross: bool, depth: int) -> dict[str, Tensor]:
    """A block's LoRA. Each of the repeated blocks adds its share of the output."""
    wide = {name: x for name, x in layer.items() if "_lora." in name}
    if cross:
        for part in "kv":
            name = f"to_{part}_lora.down.weight"
            wide[name] = demo.reading_text(wide[name])
    return wide | {"to_out_lora.up.weight": wide["to_out_lora.up.weight"] / depth}


def wide_ppr(narrow: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of `ppr.PositionalPerceiverResampler` at full width from that of a narrow one.

    A narrow norm has one number for all weights, and no bias.
    """
    wide = {name: narrow[name] @ tokens().into.T for name in ("pos_embed", "bg_embed")}
    wide["resample.latents"] = narrow["resample.latents"] @ features().into.T
    wide["proj.0.weight"] = pad(narrow["proj.0.weight"] @ identities().out_of, (0, 0, 0, HIDDEN - _rows(narrow)))
    wide["proj.0.bias"] = pad(narrow["proj.0.bias"], (0, HIDDEN - _rows(narrow)))
    queries = narrow["proj.2.weight"].unflatten(0, (FACE_TOKENS, WIDTH))
    wide["proj.2.weight"] = pad((tokens().into @ queries).flatten(0, 1), (0, HIDDEN - _rows(narrow)))
    wide["proj.2.bias"] = (narrow["proj.2.bias"].view(FACE_TOKENS, WIDTH) @ tokens().into.T).flatten()
    wide |= _norm("norm", narrow, CONTEXT) | _linear("proj_out", narrow, tokens(), tokens())
    wide |= _norm("norm_out", narrow, CONTEXT)
    for part, space in (("perceiver_resampler", tokens()), ("resample", features())):
        wide |= _linear(f"{part}.proj_in", narrow, features(), space)
        wide |= _linear(f"{part}.proj_out", narrow, space, tokens()) | _norm(f"{part}.norm_out", narrow, CONTEXT)
        for name in narrow:
            if name.startswith(f"{part}.layers.") and name.endswith(".0.to_q.weight"):
                wide |= _layer(name.removesuffix(".0.to_q.weight"), narrow, space)
    return wide


def _rows(narrow: Mapping[str, Tensor]) -> int:
    return len(narrow["proj.0.weight"])


def _norm(name: str, narrow: Mapping[str, Tensor], width: int) -> dict[str, Tensor]:
    return {f"{name}.weight": narrow[f"{name}.weight"].expand(width).clone(), f"{name}.bias": torch.zeros(width)}


def _linear(name: str, narrow: Mapping[str, Tensor], source: Space, target: Space) -> dict[str, Tensor]:
    weight, bias = narrow[f"{name}.weight"], narrow[f"{name}.bias"]
    return {f"{name}.weight": target.into @ weight @ source.out_of, f"{name}.bias": target.into @ bias}


def _layer(name: str, narrow: Mapping[str, Tensor], space: Space) -> dict[str, Tensor]:
    """Attention and feed-forward of a resampler's layer; what is wider than the narrow one is zero."""
    width, inner = space.columns.shape
    wide = {}
    for norm in ("0.norm1", "0.norm2", "1.0"):
        wide |= _norm(f"{name}.{norm}", narrow, width)

    def reading(weight: Tensor, rows: int) -> Tensor:
        return pad(weight @ space.out_of, (0, 0, 0, rows - len(weight)))

    def writing(weight: Tensor, columns: int) -> Tensor:
        return pad(space.into @ weight, (0, columns - weight.shape[1]))

    keys, values = narrow[f"{name}.0.to_kv.weight"].split(inner)
    return wide | {
        f"{name}.0.to_q.weight": reading(narrow[f"{name}.0.to_q.weight"], width),
        f"{name}.0.to_kv.weight": torch.cat([reading(keys, width), reading(values, width)]),
        f"{name}.0.to_out.weight": writing(narrow[f"{name}.0.to_out.weight"], width),
        f"{name}.1.1.weight": reading(narrow[f"{name}.1.1.weight"], 4 * width),
        f"{name}.1.3.weight": writing(narrow[f"{name}.1.3.weight"], 4 * width),
    }
