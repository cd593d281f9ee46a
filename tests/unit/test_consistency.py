"""The measures equal what one counts by hand, and say what they are."""

import json
import math

import numpy as np
import pytest
import torch

from storyloom.measures.backgrounds import replace_background
from storyloom.measures.consistency import (
    CONVENTIONS,
    Consistency,
    alignment,
    mean_pairwise,
    others,
    pairwise,
    text_of,
)
from storyloom.measures.measuring import measure

NAN = float("nan")
FEATURES = torch.tensor([[3.0, 4.0], [6.0, 8.0], [4.0, -3.0]])
"""The first two point the same way, the third at a right angle to them."""


class Fixed:
    """An encoder whose features are fixed: those of a picture by its upper left red value, those of a text by name."""

    name = "fixed"

    def __init__(self, features, texts=None):
        self.features, self.vectors = features, texts or {}
        self.seen, self.read = [], []

    def images(self, pictures):
        self.seen.append(pictures.clone())
        return self.features[[round(float(value) * 10) for value in pictures[:, 0, 0, 0]]]

    def texts(self, texts):
        self.read.append(list(texts))
        return torch.stack([self.vectors[text] for text in texts])


def pictures(count=3, side=4):
    images = torch.zeros(count, side, side, 3)
    images[:, :, :, 0] = torch.arange(count)[:, None, None] / 10
    return images


def test_cosines_are_those_counted_by_hand():
    expected = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    cosines = pairwise(FEATURES)
    assert cosines.dtype == torch.float64
    torch.testing.assert_close(cosines, expected, rtol=0, atol=1e-12)


def test_the_mean_is_over_pairs_and_not_over_the_diagonal():
    assert mean_pairwise(pairwise(FEATURES)) == pytest.approx((1 + 0 + 0) / 3, abs=1e-12)
    matrix = torch.tensor([[9.0, 0.2, 0.4], [7.0, 9.0, NAN], [7.0, 7.0, 9.0]], dtype=torch.float64)
    assert mean_pairwise(matrix) == pytest.approx(0.3), "what is no number does not count"
    assert math.isnan(mean_pairwise(torch.ones(1, 1))) and math.isnan(mean_pairwise(torch.full((3, 3), NAN)))
    assert others(matrix).tolist() == pytest.approx([0.3, 7.0, 7.0])


def test_a_row_that_is_no_number_makes_no_pair():
    features = torch.cat([FEATURES, torch.full((1, 2), NAN), torch.zeros(1, 2)])
    matrix = pairwise(features)
    assert matrix[3:].isnan().all() and matrix[:, 3:].isnan().all()
    assert mean_pairwise(matrix) == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    "convention, text, factor",
    [
        ("clip_score", "A photo depicts a fox {red}", 2.5),
        ("clip_score_file_name", "A photo depicts a fox {red}.jpg", 2.5),
        ("cosine", "a fox {red}", 1.0),
    ],
)
def test_the_published_conventions(convention, text, factor):
    assert text_of("a fox {red}", convention) == text
    texts = torch.tensor([[3.0, 4.0], [4.0, 3.0], [-4.0, 3.0]])
    expected = [factor * 1.0, factor * 24 / 25, factor * -1.0]
    assert alignment(FEATURES, texts, convention).tolist() == pytest.approx(expected), "nothing is cut at zero"
    assert set(CONVENTIONS) == {"clip_score", "clip_score_file_name", "cosine"}


def test_everything_at_once():
    prompts = ["zero", "one", "two"]
    vectors = {text_of(p, c): torch.tensor([0.6, 0.8]) for p in prompts for c in CONVENTIONS}
    vectors["two"] = torch.tensor([1.0, 0.0])
    steps = []
    measures = measure(
        pictures(),
        prompts,
        Fixed(FEATURES),
        Fixed(FEATURES, vectors),
        progress=lambda done, total: steps.append((done, total)),
    )
    assert measures.frames == 3 and measures.prompts == ("zero", "one", "two")
    assert measures.means() == pytest.approx(
        {
            "clip_i": 1 / 3,
            "clip_t_clip_score": 2.5 * 2 / 3,
            "clip_t_clip_score_file_name": 2.5 * 2 / 3,
            "clip_t_cosine": (1 + 1 + 0.8) / 3,
        }
    )
    assert measures.encoders == {"clip_i": "fixed", "clip_t": "fixed"}
    assert steps == [(3, 6), (6, 6)]


def test_only_what_is_given_is_measured():
    assert measure(pictures(), image_encoder=Fixed(FEATURES)).means().keys() == {"clip_i"}
    assert measure(pictures(), ["a"] * 3, image_encoder=Fixed(FEATURES)).clip_t == {}
    assert measure(pictures(), None, text_encoder=Fixed(FEATURES)).means() == {}


def test_one_encoder_for_both_sees_the_pictures_once():
    vectors = {text_of("x", c): torch.tensor([1.0, 0.0]) for c in CONVENTIONS}
    encoder = Fixed(FEATURES, vectors)
    measures = measure(pictures(), ["x"] * 3, encoder, encoder)
    assert len(encoder.seen) == 1 and measures.clip_t["cosine"].tolist() == pytest.approx([0.6, 0.6, 0.8])


def test_many_pictures_are_encoded_a_few_at_a_time_and_keep_their_order():
    features = torch.randn(100, 6, generator=torch.Generator().manual_seed(1))
    encoder = Fixed(features)
    encoder.images = lambda part: features[[round(float(v) * 100) for v in part[:, 0, 0, 0]]]
    images = torch.zeros(100, 2, 2, 3) + torch.arange(100)[:, None, None, None] / 100
    assert torch.equal(measure(images, image_encoder=encoder).clip_i, pairwise(features))


class Faces:
    def embeddings(self, images):
        features = torch.tensor([[1.0, 0.0], [0.6, 0.8], [NAN, NAN]])
        return features[[round(float(value) * 10) for value in images[:, 0, 0, 0]]]


class Distances:
    name = "DreamSim test"

    def distance(self, images):
        return (images[:, None, 0, 0, 0] - images[None, :, 0, 0, 0]).abs()


def test_frames_without_a_face_are_counted_and_have_no_say():
    measures = measure(pictures(), faces=Faces(), dreamsim=Distances())
    assert measures.means() == pytest.approx({"face": 0.6, "dreamsim": (0.1 + 0.2 + 0.1) / 3})
    assert measures.faceless == (2,) and "found in 2 of 3 frames" in measures.table()


def test_the_json_is_plain_and_has_null_for_what_is_no_number():
    measures = measure(pictures(), ["a", "b", "c"], faces=Faces(), dreamsim=Distances())
    content = json.loads(json.dumps(measures.to_json(), allow_nan=False))
    assert (content["format"], content["version"], content["frames"]) == ("storyloom-consistency", 1, 3)
    assert content["face"][2] == [None, None, None] and content["face"][0][1] == pytest.approx(0.6)
    assert content["faceless"] == [3] and content["prompts"] == ["a", "b", "c"]
    assert content["dreamsim"][0] == pytest.approx([0.0, 0.1, 0.2]) and "clip_i" not in content
    assert content["means"]["face"] == pytest.approx(0.6)
    alone = measure(pictures(1), image_encoder=Fixed(FEATURES)).to_json()
    assert alone["means"] == {"clip_i": None}


def test_the_table_has_a_line_per_measure_and_one_per_frame():
    vectors = {text_of(p, c): torch.tensor([0.6, 0.8]) for p in "abc" for c in CONVENTIONS}
    table = measure(pictures(), list("abc"), Fixed(FEATURES), Fixed(FEATURES, vectors), Faces()).table()
    lines = [line.split() for line in table.split("\n")]
    assert lines[0] == ["3", "frames"]
    assert ["CLIP-I", "0.3333", "0.0000", "1.0000", "fixed"] in lines
    assert ["CLIP-T", "(clip_score)", "1.6667", "0.0000", "2.5000", "fixed"] in lines
    assert ["2", "2.5000", "2.5000", "1.0000", "0.5000", "0.6000", "b"] in lines
    assert ["3", "0.0000", "0.0000", "0.0000", "0.0000", "-", "c"] in lines
    alone = measure(pictures(1), image_encoder=Fixed(FEATURES)).table()
    assert "A single frame has no pairs" in alone


def test_an_encoder_names_its_own_numbers():
    class Reader(Fixed):
        name, image_label, text_label, conventions = "reader", "Same looks", "As told", ("cosine",)

        def images_for(self, images, texts):
            return torch.stack(
                [torch.tensor([1.0, 0.0]) if text == "right" else torch.full((2,), NAN) for text in texts]
            )

    reader = Reader(FEATURES, {"right": torch.tensor([2.0, 0.0]), "wrong": torch.tensor([2.0, 0.0])})
    measures = measure(pictures(), ["right", "wrong", "right"], reader, reader)
    assert "CLIP" not in measures.table() and "CLIP" not in json.dumps(list(measures.to_json()["labels"].values()))
    assert measures.means()["clip_t_cosine"] == pytest.approx(1, abs=1e-12)
    assert "1 of 3 prompts were not understood" in measures.table()


# ---- backgrounds -----------------------------------------------------------------------------------------------------


def half(count=1, side=4):
    masks = torch.zeros(count, side, side)
    masks[:, :, : side // 2] = 1
    return masks


def test_what_is_outside_the_mask_is_replaced_and_nothing_else():
    images = torch.full((2, 4, 4, 3), 0.5)
    for fill, value in (("grey", 130 / 255), ("white", 1.0)):
        replaced = replace_background(images, half(), fill)
        assert (replaced[:, :, :2] == 0.5).all() and torch.allclose(replaced[:, :, 2:], torch.tensor(value))
    assert (images == 0.5).all()


def test_noise_is_uniform_in_8_bits_and_told_by_its_seed():
    images = torch.zeros(3, 64, 64, 3)
    mask = torch.zeros(1, 64, 64)
    mask[:, 0, 0] = 1
    noise = replace_background(images, mask, seed=5)
    values = (noise * 255).round()
    assert torch.allclose(values, noise * 255, atol=1e-4)
    assert values[0].unique().numel() == 256 and abs(noise.mean().item() - 0.5) < 0.01
    assert torch.equal(noise, replace_background(images, mask, seed=5))
    assert not torch.equal(noise, replace_background(images, mask, seed=6))
    assert not torch.equal(noise[0], noise[1]) and not torch.equal(noise[0, :, :, 0], noise[0, :, :, 1])
    assert torch.equal(noise[2:], replace_background(images[2:], mask, seed=5, first=2)), "in any batch"


def test_masks_of_another_size_are_scaled_and_a_wrong_number_is_refused():
    images = torch.full((2, 8, 8, 3), 0.5)
    replaced = replace_background(images, half(2, 4), "white")
    assert (replaced[:, :, :4] == 0.5).all() and (replaced[:, :, 4:] == 1).all()
    with pytest.raises(ValueError, match=r"masks has shape \[3, 4, 4\] for 2 images"):
        replace_background(images, half(3))
    empty = half(2)
    empty[1] = 0
    with pytest.raises(ValueError, match="mask for image 2 is empty"):
        replace_background(images, empty)


def test_masks_are_for_clip_i_and_dreamsim_alone():
    seen = {}

    class Watching(Distances):
        def distance(self, images):
            seen["dreamsim"] = images
            return super().distance(images)

    class Looking(Faces):
        def embeddings(self, images):
            seen["faces"] = images
            return super().embeddings(images)

    vectors = {text_of("x", c): torch.tensor([1.0, 0.0]) for c in CONVENTIONS}
    encoder = Fixed(FEATURES, vectors)
    images = pictures()
    measures = measure(images, ["x"] * 3, encoder, encoder, Looking(), Watching(), half(), "white", seed=1)
    masked = replace_background(images, half(), "white")
    assert torch.equal(encoder.seen[0], masked) and torch.equal(encoder.seen[1], images)
    assert torch.equal(seen["dreamsim"], masked) and torch.equal(seen["faces"], images)
    assert measures.encoders["clip_i"] == "fixed, background white" and measures.encoders["clip_t"] == "fixed"


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"images": torch.zeros(0, 4, 4, 3)}, r"\[0, 4, 4, 3\]"),
        ({"images": torch.zeros(4, 4, 3)}, r"\[4, 4, 3\] instead of"),
        ({"images": torch.full((2, 4, 4, 3), NAN)}, "Image 1, 2: the values contain NaN"),
        ({"prompts": ["a", "b"]}, "2 prompts for 3 images"),
        ({"masks": torch.ones(2, 4, 4)}, "for 3 images"),
        ({"masks": torch.ones(4, 4)}, r"masks has shape \[4, 4\]"),
    ],
)
def test_what_cannot_be_measured_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        measure(**{"images": pictures(), "image_encoder": Fixed(FEATURES)} | changes)


def test_a_measure_of_nothing_has_an_empty_table():
    nothing = Consistency(2)
    assert nothing.means() == {} and nothing.table().startswith("2 frames") and nothing.to_json()["clip_t"] == {}
    assert np.isfinite(nothing.frames)
