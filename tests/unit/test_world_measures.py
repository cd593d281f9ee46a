"""Alignment, consistency and chance of small stories, counted by hand."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storyloom.world.captions import FigureCaption, FrameCaption
from storyloom.world.measures import (
    RATES,
    StoryPictures,
    effect,
    interval,
    match,
    paired_difference,
    per_story,
)
from storyloom.world.scene import LOOKS, PLACES, Figure, Scene
from storyloom.world.stereotypes import imagine
from storyloom.world.stories import WorldStory, random_story, random_story_of_two

PLAIN = Figure("fox", "red", "blue", "green", "none")
NAMED = {"shirt": "blue", "trousers": "green", "hat": "none"}


def of_one(furs, looks=NAMED, species="fox"):
    """A story of one character in as many frames as there are furs, with the pictures that show them."""
    frames = tuple(FrameCaption(place, "sitting") for place in PLACES[: len(furs)])
    story = WorldStory((FigureCaption(species, looks),), frames, ((0,),) * len(furs))
    figures = [() if fur is None else (replace(PLAIN, fur=fur),) for fur in furs]
    scenes = tuple(Scene(f.place, f.action, f.prop, who) for f, who in zip(frames, figures, strict=True))
    return StoryPictures(story, scenes)


def imagined(story, random, stereotypes=False):
    """Pictures of a model without memory: every frame's open looks are sampled independently."""
    frames = story.frames
    return StoryPictures(
        story,
        tuple(imagine((frames[k],), 0, story.identities_in(k), random, stereotypes) for k in range(len(frames))),
    )


def kept(story, random):
    """Pictures in which every character keeps its looks."""
    scene = imagine(story.frames, 0, story.identities, random)
    return StoryPictures(
        story,
        tuple(
            Scene(frame.place, frame.action, frame.prop, tuple(scene.figures[i] for i in shown))
            for frame, shown in zip(story.frames, story.shown, strict=True)
        ),
    )


def test_consistency_is_the_share_of_pairs_that_agree():
    values = per_story([of_one(["red", "red", "grey"]), of_one(["pink", "pink", "pink"]), of_one(["red", "grey"])])
    assert values["consistency"] == pytest.approx([1 / 3, 1, 0])


def test_chance_is_the_share_of_pairs_with_frames_of_other_stories_that_agree():
    values = per_story([of_one(["red", "red", "grey"]), of_one(["pink", "pink", "pink"]), of_one(["red", "grey"])])
    assert values["chance"] == pytest.approx([(2 + 1) / (3 * 5), 0, (2 + 1) / (2 * 6)])
    assert values["gain"] == pytest.approx(values["consistency"] - values["chance"])


def test_chance_leaves_out_the_own_story():
    """A story that agrees only with itself has no chance agreement."""
    assert per_story([of_one(["red"] * 4), of_one(["grey"] * 4)])["chance"] == pytest.approx([0, 0])


def test_chance_compares_only_with_stories_that_leave_the_look_open():
    named = of_one(["red", "red"], NAMED | {"fur": "red"})
    assert np.isnan(per_story([of_one(["red", "red"]), named])["chance"]).all()
    assert per_story([of_one(["red", "red"]), named, of_one(["red", "grey"])])["chance"][0] == 0.5


def test_open_looks_of_a_story_weigh_the_same():
    pictures = of_one(["red", "red", "grey", "pink"], {"shirt": "blue", "trousers": "green"})
    assert per_story([pictures])["consistency"] == pytest.approx([(1 / 6 + 1) / 2])


def test_a_missing_character_agrees_with_nobody():
    whole, missing = of_one(["red", "red", "red"]), of_one(["red", "red", None])
    values = per_story([whole, missing])
    assert values["consistency"] == pytest.approx([1, 1 / 3])
    assert values["chance"] == pytest.approx([2 / 3, 2 / 3])


def test_stories_without_open_looks_are_left_out_and_counted():
    named = of_one(["red", "red"], NAMED | {"fur": "red"})
    result = effect([of_one(["red", "red"]), of_one(["red", "grey"]), named])
    assert (result.stories, result.alignment.n, result.consistency.n, result.gain.n) == (3, 3, 2, 2)
    assert result.consistency.mean == 0.5


def test_a_story_of_one_frame_has_no_consistency_but_counts_for_the_chance_of_others():
    values = per_story([of_one(["red"]), of_one(["red", "grey"])])
    assert np.isnan([values[name][0] for name in ("consistency", "chance", "gain")]).all()
    assert values["chance"][1] == 0.5 and values["alignment"].tolist() == [1, 1]


def test_no_stories_have_no_effect():
    result = effect([])
    assert result.stories == result.alignment.n == 0
    assert np.isnan([result.gain.mean, result.gain.low, result.gain.high]).all()


@pytest.mark.parametrize(
    ("wrong", "rate"),
    [
        ({"place": "train"}, "place"),
        ({"action": "running"}, "action"),
        ({"prop": "book"}, "prop"),
        ({"figures": (PLAIN, PLAIN)}, "figures"),
        ({"figures": (replace(PLAIN, species="cat"),)}, "species"),
        ({"figures": (replace(PLAIN, hat="cap"),)}, "looks"),
    ],
)
def test_whatever_was_told_and_is_not_shown_breaks_alignment(wrong, rate):
    right = of_one(["red", "red"])
    broken = StoryPictures(right.story, (right.scenes[0], replace(right.scenes[1], **wrong)))
    values = per_story([right, broken])
    assert values["alignment"].tolist() == [1, 0.5]
    expected = 1 - 1 / 6 if rate == "looks" else 0.5
    assert {name: values[name][1] for name in RATES} == {n: pytest.approx(expected if n == rate else 1) for n in RATES}


def test_open_looks_do_not_break_alignment():
    values = per_story([of_one(["red", "grey"], {})])
    assert values["alignment"].tolist() == [1] and np.isnan(values["looks"]).all()


def test_a_missing_figure_breaks_its_species_and_named_looks():
    values = per_story([of_one(["red", None])])
    assert [values[name][0] for name in ("alignment", "figures", "species", "looks", "place")] == [0.5] * 4 + [1]


def test_figures_are_matched_by_species_then_named_looks_then_order():
    fox, cat = FigureCaption("fox"), FigureCaption("cat")
    red, grey = replace(PLAIN, species="cat"), replace(PLAIN, fur="grey")
    assert match((fox, cat), (red, grey)) == (grey, red)
    assert match((fox, FigureCaption("fox", {"fur": "red"})), (PLAIN, grey)) == (grey, PLAIN)
    assert match((fox, fox), (PLAIN, grey)) == (PLAIN, grey)
    assert match((fox, cat), (red,)) == (None, red)
    assert match((cat,), (PLAIN, red)) == (red,)
    assert match((cat,), (PLAIN,)) == (PLAIN,)


def test_every_character_of_a_cast_is_compared_with_itself():
    story = WorldStory(
        (FigureCaption("fox", NAMED), FigureCaption("cat", NAMED)),
        (FrameCaption("beach", "sitting"), FrameCaption("snow", "sitting"), FrameCaption("city", "sitting")),
        ((0, 1), (1,), (1, 0)),
    )
    fox, cat = PLAIN, replace(PLAIN, species="cat", fur="grey")
    pictures = StoryPictures(
        story,
        (
            Scene("beach", "sitting", "none", (fox, cat)),
            Scene("snow", "sitting", "none", (cat,)),
            Scene("city", "sitting", "none", (replace(cat, fur="pink"), fox)),
        ),
    )
    values = per_story([pictures])
    assert values["consistency"] == pytest.approx([(1 + 1 / 3) / 2])
    assert values["alignment"].tolist() == [1]


@pytest.mark.parametrize("draw", [random_story, random_story_of_two])
def test_memoryless_pictures_gain_nothing_and_kept_looks_gain_all_above_chance(draw):
    random = np.random.default_rng(0)
    stories = [draw(seed) for seed in range(60)]
    forgetful = effect([imagined(story, random) for story in stories])
    faithful = effect([kept(story, random) for story in stories])
    assert forgetful.alignment.mean == faithful.alignment.mean == faithful.consistency.mean == 1
    assert forgetful.gain.low < 0 < forgetful.gain.high
    assert forgetful.consistency.mean == pytest.approx(np.mean([1 / 6, 1 / 6, 1 / 6, 1 / 4]), abs=0.04)
    assert faithful.gain.low > 0.7


def test_the_number_of_pictures_has_to_fit():
    pictures = of_one(["red", "red"])
    with pytest.raises(ValueError, match="2 frames and 1 pictures"):
        StoryPictures(pictures.story, pictures.scenes[:1])


def test_a_paired_difference_is_that_of_each_story():
    ours = [of_one(["red", "red"]), of_one(["grey", "grey"]), of_one(["pink", "grey"])]
    theirs = [of_one(["red", "grey"]), of_one(["grey", "pink"]), of_one(["pink", "red"])]
    difference = paired_difference(ours, theirs)
    one, other = per_story(ours), per_story(theirs)
    assert difference.consistency.mean == pytest.approx(2 / 3)
    assert difference.gain.mean == pytest.approx(np.mean(one["gain"] - other["gain"]))
    assert difference.alignment.mean == difference.alignment.low == 0
    assert difference.consistency.n == difference.stories == 3


def test_a_method_does_not_differ_from_itself():
    stories = [of_one(["red", "grey", "red"]), of_one(["grey", "grey", "pink"])]
    same = paired_difference(stories, stories)
    assert {same.gain.mean, same.gain.low, same.gain.high} == {0}


def test_other_stories_cannot_be_compared():
    with pytest.raises(ValueError, match="same stories"):
        paired_difference([of_one(["red", "red"])], [of_one(["red", "red"], species="cat")])


def test_an_interval_is_repeatable_and_depends_on_the_seed():
    values = np.random.default_rng(0).random(30)
    assert interval(values) == interval(list(values)) != interval(values, seed=1)


def test_an_interval_is_as_wide_as_the_normal_one():
    values = np.random.default_rng(1).standard_normal(400)
    low, high = interval(values)
    error = values.std() / np.sqrt(len(values))
    assert (low - values.mean()) / error == pytest.approx(-1.96, abs=0.2)
    assert (high - values.mean()) / error == pytest.approx(1.96, abs=0.2)


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    random = np.random.default_rng(2)
    ends = [interval(random.random(40), resamples=400) for _ in range(300)]
    assert 0.9 <= np.mean([low <= 0.5 <= high for low, high in ends]) <= 0.99


@settings(max_examples=60)
@given(st.lists(st.floats(-1, 1), min_size=1, max_size=30))
def test_an_interval_lies_within_the_values(values):
    low, high = interval(values, resamples=50)
    assert min(values) - 1e-12 <= low <= high <= max(values) + 1e-12


@settings(max_examples=60)
@given(
    st.lists(st.lists(st.sampled_from(LOOKS["fur"][:3]), min_size=2, max_size=5), min_size=2, max_size=5),
    st.data(),
)
def test_measures_against_counting_pairs_one_by_one(furs, data):
    values = per_story([of_one(story) for story in furs])
    own = data.draw(st.integers(0, len(furs) - 1))
    within = [a == b for i, a in enumerate(furs[own]) for j, b in enumerate(furs[own]) if i != j]
    between = [a == b for a in furs[own] for k, other in enumerate(furs) if k != own for b in other]
    assert values["consistency"][own] == pytest.approx(np.mean(within))
    assert values["chance"][own] == pytest.approx(np.mean(between))


@settings(max_examples=60)
@given(st.lists(st.sampled_from(LOOKS["fur"]), min_size=2, max_size=6))
def test_showing_the_most_frequent_look_everywhere_never_lowers_consistency(furs):
    most = max(furs, key=furs.count)
    others = [index for index, fur in enumerate(furs) if fur != most]
    steps = [furs]
    for index in others:
        steps.append([*steps[-1][:index], most, *steps[-1][index + 1 :]])
    values = per_story([of_one(story) for story in steps])["consistency"]
    assert (np.diff(values) >= 0).all() and values[-1] == 1


@settings(max_examples=40)
@given(st.permutations(range(4)))
def test_the_order_of_frames_and_stories_does_not_matter(order):
    furs = ["red", "red", "grey", "pink"]
    stories = [of_one(furs), of_one(["red", "pink"]), of_one(["grey", "grey", "red"]), of_one(["red", "red"])]
    before = per_story(stories)
    after = per_story([of_one([furs[i] for i in order]), *stories[1:]])
    moved = per_story([stories[i] for i in order])
    for name in ("consistency", "chance", "gain"):
        assert after[name] == pytest.approx(before[name])
        assert moved[name] == pytest.approx(before[name][list(order)])
