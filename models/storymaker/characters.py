"""Character references for StoryMaker: the features of an image, blends of several, and their files.

A file is a safetensors file with the metadata `format` ("storyloom-character"), `version`, `name` and `shares` (a JSON
list, one number per part) and the tensors `picture` and, for every part k, `k.id_embed` and `k.face`, if it has a face,
and `k.character`, if it has an appearance.
"""

from __future__ import annotations

import json
import math
import os
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..files import write_whole
from .crops import SIDE

IDENTITY = (512,)
FEATURES = (257, 1280)
FORMAT, VERSION = "storyloom-character", "1"
SUFFIX = ".safetensors"

MAX_PARTS = 64
MAX_PICTURE = MAX_PARTS * SIDE
"""Largest height and width of a preview: a row per part."""
MAX_NAME = 200
"""Longest file name in bytes, without the suffix."""
RESERVED = {"CON", "PRN", "AUX", "NUL", "CONIN$", "CONOUT$", *(f"{d}{n}" for d in ("COM", "LPT") for n in "0123456789")}
"""Names that Windows reserves for devices, with any extension."""


class CharacterFileError(ValueError):
    """A file is not a character, or is damaged. The message is one sentence for the user."""

    __module__ = "storyloom"  # ComfyUI shows the module before the message; otherwise it would be this file's path


@dataclass(frozen=True, eq=False)
class CharacterFeatures:
    """Features of a character from one image. All float32 on the CPU, zeros if absent.

    id_embed       [512], the face's identity vector: norm 1, or zeros if unknown
    face           [257, 1280], penultimate CLIP ViT-H features of the face
    character      [257, 1280], the same for the whole character, or for the clothing used instead
    has_face       whether to use id_embed and face
    has_character  whether to use character
    """

    id_embed: Tensor
    face: Tensor
    character: Tensor
    has_face: bool
    has_character: bool


@dataclass(frozen=True, eq=False)
class CharacterReference:
    """A character taken from one or more images.

    name     as in the story script, or ""
    parts    features and their shares, which are positive and sum to 1; more than one in a blend
    picture  [H, W, 3] in 0..1, the image encoder's inputs: one row per part, the face before the character
    """

    name: str
    parts: tuple[tuple[CharacterFeatures, float], ...]
    picture: Tensor


def features_of(face: tuple[Tensor, Tensor] | None, character: Tensor | None) -> CharacterFeatures:
    """Features with zeros for absent parts. face: the identity vector [512] and the features [257, 1280], or None."""
    id_embed, seen = face or (torch.zeros(IDENTITY), torch.zeros(FEATURES))
    whole = torch.zeros(FEATURES) if character is None else character
    return CharacterFeatures(id_embed, seen, whole, face is not None, character is not None)


def unit_identity(vector: object) -> Tensor:
    """512 numbers (tensor, array or list, of any shape) as an identity vector [512] with norm 1.

    Raises ValueError unless they are 512 finite numbers, at least one of them not 0.
    """
    try:
        values = vector.detach().cpu() if isinstance(vector, Tensor) else np.asarray(vector, dtype=np.float64)
        numbers = torch.as_tensor(values).double().flatten()
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(
            f"A face embedding is 512 numbers, got {type(vector).__name__}: connect the output of a face recogniser."
        ) from None
    if numbers.shape != IDENTITY:
        raise ValueError(f"A face embedding is 512 numbers, got {numbers.numel()}: use an ArcFace recogniser.")
    length = numbers.norm()
    if not (length.isfinite() and length > 0):
        raise ValueError("The face embedding has no usable values (NaN, infinity, or only zeros): compute it again.")
    return (numbers / length).float()


def blend(first: CharacterReference, second: CharacterReference, ratio: float, name: str) -> CharacterReference:
    """A blend of two characters: ratio 0 is the first, 1 the second. A blend of blends is one flat list of parts.

    The adapter mixes the tokens of the parts, so shares multiply. Raises ValueError for more than MAX_PARTS parts.
    """
    sides = [(side, share) for side, share in ((first, 1 - ratio), (second, ratio)) if share > 0]
    parts = tuple((features, share * own) for side, share in sides for features, own in side.parts)
    if len(parts) > MAX_PARTS:
        raise ValueError(
            f"A blend holds at most {MAX_PARTS} images, but this one has {len(parts)}: mix fewer characters."
        )
    return CharacterReference(name, parts, _stacked([side.picture for side, _ in sides]))


def _stacked(pictures: Sequence[Tensor]) -> Tensor:
    """Images stacked vertically, narrower ones padded with white on the right."""
    width = max(picture.shape[1] for picture in pictures)
    pad = torch.nn.functional.pad
    return torch.cat([pad(picture, (0, 0, 0, width - picture.shape[1]), value=1.0) for picture in pictures])


def file_stem(name: str) -> str:
    """A name as a file name inside a folder, without the suffix.

    Raises ValueError if it would leave the folder or is not a valid file name on a common operating system.
    """
    stem = name.strip().removesuffix(SUFFIX)
    if not stem:
        raise ValueError("The character has no name to use for its file: enter one in file_name.")
    forbidden = sorted({c for c in stem if c in '/\\:*?"<>|' or unicodedata.category(c) in ("Cc", "Cs")})
    if forbidden:
        signs = " ".join(c if c.isprintable() else ascii(c)[1:-1] for c in forbidden)
        raise ValueError(f"The file name {_quoted(stem)} contains {signs}, which file names must not: remove it.")
    if stem.startswith(".") or stem.endswith((".", " ")):
        raise ValueError(f"The file name {_quoted(stem)} must not begin with a dot or end with a dot or space.")
    if stem.partition(".")[0].rstrip().upper() in RESERVED:
        raise ValueError(f"The file name {_quoted(stem)} is reserved for a device on Windows: choose another.")
    if len(stem.encode()) > MAX_NAME:
        raise ValueError(f"The file name is {len(stem.encode())} bytes long, but the limit is {MAX_NAME}: shorten it.")
    return stem


def _quoted(text: str) -> str:
    """A text in quotes, shortened, with non-printable characters escaped."""
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    return f'"{shown[:60]}{"..." if len(shown) > 60 else ""}"'


def free_path(path: Path) -> Path:
    """The path itself if it is free, otherwise the first free one of name_2, name_3 and so on."""
    stem, number = path.stem, 2
    while os.path.lexists(path):
        path = path.with_name(f"{stem}_{number}{path.suffix}")
        number += 1
    return path


def save_character(path: Path, character: CharacterReference) -> None:
    """Write a character's file atomically; a file or link at `path` is replaced, never written through."""
    tensors = {"picture": (character.picture.clamp(0, 1) * 255).round().to(torch.uint8)}
    for number, (features, _) in enumerate(character.parts):
        if features.has_face:
            tensors |= {f"{number}.id_embed": features.id_embed, f"{number}.face": features.face}
        if features.has_character:
            tensors[f"{number}.character"] = features.character
    shares = [share for _, share in character.parts]
    metadata = {"format": FORMAT, "version": VERSION, "name": character.name, "shares": json.dumps(shares)}
    content = save({key: value.contiguous() for key, value in tensors.items()}, metadata)
    write_whole(path, content)


def load_character(path: Path) -> CharacterReference:
    """Read a character's file. Raises CharacterFileError if it is not one."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise _Refused("it is a safetensors file of another kind")
            if metadata.get("version") != VERSION:
                raise _Refused(
                    f"its version is {_quoted(metadata.get('version', ''))}, but this StoryLoom reads version 1"
                )
            shares = _shares(metadata.get("shares", ""))
            names = set(file.keys())
            parts = tuple((_features(file, names, number), share) for number, share in enumerate(shares))
            picture = _picture(file, names)
            if names:
                raise _Refused(f"it contains {_quoted(min(names))}, which belongs to no part")
            return CharacterReference(metadata.get("name", ""), parts, picture)
    except _Refused as reason:
        raise _error(path, reason) from None
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise _error(path, f"it is damaged, incomplete or of another kind ({error})") from error


class _Refused(Exception):
    """Why a file is not a character, as a clause."""


def _error(path: Path, reason: object) -> CharacterFileError:
    return CharacterFileError(
        f"{Path(path).name} cannot be read as a character because {reason}: save the character again."
    )


def _shares(text: str) -> list[float]:
    """The shares of a file's parts, from its metadata."""
    try:
        shares = json.loads(text)
    except (ValueError, RecursionError):
        shares = None
    if isinstance(shares, list) and 0 < len(shares) <= MAX_PARTS:
        within = all(type(share) in (int, float) and 0 < share <= 1 for share in shares)
        if within and math.isclose(sum(shares), 1, abs_tol=1e-6):
            return [float(share) for share in shares]
    raise _Refused("the shares of its parts are not positive numbers that sum to 1")


def _features(file: safe_open, names: set[str], number: int) -> CharacterFeatures:
    """The features of one part in a file; removes their tensor names from `names`."""
    shapes = {"id_embed": IDENTITY, "face": FEATURES, "character": FEATURES}
    present = {key: f"{number}.{key}" for key in shapes if f"{number}.{key}" in names}
    if ("id_embed" in present) != ("face" in present) or not present:
        raise _Refused(f"part {number} lacks the tensors of a face or an appearance")
    tensors = {key: _numbers(file, name, shapes[key]) for key, name in present.items()}
    names -= set(present.values())
    if "face" not in tensors:
        return features_of(None, tensors["character"])
    length = tensors["id_embed"].norm().item()
    if length and not math.isclose(length, 1, abs_tol=1e-3):
        raise _Refused(f"the identity vector of part {number} has the norm {length:.3g} instead of 1")
    return features_of((tensors["id_embed"], tensors["face"]), tensors.get("character"))


def _numbers(file: safe_open, name: str, shape: tuple[int, ...]) -> Tensor:
    """A tensor from a file in float32, after checking its shape, dtype and values."""
    entry = file.get_slice(name)
    if tuple(entry.get_shape()) != shape or entry.get_dtype() not in ("F16", "BF16", "F32"):
        raise _Refused(f"{name} is {entry.get_dtype()} {entry.get_shape()} instead of floats {list(shape)}")
    tensor = file.get_tensor(name).to(torch.float32, copy=True)  # not a view of the file, which may be replaced later
    if not tensor.isfinite().all():
        raise _Refused(f"{name} contains NaN or infinity")
    return tensor


def _picture(file: safe_open, names: set[str]) -> Tensor:
    """The preview in a file; removes its name from `names`."""
    if "picture" not in names:
        raise _Refused("its preview is missing")
    names.discard("picture")
    entry = file.get_slice("picture")
    shape = entry.get_shape()
    if entry.get_dtype() != "U8" or len(shape) != 3 or shape[2] != 3 or not all(0 < n <= MAX_PICTURE for n in shape):
        raise _Refused(f"its preview is {entry.get_dtype()} {shape} instead of 8-bit [height, width, 3]")
    return file.get_tensor("picture").float() / 255
