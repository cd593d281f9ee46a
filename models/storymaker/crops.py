"""Image preparation for StoryMaker: the character cropped onto white, the aligned face, and the choice of the face.

Images are prepared as in StoryMaker's published program (arXiv 2409.12576). Pictures are [H, W, 3] RGB and masks
[H, W], both 8-bit arrays; boxes are left, top, right, bottom in pixels, right and bottom exclusive.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

SIDE = 224
"""Height and width of the image encoder's input."""
ARCFACE = np.array([[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]])
"""ArcFace's landmark template: x, y of eyes, nose and mouth corners in an aligned face of ARCFACE_SIDE pixels."""
ARCFACE_SIDE = 112
BLUR = (1, 4, 6, 4, 1)
"""OpenCV's 5-tap Gaussian for sigma 0: a fixed table in sixteenths, not computed from the formula's sigma of 1.1."""


def to_pixels(image: Tensor) -> np.ndarray:
    """An image [H, W, 3 or 4] in 0..1 as 8-bit RGB [H, W, 3]. Values are clamped; transparency becomes white."""
    image = image.detach().float().cpu().clamp(0, 1)
    if image.shape[2] == 4:
        image = image[..., :3] * image[..., 3:] + 1 - image[..., 3:]
    return (image * 255).round().to(torch.uint8).numpy()


def to_image(picture: np.ndarray) -> Tensor:
    """An 8-bit picture as a float32 image [H, W, 3] in 0..1."""
    return torch.from_numpy(np.array(picture, dtype=np.float32) / 255)


def to_mask(mask: Tensor, height: int, width: int) -> np.ndarray:
    """A mask [h, w] in 0..1 as 8-bit [height, width]; resized with nearest-neighbour sampling if needed."""
    mask = mask.detach().float().cpu().clamp(0, 1)[None, None]
    if mask.shape[2:] != (height, width):
        mask = torch.nn.functional.interpolate(mask, (height, width), mode="nearest-exact")
    return (mask[0, 0] * 255).round().to(torch.uint8).numpy()


def mask_box(mask: np.ndarray) -> tuple[int, int, int, int] | None:
    """The bounding box of all pixels above 0, or None if there are none."""
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    if not len(rows):
        return None
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def soften(mask: np.ndarray) -> np.ndarray:
    """Gaussian blur, 5 x 5, reflected at the borders without repeating the border pixel; rounded as in OpenCV."""
    padded = np.pad(mask.astype(np.int64), 2, mode="reflect")
    height, width = mask.shape
    rows = sum(weight * padded[i : i + height] for i, weight in enumerate(BLUR))
    both = sum(weight * rows[:, i : i + width] for i, weight in enumerate(BLUR))
    return ((both + 128) // 256).astype(np.uint8)


def character_crop(picture: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The character alone on white, stretched to a square [224, 224, 3].

    Picture x and mask are cropped to the mask's bounding box, the mask is softened to m in 0..1, and 255 (1 - m) + m x
    is truncated to 8 bits and stretched. mask: of the picture's size, not empty.
    """
    left, top, right, bottom = mask_box(mask)
    m = soften(mask[top:bottom, left:right])[..., None] / 255
    return stretched((255 * (1 - m) + m * picture[top:bottom, left:right]).astype(np.uint8))


def stretched(picture: np.ndarray) -> np.ndarray:
    """A picture at the encoder's size [224, 224, 3], bicubic, ignoring its proportions. Used for clothing as well."""
    return np.asarray(Image.fromarray(picture).resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def aligned(picture: np.ndarray, landmarks: np.ndarray, side: int = SIDE) -> np.ndarray:
    """A face [side, side, 3] turned, scaled and moved so that its landmarks [5, 2] come closest to ArcFace's template.

    picture: whole and unmasked. Bilinear; pixels outside it are black. The similarity transform has the least squared
    error; points are complex numbers, whose products turn and scale.
    """
    points, targets = landmarks.astype(np.float64) @ (1, 1j), ARCFACE @ (1, 1j) * side / ARCFACE_SIDE
    spread = points - points.mean()
    turn = np.vdot(spread, targets) / np.vdot(spread, spread)
    rows, columns = np.mgrid[:side, :side]
    sources = (columns + 1j * rows - targets.mean()) / turn + points.mean()
    return _bilinear(picture, sources.real, sources.imag)


def _bilinear(picture: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The colours of an 8-bit picture at these places, black outside it."""
    height, width = picture.shape[:2]
    black = np.pad(picture, ((1, 2), (1, 2), (0, 0))).astype(np.float64)
    x, y = x.clip(-1, width) + 1, y.clip(-1, height) + 1
    left, top = x.astype(int), y.astype(int)
    right, down = (x - left)[..., None], (y - top)[..., None]
    upper = black[top, left] * (1 - right) + black[top, left + 1] * right
    lower = black[top + 1, left] * (1 - right) + black[top + 1, left + 1] * right
    return (upper * (1 - down) + lower * down).round().astype(np.uint8)


def choose_face(boxes: np.ndarray, mask: np.ndarray | None) -> int | None:
    """Index of the largest face that is at least half inside the mask, or None.

    boxes: [F, 4]. mask: None for the whole picture; its overlap counts only pixels inside the picture, soft ones in
    part.
    """
    best, largest = None, 0.0
    for number, (left, top, right, bottom) in enumerate(boxes):
        area = max(0.0, right - left) * max(0.0, bottom - top)
        if area > largest and (mask is None or _share(mask, left, top, right, bottom) >= 0.5):
            best, largest = number, area
    return best


def _share(mask: np.ndarray, left: float, top: float, right: float, bottom: float) -> float:
    """The share of a box, clipped to the picture, that the mask covers."""
    inside = mask[max(0, round(top)) : max(0, round(bottom)), max(0, round(left)) : max(0, round(right))]
    return inside.mean() / 255 if inside.size else 0.0
