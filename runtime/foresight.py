"""What a patch makes for a run before the UNet is loaded, so that its networks need not lie beside it.

The networks of StoryMaker are 1.7 GB, and all that a run wants of them are keys and values of 20 to 60 MB. Who will be
in its pictures is known from the conditionings before they are sampled, so these are made first, and the networks go.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch

from ..prompts.conditioning import StoryCond

OUTER_SAMPLE = "outer_sample"
"""ComfyUI's name for a sampling run from before its model is loaded."""

FORESEEN = "storyloom_foreseen"
"""Where what was made lies in the transformer_options of a run until its sampler starts."""

Resident = Callable[[], AbstractContextManager[torch.device]]
"""Puts networks onto the device where they compute, which it gives, for as long as it is entered."""


class Asked(NamedTuple):
    """A conditioning of a run: the story that it is sampled beside, and whether it asks for the picture."""

    story: StoryCond | None
    positive: bool


@runtime_checkable
class Foreseeing(Protocol):
    """A patch with networks of its own. resident: equal for patches that share them; None: where nobody moves them."""

    resident: Resident | None

    def foreseen(
        self, asked: Sequence[Asked], device: torch.device, dtype: torch.dtype | None
    ) -> Mapping[Hashable, Any]:
        """What `SamplerCall.kept` of the run holds from the start. dtype: that of the UNet's tensors, None: unknown."""


def foresee(patches: Iterable[object], asked: Sequence[Asked], dtype: torch.dtype | None) -> dict[Hashable, Any]:
    """What the patches of a run want to have before its UNet is loaded; networks that they share are loaded once."""
    sharing: dict[Resident, list[Foreseeing]] = {}
    for patch in patches:
        if isinstance(patch, Foreseeing) and patch.resident is not None:
            sharing.setdefault(patch.resident, []).append(patch)
    kept: dict[Hashable, Any] = {}
    for resident, theirs in sharing.items():
        with resident() as device:
            for patch in theirs:
                kept |= patch.foreseen(asked, device, dtype)
    return kept
