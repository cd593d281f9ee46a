"""Faces, with InsightFace and onnxruntime themselves, on small ONNX files that stand for a detector and a recogniser.

The detector sees a face wherever a cell of 32 x 32 pixels of its input is green and the cells around it are not; blue
in the cell makes the face larger. The recogniser multiplies the pixels by fixed random numbers.
"""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from rounding import rounding

from storyloom.models.storymaker import faces
from storyloom.models.storymaker.crops import aligned, stretched
from storyloom.models.storymaker.faces import (
    FaceAnalysisError,
    InsightFace,
    face_packs,
    load_face_analysis,
    read_face,
)

try:
    import insightface
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper
except ImportError as missing:
    insightface, reason = None, f"FACES ARE NOT TESTED: pip install insightface onnxruntime ({missing})"
else:
    reason = ""
needs_insightface = pytest.mark.skipif(insightface is None, reason=reason)

STRIDES = (8, 16, 32)
TEMPLATE = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]
)
"""ArcFace's eyes, nose and corners of the mouth in a crop of 112 x 112."""
BOX = np.array([1.0, 1.5, 2.0, 2.5])
"""How far left, up, right and down a face's box reaches from its cell's corner, in cells, without blue."""
POINTS = (TEMPLATE - 40) / 60
"""Where eyes, nose and mouth lie from the cell's corner, in cells."""


def write_detector(path):
    """An SCRFD with landmarks: scores, boxes and points for strides 8, 16 and 32, two anchors per cell."""
    nodes, constants = [], {}

    def constant(name, value, kind=np.float32):
        constants[name] = numpy_helper.from_array(np.asarray(value, kind), name)
        return name

    def node(operation, inputs, output, **attributes):
        nodes.append(helper.make_node(operation, inputs, [output], **attributes))
        return output

    green = constant("green", np.array([-1, 1, 0], np.float32).reshape(1, 3, 1, 1))
    blue = constant("blue", np.array([0, 0, 1], np.float32).reshape(1, 3, 1, 1))
    alone = constant("alone", np.where(np.arange(9) == 4, 0.5, -0.5).astype(np.float32).reshape(1, 1, 3, 3))
    outputs = {"score": [], "box": [], "points": []}
    for stride in STRIDES:
        cells = node("AveragePool", ["image"], f"cells{stride}", kernel_shape=[stride] * 2, strides=[stride] * 2)
        seen = node("Conv", [cells, green], f"seen{stride}")
        lit = node("Relu", [seen], f"lit{stride}")
        lonely = node("Conv", [lit, alone], f"lonely{stride}", pads=[1, 1, 1, 1])
        if stride != 32:
            lonely = node("Mul", [lonely, constant(f"never{stride}", 0.0)], f"off{stride}")
        flat = constant("flat", [-1, 1], np.int64)
        first = node("Reshape", [lonely, flat], f"first{stride}")
        zero = node("Mul", [first, constant(f"zero{stride}", 0.0)], f"none{stride}")
        both = node("Concat", [first, zero], f"both{stride}", axis=1)
        outputs["score"].append(node("Reshape", [both, flat], f"score{stride}"))
        depth = node("Reshape", [node("Conv", [cells, blue], f"depth{stride}"), flat], f"blue{stride}")
        size = node("Add", [depth, constant(f"two{stride}", 2.0)], f"size{stride}")  # 1 without blue, 3 with
        twice = node("Reshape", [node("Concat", [size, size], f"pair{stride}", axis=1), flat], f"twice{stride}")
        outputs["box"].append(node("Mul", [twice, constant(f"reach{stride}", BOX[None])], f"box{stride}"))
        offsets = constant(f"offsets{stride}", POINTS.reshape(1, 10))
        outputs["points"].append(node("Mul", [twice, offsets], f"points{stride}"))
    widths = {"score": 1, "box": 4, "points": 10}
    graph = helper.make_graph(
        nodes,
        "detector",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, "height", "width"])],
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, widths[kind]])
            for kind, names in outputs.items()
            for name in names
        ],
        list(constants.values()),
    )
    save(graph, path)


def recogniser_weights(width=512):
    return np.random.default_rng(5).standard_normal((3 * 16 * 16, width)).astype(np.float32)


def write_recogniser(path, width=512):
    """An ArcFace: [1, 3, 112, 112] -> [1, 512], linear in the means of squares of 7 x 7 pixels."""
    nodes = [
        helper.make_node("AveragePool", ["face"], ["cells"], kernel_shape=[7, 7], strides=[7, 7]),
        helper.make_node("Flatten", ["cells"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weights"], ["embedding"]),
    ]
    graph = helper.make_graph(
        nodes,
        "recogniser",
        [helper.make_tensor_value_info("face", TensorProto.FLOAT, [1, 3, 112, 112])],
        [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, [1, width])],
        [numpy_helper.from_array(recogniser_weights(width), "weights")],
    )
    save(graph, path)


def save(graph, path):
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.checker.check_model(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path)


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    folder = tmp_path_factory.mktemp("insightface") / "models" / "tiny"
    write_detector(folder / "det.onnx")
    write_recogniser(folder / "rec.onnx")
    return folder


@pytest.fixture(scope="module")
def analysis(pack):
    return load_face_analysis(pack, "CPU")


GREEN, CYAN = (0, 255, 0), (0, 255, 255)


def photograph(*marks, height=640, width=640, cell=32, seed=0):
    """Dark noise, with marks (column, row, colour) of a cell's size. Returns 8-bit RGB."""
    picture = np.random.default_rng(seed).integers(0, 60, (height, width, 3), dtype=np.uint8)
    for column, row, colour in marks:
        picture[row * cell : (row + 1) * cell, column * cell : (column + 1) * cell] = colour
    return picture


def expected_box(column, row, size=1, cell=32):
    left, top = column * cell, row * cell
    reach = BOX * size * cell
    return [left - reach[0], top - reach[1], left + reach[2], top + reach[3]]


def area(*box):
    mask = np.zeros((640, 640), np.uint8)
    left, top, right, bottom = box
    mask[top:bottom, left:right] = 255
    return mask


@needs_insightface
def test_faces_are_found_where_they_are(analysis):
    faces, side = analysis.find(photograph((4, 6, GREEN), (14, 12, CYAN)))
    boxes = sorted(face.box.round(2).tolist() for face in faces)
    assert np.allclose(boxes, [expected_box(4, 6), expected_box(14, 12, 3)], atol=0.5)
    assert side is None
    small = min(faces, key=lambda face: face.box[0])
    assert np.allclose(small.landmarks, np.array([4, 6]) * 32 + POINTS * 32, atol=0.5)


@needs_insightface
def test_red_and_blue_are_not_exchanged(analysis):
    """InsightFace takes BGR: a face in yellow would be found were it given RGB."""
    faces, _ = analysis.find(photograph((4, 6, (0, 255, 60))))
    assert len(faces) == 1
    assert analysis.find(photograph((4, 6, (255, 255, 0))))[0] == []
    (large,), _ = analysis.find(photograph((8, 8, (0, 255, 255))))
    assert large.box[2] - large.box[0] == pytest.approx(3 * 96, abs=1)


@needs_insightface
@pytest.mark.parametrize("cell, side", [(64, 320), (128, 160)])
def test_a_face_that_fills_the_picture_is_found_at_a_smaller_size(analysis, cell, side):
    (face,), detector_side = analysis.find(photograph((2, 2, GREEN), cell=cell))
    assert detector_side == side
    assert np.allclose(face.box, expected_box(2, 2, cell=cell), atol=cell / 32)


@needs_insightface
@pytest.mark.parametrize("height, width", [(640, 640), (100, 333), (32, 32), (32, 8000), (9000, 33), (1, 1)])
def test_a_picture_of_any_shape_without_a_face_gives_none(analysis, height, width):
    assert analysis.find(photograph(height=height, width=width))[0] == []


@needs_insightface
def test_the_identity_is_the_recogniser_s_on_the_aligned_face_with_length_one(analysis):
    weights = torch.from_numpy(recogniser_weights())

    def reference(pixels, weights):
        cells = pixels.double().permute(2, 0, 1).reshape(3, 16, 7, 16, 7).mean((2, 4))
        return torch.nn.functional.normalize(cells.flatten() @ weights.double(), dim=0)

    picture = photograph((4, 6, GREEN), (14, 12, CYAN))
    for face in analysis.find(picture)[0]:
        vector = analysis.id_embed(picture, face)
        assert vector.shape == (512,) and vector.dtype == torch.float32
        assert vector.double().norm().item() == pytest.approx(1, abs=1e-6)
        aligned = insightface.utils.face_align.norm_crop(picture, face.landmarks)
        given = (torch.from_numpy(aligned).float() - 127.5) / 127.5, weights
        assert (vector - reference(*given)).abs().max() < rounding(reference, *given)


@needs_insightface
def test_embeddings_are_those_of_the_largest_face_and_nan_without_one(analysis):
    picture = photograph((4, 6, GREEN), (14, 12, CYAN))
    shown = np.stack([picture, photograph()])
    embeddings = analysis.embeddings(torch.from_numpy(shown).float() / 255)
    largest = max(analysis.find(picture)[0], key=lambda face: face.box[2] - face.box[0])
    assert torch.equal(embeddings[0], analysis.id_embed(picture, largest)) and embeddings[1].isnan().all()


@needs_insightface
def test_the_crop_puts_the_landmarks_on_arcface_s_template_times_two(analysis):
    """A picture whose red is x and whose green is y tells where each pixel of the crop came from."""
    picture = np.zeros((256, 256, 3), np.uint8)
    picture[..., 0], picture[..., 1] = np.meshgrid(np.arange(256), np.arange(256))
    landmarks = (TEMPLATE - 56) @ np.array([[0.8, 0.3], [-0.3, 0.8]]) + 128
    crop = analysis.crop(picture, faces.Face(np.zeros(4), landmarks.astype(np.float32)))
    assert crop.shape == (224, 224, 3)
    for (x, y), landmark in zip(2 * TEMPLATE, landmarks, strict=True):
        assert np.allclose(crop[round(y), round(x), :2], landmark, atol=1.5)


@needs_insightface
@pytest.mark.parametrize("degrees, scale, middle", [(0, 1, (128, 128)), (25, 0.7, (90, 140)), (-70, 1.4, (20, 200))])
def test_the_crop_without_insightface_is_the_same(analysis, degrees, scale, middle):
    """Up to the thirty-seconds of a pixel in which OpenCV counts; the landmarks are not exactly those of a template."""
    picture = np.zeros((256, 256, 3), np.uint8)
    picture[..., 0], picture[..., 1] = np.meshgrid(np.arange(256), np.arange(256))
    picture[..., 2] = 40
    turn = np.exp(1j * np.radians(degrees)) * scale
    matrix = [[turn.real, turn.imag], [-turn.imag, turn.real]]
    off = np.random.default_rng(2).normal(0, 4, (5, 2))
    face = faces.Face(np.zeros(4), ((TEMPLATE - 56) @ matrix + middle + off).astype(np.float32))
    difference = np.abs(aligned(picture, face.landmarks).astype(int) - analysis.crop(picture, face))
    inside = aligned(np.full_like(picture, 255), face.landmarks)[..., 0] == 255
    assert inside.mean() > 0.3 and difference[inside].max() <= 2


@needs_insightface
def test_what_lies_outside_the_picture_is_black_in_the_crop(analysis):
    white = np.full((64, 64, 3), 255, np.uint8)
    crop = analysis.crop(white, faces.Face(np.zeros(4), (TEMPLATE - 56).astype(np.float32)))
    assert not crop[0, 0].any() and crop[200, 200].all()
    crop = aligned(white, (TEMPLATE - 56).astype(np.float32))
    assert not crop[0, 0].any() and crop[200, 200].all()


@needs_insightface
def test_nothing_that_arrives_is_changed(analysis):
    picture = photograph((4, 6, GREEN))
    before = picture.copy()
    read_face(picture, area(0, 0, 640, 640), analysis, None, None)
    assert np.array_equal(picture, before)


TWO = ((4, 6, GREEN), (14, 12, CYAN))


@needs_insightface
def test_the_largest_face_is_taken_and_the_mask_chooses_among_them(analysis):
    picture = photograph(*TWO)
    large, source = read_face(picture, None, analysis, None, None)
    assert source == "the largest in the image, 288 x 384 pixels, of 2 found"
    small, source = read_face(picture, area(96, 140, 200, 280), analysis, None, None)
    assert source == "the largest inside the mask, 96 x 128 pixels, of 2 found"
    faces = sorted(analysis.find(picture)[0], key=lambda face: face.box[0])
    for part, face in ((small, faces[0]), (large, faces[1])):
        assert torch.equal(part.id_embed, analysis.id_embed(picture, face))
        assert np.array_equal(part.crop, analysis.crop(picture, face)), "of the unmasked picture"


@needs_insightface
def test_faces_outside_the_mask_do_not_count(analysis):
    part, source = read_face(photograph(*TWO), area(0, 400, 100, 640), analysis, None, None)
    assert part is None and source == "none of the 2 faces found is in the mask"


@needs_insightface
def test_a_given_crop_and_a_given_identity_come_first(analysis):
    picture, given = photograph((4, 6, GREEN)), 0.5 * torch.ones(512)
    crop = photograph((4, 6, GREEN), height=320, width=320, cell=16, seed=3)
    part, source = read_face(picture, None, analysis, crop, None)
    assert np.array_equal(part.crop, stretched(crop)) and source.startswith("the largest in face_crop")
    assert torch.equal(part.id_embed, analysis.id_embed(crop, analysis.find(crop)[0][0]))
    part, source = read_face(picture, None, analysis, None, given)
    assert torch.equal(part.id_embed, given) and part.crop.shape == (224, 224, 3)
    part, source = read_face(picture, None, analysis, photograph(height=99, width=50), None)
    assert not part.id_embed.any() and source == "face_crop, in which no face was found, so its identity is unknown"


def test_without_face_analysis_a_given_crop_is_taken_as_it_is():
    picture = photograph()
    assert read_face(picture, None, None, None, None) == (None, "neither face_analysis nor face_crop is connected")
    part, source = read_face(picture, None, None, photograph(height=100, width=80), None)
    assert part.crop.shape == (224, 224, 3) and not part.id_embed.any()
    assert source == "face_crop, its identity is unknown"
    part, source = read_face(picture, None, None, photograph(height=100, width=80), torch.ones(512))
    assert part.id_embed.all() and source == "face_crop, its identity is from face_embedding"


def test_a_detector_without_landmarks_is_refused():
    class Blind:
        def detect(self, picture, input_size):
            return np.zeros((1, 5)), None

    with pytest.raises(FaceAnalysisError, match="returns no landmarks"):
        InsightFace(Blind(), None).find(photograph())


def test_packs_are_the_folders_with_onnx_files(tmp_path):
    for name in ("models/buffalo_l/det.onnx", "models/empty/readme.txt", "other/x.onnx", "models/loose.onnx"):
        (tmp_path / "a" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "a" / name).touch()
    second = tmp_path / "b" / "models" / "buffalo_l"
    second.mkdir(parents=True)
    (second / "x.onnx").touch()
    packs = face_packs([tmp_path / "a", tmp_path / "b", tmp_path / "missing"])
    assert packs == {"buffalo_l": tmp_path / "a" / "models" / "buffalo_l"}


def test_a_missing_pack_is_named_and_nothing_is_downloaded(tmp_path):
    with pytest.raises(
        FaceAnalysisError, match="contains no .onnx files: put those of a face pack into ComfyUI/models"
    ):
        load_face_analysis(tmp_path / "models" / "buffalo_l", "CPU")
    assert not list(tmp_path.iterdir())


def test_without_insightface_the_message_says_how_to_get_it(tmp_path):
    (tmp_path / "x.onnx").touch()
    code = (
        "import sys; sys.modules['insightface'] = None; sys.modules['onnxruntime'] = None\n"
        "from pathlib import Path\n"
        "from storyloom.models.storymaker.faces import load_face_analysis, FaceAnalysisError\n"
        "try: load_face_analysis(Path(sys.argv[1]), 'CPU')\n"
        "except FaceAnalysisError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    for words in ("pip install insightface onnxruntime", "models/insightface/models/", "non-commercial research only"):
        assert words in done.stdout, done.stderr


@needs_insightface
def test_a_provider_that_is_not_here_is_named_with_those_that_are(pack):
    absent = next(n for n, full in faces.PROVIDERS.items() if full not in onnxruntime.get_available_providers())
    with pytest.raises(FaceAnalysisError, match=f"cannot run on {absent} here, only on .*CPU"):
        load_face_analysis(pack, absent)


@needs_insightface
def test_damaged_and_incomplete_packs_are_refused_in_one_sentence(tmp_path):
    for number, files in enumerate([{"det.onnx": b""}, {"det.onnx": b"junk" * 99}, {}]):
        folder = tmp_path / "models" / f"bad{number}"
        folder.mkdir(parents=True)
        for name, content in files.items():
            (folder / name).write_bytes(content)
        if not files:
            write_detector(folder / "det.onnx")
        with pytest.raises(FaceAnalysisError, match="is not a face pack with a detector and a recogniser") as refused:
            load_face_analysis(folder, "CPU")
        assert "\n" not in str(refused.value) and str(refused.value).endswith(".")


@needs_insightface
def test_a_recogniser_of_another_length_is_refused(tmp_path):
    write_detector(tmp_path / "det.onnx")
    write_recogniser(tmp_path / "rec.onnx", width=256)
    with pytest.raises(ValueError, match="512 numbers, got 256"):
        read_face(photograph((4, 6, GREEN)), None, load_face_analysis(tmp_path, "CPU"), None, None)


@needs_insightface
def test_a_folder_of_the_same_name_where_the_program_runs_is_not_taken(pack, tmp_path, monkeypatch):
    (tmp_path / "tiny").mkdir()
    monkeypatch.chdir(tmp_path)
    load_face_analysis(pack, "CPU")


@needs_insightface
def test_loading_needs_no_network(pack, monkeypatch):
    import socket

    def refuse(*_):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    load_face_analysis(Path(pack), "CPU")
