"""The conditionings of a run: which role each has, and which of them are a story's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..prompts.conditioning import TAG, StoryCond
from ..prompts.tag import tag_of
from .call import Conditioning

ROLE = "storyloom_role"
"""Key of a guider's name for a conditioning, in the dicts of a run. Those without it are not the guider's own."""

UNCONDITIONAL = (None, "negative", "empty_negative_prompt", "middle")
"""Roles that guidance leads away from: no role (the model node of Perp-Neg), ordinary, PerpNeg, DualCFG."""


def marked(conds: Mapping[str, list[dict]], original: Mapping[str, list[dict]]) -> dict[str, list[dict]]:
    """This run's conditionings, each with its role, and tagged with a story only if it holds that story's context.

    A tag travels with a conditioning's dict, but the context can be a different one: ConditioningZeroOut leaves only
    zeros, and for a region the host appends a copy of the dict, with the context of the other side, to that side's own.
    """
    stories = {
        id(context_of(cond)): tag_of(cond)
        for name, group in conds.items()
        for cond in group[: len(original.get(name, group))]
        if TAG in cond and context_of(cond) is not None and context_of(cond).any()
    }
    return {
        name: [_with_marks(cond, name, stories.get(id(context_of(cond)))) for cond in group]
        for name, group in conds.items()
    }


def _with_marks(cond: dict, role: str, story: StoryCond | None) -> dict:
    marked = {key: value for key, value in cond.items() if key != TAG} | {ROLE: role}
    return marked if story is None else {**marked, TAG: story}


def conditioning_of(cond: Mapping[str, Any]) -> Conditioning:
    """A run's conditioning as UNet calls see it."""
    area = cond.get("area")
    positive = cond.get(ROLE) not in UNCONDITIONAL
    return Conditioning(tag_of(cond), _context_length(cond), positive, None if area is None else tuple(area))


def context_of(cond: Mapping[str, Any]) -> Tensor | None:
    """A conditioning's text context [rows, T, D] as the UNet gets it, None when it has none."""
    encoded = cond.get("model_conds", {}).get("c_crossattn")
    return None if encoded is None else encoded.cond


def _context_length(cond: Mapping[str, Any]) -> int:
    context = context_of(cond)
    return 1 if context is None else context.shape[1]
