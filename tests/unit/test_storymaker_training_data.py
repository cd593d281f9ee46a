"""Training data of StoryMaker: both forms, sizes, batches, the crops of training, and every kind of bad data."""

import json
import shutil
import tarfile
from dataclasses import fields

import numpy as np
import pytest
import torch
from drawn_pictures import COUNTS, face_of, write_data
from PIL import Image

from storyloom.training.storymaker.data import references
from storyloom.training.storymaker.data.batches import Batches, Share
from storyloom.training.storymaker.data.buckets import Plan, size_for
from storyloom.training.storymaker.data.reading import Limits, read_example
from storyloom.training.storymaker.data.scan import REPORT, index_of, known_index, scan
from storyloom.training.storymaker.data.sources import DataError, open_source, pack
from storyloom.training.storymaker.encoders import Cache

LIMITS = Limits(64, 128, pose=True)


class Encoders:
    """Stands for the networks: averages of pixels, and the letters of a text. Counts its calls."""

    def __init__(self):
        self.calls = 0

    def caption(self, text):
        self.calls += 1
        letters = torch.zeros(77, 3)
        letters[: len(text), 0] = torch.tensor([float(ord(letter)) for letter in text[:77]])
        return letters, letters.sum(0)

    def latents(self, picture):
        self.calls += 1
        return torch.tensor(picture[::8, ::8, [0, 1, 2, 0]].copy()).movedim(-1, 0).float()

    def features(self, picture):
        return torch.tensor(picture[::56, ::56].copy()).flatten(0, 1).float()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_data(folder, poses=True)
    return folder


def batches_of(path, batch_size=2, cache=None, share=None, **settings):
    source = open_source(path)
    index = scan(source, LIMITS, 1)
    assert not index.faults
    plan = Plan(index.sizes, index.persons, batch_size, 5)
    return Batches(source, index, LIMITS, plan, Encoders(), cache=cache, share=share, **settings)


def assert_equal(one, other):
    for field in fields(one):
        a, b = getattr(one, field.name), getattr(other, field.name)
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, field.name


def test_shards_give_the_same_batches_as_the_list_that_they_were_packed_from(data, tmp_path):
    pack(open_source(data), tmp_path, per_shard=7)
    assert len([*tmp_path.glob("*.tar")]) == 3
    listed, packed = batches_of(data), batches_of(tmp_path)
    for number in range(listed.plan.length):
        assert_equal(listed(0, number), packed(0, number))


def test_a_batch_depends_on_its_number_alone(data):
    one, other = batches_of(data), batches_of(data)
    expected = [one(step, 0) for step in range(6)]
    for step in (4, 0, 5, 2):
        assert_equal(expected[step], other(step, 0))
    assert not torch.equal(expected[0].latents, expected[1].latents)


def test_processes_share_the_batches_of_a_step(data):
    alone = batches_of(data, share=Share(accumulation=4))
    pair = [batches_of(data, share=Share(2, rank, 2)) for rank in range(2)]
    for step in range(2):
        for micro in range(4):
            assert_equal(alone(step, micro), pair[micro % 2](step, micro))


def test_an_epoch_contains_every_picture_as_often_as_asked(data):
    plan, again = (batches_of(data).plan for _ in range(2))
    assert [plan.batch(i) for i in range(60)] == [again.batch(i) for i in range(60)]
    for epoch in range(2):
        shown = [i for number in range(plan.length) for i in plan.batch(epoch * plan.length + number)]
        least = {1: 1, 2: 2, 3: 5}
        assert all(shown.count(i) >= least[persons] for i, persons in enumerate(COUNTS))
        assert len(shown) <= sum(least[persons] for persons in COUNTS) + 2  # a bucket's last batch may be filled
    assert [plan.batch(i) for i in range(plan.length)] != [plan.batch(plan.length + i) for i in range(plan.length)]


def test_a_batch_has_pictures_of_one_size_and_its_parts_fit_together(data):
    batches = batches_of(data)
    for number in range(batches.plan.length):
        batch = batches(0, number)
        characters, (height, width) = sum(batch.counts), batch.latents.shape[2:]
        assert batch.masks.shape == (2, 3, height, width) and batch.pose.shape == (2, 3, 8 * height, 8 * width)
        assert {len(batch.id_embeds), len(batch.face), len(batch.character), len(batch.crops)} == {characters}
        for masks, count in zip(batch.masks, batch.counts, strict=True):
            assert [bool(mask.any()) for mask in masks] == [True] * count + [False] * (3 - count)
        assert batch.time_ids.tolist() == [[8 * height, 8 * width, 0, 0, 8 * height, 8 * width]] * 2


def test_the_published_time_ids_have_one_target_for_all(data):
    assert batches_of(data, time_ids="published")(0, 0).time_ids[0, 4:].tolist() == [1286, 960]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((960, 960), (960, 960)),
        ((1080, 1080), (960, 960)),
        ((1920, 1080), (1280, 704)),
        ((1286, 960), (1280, 960)),
        ((500, 400), (1152, 960)),
        ((4000, 190), None),
    ],
)
def test_sizes_are_scaled_to_the_published_limits(given, expected):
    assert size_for(*given) == expected
    assert size_for(*given[::-1]) == (expected and expected[::-1])


def test_crops_of_training_equal_those_of_opencv(data):
    cv2 = pytest.importorskip("cv2")
    picture = np.random.default_rng(0).integers(0, 256, (90, 70, 3), np.uint8)
    mask = np.zeros((90, 70), np.uint8)
    mask[20:61, 33:50], mask[70:80, 2:30] = 255, 255
    wide = cv2.dilate(mask, np.ones((7, 7), np.uint8))
    x, y, w, h = cv2.boundingRect(wide)
    m = cv2.GaussianBlur(wide[y : y + h, x : x + w], (5, 5), 0)[..., None] / 255
    expected = (255 * (1 - m) + m * picture[y : y + h, x : x + w]).astype(np.uint8)
    assert np.array_equal(references.masked_crop(picture, mask), expected)
    assert references.crop_origin(mask) == (x, y)


def test_a_rotated_crop_is_white_outside():
    black = np.zeros((100, 80, 3), np.uint8)
    turned = references.character_picture(black, 10)
    assert turned.shape == (224, 224, 3)
    assert (turned[0, 0] == 255).all() and not turned[112, 112].any()
    assert not references.character_picture(black, 0).any()


def smooth_picture(height, width):
    small = np.random.default_rng(1).integers(0, 256, (5, 6, 3), np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


POINTS = np.array([(61.0, 52), (95, 60), (74, 82), (55, 97), (85, 103)])


def test_faces_are_aligned_as_by_insightface():
    face_align = pytest.importorskip("insightface.utils.face_align")
    picture, points = smooth_picture(300, 330), POINTS + 100
    theirs = face_align.norm_crop(picture, landmark=points.astype(np.float32), image_size=224)
    ours = references.face_picture(picture, points)
    assert np.abs(ours.astype(int) - theirs).max() <= 3  # OpenCV rounds positions to 1/32 pixel


def test_the_identity_loss_samples_the_face_that_the_crop_shows():
    picture = smooth_picture(150, 180)
    grid = torch.from_numpy(references.face_grid(POINTS, picture.shape[:2])).float()
    pixels = torch.tensor(picture).movedim(-1, 0)[None].float()
    sampled = torch.nn.functional.affine_grid(grid[None], (1, 3, 112, 112), align_corners=False)
    face = torch.nn.functional.grid_sample(pixels, sampled, align_corners=False)[0].movedim(0, -1)
    crop = torch.tensor(references.face_picture(picture, POINTS)).float()[::2, ::2]  # the template at twice its size
    assert (face - crop).abs()[3:-3, 3:-3].mean() < 2


def test_the_cache_gives_what_the_encoders_gave(data, tmp_path):
    plain, first, second = batches_of(data), batches_of(data, cache=Cache(tmp_path)), None
    expected = [plain(step, 0) for step in range(5)]
    first.encode_all(lambda: None)
    assert len([*tmp_path.iterdir()]) == len(COUNTS)
    next(tmp_path.iterdir()).write_bytes(b"damaged")
    second = batches_of(data, cache=Cache(tmp_path))
    second.encode_all(lambda: None)
    calls = second.encoders.calls
    for step in range(5):
        assert_equal(expected[step], second(step, 0))
    assert second.encoders.calls == calls, "something was encoded again"
    other = batches_of(data, cache=Cache(tmp_path, "another checkpoint"))
    other(0, 0)
    assert other.encoders.calls > 1


def edit(groups, place, value):
    groups["2"][0][place] = value


def rewrite(folder, name, change):
    with Image.open(folder / name) as image:
        changed = change(image.copy())
    changed.save(folder / name)


def colourless(image):
    pixels = np.array(image)
    pixels[..., 1] = 0
    return Image.fromarray(pixels)


class Evil:
    def __reduce__(self):
        return print, ("executed",)


def features(folder, **changes):
    torch.save(face_of(1, np.zeros((100, 100))) | changes, folder / "faces/12/1.bin")


BAD = {
    "no picture": (lambda f, g: (f / "images/12.png").unlink(), "the picture is missing"),
    "an unreadable picture": (lambda f, g: (f / "images/12.png").write_bytes(b"no"), "the picture cannot be read"),
    "half a picture": (
        lambda f, g: (f / "images/12.png").write_bytes((f / "images/12.png").read_bytes()[:300]),
        "the picture cannot be read",
    ),
    "a small picture": (
        lambda f, g: rewrite(f, "images/12.png", lambda i: i.resize((200, 200))),
        "the picture has 200 x 200 pixels; its sides need at least 256",
    ),
    "a narrow picture": (
        lambda f, g: rewrite(f, "images/12.png", lambda i: i.resize((256, 2000))),
        "the picture is too narrow",
    ),
    "no mask": (lambda f, g: (f / "masks/12.png").unlink(), "the mask is missing"),
    "no mask in the list": (lambda f, g: edit(g, 2, None), "its mask is missing"),
    "an empty mask": (
        lambda f, g: rewrite(f, "masks/12.png", colourless),
        r"its mask is empty for person 2 \(no green pixel\)",
    ),
    "a mask of another size": (
        lambda f, g: rewrite(f, "masks/12.png", lambda i: i.resize((288, 200))),
        "the mask has 288 x 200 pixels, the picture 288 x 288",
    ),
    "no face": (lambda f, g: (f / "faces/12/1.bin").unlink(), "the face features are missing"),
    "an unreadable face": (lambda f, g: (f / "faces/12/1.bin").write_bytes(b"\x80"), "face features cannot be read"),
    "a face that runs code": (lambda f, g: torch.save(Evil(), f / "faces/12/1.bin"), "face features cannot be read"),
    "a face without landmarks": (
        lambda f, g: torch.save({"id": torch.ones(512)}, f / "faces/12/1.bin"),
        "face features cannot be read",
    ),
    "a vector of another length": (lambda f, g: features(f, id=torch.ones(1, 128)), r"shapes \[1, 128\] and \[5, 2\]"),
    "a vector of another norm": (lambda f, g: features(f, id=torch.ones(1, 512)), "the norm 22.6 instead of 1"),
    "a vector of no numbers": (lambda f, g: features(f, id=torch.full((512,), torch.nan)), "the norm nan"),
    "equal landmarks": (lambda f, g: features(f, kps=torch.ones(5, 2)), "not five different points"),
    "a face elsewhere": (
        lambda f, g: features(f, kps=torch.rand(5, 2) * 9 + 5000),
        "lies outside the character's crop",
    ),
    "no caption": (lambda f, g: edit(g, 3, " "), "its caption is missing or empty"),
    "no pose": (lambda f, g: (f / "poses/12.png").unlink(), "the pose picture is missing"),
    "no pose in the list": (lambda f, g: edit(g, 1, ""), "its pose picture is missing"),
    "four persons": (lambda f, g: g.setdefault("4", []).append(g["2"].pop(0)[:4] + [4, "x"]), "it shows 4 persons"),
    "persons of another group": (lambda f, g: edit(g, 4, 1), 'has 1 persons but is in the group "2"'),
    "an entry of another form": (lambda f, g: g["2"].__setitem__(0, ["images/12.png"]), "the list's entry is not"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_data_is_reported_by_file_and_skipped_or_refused(data, tmp_path, kind):
    folder, out, (damage, reason) = tmp_path / "data", tmp_path / "out", BAD[kind]
    shutil.copytree(data, folder)
    groups = json.loads((folder / "data.json").read_text())
    groups = {"1": groups["1"][:1], "2": groups["2"][:2], "3": []}
    damage(folder, groups)
    (folder / "data.json").write_text(json.dumps(groups))
    source = open_source(folder)
    with pytest.raises(DataError, match=reason):
        index_of(source, LIMITS, out, "refuse", 1)
    assert not (out / "data-index.json").exists()
    index = index_of(source, LIMITS, out, "skip", 2)
    assert [item.image for item in index.items] == ["images/00.png", "images/13.png"]
    summary, *lines = (out / REPORT).read_text().splitlines()
    assert summary == "3 pictures: 2 are usable, 1 are not."
    (line,) = lines
    assert "12" in line.split("\t")[0]


def test_a_resumed_run_uses_the_index_of_its_first_start(data, tmp_path):
    source = open_source(data)
    index = index_of(source, LIMITS, tmp_path, "refuse", 2)
    known = known_index(source, LIMITS, tmp_path)
    assert (known.items, known.sizes, known.faults) == (index.items, index.sizes, index.faults)
    with pytest.raises(DataError, match="have changed since the run"):
        known_index(source, Limits(128, 128), tmp_path)


def test_a_picture_that_vanishes_during_training_is_named(data, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(data, folder)
    batches = batches_of(folder)
    for path in (folder / "images").iterdir():
        path.unlink()
    with pytest.raises(DataError, match=r"images/\d\d.png was usable when training began"):
        batches(0, 0)


def test_a_damaged_shard_is_reported_and_its_beginning_used(data, tmp_path):
    (path,) = pack(open_source(data), tmp_path, per_shard=100)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    index = scan(open_source(path), LIMITS, 1)
    assert 0 < len(index.items) < len(COUNTS)
    assert any("000000.tar" in file for file, _ in index.faults)


def test_a_shard_without_number_of_persons_is_reported(data, tmp_path):
    (path,) = pack(open_source(data), tmp_path, per_shard=100)
    with tarfile.open(path) as archive:
        archive.extractall(tmp_path / "files", filter="data")
    (tmp_path / "files/00000003.json").unlink()
    with tarfile.open(path, "w") as archive:
        for file in sorted((tmp_path / "files").iterdir()):
            archive.add(file, file.name)
    index = scan(open_source(tmp_path), LIMITS, 1)
    assert [file for file, _ in index.faults] == ["000000.tar:00000003"]
    assert len(index.items) == len(COUNTS) - 1


def test_face_features_may_be_numpy_arrays(data, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(data, folder)
    expected = read_example(open_source(folder), open_source(folder).items[0], LIMITS).persons[0]
    path = folder / "faces/00/0.bin"
    torch.save({name: value.numpy() for name, value in torch.load(path).items()}, path)
    read = read_example(open_source(folder), open_source(folder).items[0], LIMITS).persons[0]
    assert torch.equal(read.id_embed, expected.id_embed) and np.array_equal(read.face, expected.face)


@pytest.mark.parametrize("content", ["[]", "no", '{"1": 3}'])
def test_a_list_of_another_form_is_refused(tmp_path, content):
    (tmp_path / "data.json").write_text(content)
    with pytest.raises(DataError, match="write it again"):
        open_source(tmp_path)


def test_a_folder_without_data_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"neither data.json nor .tar files"):
        open_source(tmp_path)
    with pytest.raises(DataError, match="does not exist"):
        open_source(tmp_path / "absent")
