"""Long stories: a plan of equal-size batches that all begin with the same anchor frames.

Consistent self-attention lets every image look at the anchors only, so that batches which share their anchors share
their character, and a story of any length is drawn by as many runs of the sampler as it has batches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .conditioning import TAG


@dataclass(frozen=True)
class BatchPlan:
    """Which frames are drawn together.

    frames   how many the story has
    anchors  how many of the first frames stand at the beginning of every batch
    batches  frame numbers of each batch, anchors first; the last frame fills up the last batch
    """

    frames: int
    anchors: int
    batches: tuple[tuple[int, ...], ...]

    def places(self) -> list[tuple[int, int]]:
        """(batch, place in it) where each frame is taken from, in story order: the first time that it is drawn."""
        found: dict[int, tuple[int, int]] = {}
        for number, batch in enumerate(self.batches):
            for place, frame in enumerate(batch):
                found.setdefault(frame, (number, place))
        return [found[frame] for frame in range(self.frames)]


def plan_batches(frames: int, size: int, anchors: int) -> BatchPlan:
    """A plan for `frames` frames in batches of `size`. A story that fits one batch is one, as large as itself.

    Raises ValueError when a batch has no room beside its anchors.
    """
    if frames <= size:
        return BatchPlan(frames, min(anchors, frames), (tuple(range(frames)),))
    if anchors >= size:
        raise ValueError(
            f"A batch of {size} images has no room for frames beside {anchors} anchors. Raise batch_size above "
            "anchors, or use fewer anchors."
        )
    shared, room = tuple(range(anchors)), size - anchors
    batches = [shared + tuple(range(first, min(first + room, frames))) for first in range(anchors, frames, room)]
    batches[-1] += (frames - 1,) * (size - len(batches[-1]))
    return BatchPlan(frames, anchors, tuple(batches))


def split_rows(rows: Tensor, frames: Sequence[int], count: int, what: str = "rows") -> Tensor:
    """The rows of some frames; a single row, which holds for every frame, stays alone.

    rows: [count or 1, ...]; what: their name in errors. Raises ValueError for any other number of rows.
    """
    if rows.shape[0] == 1:
        return rows
    if rows.shape[0] != count:
        raise ValueError(
            f"has {rows.shape[0]} {what}, but the story has {count} frames. It needs one per frame, or a single one."
        )
    return rows[list(frames)]


def split_info(
    info: Mapping[str, Any], frames: Sequence[int], count: int, anchors: int | None = None
) -> dict[str, Any]:
    """A conditioning's dict for some frames: tensors with a row per frame and the story's tag are cut, the rest stays.

    anchors: how many of the story's first frames begin every batch, which the tag tells from now on.
    Raises ValueError for a ControlNet whose hint has an image per frame: hints are split before they are applied.
    """
    control = info.get("control")
    while control is not None:
        hint = control.cond_hint_original
        if hint is not None and hint.shape[0] > 1:
            raise ValueError(
                "already has a ControlNet with several hint images. Split the story first: connect the hint images "
                "to the same Split node, and apply the ControlNet to its outputs."
            )
        control = control.previous_controlnet
    cut = {}
    for key, value in info.items():
        if isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == count > 1:
            value = value[list(frames)]
        elif key == TAG and len(value.rows) == count:
            value = replace(value, rows=tuple(value.rows[frame] for frame in frames), anchors=anchors)
        cut[key] = value
    return cut


def split_conditioning(
    conditioning: Sequence[Sequence], frames: Sequence[int], count: int, anchors: int | None = None
) -> list[list]:
    """A conditioning, [context [count or 1, T, D], info] each, for some frames. Raises ValueError as the above do."""
    return [
        [split_rows(context, frames, count), split_info(info, frames, count, anchors)] for context, info in conditioning
    ]


def split_latent(latent: Mapping[str, Any], frames: Sequence[int]) -> dict[str, Any]:
    """A latent batch for some frames. Each frame keeps its own noise: `batch_index` says which that is.

    latent: `samples` [frames, C, h, w] and what else may lie with them. Raises ValueError as `split_rows` does.
    """
    samples = latent["samples"]
    count = samples.shape[0]
    numbers = latent.get("batch_index") or range(count)
    if len(numbers) != count:
        raise ValueError(f"has {count} images, but {len(numbers)} entries in batch_index. Create the latent again.")
    cut = {**latent, "samples": samples[list(frames)], "batch_index": [numbers[frame] for frame in frames]}
    if "noise_mask" in latent:
        cut["noise_mask"] = split_rows(_masks(latent), frames, count, "noise masks")
    return cut


def join_latents(batches: Sequence[Mapping[str, Any]], plan: BatchPlan) -> dict[str, Any]:
    """The latents of all frames in story order, each with the number of its noise and its noise mask.

    Raises ValueError as `join_rows`.
    """
    joined: dict[str, Any] = {"samples": join_rows([batch["samples"] for batch in batches], plan)}
    if all("noise_mask" in batch for batch in batches):
        one_each = [_masks(batch)[torch.arange(len(batch["samples"])) % len(_masks(batch))] for batch in batches]
        joined["noise_mask"] = join_rows(one_each, plan)
    if all("batch_index" in batch for batch in batches):
        joined["batch_index"] = [batches[number]["batch_index"][place] for number, place in plan.places()]
    return joined


def join_rows(batches: Sequence[Tensor], plan: BatchPlan) -> Tensor:
    """Frames [plan.frames, ...] in story order from one tensor per batch; anchors are taken from the first.

    Raises ValueError when the batches are not those of the plan.
    """
    found, wanted = [batch.shape[0] for batch in batches], [len(batch) for batch in plan.batches]
    if found != wanted:
        raise ValueError(
            f"The plan has batches of {_sizes(wanted)} images, but the input has batches of {_sizes(found)}. "
            "Connect the results of all batches of the same Split node."
        )
    return torch.stack([batches[number][place] for number, place in plan.places()])


def _masks(latent: Mapping[str, Any]) -> Tensor:
    """A latent's noise masks, [masks, 1, h, w]."""
    mask = latent["noise_mask"]
    if not mask.numel():
        raise ValueError("has an empty noise mask. Connect another mask to the node that sets it.")
    return mask.reshape(-1, 1, *mask.shape[-2:])


def _sizes(sizes: Sequence[int]) -> str:
    return " + ".join(map(str, sizes)) or "no"
