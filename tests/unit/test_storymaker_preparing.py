"""Preparation of photos for StoryMaker's training: masks, face features, the list, and what is left out."""

import json

import numpy as np
import pytest
import torch
from drawn_pictures import drawn
from PIL import Image

from storyloom.models.storymaker.crops import mask_box
from storyloom.models.storymaker.faces import Face
from storyloom.training.storymaker import prepare, segmentation
from storyloom.training.storymaker.data.reading import Limits, read_example
from storyloom.training.storymaker.data.scan import scan
from storyloom.training.storymaker.data.sources import DataError, open_source

PHOTOS = {"ann": 1, "two": 2, "three": 3}


class Analysis:
    """Stands for the face analysis: knows where the faces of each drawn photo are, by its pixels."""

    def __init__(self):
        self.faces = {}

    def know(self, picture, masks):
        faces = []
        for left, top, right, _ in map(mask_box, masks):
            box = np.array([left + 20, top + 20, right - 20, top + 80], np.float32)
            across, down = np.linspace(box[0] + 10, box[2] - 10, 5), box[1] + np.array([20, 22, 30, 50, 48])
            faces.append(Face(box, np.stack([across, down], 1).astype(np.float32)))
        self.faces[picture.tobytes()] = faces[::-1]

    def find(self, picture):
        return self.faces.get(picture.tobytes(), []), 640

    def id_embed(self, picture, face):
        generator = torch.Generator().manual_seed(int(face.box[0]))
        return torch.nn.functional.normalize(torch.randn(512, generator=generator), dim=0)


@pytest.fixture
def photos(tmp_path):
    """Three photos with captions and ready-made masks, and the analysis that knows their faces."""
    folder, analysis = tmp_path / "photos", Analysis()
    (folder / "masks").mkdir(parents=True)
    for name, persons in PHOTOS.items():
        picture, masks, caption = drawn(5, persons)
        Image.fromarray(picture).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(caption)
        shown = masks[0] if persons == 1 else segmentation.colour_mask(masks)
        Image.fromarray(shown).save(folder / "masks" / f"{name}.png")
        analysis.know(picture, masks)
    return folder, analysis


def run(photos, tmp_path, bad="skip", masks=None):
    folder, analysis = photos
    masks = masks or prepare._masks_of(folder / "masks", 1, "CPU")
    return prepare.prepare_folder(folder, tmp_path / "data", analysis, masks, None, bad)


def test_prepared_photos_are_training_data(photos, tmp_path):
    assert run(photos, tmp_path) == []
    source = open_source(tmp_path / "data")
    index = scan(source, Limits(), 1)
    assert not index.faults
    assert [(item.image.rpartition("/")[2], len(item.faces)) for item in index.items] == [
        ("ann.png", 1),
        ("two.png", 2),
        ("three.png", 3),
    ]
    assert index.items[0].caption == (photos[0] / "ann.txt").read_text()


def test_each_person_gets_the_face_in_its_mask(photos, tmp_path):
    run(photos, tmp_path)
    source, (picture, masks, _) = open_source(tmp_path / "data"), drawn(5, 2)
    example = read_example(source, source.items[1], Limits(288, 288))
    faces = photos[1].find(picture)[0][::-1]
    for mask, person, face in zip(masks, example.persons, faces, strict=True):
        assert torch.equal(person.id_embed, photos[1].id_embed(picture, face))
        from storyloom.training.storymaker.data.references import face_grid

        assert torch.allclose(person.grid, torch.from_numpy(face_grid(face.landmarks, (288, 288))).float(), atol=1e-5)
        assert mask_box(mask)[0] <= face.box[0]


def damage(photos, kind):
    folder, analysis = photos
    if kind == "no caption":
        (folder / "ann.txt").unlink()
    elif kind == "an empty caption":
        (folder / "ann.txt").write_text(" \n")
    elif kind == "no photo":
        (folder / "ann.png").write_bytes(b"no")
    elif kind == "no face":
        analysis.faces[drawn(5, 1)[0].tobytes()] = []
    elif kind == "a face elsewhere":
        analysis.faces[drawn(5, 1)[0].tobytes()] = [Face(np.array([0.0, 0, 9, 9]), np.zeros((5, 2)))]
    elif kind == "no mask":
        (folder / "masks/ann.png").unlink()
    elif kind == "an empty mask":
        Image.new("L", (288, 288)).save(folder / "masks/ann.png")
    elif kind == "a damaged mask":
        (folder / "masks/ann.png").write_bytes(b"no")


REASONS = {
    "no caption": "its caption ann.txt is missing",
    "an empty caption": "its caption ann.txt is empty",
    "no photo": "it cannot be read",
    "no face": "no face was found",
    "a face elsewhere": "no face was found in the mask of person 1",
    "no mask": "it has no mask in",
    "an empty mask": "its mask is empty",
    "a damaged mask": "its mask ann.png cannot be read",
}


@pytest.mark.parametrize("kind", REASONS)
def test_photos_that_cannot_be_used_are_reported_and_skipped_or_refused(photos, tmp_path, kind):
    damage(photos, kind)
    with pytest.raises(DataError, match=REASONS[kind]):
        run(photos, tmp_path, "refuse")
    assert not (tmp_path / "data/data.json").exists()
    ((name, reason),) = run(photos, tmp_path)
    assert name == "ann.png" and REASONS[kind] in reason
    assert [len(group) for group in json.loads((tmp_path / "data/data.json").read_text()).values()] == [0, 1, 1]
    assert f"ann.png\t{REASONS[kind]}" in (tmp_path / "data/data-report.txt").read_text()


class Blackness(torch.nn.Module):
    """Stands for a segmentation network: whatever is bright is a person."""

    def forward(self, photo):
        return photo.mean(1, keepdim=True)


class TwoClasses(Blackness):
    def forward(self, photo):
        bright = photo.mean(1, keepdim=True)
        return torch.cat([-bright, bright], 1)


def blocks(*lefts):
    """A black photo with a white block of 60 pixels at each of these columns."""
    photo = np.zeros((200, 300, 3), np.uint8)
    for left in lefts:
        photo[50:180, left : left + 60] = 255
    return photo


def faces_at(*lefts):
    return [Face(np.array([left + 20.0, 60, left + 40, 80]), np.zeros((5, 2))) for left in lefts]


@pytest.mark.parametrize("network", [Blackness, TwoClasses])
def test_a_network_makes_a_mask_for_each_face(tmp_path, network):
    torch.jit.script(network()).save(str(tmp_path / "net.pt"))
    masks = prepare._masks_of(tmp_path / "net.pt", 1, "CPU")
    first, second = masks(tmp_path, blocks(20, 200), faces_at(20, 200))
    for mask, left in ((first, 20), (second, 200)):
        assert np.abs(np.array(mask_box(mask)) - (left, 50, left + 60, 180)).max() <= 1
        assert np.isin(mask, (0, 255)).all()
    with pytest.raises(prepare.Unusable, match="persons touch"):
        masks(tmp_path, blocks(20, 80), faces_at(20, 80))
    with pytest.raises(prepare.Unusable, match="face 2 is not on a person"):
        masks(tmp_path, blocks(20), faces_at(20, 200))


def test_a_class_that_the_network_lacks_is_refused(tmp_path):
    torch.jit.script(TwoClasses()).save(str(tmp_path / "net.pt"))
    with pytest.raises(segmentation.SegmentationError, match="2 classes, and --person-class is 15"):
        prepare._masks_of(tmp_path / "net.pt", 15, "CPU")(tmp_path, blocks(20), faces_at(20))


def test_an_onnx_network_is_run_at_its_own_size(tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    node = helper.make_node("ReduceMean", ["photo"], ["mask"], axes=[1], keepdims=1)
    photo, mask = (helper.make_tensor_value_info(n, kind, [1, c, 64, 64]) for n, c in (("photo", 3), ("mask", 1)))
    model = helper.make_model(
        helper.make_graph([node], "net", [photo], [mask]), opset_imports=[helper.make_opsetid("", 13)], ir_version=8
    )
    onnx.save(model, tmp_path / "net.onnx")
    (mask,) = prepare._masks_of(tmp_path / "net.onnx", 1, "CPU")(tmp_path, blocks(100), faces_at(100))
    assert np.abs(np.array(mask_box(mask)) - (100, 50, 160, 180)).max() <= 5  # a pixel of the network has 4.7


@pytest.mark.parametrize("name", ["net.onnx", "net.pt"])
def test_a_file_that_is_no_network_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"no network")
    with pytest.raises(
        segmentation.SegmentationError, match="neither an ONNX nor a TorchScript file|needs onnxruntime"
    ):
        prepare._masks_of(tmp_path / name, 1, "CPU")
    with pytest.raises(segmentation.SegmentationError, match="does not exist"):
        prepare._masks_of(tmp_path / "absent", 1, "CPU")


def reference_regions(mask):
    """Regions by spreading the smallest number of each pixel to its neighbours until nothing changes."""
    labels = np.where(mask > 0, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:
        padded = np.pad(np.where(labels, labels, mask.size + 1), 1, constant_values=mask.size + 1)
        around = [padded[1:-1, 1:-1], padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]]
        spread = np.where(labels, np.min(around, axis=0), 0)
        if (spread == labels).all():
            return labels
        labels = spread


@pytest.mark.parametrize("share", [0.4, 0.6, 0.7])
def test_regions_are_what_touches_along_an_edge(share):
    mask = np.where(np.random.default_rng(0).random((40, 50)) < share, 255, 0).astype(np.uint8)
    ours, expected = segmentation.regions(mask), reference_regions(mask)
    pairs = {*zip(ours.flatten().tolist(), expected.flatten().tolist(), strict=True)}
    assert len(pairs) == len({one for one, _ in pairs}) == len({other for _, other in pairs})
    assert (ours > 0).tolist() == (mask > 0).tolist()


def test_the_command_states_the_licence_of_the_faces(tmp_path, capsys):
    with pytest.raises(SystemExit, match="contains no .onnx files"):
        from storyloom.training.storymaker.__main__ import main

        main(["prepare", str(tmp_path), "--faces", str(tmp_path), "--segmentation", str(tmp_path)])
    assert "non-commercial research only" in capsys.readouterr().out
