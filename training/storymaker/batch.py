"""A training batch: pictures with one to three characters, and the features of each character's reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

FLOAT32 = ("masks", "id_embeds", "crops")
"""Fields that stay float32 in half precision."""


@dataclass(frozen=True, eq=False)
class Batch:
    """B pictures with M characters in all, as a training step needs them.

    latents        [B, 4, h, w] clean latents, scaled as the UNet expects
    context        [B, T, C] text tokens
    pooled         [B, P] pooled text
    time_ids       [B, 6] SDXL's picture sizes
    empty_context  [1, T, C] text tokens of a dropped text
    empty_pooled   [1, P] pooled text of a dropped text
    counts         number of characters in each picture, 1 to 3, as integers; their sum is M
    masks          [B, 3, H, W] in 0..1, one for each character in the picture's order, zeros where absent
    id_embeds      [M, id_width] unit vectors of the faces; all per-character fields are in the pictures' order
    face           [M, F, image_width] image features of the aligned faces
    character      [M, F, image_width] image features of the whole characters
    pose           [B, 3, 8h, 8w] in 0..1, the pose of the picture as a ControlNet hint, or None
    crops          [M, 2, 3] matrices for `affine_grid`, from an aligned face crop to the picture, zeros where no face
                   is visible; or None. Only the identity loss reads them.
    """

    latents: Tensor
    context: Tensor
    pooled: Tensor
    time_ids: Tensor
    empty_context: Tensor
    empty_pooled: Tensor
    counts: tuple[int, ...]
    masks: Tensor
    id_embeds: Tensor
    face: Tensor
    character: Tensor
    pose: Tensor | None = None
    crops: Tensor | None = None

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Batch:
        """The same batch on a device, in a dtype. Masks, identity vectors and crops become at least float32."""
        precise = torch.promote_types(dtype, torch.float32)
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        for name, value in values.items():
            if isinstance(value, Tensor):
                values[name] = value.to(device, precise if name in FLOAT32 else dtype)
        return Batch(**values)


def places(counts: Sequence[int]) -> list[tuple[int, int]]:
    """Picture and position of each character: counts (2, 1) -> [(0, 0), (0, 1), (1, 0)]."""
    return [(picture, position) for picture, count in enumerate(counts) for position in range(count)]


def per_character(of_pictures: Tensor, counts: Sequence[int]) -> Tensor:
    """Values of pictures [B, ...] repeated for each of their characters: [M, ...]."""
    return of_pictures[[picture for picture, _ in places(counts)]]
