"""Measures of likeness on small scenes, counted by hand."""

from dataclasses import replace

import numpy as np
import pytest

from storyloom.world.captions import FigureCaption, FrameCaption
from storyloom.world.likeness import (
    CLOTHES,
    HEAD,
    Portrayal,
    aligned,
    leak,
    leak_by_chance,
    shared,
    shared_by_chance,
    swapped,
)
from storyloom.world.measures import StoryPictures
from storyloom.world.scene import Figure, Scene
from storyloom.world.stories import WorldStory

FOX = Figure("fox", "red", "blue", "green", "none")
CAT = Figure("cat", "grey", "red", "white", "crown")
BEAR = Figure("bear", "red", "purple", "green", "cap")
TEXT = FrameCaption("city", "sitting")
SNOW = Scene("snow", "jumping", "book", (FOX,))


def case(*shown, expected=(FOX,), references=(SNOW,), named=None, at=()):
    """Pictures with these figures per frame. at: (place, action) of pictures that are not as in the text."""
    story = WorldStory(
        tuple(FigureCaption(who.species, named or {}) for who in expected),
        (TEXT,) * len(shown),
        (tuple(range(len(expected))),) * len(shown),
    )
    where = [*at, *[None] * (len(shown) - len(at))]
    scenes = [
        Scene(*(place or (TEXT.place, TEXT.action)), TEXT.prop, figures)
        for place, figures in zip(where, shown, strict=True)
    ]
    return Portrayal(StoryPictures(story, tuple(scenes)), expected, references)


def values(*each):
    return pytest.approx(list(each), nan_ok=True)


def test_shared_counts_the_looks_that_equal_the_references():
    other_hat, other = replace(FOX, hat="cap"), replace(CAT, species="fox")
    cases = [case((FOX,)), case((other_hat,)), case((FOX,), (other,)), case((other_hat,), (FOX,))]
    assert shared(cases) == values(1, 3 / 4, 1 / 2, 7 / 8)


def test_a_missing_figure_shares_nothing():
    assert shared([case(()), case((FOX,), ())]) == values(0, 1 / 2)


def test_looks_that_the_text_names_do_not_count():
    assert shared([case((replace(FOX, fur="pink"),), named={"fur": "red"})]) == values(1)
    assert shared([case((FOX,), named={"fur": "red", "hat": "none"})], HEAD) == values(np.nan)


def test_head_and_clothes_are_counted_apart():
    dressed = replace(FOX, shirt=CAT.shirt, trousers=CAT.trousers)
    assert shared([case((dressed,))], HEAD) == values(1)
    assert shared([case((dressed,))], CLOTHES) == values(0)
    assert shared([case((dressed,), expected=(dressed,))]) == values(1)


def test_chance_is_the_share_of_the_other_references_looks():
    cases = [case((FOX,)), case((CAT,), expected=(CAT,)), case((BEAR,), expected=(BEAR,))]
    fox, cat, bear = shared_by_chance(cases)
    assert (fox, cat, bear) == values(1 / 4, 0, 1 / 4)  # fox and bear have red fur and green trousers in common
    assert np.isnan(shared_by_chance(cases[:1])).all()


def test_chance_counts_every_frame_and_every_expected_figure():
    cases = [case((FOX,), (CAT,)), case((FOX, CAT), expected=(BEAR, CAT))]
    of_fox = (BEAR.fur == FOX.fur) + (BEAR.trousers == FOX.trousers)
    assert shared_by_chance(cases)[0] == (of_fox + 4) / 16  # the fox and the cat, each against the bear and the cat


def test_swapped_counts_the_looks_of_the_other_character():
    fox_as_cat = replace(CAT, species="fox")
    cat_as_fox = replace(FOX, species="cat")
    half = replace(FOX, fur=CAT.fur, shirt=CAT.shirt)
    both = {"expected": (FOX, CAT)}
    cases = [case((FOX, CAT), **both), case((fox_as_cat, cat_as_fox), **both), case((half, CAT), **both)]
    assert swapped(cases) == values(0, 1, 1 / 4)
    assert shared(cases) == values(1, 0, 3 / 4)


def test_swapped_ignores_looks_that_both_characters_have():
    bear_as_fox = replace(FOX, species="bear")
    assert swapped([case((FOX, bear_as_fox), expected=(FOX, BEAR))]) == values(1 / 2)


def test_figures_are_told_apart_by_their_species():
    assert shared([case((CAT, FOX), expected=(FOX, CAT))]) == values(1)


def test_a_blend_is_compared_with_its_first_and_its_second_character():
    """The story has one character; the second expected figure is only compared with."""
    cat = replace(CAT, species="fox")
    mixed = replace(FOX, hat=CAT.hat)
    blend = case((mixed,))
    blend = Portrayal(blend.pictures, (FOX, cat), blend.references)
    assert shared([blend]) == values(3 / 4)
    assert swapped([blend]) == values(1 / 4)


def test_aligned_frames_show_everything_in_their_text():
    cases = [case((FOX,), (FOX,), at=(None, ("city", "jumping"))), case((CAT,)), case((FOX, FOX))]
    assert aligned(cases) == values(1 / 2, 0, 0)


def test_leak_counts_frames_with_the_references_place_or_action():
    at = (None, ("snow", "sitting"), ("city", "jumping"), ("snow", "jumping"), ("forest", "waving"))
    assert leak([case(*[(FOX,)] * 5, at=at)]) == values(3 / 5)


def test_leak_looks_at_all_references_of_a_picture():
    beach = Scene("beach", "waving", "none", (CAT,))
    shown = case((FOX, CAT), at=(("beach", "sitting"),), expected=(FOX, CAT), references=(SNOW, beach))
    assert leak([shown]) == values(1)


def test_leak_by_chance_is_against_the_references_of_the_other_cases():
    shown = case((FOX,), at=(("snow", "sitting"),))
    snow = case((FOX,), references=(Scene("snow", "running", "none", (FOX,)),))
    cave = case((FOX,), references=(Scene("cave", "running", "none", (FOX,)),))
    assert leak_by_chance([shown, snow, cave])[0] == 1 / 2


def test_leak_by_chance_leaves_out_references_that_show_what_the_text_names():
    shown = case((FOX,), at=(("snow", "sitting"),))
    city = case((FOX,), references=(Scene("city", "running", "none", (FOX,)),))
    sitting = case((FOX,), references=(Scene("snow", "sitting", "none", (FOX,)),))
    assert np.isnan(leak_by_chance([shown, city, sitting])[0])
