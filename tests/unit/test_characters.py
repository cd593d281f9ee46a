"""From pixels to a character: what the encoder sees, whose face is meant, blends, and files that may be hostile."""

import json
import math
import os

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from killing import can_be_killed, killed_at_every_point
from PIL import Image
from rounding import rounding
from safetensors.torch import load_file, save_file

from storyloom.models.storymaker import characters, crops
from storyloom.models.storymaker.characters import (
    CharacterFileError,
    CharacterReference,
    blend,
    features_of,
    load_character,
    save_character,
)

RANDOM = np.random.default_rng(0)


def noise(*shape):
    return RANDOM.integers(0, 256, shape, dtype=np.uint8)


def tensor(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def some(name="Fox", seed=0, face=True, character=True):
    """A character with one part of random features."""
    identity = torch.nn.functional.normalize(tensor(512, seed=seed), dim=0)
    part = features_of(
        (identity, tensor(257, 1280, seed=seed + 1)) if face else None,
        tensor(257, 1280, seed=seed + 2) if character else None,
    )
    return CharacterReference(name, ((part, 1.0),), tensor(224, 224 * (face + character), 3, seed=seed).sigmoid())


def test_the_blur_has_the_weights_of_opencv_s_own_table():
    """cv2.getGaussianKernel(5, 0): a point becomes the outer product of 1 4 6 4 1 over 16 with itself."""
    point = np.zeros((9, 9), np.uint8)
    point[4, 4] = 255
    blurred = crops.soften(point)
    assert blurred[4].tolist() == [0, 0, 6, 24, 36, 24, 6, 0, 0]
    assert blurred[4, 4] == round(255 * 36 / 256) and blurred[3, 3] == round(255 * 16 / 256)


def test_the_blur_mirrors_at_the_border_without_repeating_the_border_pixel():
    column = np.array([[255, 0, 0, 0]], np.uint8)
    assert crops.soften(column).tolist() == [[96, 64, 16, 0]], "6/16, 4/16, 1/16 of it: it is not seen twice"
    assert crops.soften(np.array([[0, 255, 0, 0]], np.uint8))[0, 0] == 128, "4/16 from both sides"


@pytest.mark.parametrize("shape", [(40, 50), (5, 7), (3, 3), (2, 9), (1, 5), (1, 1)])
def test_the_blur_is_opencv_s(shape):
    cv2 = pytest.importorskip("cv2")
    mask = noise(*shape)
    assert np.array_equal(crops.soften(mask), cv2.GaussianBlur(mask, (5, 5), 0).reshape(shape))


def test_the_box_is_around_all_parts_and_everything_above_zero():
    mask = np.zeros((30, 40), np.uint8)
    assert crops.mask_box(mask) is None
    mask[3, 5] = 1
    assert crops.mask_box(mask) == (5, 3, 6, 4)
    mask[20:25, 30:33] = 255
    assert crops.mask_box(mask) == (5, 3, 33, 25)


def test_the_character_stands_on_white_with_edges_softened_after_the_crop():
    """By hand, for a mask of one column beside another at half strength in a black picture; 224 = 112 x 2."""
    mask = np.zeros((50, 50), np.uint8)
    mask[10:20, 10:12] = 255
    mask[10:20, 12:14] = 128
    crop = crops.character_crop(np.zeros((50, 50, 3), np.uint8), mask)
    assert crop.shape == (224, 224, 3) and crop.dtype == np.uint8
    softened = crops.soften(mask[10:20, 10:14])
    assert softened[:, 0].tolist() == [239] * 10, "the border is mirrored: nothing of the picture beside the box"
    column = (255 * (1 - softened[0] / 255)).astype(np.uint8)
    strip = np.repeat(np.repeat(column[None, :, None], 10, 0), 3, 2)
    assert np.array_equal(crop, np.asarray(Image.fromarray(strip).resize((224, 224), Image.Resampling.BICUBIC)))


def test_values_are_cut_to_whole_numbers_not_rounded():
    picture = np.full((224, 224, 3), 3, np.uint8)
    mask = np.full((224, 224), 255, np.uint8)
    mask[100:124, 100:124] = 254
    crop = crops.character_crop(picture, mask)
    assert crop[112, 112, 0] == 3, "255 / 255 + 3 * 254 / 255 = 3.99"
    assert crop[50, 50, 0] == 3


def test_the_inside_of_the_mask_is_kept_and_proportions_are_not():
    picture = noise(100, 300, 3)
    mask = np.full((100, 300), 255, np.uint8)
    assert np.array_equal(crops.character_crop(picture, mask), crops.stretched(picture))
    assert crops.stretched(picture).shape == (224, 224, 3)
    square = noise(224, 224, 3)
    assert np.array_equal(crops.stretched(square), square)


def test_what_lies_around_the_mask_does_not_matter():
    first, second = noise(60, 60, 3), noise(60, 60, 3)
    second[20:40, 20:40] = first[20:40, 20:40]
    mask = np.zeros((60, 60), np.uint8)
    mask[20:40, 20:40] = 255
    assert np.array_equal(crops.character_crop(first, mask), crops.character_crop(second, mask))


@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.sets(st.tuples(st.integers(0, 39), st.integers(0, 39)), min_size=1, max_size=5),
)
def test_any_mask_with_something_in_it_makes_a_crop(height, width, points):
    mask = np.zeros((height, width), np.uint8)
    for y, x in points:
        mask[y % height, x % width] = 255
    before = mask.copy()
    crop = crops.character_crop(np.zeros((height, width, 3), np.uint8), mask)
    assert crop.shape == (224, 224, 3)
    assert np.array_equal(mask, before)


def test_pixels_are_whole_numbers_and_transparency_is_white():
    image = torch.arange(256)[None, :, None].expand(2, 256, 3) / 255
    assert crops.to_pixels(image)[0, :, 0].tolist() == list(range(256))
    assert torch.equal(crops.to_image(crops.to_pixels(image)), image.float())
    assert crops.to_pixels(torch.tensor([[[-1.0, 0.5, 2.0]]])).tolist() == [[[0, 128, 255]]]
    assert crops.to_pixels(torch.tensor([[[0.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 1.0]]])).tolist() == [
        [[255, 255, 255], [0, 255, 0]]
    ]


def test_a_mask_of_another_size_is_stretched_without_new_values():
    mask = torch.zeros(4, 4)
    mask[1, 2] = 1
    large = crops.to_mask(mask, 40, 80)
    assert crops.mask_box(large) == (40, 10, 60, 20)
    assert set(np.unique(large)) == {0, 255}
    assert crops.mask_box(crops.to_mask(torch.zeros(64, 64), 10, 10)) is None


BOXES = np.array([[0, 0, 10, 10], [20, 20, 50, 50], [60, 60, 80, 80]], float)


def region(left, top, right, bottom, value=255):
    mask = np.zeros((100, 100), np.uint8)
    mask[top:bottom, left:right] = value
    return mask


@pytest.mark.parametrize(
    "mask, chosen",
    [
        (None, 1),
        (region(0, 0, 100, 100), 1),
        (region(55, 55, 100, 100), 2),
        (region(0, 0, 12, 12), 0),
        (region(20, 20, 50, 35), 1),
        (region(20, 20, 50, 34), None),
        (region(0, 0, 85, 85, 120), None),
        (region(90, 90, 99, 99), None),
    ],
)
def test_the_largest_face_that_lies_half_in_the_mask_is_meant(mask, chosen):
    assert crops.choose_face(BOXES, mask) == chosen


def test_no_faces_and_faces_without_area_give_none():
    assert crops.choose_face(np.zeros((0, 4)), None) is None
    assert crops.choose_face(np.array([[5, 5, 5, 9], [9, 9, 5, 5]], float), None) is None


def test_of_a_face_that_reaches_over_the_border_only_the_inside_counts():
    boxes = np.array([[-50, -50, 20, 20]], float)
    assert crops.choose_face(boxes, region(0, 0, 20, 12)) == 0
    assert crops.choose_face(boxes, region(0, 0, 20, 9)) is None
    assert crops.choose_face(np.array([[-50, -50, -10, -10]], float), region(0, 0, 100, 100)) is None


@pytest.mark.parametrize("clothes", ["half", "numpy", "tolist", "clone", "double"])
def test_an_embedding_comes_in_any_clothes_and_has_length_one(clothes):
    def reference(vector):
        return (vector.double() / vector.double().norm())[0]

    vector = 20 * tensor(1, 512)
    vector = vector.half() if clothes == "half" else vector
    unit = characters.unit_identity(getattr(vector, clothes)())
    assert unit.shape == (512,) and unit.dtype == torch.float32
    assert unit.double().norm().item() == pytest.approx(1, abs=1e-6)
    assert (unit - reference(vector)).abs().max() < rounding(reference, vector.float())


@pytest.mark.parametrize(
    "value, message",
    [
        (torch.zeros(512), "no usable values"),
        (torch.full((512,), torch.nan), "no usable values"),
        ([1e400] * 512, "no usable values"),
        (torch.ones(256), "got 256"),
        (torch.ones(2, 512), "got 1024"),
        ("a face", "got str"),
        ({"embedding": 1}, "got dict"),
        ([[1, 2], [3]], "got list"),
    ],
)
def test_what_is_no_embedding_is_refused_in_one_sentence(value, message):
    with pytest.raises(ValueError, match=message):
        characters.unit_identity(value)


def test_an_embedding_that_arrives_is_left_alone():
    vector = 3 * torch.ones(512)
    characters.unit_identity(vector)
    assert torch.equal(vector, 3 * torch.ones(512))


def test_what_is_absent_is_zeros_and_said_so():
    part = some(face=False).parts[0][0]
    assert not part.has_face and part.has_character
    assert part.id_embed.shape == (512,) and not part.id_embed.any()
    assert part.face.shape == (257, 1280) and not part.face.any()
    part = some(character=False).parts[0][0]
    assert part.has_face and not part.has_character and not part.character.any()


def shares(character):
    return [share for _, share in character.parts]


def test_a_blend_of_blends_is_one_list_with_shares_that_sum_to_one():
    a, b, c = (some(name, seed) for name, seed in (("A", 0), ("B", 10), ("C", 20)))
    mixed = blend(blend(a, b, 0.25, ""), c, 0.4, "D")
    assert mixed.name == "D"
    assert shares(mixed) == pytest.approx([0.45, 0.15, 0.4])
    assert [part for part, _ in mixed.parts] == [x.parts[0][0] for x in (a, b, c)], "the features are not copied"
    assert mixed.picture.shape == (3 * 224, 448, 3)


@pytest.mark.parametrize("ratio, kept", [(0.0, 0), (1.0, 1)])
def test_the_ends_of_a_blend_are_one_character_alone(ratio, kept):
    pair = some("A", 0), some("B", 10)
    mixed = blend(*pair, ratio, "")
    assert mixed.parts == pair[kept].parts and torch.equal(mixed.picture, pair[kept].picture)


def test_a_narrow_picture_in_a_blend_has_white_beside_it():
    mixed = blend(some(face=False), some(seed=5), 0.5, "")
    assert mixed.picture.shape == (448, 448, 3)
    assert (mixed.picture[:224, 224:] == 1).all()


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_shares_always_sum_to_one(ratios):
    tiny = CharacterReference("", ((None, 1.0),), torch.zeros(1, 1, 3))
    mixed = tiny
    for ratio in ratios:
        mixed = blend(mixed, tiny, ratio, "")
    assert math.isclose(sum(shares(mixed)), 1, abs_tol=1e-9)


def test_a_blend_too_large_for_a_file_is_refused():
    tiny = CharacterReference("", ((None, 1 / 64),) * 64, torch.zeros(1, 1, 3))
    with pytest.raises(ValueError, match="at most 64 images, but this one has 128"):
        blend(tiny, tiny, 0.5, "")


def same(a, b):
    assert a.name == b.name and shares(a) == shares(b)
    for (x, _), (y, _) in zip(a.parts, b.parts, strict=True):
        assert (x.has_face, x.has_character) == (y.has_face, y.has_character)
        for key in ("id_embed", "face", "character"):
            assert torch.equal(getattr(x, key), getattr(y, key))
    assert torch.allclose(a.picture, b.picture, atol=0.5 / 255 + 1e-6)


@pytest.mark.parametrize(
    "character",
    [
        some(),
        some("", face=False),
        some("Füchsin 狐 [x]", character=False),
        blend(some(), some(face=False, seed=9), 0.3, "mix"),
    ],
    ids=["whole", "appearance", "face", "blend"],
)
def test_a_character_comes_back_from_its_file_as_it_was(tmp_path, character):
    path = tmp_path / "a character.safetensors"
    save_character(path, character)
    same(load_character(path), character)
    assert [p.name for p in tmp_path.iterdir()] == [path.name], "nothing else is left"


def test_a_face_without_an_identity_vector_comes_back_too(tmp_path):
    part = features_of((torch.zeros(512), tensor(257, 1280)), None)
    save_character(tmp_path / "x", CharacterReference("", ((part, 1.0),), torch.zeros(224, 224, 3)))
    same(load_character(tmp_path / "x"), CharacterReference("", ((part, 1.0),), torch.zeros(224, 224, 3)))


def test_a_loaded_character_does_not_change_with_its_file(tmp_path):
    path = tmp_path / "x.safetensors"
    save_character(path, some())
    character = load_character(path)
    with open(path, "r+b") as file:
        file.write(b"\0" * path.stat().st_size)
    same(character, some())


def test_saving_replaces_a_link_and_leaves_its_target(tmp_path):
    target, link = tmp_path / "target", tmp_path / "link.safetensors"
    target.write_text("precious")
    try:
        link.symlink_to(target)
    except OSError:
        pytest.skip("links are not possible here")
    save_character(link, some())
    assert target.read_text() == "precious" and not link.is_symlink()


@can_be_killed
def test_saving_that_is_killed_leaves_the_old_file_or_the_whole_new_one(tmp_path):
    path, versions = tmp_path / "fox.safetensors", [some(seed=seed) for seed in (1, 2)]
    for _ in killed_at_every_point(lambda n: save_character(path, versions[n % 2]), tmp_path):
        face = load_character(path).parts[0][0].face
        assert any(torch.equal(face, version.parts[0][0].face) for version in versions)
    assert [file.name for file in tmp_path.glob("[!.]*")] == ["fox.safetensors"]


def test_saving_that_fails_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    save_character(path, some("old"))

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        save_character(path, some("new"))
    assert load_character(path).name == "old" and len(list(tmp_path.iterdir())) == 1


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    path = tmp_path_factory.mktemp("good") / "good.safetensors"
    save_character(path, blend(some(), some(seed=4), 0.5, "x"))
    return path


def tampered(good, tmp_path, metadata=None, **tensors):
    """The good file with other metadata and tensors; None removes one."""
    from safetensors import safe_open

    with safe_open(good, framework="pt") as file:
        held = file.metadata()
    values = {k: v for k, v in (load_file(good) | tensors).items() if v is not None}
    held = {k: v for k, v in (held | (metadata or {})).items() if v is not None}
    save_file(values, tmp_path / "bad.safetensors", held)
    return tmp_path / "bad.safetensors"


NAN = torch.full((257, 1280), torch.nan)


@pytest.mark.parametrize(
    "metadata, tensors, expected",
    [
        ({"format": "pt"}, {}, "of another kind"),
        ({"format": None}, {}, "of another kind"),
        ({"version": "2"}, {}, 'its version is "2"'),
        ({"version": None}, {}, 'its version is ""'),
        ({"shares": "[0.5]"}, {}, "shares"),
        ({"shares": "[0.5, 0.6]"}, {}, "shares"),
        ({"shares": "[1.5, -0.5]"}, {}, "shares"),
        ({"shares": "[NaN, NaN]"}, {}, "shares"),
        ({"shares": "[1e999, 1]"}, {}, "shares"),
        ({"shares": "[true, 0]"}, {}, "shares"),
        ({"shares": "1"}, {}, "shares"),
        ({"shares": "["}, {}, "shares"),
        ({"shares": "[" * 100000}, {}, "shares"),
        ({"shares": "[" + "9" * 400 + ", 1]"}, {}, "shares"),
        ({"shares": "[" + "9" * 5000 + ", 1]"}, {}, "shares"),
        ({"shares": json.dumps([1 / 128] * 128)}, {}, "shares"),
        ({"shares": "[1.0]"}, {}, "1.character.*belongs to no part"),
        ({"shares": "[0.5, 0.25, 0.25]"}, {}, "part 2 lacks"),
        ({}, {"0.face": None}, "part 0 lacks"),
        ({}, {"0.id_embed": None}, "part 0 lacks"),
        ({}, {"0.face": NAN}, "0.face contains NaN"),
        ({}, {"1.character": torch.full((257, 1280), torch.inf)}, "1.character contains NaN"),
        ({}, {"0.face": torch.zeros(256, 1280)}, "instead of floats"),
        ({}, {"0.face": torch.zeros(257, 1280, dtype=torch.int32)}, "instead of floats"),
        ({}, {"0.id_embed": torch.zeros(1, 512)}, "instead of floats"),
        ({}, {"0.id_embed": torch.ones(512)}, "norm 22.6 instead of 1"),
        ({}, {"picture": None}, "preview is missing"),
        ({}, {"picture": torch.zeros(4, 4, 3)}, "its preview is F32"),
        ({}, {"picture": torch.zeros(4, 4, 4, dtype=torch.uint8)}, "its preview is"),
        ({}, {"picture": torch.zeros(0, 4, 3, dtype=torch.uint8)}, "its preview is"),
        ({}, {"picture": torch.zeros(1, 20000, 3, dtype=torch.uint8)}, "its preview is"),
        ({}, {"extra\x1b[31m": torch.zeros(1)}, r"extra\\x1b\[31m.* belongs to no part"),
    ],
)
def test_a_tampered_file_is_refused_in_one_sentence(good, tmp_path, metadata, tensors, expected):
    path = tampered(good, tmp_path, metadata, **tensors)
    with pytest.raises(CharacterFileError, match=expected) as refused:
        load_character(path)
    message = str(refused.value)
    assert message.startswith("bad.safetensors cannot be read") and message.endswith("save the character again.")
    assert "\n" not in message and len(message) < 400


def test_what_is_no_safetensors_file_is_refused(good, tmp_path):
    content = good.read_bytes()
    for number, junk in enumerate([b"", b"\0" * 8, b"PK\3\4junk", content[:100], content[:-1], content + b"x"]):
        path = tmp_path / f"{number}.safetensors"
        path.write_bytes(junk)
        with pytest.raises(CharacterFileError, match="cannot be read as a character"):
            load_character(path)
    for path in (tmp_path, tmp_path / "missing.safetensors"):
        with pytest.raises(CharacterFileError, match="cannot be read as a character"):
            load_character(path)


@given(st.data())
def test_a_file_with_changed_bytes_is_read_whole_or_refused(good, tmp_path_factory, data):
    content = bytearray(good.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, header + 64))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "changed.safetensors"
    path.write_bytes(content)
    try:
        character = load_character(path)
    except CharacterFileError as error:
        assert str(error).endswith("save the character again.")
    else:
        assert len(character.parts) == 2 and sum(shares(character)) == pytest.approx(1)


@pytest.mark.parametrize(
    "name, stem",
    [("Fox", "Fox"), (" Fox ", "Fox"), ("Fox.safetensors", "Fox"), ("v1.2 狐", "v1.2 狐"), ("console", "console")],
)
def test_an_ordinary_name_is_its_file_s(name, stem):
    assert characters.file_stem(name) == stem


@pytest.mark.parametrize(
    "name",
    ["", "  ", ".safetensors", "..", ".", "../evil", "a/b", "/etc/passwd", "..\\evil", "C:evil", "C:\\evil", "a\0b"]
    + ["a\nb", ".hidden", "dot.", "CON", "nul.txt", "com1", "Lpt9 .x", "a*", "a?", 'a"b', "a|b", "<a>", "x" * 201]
    + ["狐" * 67, "\ud800", "file:stream"],
)
def test_a_name_that_leaves_the_folder_or_fits_no_system_is_refused(name):
    with pytest.raises(ValueError) as refused:
        characters.file_stem(name)
    assert str(refused.value).isprintable() and len(str(refused.value)) < 300


@given(st.text(max_size=30))
def test_whatever_is_typed_stays_in_the_folder(name):
    try:
        stem = characters.file_stem(name)
    except ValueError:
        return
    path = os.path.normpath(os.path.join("/folder", f"{stem}.safetensors"))
    assert os.path.dirname(path) == "/folder" and stem
    assert characters.file_stem(stem) == stem


def test_a_taken_name_gets_a_number(tmp_path):
    path = tmp_path / "Fox.safetensors"
    assert characters.free_path(path) == path
    path.touch()
    assert characters.free_path(path).name == "Fox_2.safetensors"
    (tmp_path / "Fox_2.safetensors").touch()
    assert characters.free_path(path).name == "Fox_3.safetensors"
