"""What a patch is: the settings of one method on a model, and when they act."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from ..prompts.conditioning import StoryCond
from .blocks import Blocks
from .call import SamplerCall, UNetCall
from .chain import Chain

OUTPUT_BLOCKS = "output_block_patch"
"""ComfyUI's name for functions that change the inputs of a UNet's output blocks."""


class Patch(Protocol):
    """Settings of one method, stored on the model by a node: an AttentionPatch or an OutputPatch, depending on slot."""

    name: str
    slot: str
    start_percent: float
    end_percent: float
    skip_first_steps: int

    @property
    def neutral(self) -> bool:
        """Whether these settings change nothing at all."""

    def no_effect_reason(self, story: StoryCond | None, images: int) -> str | None:
        """Why these settings change nothing in a run over this many images, None when they do."""


class AttentionPatch(Patch, Protocol):
    """A patch in slot "attn1" or "attn2", on the attention layers of some blocks.

    adds: whether it calls the chain below once, unchanged, and adds to the result. Such a patch goes around those that
    change keys and values.
    """

    blocks: Blocks
    adds: bool

    def combine(self, other: object) -> AttentionPatch | None:
        """These settings and another node's as one, on one layer at one time; None when both act by themselves."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, heads: int, call: UNetCall, inner: Chain) -> Tensor:
        """Attention of one layer; `inner` calls the attention below this patch."""


class OutputPatch(Patch, Protocol):
    """A patch in slot OUTPUT_BLOCKS, on the inputs of a UNet's output blocks."""

    def join(self, h: Tensor, skip: Tensor | None, block: int) -> tuple[Tensor, Tensor | None]:
        """New backbone and skip, [rows, channels, height, width] each, for output block `block`."""


@runtime_checkable
class PreparesSteps(Protocol):
    """A patch that makes new tensors in every step. It does so before the UNet call, where no card waits for it."""

    def prepare(self, evaluation: SamplerCall) -> None:
        """Make what the UNet calls of this evaluation will need, as far as earlier ones of the run have shown it."""


def check_percents(start_percent: float, end_percent: float) -> None:
    """Raise ValueError when a patch's percent range ends before it starts, or either end is NaN."""
    if math.isnan(start_percent) or math.isnan(end_percent):
        raise ValueError(
            f"start_percent {start_percent:g} and end_percent {end_percent:g} are not both numbers: enter or connect "
            "numbers from 0 to 1."
        )
    if start_percent > end_percent:
        raise ValueError(
            f"start_percent {start_percent:g} is after end_percent {end_percent:g}, so the patch would never act. "
            "Set start_percent below end_percent."
        )


@dataclass(frozen=True, eq=False)
class ScheduledPatch:
    """A patch and the sigmas between which it acts, both ends included."""

    patch: Patch
    first: float
    last: float

    def acts_at(self, sigma: float) -> bool:
        return self.last <= sigma <= self.first


def acting(patches: Iterable[ScheduledPatch], call: SamplerCall | UNetCall) -> list[Patch]:
    """The patches that act in this evaluation or UNet call."""
    scheduled = [entry.patch for entry in patches if entry.acts_at(call.sigma)]
    return [patch for patch in scheduled if call.step >= patch.skip_first_steps]


def nested(patches: Iterable[AttentionPatch]) -> tuple[AttentionPatch, ...]:
    """Patches of one layer from the innermost to the outermost, with those that combine made one."""
    chain: list[AttentionPatch] = []
    for patch in patches:
        for place, other in enumerate(chain):
            both = other.combine(patch)
            if both is not None:
                chain[place] = both
                break
        else:
            chain.append(patch)
    return tuple(sorted(chain, key=lambda patch: patch.adds))
