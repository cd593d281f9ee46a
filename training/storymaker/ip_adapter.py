"""IP-Adapter files as a start for StoryMaker's training: the networks that both have under the same names."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...models.storymaker.weights import listed

log = logging.getLogger(__name__)

QUERY = ("proj.", "norm.", "perceiver_resampler.")
"""Modules of the token network that ip-adapter-faceid-plusv2_sdxl has too."""


class Taken(NamedTuple):
    """taken: number of tensors that were copied; missing: those that the files should have but lack or have in another
    shape, as "name" or "name [shape] instead of [shape]"; unused: names of the files' other tensors."""

    taken: int
    missing: list[str]
    unused: list[str]


def copy_weights(
    ppr: nn.Module,
    processors: nn.Module,
    plus: Mapping[str, Any] | None,
    faceid: Mapping[str, Any] | None,
) -> Taken:
    """Copy what IP-Adapter's files have in common with StoryMaker, and log what they lack.

    plus: tensors of ip-adapter-plus_sdxl_vit-h, for `resample`; faceid: tensors of ip-adapter-faceid-plusv2_sdxl, for
    `proj`, `norm`, `perceiver_resampler`, the LoRA and the image keys and values. Both are nested dicts with
    `image_proj` and `ip_adapter`, or the same with dotted names; either may be None. What they lack keeps its values.
    """
    own = {name: tensor for name, tensor in ppr.named_parameters()}
    layers = {name: tensor for name, tensor in processors.named_parameters()}
    wanted: dict[str, tuple[Tensor, Tensor | None]] = {}
    unused = []
    if plus is not None:
        projection, adapter = _parts(plus)
        wanted |= {name: (own[name], projection.pop(name[9:], None)) for name in own if name.startswith("resample.")}
        unused += [*projection, *adapter]
    if faceid is not None:
        projection, adapter = _parts(faceid)
        wanted |= {name: (own[name], projection.pop(name, None)) for name in own if name.startswith(QUERY)}
        wanted |= {name: (layers[name], adapter.pop(name, None)) for name in layers}
        unused += [*projection, *adapter]
    taken, missing = 0, []
    with torch.no_grad():
        for name, (parameter, value) in wanted.items():
            if value is None:
                missing.append(name)
            elif value.shape != parameter.shape:
                missing.append(f"{name} {list(value.shape)} instead of {list(parameter.shape)}")
            else:
                parameter.copy_(value)
                taken += 1
    if missing:
        log.warning("%d tensors were not found in the IP-Adapter files: %s", len(missing), listed(missing))
    return Taken(taken, missing, unused)


def _parts(state_dict: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of `image_proj` and of `ip_adapter`, by their names inside these."""
    parts: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for part, tensors in parts.items():
        tensors.update(state_dict.get(part, {}))
        tensors.update({k[len(part) + 1 :]: v for k, v in state_dict.items() if k.startswith(f"{part}.")})
    return parts["image_proj"], parts["ip_adapter"]
