"""A person in a training picture: the masked crop on white, and the aligned face, as StoryMaker's training makes them.

Training differs from drawing (`models/storymaker/crops.py`): the mask is dilated before it is softened, the crop is
rotated by up to 10 degrees, and the face is cut from the masked crop instead of the photo. Pictures are 8-bit RGB
[h, w, 3]; masks are 8-bit [h, w].
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageFilter

from ....models.storymaker.crops import SIDE, mask_box, soften

DILATION = 7
"""Width of the square by which masks are dilated, in pixels."""
ROTATION = 10.0
"""Largest rotation of a character's crop, in degrees."""
TEMPLATE = np.array(
    [(38.2946, 51.6963), (73.5318, 51.5014), (56.0252, 71.7366), (41.5493, 92.3655), (70.7299, 92.2041)]
)
"""ArcFace's landmarks (eyes, nose, corners of the mouth) in a picture of 112 x 112 pixels."""


def dilated(mask: np.ndarray) -> np.ndarray:
    """The largest value within 3 pixels in each direction."""
    return np.asarray(Image.fromarray(mask).filter(ImageFilter.MaxFilter(DILATION)))


def crop_origin(mask: np.ndarray) -> tuple[int, int]:
    """Left and top edge of the crop of a mask that is not empty; landmarks in files count from there."""
    left, top, _, _ = mask_box(dilated(mask))
    return left, top


def masked_crop(picture: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The character alone on white, in the size of its dilated mask's bounding box. mask: not empty."""
    wide = dilated(mask)
    left, top, right, bottom = mask_box(wide)
    m = soften(wide[top:bottom, left:right])[..., None] / 255
    return (255 * (1 - m) + m * picture[top:bottom, left:right]).astype(np.uint8)


def character_picture(crop: np.ndarray, degrees: float) -> np.ndarray:
    """A crop, rotated on white, as the image encoder's input [224, 224, 3]; its proportions are ignored."""
    image = Image.fromarray(crop)
    if degrees:
        image = image.rotate(degrees, Image.Resampling.BILINEAR, fillcolor=(255, 255, 255))
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.LANCZOS))


def face_picture(crop: np.ndarray, landmarks: np.ndarray) -> np.ndarray:
    """The face at ArcFace's template [224, 224, 3]; black outside the crop. landmarks: [5, 2] x, y in the crop."""
    inverse = np.linalg.inv(np.vstack([similarity(landmarks, TEMPLATE * SIDE / 112), (0, 0, 1)]))
    inverse[:2, 2] += 0.5 - inverse[:2, :2].sum(1) / 2  # the transform is of pixels' centres
    coefficients = tuple(inverse[:2].flatten())
    image = Image.fromarray(crop)
    return np.asarray(image.transform((SIDE, SIDE), Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR))


def similarity(points: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The rotation, scaling and shift [2, 3] that brings points [N, 2] closest to a target (Umeyama 1991).

    The points must not all be equal.
    """
    points, target = np.asarray(points, np.float64), np.asarray(target, np.float64)
    middle, goal = points.mean(0), target.mean(0)
    u, size, v = np.linalg.svd((target - goal).T @ (points - middle) / len(points))
    sign = np.array([1.0, np.sign(np.linalg.det(u) * np.linalg.det(v))])
    linear = (u * sign) @ v * (size @ sign) / (points - middle).var(0).sum()
    return np.hstack([linear, (goal - linear @ middle)[:, None]])


def face_grid(landmarks: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The matrix [2, 3] for `affine_grid`, from an aligned face crop to a picture, both from -1 to 1.

    landmarks: [5, 2] in the picture; size: its height and width. Holds for the picture at any other size.
    """
    matrix = similarity(TEMPLATE, landmarks)
    side, width, height = 112, size[1], size[0]
    linear, shift = matrix[:, :2], matrix[:, 2]
    scale = 2 / np.array([width, height])[:, None]
    middle = linear @ np.full(2, (side - 1) / 2) + shift + 0.5
    return np.hstack([linear * side / 2 * scale, middle[:, None] * scale - 1])
