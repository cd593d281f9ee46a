"""Checks IMAGE and MASK inputs, converts them to 8-bit pixels, and encodes them with a CLIP_VISION."""

from __future__ import annotations

import numpy as np
import torch

from ..models.storymaker import characters, crops

MIN_IMAGE, MIN_MASK = 32, 8
"""Smallest height and width in pixels of an image, and of its masked area."""
ENCODER = (
    "CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors in models/clip_vision (models/image_encoder/model.safetensors from "
    "https://huggingface.co/h94/IP-Adapter, renamed)"
)


def one_picture(image: torch.Tensor, what: str) -> np.ndarray:
    """The only image of a batch [1, H, W, 3 or 4] as 8-bit RGB. what: the input's name. Raises ValueError."""
    if image.ndim != 4 or image.shape[3] not in (3, 4):
        raise ValueError(f"{what} has shape {list(image.shape)} instead of [1, height, width, 3]: connect an IMAGE.")
    if not image.is_floating_point():
        raise ValueError(
            f"{what} contains integers ({image.dtype}) instead of values from 0 to 1: check the node that produced it."
        )
    if len(image) != 1:
        raise ValueError(
            f"{what} contains {len(image)} images, but one is needed: select it with ImageFromBatch, or make a "
            "character from each and mix them with Blend characters."
        )
    height, width = image.shape[1:3]
    if min(height, width) < MIN_IMAGE:
        raise ValueError(
            f"{what} is {width} x {height} pixels, but at least {MIN_IMAGE} x {MIN_IMAGE} are needed: use a larger one."
        )
    if not image.isfinite().all():
        raise ValueError(f"{what} contains NaN or infinity: check the node that produced it.")
    return crops.to_pixels(image[0])


def one_mask(mask: torch.Tensor, picture: np.ndarray) -> np.ndarray:
    """The only mask of a batch [1, h, w] (or [h, w]) as 8-bit [H, W] of the picture's size. Raises ValueError."""
    mask = mask[None] if mask.ndim == 2 else mask
    if mask.ndim != 3 or len(mask) != 1 or not mask.numel():
        raise ValueError(
            f"mask has shape {list(mask.shape)} instead of [1, height, width]: connect one mask for one image."
        )
    if not mask.isfinite().all():
        raise ValueError("mask contains NaN or infinity: check the node that produced it.")
    area = crops.to_mask(mask[0], *picture.shape[:2])
    box = crops.mask_box(area)
    if box is None:
        raise ValueError(
            "The mask is empty: paint the character in the mask editor (Load Image returns an empty mask for an image "
            "without transparency), or disconnect mask to use the whole image."
        )
    width, height = box[2] - box[0], box[3] - box[1]
    if min(width, height) < MIN_MASK:
        raise ValueError(
            f"The mask covers only {width} x {height} pixels of the image, but at least {MIN_MASK} x {MIN_MASK} are "
            "needed: paint the whole character."
        )
    return area


def encoded(clip_vision, crop: np.ndarray) -> torch.Tensor:
    """Penultimate features [257, 1280] of an 8-bit image [224, 224, 3], float32 on the CPU. Raises ValueError."""
    if clip_vision is None:
        raise ValueError(f"clip_vision received no image encoder: load {ENCODER}.")
    output = clip_vision.encode_image(crops.to_image(crop)[None], crop=False)
    features = output["penultimate_hidden_states"]
    if features.shape != (1, *characters.FEATURES):
        raise ValueError(
            f"This CLIP_VISION returns features of shape {list(features.shape[1:])}, but StoryMaker needs "
            f"{list(characters.FEATURES)}: load {ENCODER}."
        )
    if not features.isfinite().all():
        raise ValueError("The CLIP_VISION returned NaN or infinity: start ComfyUI with --fp32-text-enc.")
    return features[0].detach().float().cpu().clone()
