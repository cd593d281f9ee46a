"""The demo reader's numbers are the shares that one counts by hand in drawn scenes."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from storyloom.measures.measuring import measure
from storyloom.models.demo.similarity import DemoReader, parsed
from storyloom.world.draw import draw
from storyloom.world.scene import Figure, Scene

FOX = Figure("fox", "red", "blue", "green", "cap")
BEAR = Figure("bear", "brown", "yellow", "green", "none")
SNOW = Scene("snow", "sleeping", "none", (FOX,))
BEACH = Scene("beach", "jumping", "none", (replace(FOX, trousers="red", hat="crown"),))
PROMPTS = ["a fox in a blue coat asleep in the snow", "a fox in a blue coat jumping on the beach"]


def drawn(*scenes):
    pictures = [draw(scene, np.random.default_rng(3)) for scene in scenes]
    return torch.from_numpy(np.stack(pictures)).float().repeat_interleave(8, 1).repeat_interleave(8, 2) / 255


@pytest.fixture(scope="module")
def reader():
    return DemoReader()


def test_pictures_agree_in_the_share_of_their_figures_looks(reader):
    measures = measure(drawn(SNOW, BEACH, replace(SNOW, place="beach")), image_encoder=reader)
    assert measures.clip_i[0, 1].item() == pytest.approx(3 / 5), "species, fur and shirt of five attributes"
    assert measures.clip_i[0, 2].item() == pytest.approx(1), "places have no say"
    assert measures.labels["clip_i"] == "Same figures (demo reader)" and "CLIP" not in measures.table()


def test_open_looks_have_no_say_in_what_is_told(reader):
    measures = measure(drawn(SNOW, BEACH), PROMPTS, reader, reader)
    assert measures.clip_t["cosine"].tolist() == pytest.approx([1, 1]) and list(measures.clip_t) == ["cosine"]


@pytest.mark.parametrize(
    "scene, share",
    [
        (SNOW, 5 / 5),
        (replace(SNOW, place="beach"), 4 / 5),
        (replace(SNOW, action="waving"), 4 / 5),
        (replace(SNOW, action="standing", prop="book"), 3 / 5),
        (replace(SNOW, figures=(replace(FOX, shirt="red"),)), 4 / 5),
        (replace(SNOW, figures=(replace(FOX, species="cat"),)), 4 / 5),
        (replace(SNOW, figures=(replace(FOX, fur="white", trousers="red", hat="none"),)), 5 / 5),
    ],
)
def test_every_told_thing_counts_alike(reader, scene, share):
    assert measure(drawn(scene), PROMPTS[:1], text_encoder=reader).clip_t["cosine"].item() == pytest.approx(share)


def test_two_figures_are_matched_and_a_missing_one_shows_nothing(reader):
    prompt = "a red fox in a blue coat and a brown bear in a yellow sweater and green pants waving on the beach"
    frame, (fox, bear) = parsed(prompt)
    assert (frame.place, frame.action) == ("beach", "waving")
    assert (fox.species, dict(fox.looks)) == ("fox", {"fur": "red", "shirt": "blue"})
    assert (bear.species, dict(bear.looks)) == ("bear", {"fur": "brown", "shirt": "yellow", "trousers": "green"})
    attributes = 3 + 3 + 4
    both, one = Scene("beach", "waving", "none", (BEAR, FOX)), Scene("beach", "waving", "none", (FOX,))
    cosines = measure(drawn(both, one), [prompt] * 2, text_encoder=reader).clip_t["cosine"]
    assert cosines.tolist() == pytest.approx([1, (attributes - 4) / attributes])


def test_a_text_that_is_not_understood_does_not_count_and_is_named(reader, caplog):
    measures = measure(drawn(SNOW, SNOW), [PROMPTS[0], "a fox drinking tea"], text_encoder=reader)
    assert measures.clip_t["cosine"].isnan().tolist() == [False, True]
    assert measures.means() == pytest.approx({"clip_t_cosine": 1})
    assert "a fox drinking tea" in caplog.text


def test_other_pictures_are_refused(reader):
    with pytest.raises(ValueError, match="only images from the Demo model .*OpenCLIP"):
        measure(torch.rand(2, 100, 192, 3), image_encoder=reader)
