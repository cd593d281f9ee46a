"""Reads an item: picture, masks, pose and faces, with a check of everything that training relies on."""

from __future__ import annotations

import _codecs
import io
import zipfile
from dataclasses import dataclass
from pickle import UnpicklingError

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ....models.pickles import MOST as MOST_OBJECTS
from ....models.pickles import expanded_size
from ....models.storymaker.crops import mask_box
from . import buckets
from .references import crop_origin, face_grid, face_picture, masked_crop
from .sources import Item, Source

COLOURS = ("blue", "green", "red")
"""The colour of each person in the mask."""
THRESHOLD = 128
"""Smallest value of a person's colour channel inside the mask."""
PROPORTIONS = 0.02
"""Largest relative difference between the proportions of picture and mask."""
SMALLEST = 256
"""Shortest side of a usable picture, in pixels."""
NORM = 0.01
"""Largest difference of an identity vector's norm from 1."""
MOST_BYTES = 1 << 20
"""Largest file of face features; real ones have 4 kB."""


class BadItem(ValueError):
    """An item cannot be used. file: the faulty file, or the item's name; the message is a clause with the reason."""

    def __init__(self, file: str, reason: str):
        super().__init__(reason)
        self.file = file


@dataclass(frozen=True)
class Limits:
    """How items are read, and what they need.

    short, long  as in `buckets.size_for`
    smallest     shortest side of a usable picture, in pixels
    pose         whether an item needs a pose picture
    face_from    "crop": faces are cut from the masked crop, as in StoryMaker's training; "photo": from the picture, as
                 in drawing
    """

    short: int = buckets.SHORT
    long: int = buckets.LONG
    smallest: int = SMALLEST
    pose: bool = False
    face_from: str = "crop"


@dataclass(frozen=True, eq=False)
class Person:
    """A person in an item.

    crop      [h, w, 3], the masked crop on white, in the file's resolution
    face      [224, 224, 3], the aligned face
    grid      float32 [2, 3], from the face crop to the picture, as `references.face_grid` returns it
    id_embed  float32 [512], norm 1
    """

    crop: np.ndarray
    face: np.ndarray
    grid: Tensor
    id_embed: Tensor


@dataclass(frozen=True, eq=False)
class Example:
    """An item at its training size.

    picture  [H, W, 3], 8-bit RGB
    masks    float32 [persons, H / 8, W / 8] in 0..1
    pose     [H, W, 3], 8-bit RGB, or None
    persons  in the order of the mask's colours
    original height and width of the picture in its file
    """

    picture: np.ndarray
    masks: Tensor
    pose: np.ndarray | None
    persons: tuple[Person, ...]
    original: tuple[int, int]


def read_example(source: Source, item: Item, limits: Limits) -> Example:
    """Read an item. Raises BadItem for the first fault found."""
    picture = _picture(source, item.image, "the picture")
    original = picture.shape[:2]
    size = training_size(item, original, limits)
    if not item.caption.strip():
        raise BadItem(item.name, "its caption is missing or empty")
    masks = _masks(source, item, original)
    persons = []
    for number, mask in enumerate(masks):
        if mask_box(mask) is None:
            raise BadItem(item.mask, f"its mask is empty for person {number + 1} (no {COLOURS[number]} pixel)")
        crop = masked_crop(picture, mask)
        id_embed, landmarks = _face(source, item, number, crop.shape[:2])
        placed = landmarks + np.array(crop_origin(mask), np.float32)
        face = face_picture(crop, landmarks) if limits.face_from == "crop" else face_picture(picture, placed)
        persons.append(Person(crop, face, torch.from_numpy(face_grid(placed, original)).float(), id_embed))
    pose = _pose(source, item, size) if limits.pose else None
    small = [_resized(mask, (size[0] // 8, size[1] // 8), Image.Resampling.BOX) for mask in masks]
    return Example(
        _resized(picture, size, Image.Resampling.LANCZOS),
        torch.from_numpy(np.stack(small)).float() / 255,
        pose,
        tuple(persons),
        original,
    )


def training_size(item: Item, original: tuple[int, int], limits: Limits) -> tuple[int, int]:
    """Height and width for training. Raises BadItem for a picture that is too small or too narrow."""
    shown = f"{original[1]} x {original[0]} pixels"
    if min(original) < limits.smallest:
        raise BadItem(item.image, f"the picture has {shown}; its sides need at least {limits.smallest}")
    size = buckets.size_for(*original, limits.short, limits.long)
    if size is None:
        raise BadItem(item.image, f"the picture is too narrow ({shown}): its short side would have under 64 pixels")
    return size


def _picture(source: Source, path: str, which: str) -> np.ndarray:
    """An image as 8-bit RGB, turned as its EXIF data says; transparency becomes white."""
    try:
        with Image.open(io.BytesIO(source.read(path))) as image:
            image = ImageOps.exif_transpose(image)
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return np.array(image.convert("RGB"))
    except FileNotFoundError:
        raise BadItem(path, f"{which} is missing") from None
    except Exception as error:  # damaged images make the decoders raise all kinds of errors
        raise BadItem(
            path, f"{which} cannot be read ({str(error).partition(chr(10))[0] or type(error).__name__})"
        ) from error


def _masks(source: Source, item: Item, size: tuple[int, int]) -> np.ndarray:
    """A mask [persons, height, width] per person, 0 or 255, at the picture's size."""
    if not item.mask:
        raise BadItem(item.name, "its mask is missing")
    colours = _picture(source, item.mask, "the mask")
    height, width = colours.shape[:2]
    if abs(height * size[1] / (width * size[0]) - 1) > PROPORTIONS:
        raise BadItem(
            item.mask,
            f"the mask has {width} x {height} pixels, the picture {size[1]} x {size[0]}: their proportions differ",
        )
    inside = np.where(colours[..., ::-1] >= THRESHOLD, 255, 0).astype(np.uint8)[..., : len(item.faces)]
    masks = [_resized(np.ascontiguousarray(mask), size, Image.Resampling.NEAREST) for mask in np.moveaxis(inside, 2, 0)]
    return np.stack(masks)


def _pose(source: Source, item: Item, size: tuple[int, int]) -> np.ndarray:
    if not item.pose:
        raise BadItem(item.name, "its pose picture is missing")
    return _resized(_picture(source, item.pose, "the pose picture"), size, Image.Resampling.BILINEAR)


def _resized(picture: np.ndarray, size: tuple[int, int], how: Image.Resampling) -> np.ndarray:
    if picture.shape[:2] == size:
        return picture
    return np.asarray(Image.fromarray(picture).resize(size[::-1], how))


def _face(source: Source, item: Item, number: int, crop: tuple[int, int]) -> tuple[Tensor, np.ndarray]:
    """Identity vector [512] and landmarks [5, 2] of a person. crop: height and width of the person's crop."""
    path = item.faces[number]
    if not path:
        raise BadItem(item.name, f"the face features of person {number + 1} are missing")
    try:
        content = source.read(path)
        if len(content) > MOST_BYTES:
            raise ValueError(f"{len(content)} bytes are too many")
        features = _tensors(content)
        id_embed, landmarks = (torch.as_tensor(features[key]).float() for key in ("id", "kps"))
    except FileNotFoundError:
        raise BadItem(path, "the face features are missing") from None
    except Exception as error:  # as for pictures
        reason = str(error).partition("\n")[0][:200] or type(error).__name__
        raise BadItem(path, f"the face features cannot be read ({reason})") from error
    if id_embed.numel() != 512 or landmarks.shape != (5, 2):
        shapes = f"{list(id_embed.shape)} and {list(landmarks.shape)}"
        raise BadItem(path, f"the face features have the shapes {shapes} instead of [1, 512] and [5, 2]")
    id_embed, landmarks = id_embed.flatten(), landmarks.numpy()
    if not abs(id_embed.norm().item() - 1) <= NORM:
        raise BadItem(path, f"its identity vector has the norm {id_embed.norm().item():.3g} instead of 1")
    if not np.isfinite(landmarks).all() or np.ptp(landmarks, axis=0).max() < 1:
        raise BadItem(path, "its landmarks are not five different points")
    middle = landmarks.mean(0)
    if not (0 <= middle[0] <= crop[1] and 0 <= middle[1] <= crop[0]):
        x, y = (round(float(value)) for value in middle)
        raise BadItem(path, f"its face at {x}, {y} lies outside the character's crop of {crop[1]} x {crop[0]} pixels")
    return id_embed, landmarks


def _tensors(content: bytes) -> dict:
    """A pickle of tensors and NumPy arrays; nothing else in it is loaded."""
    for entry in _pickles(content):
        if expanded_size(entry) > MOST_OBJECTS:
            raise UnpicklingError("it contains endlessly nested objects")
    with torch.serialization.safe_globals(_numpy_globals()):
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def _pickles(content: bytes) -> list[io.BytesIO]:
    """The pickles of a file written by `torch.save`, today's format or the one before PyTorch 1.6."""
    if not content.startswith(b"PK\x03\x04"):
        return [io.BytesIO(content)]
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise UnpicklingError("it is a compressed archive")
        return [io.BytesIO(archive.read(name)) for name in archive.namelist() if name.endswith(".pkl")]


def _numpy_globals() -> list:
    """What the pickle of a NumPy array of numbers refers to, under its names in NumPy 1 and 2."""
    reconstruct = np.array(0.0).__reduce__()[0]
    kinds = {type(np.dtype(kind)) for kind in (np.float16, np.float32, np.float64)}
    names = [(reconstruct, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")]
    return [*names, np.ndarray, np.dtype, *kinds, _codecs.encode]
