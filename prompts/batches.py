"""Long stories: a plan of equal-size batches that all begin with the same anchor frames.

With consistent self-attention every image attends to the anchors only, so batches with the same anchors share the
character, and a story of any length is drawn in one sampling run per batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .conditioning import TAG
from .options import StoryOptions
from .tag import tag_of, tag_text


@dataclass(frozen=True)
class BatchPlan:
    """Which frames are drawn together.

    frames   number of frames in the story
    anchors  number of first frames that begin every batch
    batches  frame numbers of each batch, anchors first; the last batch is padded with the last frame
    """

    frames: int
    anchors: int
    batches: tuple[tuple[int, ...], ...]

    def positions(self) -> list[tuple[int, int]]:
        """(batch, index in the batch) of each frame's first occurrence, in story order."""
        first: dict[int, tuple[int, int]] = {}
        for number, batch in enumerate(self.batches):
            for index, frame in enumerate(batch):
                first.setdefault(frame, (number, index))
        return [first[frame] for frame in range(self.frames)]


def plan_batches(frames: int, size: int, anchors: int) -> BatchPlan:
    """A plan for `frames` frames in batches of `size`. A story that fits into one batch is a batch of its own length.

    Raises ValueError when the anchors fill a whole batch.
    """
    if frames <= size:
        return BatchPlan(frames, min(anchors, frames), (tuple(range(frames)),))
    if anchors >= size:
        raise ValueError(
            f"A batch of {size} images with {anchors} anchors has no room for other frames. Raise batch_size above "
            "anchors, or use fewer anchors."
        )
    shared, room = tuple(range(anchors)), size - anchors
    batches = [shared + tuple(range(first, min(first + room, frames))) for first in range(anchors, frames, room)]
    batches[-1] += (frames - 1,) * (size - len(batches[-1]))
    return BatchPlan(frames, anchors, tuple(batches))


def split_rows(rows: Tensor, frames: Sequence[int], count: int, what: str = "rows") -> Tensor:
    """The rows of the given frames; a single row applies to every frame and is returned unchanged.

    rows: [count or 1, ...]; what: their name in errors. Raises ValueError for any other number of rows.
    """
    if rows.shape[0] == 1:
        return rows
    if rows.shape[0] != count:
        raise ValueError(
            f"has {rows.shape[0]} {what}, but the story has {count} frames. It needs one per frame, or one for all "
            "frames."
        )
    return rows[list(frames)]


def split_info(
    info: Mapping[str, Any], frames: Sequence[int], count: int, anchors: int | None = None
) -> dict[str, Any]:
    """A conditioning's dict for the given frames: tensors with a row per frame and the story's tag are cut.

    anchors: number of first frames that begin every batch, stored in the tag.
    Raises ValueError for a ControlNet whose hint has an image per frame: hints must be split before they are applied,
    and as `tag_of` does.
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
    story = tag_of(info)
    cut = {} if story is None else StoryOptions()
    for key, value in info.items():
        if isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == count > 1:
            value = value[list(frames)]
        elif key == TAG and len(story.rows) == count:
            value = tag_text(replace(story, rows=tuple(story.rows[frame] for frame in frames), anchors=anchors))
        cut[key] = value
    return cut


def split_conditioning(
    conditioning: Sequence[Sequence], frames: Sequence[int], count: int, anchors: int | None = None
) -> list[list]:
    """A conditioning, entries [context [count or 1, T, D], info], for the given frames.

    Raises ValueError as `split_rows` and `split_info` do.
    """
    return [
        [split_rows(context, frames, count), split_info(info, frames, count, anchors)] for context, info in conditioning
    ]


def split_latent(latent: Mapping[str, Any], frames: Sequence[int]) -> dict[str, Any]:
    """A latent batch for the given frames. Each frame keeps its own noise, identified by `batch_index`.

    latent: `samples` [frames, C, h, w] and optional further entries. Raises ValueError as `split_rows` does.
    """
    samples = latent["samples"]
    count = samples.shape[0]
    numbers = latent.get("batch_index") or range(count)
    if len(numbers) != count:
        raise ValueError(
            f"has {count} images, but {len(numbers)} entries in batch_index. Create it again with Empty story latent."
        )
    cut = {**latent, "samples": samples[list(frames)], "batch_index": [numbers[frame] for frame in frames]}
    if "noise_mask" in latent:
        cut["noise_mask"] = split_rows(_masks(latent), frames, count, "noise masks")
    return cut


def join_latents(batches: Sequence[Mapping[str, Any]], plan: BatchPlan) -> dict[str, Any]:
    """The latents of all frames in story order, with their `batch_index` and noise masks.

    Raises ValueError as `join_rows` does.
    """
    joined: dict[str, Any] = {"samples": join_rows([batch["samples"] for batch in batches], plan)}
    if all("noise_mask" in batch for batch in batches):
        one_each = [_masks(batch)[torch.arange(len(batch["samples"])) % len(_masks(batch))] for batch in batches]
        joined["noise_mask"] = join_rows(one_each, plan)
    if all("batch_index" in batch for batch in batches):
        joined["batch_index"] = [batches[number]["batch_index"][index] for number, index in plan.positions()]
    return joined


def join_rows(batches: Sequence[Tensor], plan: BatchPlan) -> Tensor:
    """Frames [plan.frames, ...] in story order from one tensor per batch; anchors are taken from the first batch.

    Raises ValueError when the sizes of the batches differ from the plan.
    """
    sizes, planned = [batch.shape[0] for batch in batches], [len(batch) for batch in plan.batches]
    if sizes != planned:
        raise ValueError(
            f"The plan has batches of {_sum(planned)} images, but the input has batches of {_sum(sizes)}. "
            "Connect the results of all batches of the same Split node."
        )
    return torch.stack([batches[number][index] for number, index in plan.positions()])


def _masks(latent: Mapping[str, Any]) -> Tensor:
    """A latent's noise masks, [masks, 1, h, w]."""
    mask = latent["noise_mask"]
    if not mask.numel():
        raise ValueError("has an empty noise mask. Connect another mask to the node that sets it.")
    return mask.reshape(-1, 1, *mask.shape[-2:])


def _sum(sizes: Sequence[int]) -> str:
    """Batch sizes as an error shows them: "4 + 4"."""
    return " + ".join(map(str, sizes)) or "no"
