"""References, and stories that name only the species of their characters."""

import numpy as np
import pytest

from storyloom.world.references import all_differ, random_reference, story_about
from storyloom.world.scene import LOOKS, Figure


def references(count):
    random = np.random.default_rng(1)
    return [random_reference(random) for _ in range(count)]


def test_a_reference_shows_its_figure_inside_the_mask():
    for reference in references(20):
        assert reference.picture.shape == (24, 24, 3) and reference.picture.dtype == np.uint8
        body = reference.below_the_head
        first_row = np.flatnonzero(body.any(1))[0]
        assert (body <= reference.mask).all()
        assert (body == reference.mask)[first_row:].all() and first_row == reference.drawing.heads[0][0] + 5


def test_the_same_numbers_give_the_same_reference():
    for one, other in zip(references(3), references(3), strict=True):
        assert one.scene == other.scene and np.array_equal(one.picture, other.picture)


def test_a_reference_can_be_required_to_differ():
    first = references(1)[0].figure
    second = random_reference(np.random.default_rng(2), lambda figure: all_differ(first, figure)).figure
    assert not any(getattr(first, look) == getattr(second, look) for look in LOOKS)
    assert not all_differ(Figure("cat", "red", "blue", "green", "none"), Figure("cat", "pink", "red", "white", "none"))


@pytest.mark.parametrize("count", [1, 2])
def test_a_story_names_only_species_and_differs_from_the_references(count):
    random = np.random.default_rng(3)
    for _ in range(20):
        shown = [random_reference(random) for _ in range(count)]
        scenes = [reference.scene for reference in shown]
        story = story_about([reference.figure for reference in shown], scenes, 4, random)
        assert [who.species for who in story.identities] == [reference.figure.species for reference in shown]
        assert all(not who.looks and not who.adjectives and not who.names for who in story.identities)
        assert len({frame.place for frame in story.frames}) == 4
        for frame in story.frames:
            assert all(frame.place != scene.place and frame.action != scene.action for scene in scenes)
            assert count == 2 or frame.prop != scenes[0].prop
