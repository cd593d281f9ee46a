"""The plots show what was measured, also when there is much of it or some is missing."""

import numpy as np
import pytest
import torch

from storyloom.measures.consistency import CONVENTIONS, Consistency, pairwise
from storyloom.measures.plots import MISSING, alignment_picture, matrix_picture

NAN = float("nan")
GREY = np.array([int(MISSING[i : i + 2], 16) for i in (1, 3, 5)]) / 255


def scores(frames, missing=None, **more):
    random = torch.Generator().manual_seed(frames)
    features = torch.randn(1, 8, generator=random) + 0.5 * torch.randn(frames, 8, generator=random)
    if missing is not None:
        features[missing] = NAN
    return Consistency(frames, pairwise(features), encoders={"clip_i": "ViT"}, **more)


def share(picture, colour):
    return (np.abs(picture - colour).max(-1) < 0.02).mean()


@pytest.mark.parametrize("frames", [1, 12, 100])
def test_any_number_of_frames_makes_pictures_of_a_usual_size(frames):
    texts = {"cosine": torch.linspace(0.5, 1, frames)}
    for picture in (matrix_picture(scores(frames, clip_t=texts)), alignment_picture(scores(frames, clip_t=texts))):
        assert picture.dtype == np.float32 and picture.ndim == 3 and picture.shape[2] == 3
        assert max(picture.shape) <= 1800 and 0 <= picture.min() and picture.max() <= 1
        assert share(picture, 1.0) > 0.15 and picture.std() > 0.05


def test_a_square_of_the_matrix_has_the_colour_of_its_number():
    low, high = scores(3), scores(3)
    low.clip_i[0, 1] = low.clip_i[1, 0] = low.clip_i.min() - 0.5
    changed = np.abs(matrix_picture(low) - matrix_picture(high)).max(-1) > 0.1
    assert 0.02 < changed.mean() < 0.6
    assert np.array_equal(matrix_picture(scores(3)), matrix_picture(scores(3)))


def test_every_pairwise_measure_has_its_own_matrix():
    one = matrix_picture(scores(4))
    other = scores(4)
    three = matrix_picture(Consistency(4, other.clip_i, {}, other.clip_i, 1 - other.clip_i))
    assert three.shape[1] > 2 * one.shape[1]
    with pytest.raises(ValueError, match="no matrix to draw"):
        matrix_picture(Consistency(4))


def test_what_is_missing_is_grey_in_both():
    assert share(matrix_picture(scores(5, missing=2)), GREY) > 1.5 * share(matrix_picture(scores(5)), GREY)
    assert share(alignment_picture(scores(5)), GREY) < 0.001 < share(alignment_picture(scores(5, missing=2)), GREY)
    nothing = scores(3)
    nothing.clip_i[:] = NAN
    assert share(matrix_picture(nothing), GREY) > 0.2 and share(alignment_picture(nothing), GREY) > 0.2


def test_a_higher_value_has_a_higher_bar():
    def blue(values):
        picture = alignment_picture(Consistency(2, clip_t={"cosine": torch.tensor(values)}))
        return (picture[..., 2] - picture[..., 0] > 0.2).sum()

    assert blue([0.5, 1.0]) > 1.3 * blue([0.0, 1.0])
    assert blue([-0.5, 1.0]) > 0.5 * blue([0.5, 1.0]), "what is below zero has a bar too"


def test_every_convention_has_its_panel():
    rows = {name: torch.tensor([0.5, 0.6]) for name in CONVENTIONS}
    one = alignment_picture(Consistency(2, clip_t={"cosine": rows["cosine"]}))
    assert alignment_picture(Consistency(2, clip_t=rows)).shape[0] > 2 * one.shape[0]
    assert alignment_picture(Consistency(2)).shape[2] == 3, "an empty sheet where nothing was measured"
