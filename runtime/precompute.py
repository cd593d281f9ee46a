"""What a patch computes for a run before the UNet is loaded, so that its networks need not stay in memory beside it.

StoryMaker's networks are 1.7 GB, and a run needs only 20 to 60 MB of keys and values from them. The conditionings show
who will be in the images before sampling starts, so these are computed first and the networks are unloaded.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch

from ..prompts.conditioning import StoryCond

OUTER_SAMPLE = "outer_sample"
"""ComfyUI's name for a sampling run from before its model is loaded."""

PRECOMPUTED = "storyloom_precomputed"
"""Key of the precomputed values in the transformer_options of a run, until its sampler starts."""

Resident = Callable[[], AbstractContextManager[torch.device]]
"""A context manager that keeps networks on their compute device, which it returns, while it is entered."""


class RunConditioning(NamedTuple):
    """A conditioning of a run: its story (or the run's, if it has none) and whether guidance leads towards it."""

    story: StoryCond | None
    positive: bool


@runtime_checkable
class Precomputes(Protocol):
    """A patch with networks of its own. resident: equal for patches that share them; None: they are never moved."""

    resident: Resident | None

    def precomputed(
        self, conditionings: Sequence[RunConditioning], device: torch.device, dtype: torch.dtype | None
    ) -> Mapping[Hashable, Any]:
        """Values that the run's cache holds from the start. dtype: of the UNet's tensors, None: unknown."""


def precompute(
    patches: Iterable[object], conditionings: Sequence[RunConditioning], dtype: torch.dtype | None
) -> dict[Hashable, Any]:
    """Values that patches need before the UNet is loaded. Networks that several patches share are loaded once."""
    sharing: dict[Resident, list[Precomputes]] = {}
    for patch in patches:
        if isinstance(patch, Precomputes) and patch.resident is not None:
            sharing.setdefault(patch.resident, []).append(patch)
    values: dict[Hashable, Any] = {}
    for resident, group in sharing.items():
        with resident() as device:
            for patch in group:
                values |= patch.precomputed(conditionings, device, dtype)
    return values
