"""Replacing the background behind a masked character before its images are measured."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

Background = Literal["noise", "grey", "white"]
BACKGROUNDS: tuple[str, ...] = get_args(Background)
GREY = 130 / 255
"""The grey that the published script puts behind a cut-out character before it draws noise there."""


def replace_background(
    images: Tensor, masks: Tensor, fill: Background = "noise", seed: int = 0, first: int = 0
) -> Tensor:
    """A copy of images [N, H, W, 3] in 0..1 with everything outside their masks replaced.

    masks  [N, h, w], or [1, h, w] for all: 0.5 and above is the character, the rest background; resized if needed
    fill   noise: each pixel and channel uniform in 0..255, as published; grey: 130 of 255; white
    seed   for the noise; image number `first` + i has the same noise in any batch
    Raises ValueError for a wrong number of masks, and for an empty mask.
    """
    check_masks(masks, len(images))
    images = images[..., :3].float().clone()
    height, width = images.shape[1:3]
    for number, image in enumerate(images):
        mask = masks[number % len(masks)].detach().float().cpu()[None, None]
        if mask.shape[2:] != (height, width):
            mask = torch.nn.functional.interpolate(mask, (height, width), mode="nearest-exact")
        background = ~(mask[0, 0] >= 0.5)  # nan is background
        if background.all():
            raise ValueError(
                f"The mask for image {first + number + 1} is empty: paint the character white, or disconnect masks to "
                "measure whole images."
            )
        if fill == "noise":
            random = np.random.default_rng([seed, first + number])
            paper = torch.from_numpy(random.integers(256, size=(height, width, 3), dtype=np.uint8)).float() / 255
        else:
            paper = torch.full((height, width, 3), GREY if fill == "grey" else 1.0)
        image[background] = paper[background].to(image.device)
    return images


def check_masks(masks: Tensor, pictures: int) -> None:
    """Raise ValueError unless there is one mask [h, w] for all images, or one per image."""
    if masks.ndim != 3 or len(masks) not in (1, pictures):
        raise ValueError(
            f"masks has shape {list(masks.shape)} for {pictures} images: connect one mask for all of them or one per "
            "image, [1 or number of images, height, width]."
        )
