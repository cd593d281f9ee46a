"""Training data from a folder of photos: masks, face features, and the list in StoryMaker's published form.

Captions are read from .txt files beside the photos. Pose pictures are taken from a folder, if one is named.
"""

from __future__ import annotations

import argparse
import io
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from ...models.files import write_whole
from ...models.storymaker.crops import choose_face
from ...models.storymaker.faces import PROVIDERS, FaceAnalysis, load_face_analysis
from .data.references import crop_origin
from .data.scan import REPORT, listed
from .data.sources import LIST, DataError, fault_of_count, open_source
from .data.sources import pack as write_shards
from .segmentation import (
    SUFFIXES,
    SegmentationError,
    colour_mask,
    find_mask,
    foreground,
    load_network,
    ready_masks,
    separated,
)

LICENCE = (
    "The face packs that InsightFace offers, such as buffalo_l, are for non-commercial research only; so is what is "
    "trained on their vectors."
)
Masks = Callable[[Path, np.ndarray, list], list[np.ndarray]]
"""From a photo's path, its pixels and the faces in it to a mask per person."""


class Unusable(ValueError):
    """Why a photo cannot be used, as a clause."""


def prepare(words: Sequence[str]) -> None:
    """The command `prepare`."""
    arguments = _parser().parse_args(words)
    print(LICENCE, flush=True)
    analysis = load_face_analysis(arguments.faces, arguments.provider)
    masks = _masks_of(arguments.segmentation, arguments.person_class, arguments.provider)
    photos, out = arguments.photos, arguments.out or arguments.photos
    faults = prepare_folder(photos, out, analysis, masks, arguments.poses, arguments.bad)
    print(f"{out / LIST} is ready. {len(faults)} photos were left out{', see ' + str(out / REPORT) if faults else ''}.")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m storyloom.training.storymaker prepare", description=f"{__doc__}\n{LICENCE}"
    )
    add = parser.add_argument
    add("photos", type=Path, help="folder of photos, each with a caption in a .txt file of the same name")
    add("--faces", type=Path, required=True, help="folder of a face pack's .onnx files, such as buffalo_l")
    add("--provider", choices=PROVIDERS, default="CPU", help="where the networks run (default CPU)")
    add(
        "--segmentation",
        type=Path,
        required=True,
        help="an ONNX or TorchScript file of a segmentation network, or a folder of masks with the photos' names",
    )
    add("--person-class", type=int, default=1, help="index of persons in a network with several classes (default 1)")
    add("--poses", type=Path, help="folder of pose pictures with the photos' names, for pose decoupling")
    add("--out", type=Path, help="folder for the list, masks and face features (default: that of the photos)")
    add("--bad", choices=("skip", "refuse"), default="skip", help="what to do with unusable photos (default skip)")
    return parser


def _masks_of(path: Path, person: int, provider: str) -> Masks:
    """How masks are made with a folder of ready-made ones, or with a network."""
    if path.is_dir():

        def ready(photo: Path, pixels: np.ndarray, faces: list) -> list[np.ndarray]:
            found = find_mask(path, photo.stem)
            if found is None:
                raise Unusable(f"it has no mask in {path}")
            try:
                return ready_masks(found, pixels.shape[:2])
            except SegmentationError as error:
                raise Unusable(str(error)) from error

        return ready
    if not path.exists():
        raise SegmentationError(f'"{path}" does not exist: name a segmentation network or a folder of masks.')
    network, side = load_network(path, [PROVIDERS[provider]])

    def computed(photo: Path, pixels: np.ndarray, faces: list) -> list[np.ndarray]:
        mask = foreground(pixels, network, side, person)
        try:
            return separated(mask, [face.box for face in faces])
        except SegmentationError as error:
            raise Unusable(str(error)) from error

    return computed


def prepare_folder(
    photos: Path, out: Path, analysis: FaceAnalysis, masks: Masks, poses: Path | None, bad: str
) -> list[tuple[str, str]]:
    """Write `data.json`, `masks/` and `faces/` for the photos of a folder; returns (photo, reason) of those left out.

    bad: with "refuse", nothing but the report is written if there are any, and DataError is raised.
    """
    from tqdm import tqdm

    paths = sorted(path for path in photos.iterdir() if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise DataError(f'"{photos}" contains no photos ({", ".join(SUFFIXES)}).')
    groups: dict[str, list] = {"1": [], "2": [], "3": []}
    faults = []
    (out / "masks").mkdir(parents=True, exist_ok=True)
    for path in tqdm(paths, desc="preparing", unit="photo", mininterval=2, ncols=110):
        try:
            entry = _prepared(path, out, analysis, masks, poses)
            groups[str(entry[4])].append(entry)
        except Unusable as reason:
            faults.append((path.name, str(reason)))
    lines = [f"{len(paths)} photos: {len(paths) - len(faults)} are prepared, {len(faults)} are left out."]
    lines += [f"{name}\t{reason}" for name, reason in faults]
    write_whole(out / REPORT, "\n".join([*lines, ""]).encode("utf-8"))
    if faults and bad == "refuse":
        raise DataError(f"{lines[0]} {listed(faults)} All are in {out / REPORT}: repair or remove them.")
    if len(faults) == len(paths):
        raise DataError(f"No photo could be prepared. {listed(faults)} All reasons are in {out / REPORT}.")
    write_whole(out / LIST, json.dumps(groups, indent=1, ensure_ascii=False).encode("utf-8"))
    return faults


def _prepared(path: Path, out: Path, analysis: FaceAnalysis, masks: Masks, poses: Path | None) -> list:
    """The list's entry of a photo, whose mask and face features are written. Persons are numbered from left to right
    by a network's masks, and by the colours of ready-made ones."""
    pixels = _photo(path)
    caption = path.with_suffix(".txt")
    if not caption.is_file():
        raise Unusable(f"its caption {caption.name} is missing")
    text = " ".join(caption.read_text(encoding="utf-8", errors="replace").split())
    if not text:
        raise Unusable(f"its caption {caption.name} is empty")
    faces, _ = analysis.find(pixels)
    faces = sorted(faces, key=lambda face: float(face.box[0] + face.box[2]))
    if not faces:
        raise Unusable("no face was found")
    found = masks(path, pixels, faces)
    reason = fault_of_count(len(found)) if found else "its mask is empty"
    if reason:
        raise Unusable(reason)
    boxes = np.array([face.box for face in faces]).reshape(-1, 4)
    chosen = [choose_face(boxes, mask) for mask in found]
    if None in chosen:
        raise Unusable(f"no face was found in the mask of person {chosen.index(None) + 1}")
    folder = out / "faces" / path.name
    folder.mkdir(parents=True, exist_ok=True)
    for number, (mask, face) in enumerate(zip(found, (faces[i] for i in chosen), strict=True)):
        landmarks = torch.tensor(np.asarray(face.landmarks, np.float32) - np.float32(crop_origin(mask)))
        buffer = io.BytesIO()
        torch.save({"id": analysis.id_embed(pixels, face)[None].clone(), "kps": landmarks}, buffer)
        write_whole(folder / f"{number}.bin", buffer.getvalue())
    buffer = io.BytesIO()
    Image.fromarray(colour_mask(found)).save(buffer, "PNG")
    mask_path = out / "masks" / f"{path.name}.png"
    write_whole(mask_path, buffer.getvalue())
    pose = find_mask(poses, path.stem) if poses else None
    files = (_relative(file, out) if file else "" for file in (path, pose, mask_path, folder))
    image, pose_path, mask_name, folder_name = files
    return [image, pose_path, mask_name, text, len(found), folder_name]


def _photo(path: Path) -> np.ndarray:
    try:
        with Image.open(path) as image:
            return np.array(ImageOps.exif_transpose(image).convert("RGB"))
    except Exception as error:  # damaged images make the decoders raise all kinds of errors
        raise Unusable(f"it cannot be read ({str(error).partition(chr(10))[0] or type(error).__name__})") from error


def _relative(path: Path, folder: Path) -> str:
    """A path as seen from a folder, with forward slashes; absolute if it is on another drive."""
    try:
        return Path(os.path.relpath(path, folder)).as_posix()
    except ValueError:
        return path.absolute().as_posix()


def pack(words: Sequence[str]) -> None:
    """The command `pack`."""
    parser = argparse.ArgumentParser(
        "python -m storyloom.training.storymaker pack",
        description="Packs training data into WebDataset shards, which suit network drives and several machines.",
    )
    parser.add_argument("data", type=Path, help="data.json or its folder")
    parser.add_argument("--out", type=Path, required=True, help="folder for the shards")
    parser.add_argument("--per-shard", type=int, default=1000, help="pictures in a shard (default 1000)")
    arguments = parser.parse_args(words)
    source = open_source(arguments.data)
    shards = write_shards(source, arguments.out, arguments.per_shard)
    print(f"{len(source.items)} pictures in {len(shards)} shards, in {arguments.out}.")
    if source.faults:
        print(f"Left out: {listed(source.faults)}")
