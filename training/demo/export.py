"""The demo model's weights file, from a trained network."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...models.demo import model as demo
from ...standalone.unet import diffusers_names
from .data import make_batch
from .loop import Training
from .networks import SHALLOW, DividedLinear, NarrowModel


def exported_weights(training: Training) -> dict[str, Tensor]:
    """The averaged weights as they are shipped, in float16: the UNet under SDXL's names, one block per transformer.

    Text tokens are scaled to a norm of 1 per dimension, so that they reach `demo.ROW_NORM` at SDXL's widths.
    """
    net = training.averaged()
    originals = {name: original for original, name in diffusers_names(SHALLOW).items()}
    repeats = {name: layer.repeats for name, layer in net.named_modules() if isinstance(layer, DividedLinear)}
    norms = token_norms(training, net)
    out = {"vocabulary": torch.tensor(training.vocabulary.tokens, dtype=torch.int32)}
    for name, value in net.named_parameters():
        part, rest = name.split(".", 1)
        value = value.detach() / repeats.get(name.rpartition(".")[0], 1)
        if rest.startswith(("embedding", "position", "out.", "fc2.")):  # the terms of the residual stream
            value = value / norms[part]
        elif ".attn2.to_k." in name or ".attn2.to_v." in name:
            value = torch.cat([half * norm for half, norm in zip(value.chunk(2, 1), norms.values(), strict=True)], 1)
        out[f"unet.{originals[rest]}" if part == "unet" else name] = value.half().cpu().contiguous()
    return out


@torch.no_grad()
def token_norms(training: Training, net: NarrowModel) -> dict[str, float]:
    """Mean norm per dimension of the text tokens of each encoder, without start, end and padding."""
    batch = make_batch(training.vocabulary, (training.seed, 3), training.stereotypes, simple=True).to(training.device)
    context, _ = net.encode(batch.rows_l, batch.rows_g, batch.ends)
    positions = torch.arange(context.shape[1], device=training.device)
    words = (positions > 0) & (positions < batch.ends[:, None])
    means = (half[words].norm(dim=1).mean() / math.sqrt(demo.NARROW) for half in context.chunk(2, -1))
    return dict(zip("lg", map(float, means), strict=True))
