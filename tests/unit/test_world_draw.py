"""Every attribute of a scene is visible in its picture."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from storyloom.world.backgrounds import background
from storyloom.world.canvas import EMPTY, OUTLINE
from storyloom.world.draw import HALF, SHIFTS, compose, draw
from storyloom.world.scene import ACTIONS, HATS, LOOKS, PLACES, PROPS, SIZE, SPECIES, TOGETHER, Figure, Scene

BLANK = np.full((SIZE, SIZE, 3), EMPTY, np.int16)
WHO = Figure("fox", "red", "blue", "green", "none")
ONE = list(itertools.product(ACTIONS, PROPS))
TWO = list(itertools.product(TOGETHER, PROPS[:1]))
FEWEST = {"species": 12, "fur": 12, "shirt": 20, "trousers": 12, "hat": 10, "action": 8, "prop": 6}
"""Least number of pixels that a change of only this attribute changes; no attribute is ever hidden."""


def drawn(*figures, action="standing", prop="none", at=None):
    """Figures on an empty picture."""
    shifts = [SHIFTS[len(figures)][0] if at is None else at] * len(figures)
    return compose(BLANK, Scene("meadow", action, prop, figures), shifts)


def changed(one, other):
    """Number of pixels that differ."""
    return int((one != other).any(-1).sum())


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("species", SPECIES)
def test_every_look_changes_the_picture_whatever_else_is_drawn(species, look):
    for action, prop in ONE:
        for hat in HATS:
            who = replace(WHO, species=species, hat=hat)
            pictures = [drawn(replace(who, **{look: value}), action=action, prop=prop) for value in LOOKS[look]]
            assert min(changed(*pair) for pair in itertools.combinations(pictures, 2)) >= FEWEST[look]


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("side", [0, 1])
def test_every_look_of_each_of_two_changes_its_half_alone(side, look):
    for (action, _), species in itertools.product(TWO, SPECIES):
        pair = [replace(WHO, species=species), replace(WHO, species=species)]
        pictures = []
        for value in LOOKS[look]:
            pair[side] = replace(pair[side], **{look: value})
            pictures.append(drawn(*pair, action=action))
        half, rest = slice(side * HALF, side * HALF + HALF), slice(HALF - side * HALF, SIZE - side * HALF)
        for one, other in itertools.combinations(pictures, 2):
            assert changed(one[:, half], other[:, half]) >= FEWEST[look]
            assert changed(one[:, rest], other[:, rest]) == 0


@pytest.mark.parametrize("hat", HATS)
@pytest.mark.parametrize("count", [1, 2])
def test_species_actions_and_props_change_the_picture_at_every_place(count, hat):
    for at in SHIFTS[count]:
        poses = {
            (species, *doing): drawn(
                *(replace(WHO, species=species, hat=hat),) * count, action=doing[0], prop=doing[1], at=at
            )
            for species in SPECIES
            for doing in (ONE if count == 1 else TWO)
        }
        for index, name in enumerate(("species", "action", "prop")):
            groups = {}
            for key, picture in poses.items():
                groups.setdefault(key[:index] + key[index + 1 :], []).append(picture)
            for pictures in groups.values():
                for pair in itertools.combinations(pictures, 2):
                    assert changed(*pair) >= FEWEST[name] * count


def test_places_never_look_alike():
    random = np.random.default_rng(0)
    pictures = {place: [background(place, random) for _ in range(8)] for place in PLACES}
    for one, other in itertools.combinations(PLACES, 2):
        pairs = itertools.product(pictures[one], pictures[other])
        assert min(changed(*pair) for pair in pairs) > 0.6 * SIZE**2


@pytest.mark.parametrize("count", [1, 2])
def test_the_same_generator_draws_the_same_picture(count):
    for place in PLACES:
        scene = Scene(place, "sitting", "none", (WHO,) * count)
        first, again, *others = (draw(scene, np.random.default_rng(seed)) for seed in (0, 0, 1, 2, 3, 4, 5))
        assert np.array_equal(first, again)
        assert not all(np.array_equal(first, other) for other in others)


@pytest.mark.parametrize("count", [1, 2])
def test_every_scene_is_drawn_within_its_picture(count):
    random = np.random.default_rng(0)
    for (action, prop), species, hat in itertools.product(ONE if count == 1 else TWO, SPECIES, HATS):
        who = replace(WHO, species=species, hat=hat)
        picture = draw(Scene(str(random.choice(PLACES)), action, prop, (who,) * count), random)
        assert picture.shape == (SIZE, SIZE, 3) and picture.dtype == np.uint8


def test_figures_stand_at_every_place_that_they_may_stand_at():
    random = np.random.default_rng(0)
    scene = Scene("desert", "standing", "none", (WHO,))
    seen = set()
    for _ in range(150):
        shoes = draw(scene, random)[-1]
        seen.add(int(np.flatnonzero((shoes == shoes.min(0)).all(-1))[0]))
    assert len(seen) == len(SHIFTS[1])


def test_two_figures_look_at_each_other():
    for action, _ in TWO:
        picture = drawn(WHO, WHO, action=action)
        assert np.array_equal(picture[:, HALF:], picture[:, :HALF][:, ::-1])


def test_a_figure_hides_the_place_only_where_it_is():
    scene = Scene("snow", "running", "book", (WHO,))
    place = background("snow", np.random.default_rng(0)).astype(np.int16)
    before = place.copy()
    picture = compose(place, scene, [7])
    alone = compose(BLANK, scene, [7])
    figure = alone[..., 0] != EMPTY
    assert np.array_equal(place, before)
    assert np.array_equal(picture[~figure], place[~figure]) and np.array_equal(picture[figure], alone[figure])


def test_a_figure_has_an_outline_all_around():
    """No pixel in one of its own colours touches the place."""
    body = (drawn(WHO)[..., 0] != EMPTY) & (drawn(WHO) != OUTLINE).any(-1)
    free = drawn(WHO)[..., 0] == EMPTY
    assert not (body[:, :-1] & free[:, 1:]).any() and not (body[:, 1:] & free[:, :-1]).any()
    assert not (body[:-1] & free[1:]).any() and not (body[1:] & free[:-1]).any()
