"""What StoryMaker sees of a photograph: the character on white paper, and which of the faces is meant.

As the published program of StoryMaker (arXiv 2409.12576) prepares its pictures. Pictures are [H, W, 3] RGB and masks
[H, W], both 8-bit arrays; boxes are left, top, right, bottom in pixels, right and bottom exclusive.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

SIDE = 224
"""Height and width of every picture that the image encoder sees."""
BLUR = (1, 4, 6, 4, 1)
"""OpenCV's 5-tap Gaussian where its width is left to OpenCV: a fixed table of sixteenths, not the formula's 1.1."""


def to_pixels(image: Tensor) -> np.ndarray:
    """An image [H, W, 3 or 4] in 0..1 as 8-bit RGB [H, W, 3]. What is beyond 0..1 is cut; transparency shows white."""
    image = image.detach().float().cpu().clamp(0, 1)
    if image.shape[2] == 4:
        image = image[..., :3] * image[..., 3:] + 1 - image[..., 3:]
    return (image * 255).round().to(torch.uint8).numpy()


def to_image(picture: np.ndarray) -> Tensor:
    """A picture as an image [H, W, 3] in 0..1, float32."""
    return torch.from_numpy(np.array(picture, dtype=np.float32) / 255)


def to_mask(mask: Tensor, height: int, width: int) -> np.ndarray:
    """A mask [h, w] in 0..1 as 8-bit [height, width]; one of another size is stretched, each pixel from its nearest."""
    mask = mask.detach().float().cpu().clamp(0, 1)[None, None]
    if mask.shape[2:] != (height, width):
        mask = torch.nn.functional.interpolate(mask, (height, width), mode="nearest-exact")
    return (mask[0, 0] * 255).round().to(torch.uint8).numpy()


def mask_box(mask: np.ndarray) -> tuple[int, int, int, int] | None:
    """The box around everything above 0, all separate parts together, or None when there is nothing."""
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    if not len(rows):
        return None
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def soften(mask: np.ndarray) -> np.ndarray:
    """Gaussian blur, 5 x 5, mirrored at the borders without repeating the border pixel; rounded as OpenCV does."""
    padded = np.pad(mask.astype(np.int64), 2, mode="reflect")
    height, width = mask.shape
    rows = sum(weight * padded[i : i + height] for i, weight in enumerate(BLUR))
    both = sum(weight * rows[:, i : i + width] for i, weight in enumerate(BLUR))
    return ((both + 128) // 256).astype(np.uint8)


def character_crop(picture: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The character alone on white, filling a square whatever its proportions. Returns [224, 224, 3].

    The box around the mask is cut out of both, the cut mask softened to m in 0..1, and 255 (1 - m) + m x truncated to
    8 bits and stretched. mask: of the picture's size, with something in it.
    """
    left, top, right, bottom = mask_box(mask)
    m = soften(mask[top:bottom, left:right])[..., None] / 255
    return stretched((255 * (1 - m) + m * picture[top:bottom, left:right]).astype(np.uint8))


def stretched(picture: np.ndarray) -> np.ndarray:
    """A picture at the encoder's size [224, 224, 3], bicubic, its proportions ignored: so are clothes prepared."""
    return np.asarray(Image.fromarray(picture).resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def choose_face(boxes: np.ndarray, mask: np.ndarray | None) -> int | None:
    """The number of the face that is meant: the largest of those that lie at least half in the mask, or None.

    boxes: [F, 4]; only what is inside the picture counts. mask: None for the whole picture; soft pixels count in part.
    """
    best, largest = None, 0.0
    for number, (left, top, right, bottom) in enumerate(boxes):
        area = max(0.0, right - left) * max(0.0, bottom - top)
        if area > largest and (mask is None or _share(mask, left, top, right, bottom) >= 0.5):
            best, largest = number, area
    return best


def _share(mask: np.ndarray, left: float, top: float, right: float, bottom: float) -> float:
    """Which part of a box, as far as it is inside the picture, a mask covers."""
    inside = mask[max(0, round(top)) : max(0, round(bottom)), max(0, round(left)) : max(0, round(right))]
    return inside.mean() / 255 if inside.size else 0.0
