"""A and B on one page, and what changed between them in words."""

import numpy as np
import pytest
import torch

from storyloom.measures.consistency import Consistency
from storyloom.pages.comic import PageStyle
from storyloom.pages.comparison import comparison_page, differences

RED, BLUE = np.zeros((30, 40, 3), np.uint8), np.zeros((30, 40, 3), np.uint8)
RED[..., 0] = BLUE[..., 2] = 255


def page(count=3, **settings):
    chosen = {name: settings.pop(name) for name in ("columns", "gap", "title") if name in settings}
    style = PageStyle(**{"gap": 4, "caption_size": 10} | chosen)
    return np.asarray(comparison_page([RED] * count, [BLUE] * count, style=style, **settings))


def places(picture, channel):
    """Rows and columns in which a panel's colour is."""
    is_panel = (picture[..., channel] > 240) & (picture[..., 1] < 10)
    return np.flatnonzero(is_panel.any(1)), np.flatnonzero(is_panel.any(0))


def test_rows_are_above_each_other_and_columns_beside():
    rows = page(labels=("", ""))
    assert rows.shape == (2 * (30 + 16) - 8, 3 * 40 + 2 * 4 + 16, 3)
    (red, _), (blue, _) = places(rows, 0), places(rows, 2)
    assert red.max() < blue.min()
    columns = page(labels=("", ""), arrangement="columns", columns=1)
    assert columns.shape == (3 * 30 + 2 * 4 + 16, 2 * (40 + 16), 3)
    (_, red), (_, blue) = places(columns, 0), places(columns, 2)
    assert red.max() < blue.min()


def test_labels_lines_and_title_take_their_room_and_captions_are_under_both():
    plain = page(labels=("", ""))
    assert page().shape[0] > plain.shape[0]
    assert page(labels=("", ""), lines=["a", "b"]).shape[0] > page(labels=("", ""), lines=["a"]).shape[0]
    assert page(labels=("", ""), title="A title").shape[0] > plain.shape[0]
    one, both = page(labels=("", ""), lines=["x"]), page(labels=("", ""), lines=["x"], captions=["one", "two", "three"])
    below = both.shape[0] - one.shape[0]
    assert below > 20 and below % 2 == 0


@pytest.mark.parametrize("labels", [("", ""), ("without", "with")])
def test_every_line_is_seen_whole(labels):
    """The paper around A covers none of them."""

    def ink(**settings):
        return int((page(labels=labels, gap=14, **settings).max(-1) < 120).sum())

    line = ink(lines=["CLIP-I"]) - ink()
    assert line > 20
    assert ink(lines=["CLIP-I"] * 3) - ink() == 3 * line
    assert ink(title="T", lines=["CLIP-I"] * 3) - ink(title="T") == 3 * line


def test_many_frames_go_into_rows_of_six():
    assert page(13, labels=("", "")).shape[1] == 6 * 40 + 5 * 4 + 16
    assert page(13, labels=("", ""), columns=4).shape[1] == 4 * 40 + 3 * 4 + 16


def test_pictures_of_another_size_are_scaled_to_the_same_width():
    large = np.repeat(np.repeat(BLUE, 2, 0), 2, 1)
    picture = np.asarray(comparison_page([RED] * 2, [large] * 2, labels=("", ""), style=PageStyle(gap=4)))
    (_, red), (_, blue) = places(picture, 0), places(picture, 2)
    assert abs(np.ptp(red) - np.ptp(blue)) < 6
    with pytest.raises(ValueError, match="A has 2 images, but B has 3"):
        comparison_page([RED] * 2, [BLUE] * 3)


def measured(pair, texts=None, encoder="ViT", **more):
    matrix = torch.tensor([[1.0, pair], [pair, 1.0]])
    encoders = {"clip_i": encoder, **({"clip_t": "ViT"} if texts else {}), **{name: name for name in more}}
    return Consistency(
        2, matrix, {k: torch.tensor([v, v]) for k, v in (texts or {}).items()}, encoders=encoders, **more
    )


def test_differences_are_reported_with_sign_and_name():
    scores = {"clip_score": 0.9, "cosine": 0.3}
    a, b = measured(0.812, scores), measured(0.874, {"clip_score": 0.85, "cosine": 0.31})
    assert differences(a, b) == ["CLIP-I 0.812 -> 0.874 (+0.062)", "CLIP-T (clip_score) 0.900 -> 0.850 (-0.050)"]
    distances = torch.tensor([[0.0, 0.4], [0.4, 0.0]])
    a, b = measured(0.5, dreamsim=distances), measured(0.5, dreamsim=distances / 2)
    assert differences(a, b)[1] == "DreamSim distance 0.400 -> 0.200 (-0.200, lower means more similar)"


def test_what_cannot_be_compared_is_reported():
    assert differences(measured(0.5), measured(0.6, encoder="bigG")) == [
        "CLIP-I was measured with ViT and bigG: not compared"
    ]
    assert differences(measured(0.5), measured(float("nan"))) == ["CLIP-I could not be measured for both sides"]
    assert differences(measured(0.5), measured(0.6, {"cosine": 0.3}))[1] == "CLIP-T was measured for one side only"
    assert differences(Consistency(2), Consistency(2)) == []
