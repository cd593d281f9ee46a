"""The demo's image encoder: fixed features, from which colours and positions can be read linearly."""

import numpy as np
import pytest
import torch

from storyloom.models.demo import vision
from storyloom.models.storymaker.crops import character_crop, to_image
from storyloom.world.canvas import EMPTY
from storyloom.world.draw import draw
from storyloom.world.figures import figure
from storyloom.world.scene import ACTIONS, LOOKS, PLACES, PROPS, SIZE, SPECIES, Figure, Scene


def crop(random):
    """A character of the world as StoryMaker crops it: [224, 224, 3] in 0..1."""
    who = Figure(*(str(random.choice(values)) for values in (SPECIES, *LOOKS.values())))
    action, prop = str(random.choice(ACTIONS)), str(random.choice(PROPS))
    picture = draw(Scene(str(random.choice(PLACES)), action, prop, (who,)), np.random.default_rng(0))
    body, _ = figure(who, action, prop, 8, SIZE)
    mask = ((body[..., 0] != EMPTY) * 255).astype(np.uint8)
    return to_image(character_crop(picture.repeat(8, 0).repeat(8, 1), mask.repeat(8, 0).repeat(8, 1)))


@pytest.fixture(scope="module")
def crops():
    random = np.random.default_rng(3)
    return torch.stack([crop(random) for _ in range(24)])


def unexplained(features, targets):
    """Share of the variance of targets [N, P, T] that is not linear in features [N, P, F], on the last third of N."""
    split = len(features) * 2 // 3
    rows = torch.cat([features, torch.ones_like(features[..., :1])], 2).double()
    solved = torch.linalg.lstsq(rows[:split].flatten(0, 1), targets[:split].flatten(0, 1).double()).solution
    held_out = targets[split:].flatten(0, 1).double()
    error = held_out - rows[split:].flatten(0, 1) @ solved
    return (error.square().sum() / (held_out - held_out.mean(0)).square().sum()).item()


def test_features_have_the_shape_of_clip_and_one_size(crops):
    features = vision.features(crops[:2])
    assert features.shape == (2, 257, 1280) and features.dtype == torch.float32
    torch.testing.assert_close(features.square().mean(2), torch.ones(2, 257), rtol=1e-3, atol=0)
    torch.testing.assert_close(features.mean(2), torch.zeros(2, 257), rtol=0, atol=1e-5)


def test_features_at_full_width_are_the_narrow_ones(crops):
    narrow, wide = vision.narrow_features(crops[:3]).flatten(0, 1), vision.features(crops[:3]).flatten(0, 1)
    torch.testing.assert_close(wide @ wide.T, narrow @ narrow.T * 10, rtol=1e-4, atol=1e-2)


def test_the_class_token_is_the_same_for_all_pictures(crops):
    features = vision.narrow_features(crops[:2])
    assert torch.equal(features[0, 0], features[1, 0])


def test_a_patch_depends_on_its_own_pixels_only(crops):
    changed = crops[:1].clone()
    changed[:, 14 * 3 : 14 * 4, 14 * 5 : 14 * 6] = torch.tensor([0.2, 0.9, 0.4])
    differ = (vision.narrow_features(changed) != vision.narrow_features(crops[:1])).any(2)[0]
    assert differ.nonzero().flatten().tolist() == [1 + 3 * 16 + 5]


def test_the_colours_of_a_patch_can_be_read_linearly(crops):
    colours = crops.view(24, 16, 2, 7, 16, 2, 7, 3).mean((3, 6))  # picture, row, upper or lower, column, ...
    colours = colours.permute(0, 1, 3, 2, 4, 5).flatten(3).flatten(1, 2)
    assert unexplained(vision.narrow_features(crops)[:, 1:], colours) < 0.05


def test_the_position_of_a_patch_can_be_read_linearly(crops):
    places = torch.cartesian_prod(torch.arange(16.0), torch.arange(16.0)).expand(24, 256, 2)
    assert unexplained(vision.narrow_features(crops)[:, 1:], places) < 0.05


def test_features_do_not_change_from_one_process_to_the_next():
    grey = vision.narrow_features(torch.full((1, 224, 224, 3), 0.5))
    torch.testing.assert_close(grey[0, 1:, 0][[0, -1]], torch.tensor([0.584926, 1.069728]), rtol=0, atol=1e-5)
