"""Masks of the persons in a photo: from ready-made pictures, or from a segmentation network that the user names.

A network separates persons from the background; which pixels belong to which person follows from the connected regions
and the faces in them. Photos are 8-bit RGB [H, W, 3]; masks are 8-bit [H, W], 0 or 255.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .data.reading import COLOURS, THRESHOLD

SIDE = 1024
"""Height and width of a network's input, if the network does not fix them."""
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Colours by which segmentation networks are trained (ImageNet's)."""
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")

Network = Callable[[np.ndarray], np.ndarray]
"""From a normalised photo float32 [1, 3, h, w] to [1, C, h', w'] or [1, h', w']."""


class SegmentationError(ValueError):
    """Masks cannot be made. The message is one sentence for the user."""


def load_network(path: Path, providers: Sequence[str] = ("CPUExecutionProvider",)) -> tuple[Network, int]:
    """A network from an ONNX or TorchScript file, and the side of its input. Raises SegmentationError."""
    try:
        return _onnx(path, providers) if path.suffix == ".onnx" else (_torchscript(path), SIDE)
    except ImportError as error:
        raise SegmentationError(f"An ONNX file needs onnxruntime ({error}): run pip install onnxruntime.") from error
    except Exception as error:  # damaged files make the loaders raise all kinds of errors
        reason = str(error).strip().partition("\n")[0][:200]
        raise SegmentationError(
            f'"{path}" is neither an ONNX nor a TorchScript file that can be loaded ({reason}): choose another one, '
            "or a folder of masks."
        ) from error


def _onnx(path: Path, providers: Sequence[str]) -> tuple[Network, int]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=list(providers))
    inputs = session.get_inputs()[0]
    side = inputs.shape[2] if isinstance(inputs.shape[2], int) else SIDE
    return lambda photo: session.run(None, {inputs.name: photo})[0], side


def _torchscript(path: Path) -> Network:
    network = torch.jit.load(str(path), "cpu").train(False)

    @torch.no_grad()
    def run(photo: np.ndarray) -> np.ndarray:
        out = network(torch.from_numpy(photo))
        while not isinstance(out, Tensor):  # networks with several outputs put the finest one first
            out = next(iter(out.values())) if isinstance(out, dict) else out[0]
        return out.float().numpy()

    return run


def foreground(photo: np.ndarray, network: Network, side: int, person: int) -> np.ndarray:
    """Where persons are. person: the index of the class for networks with several classes.

    One channel is a probability or, if values leave 0..1, a logit; several are classes, of which the largest counts.
    """
    image = Image.fromarray(photo).resize((side, side), Image.Resampling.BILINEAR)
    normal = (np.asarray(image, np.float32) / 255 - np.float32(MEAN)) / np.float32(STD)
    out = np.asarray(network(np.ascontiguousarray(normal.transpose(2, 0, 1)[None], dtype=np.float32)), np.float32)
    out = out.reshape(-1, *out.shape[-2:])
    if len(out) > 1 and not 0 <= person < len(out):
        raise SegmentationError(
            f"The network has {len(out)} classes, and --person-class is {person}: choose one from 0 to {len(out) - 1}."
        )
    if len(out) > 1:
        inside = out.argmax(0) == person
    else:
        probability = 0 <= out.min() and out.max() <= 1
        inside = out[0] > (0.5 if probability else 0)
    mask = Image.fromarray(np.where(inside, 255, 0).astype(np.uint8))
    return np.asarray(mask.resize(photo.shape[1::-1], Image.Resampling.NEAREST))


def regions(mask: np.ndarray) -> np.ndarray:
    """The connected regions of a mask, pixels touching along an edge: [H, W] of labels from 1, 0 outside."""
    labels = np.zeros(mask.shape, np.int64)
    parents = [0]

    def root(label: int) -> int:
        while parents[label] != label:
            parents[label] = parents[parents[label]]
            label = parents[label]
        return label

    for y, row in enumerate(mask > 0):
        edges = np.flatnonzero(np.diff(np.concatenate([[0], row, [0]]).astype(np.int8)))
        for left, right in edges.reshape(-1, 2):
            above = {root(label) for label in np.unique(labels[y - 1, left:right]) if label} if y else set()
            if not above:
                parents.append(len(parents))
            label = min(above, default=len(parents) - 1)
            for other in above:
                parents[other] = label
            labels[y, left:right] = label
    return np.array([root(label) for label in range(len(parents))])[labels]


def separated(mask: np.ndarray, boxes: Sequence[Sequence[float]]) -> list[np.ndarray]:
    """A mask per face: the region in which the middle of its box lies, and regions with no face go to nobody.

    boxes: left, top, right, bottom of each face. Raises SegmentationError if a face lies in no region, or if two lie in
    the same one.
    """
    labels = regions(mask)
    found = []
    for number, (left, top, right, bottom) in enumerate(boxes, start=1):
        y, x = (
            int(np.clip((a + b) / 2, 0, end - 1))
            for a, b, end in ((top, bottom, len(mask)), (left, right, mask.shape[1]))
        )
        if not labels[y, x]:
            raise SegmentationError(f"face {number} is not on a person that the segmentation found")
        found.append(labels[y, x])
    if len(set(found)) < len(found):
        raise SegmentationError(
            "persons touch, and the segmentation does not separate them: give a mask with a colour for each person"
        )
    return [np.where(labels == label, 255, 0).astype(np.uint8) for label in found]


def ready_masks(path: Path, size: tuple[int, int]) -> list[np.ndarray]:
    """The masks in a picture: blue, green and red for three persons, or white for one. size: height and width of the
    photo, to which the masks are scaled. Raises SegmentationError if the picture cannot be read."""
    try:
        with Image.open(path) as image:
            colours = np.asarray(image.convert("RGB").resize(size[::-1], Image.Resampling.NEAREST))
    except Exception as error:  # as above
        raise SegmentationError(f"its mask {path.name} cannot be read ({error})") from error
    inside = colours[..., ::-1] >= THRESHOLD
    if (inside.all(2) | ~inside.any(2)).all():
        inside = inside[..., :1]
    masks = [np.where(inside[..., i], 255, 0).astype(np.uint8) for i in range(inside.shape[2])]
    return [mask for mask in masks if mask.any()]


def colour_mask(masks: Sequence[np.ndarray]) -> np.ndarray:
    """Masks of up to three persons as one picture [H, W, 3] with the colours of `COLOURS`."""
    picture = np.zeros((*masks[0].shape, len(COLOURS)), np.uint8)
    for number, mask in enumerate(masks):
        picture[..., len(COLOURS) - 1 - number] = mask
    return picture


def find_mask(folder: Path, name: str) -> Path | None:
    """The mask of a photo in a folder: a picture with the same name before the suffix."""
    return next((path for path in (folder / f"{name}{suffix}" for suffix in SUFFIXES) if path.is_file()), None)
