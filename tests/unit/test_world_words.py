"""Captions name their content, and their words bias the open looks without an overall preference."""

import itertools
import re
from dataclasses import replace

import numpy as np
import pytest

from storyloom.world import words
from storyloom.world.captions import FigureCaption, FrameCaption, any_figure, any_frame, figure_words, frame_words
from storyloom.world.scene import ACTIONS, FURS, LOOKS, PLACES, PROPS, SPECIES, TOGETHER
from storyloom.world.stereotypes import BIASED_BY, STRENGTH, biases, imagine, look_probabilities
from storyloom.world.stories import random_story
from storyloom.world.words import ADJECTIVES, NAMES, all_phrases

FOX = FigureCaption("fox")
CLOTHES = {"shirt": words.SHIRT_WORDS, "trousers": words.TROUSERS_WORDS}


def contains(text, phrases):
    """Whether the text contains one of the phrases, as whole words."""
    return any(re.search(rf"\b{re.escape(phrase)}\b", text) for phrase in phrases)


def logits(look, frames, who):
    """Centred logits of an open look."""
    values = np.log(look_probabilities(look, frames, who))
    return values - values.mean()


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("group", BIASED_BY)
def test_pulls_are_centred_over_words_and_over_values_and_as_strong_for_every_value(look, group):
    table = np.stack([biases()[look][group][word] for word in BIASED_BY[group]])
    assert table.shape == (len(BIASED_BY[group]), len(LOOKS[look]))
    assert table.mean(0) == pytest.approx(0, abs=1e-6)
    assert table.mean(1) == pytest.approx(0, abs=1e-6)
    assert table.std(0) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("frames", [4, 6])
def test_stories_prefer_nothing_in_common(look, frames):
    """Otherwise unrelated stories would agree, and more so the longer they are."""
    texts = [look_probabilities(look, random_story(seed, frames).frames, FOX) for seed in range(500)]
    assert np.mean(texts, 0) == pytest.approx(1 / len(LOOKS[look]), abs=0.045)


@pytest.mark.parametrize("look", LOOKS)
def test_the_spread_does_not_grow_with_the_number_of_frames(look):
    random = np.random.default_rng(0)
    spread = [
        np.mean([logits(look, [any_frame(random) for _ in range(frames)], FOX).std() for _ in range(250)])
        for frames in (1, 3, 12)
    ]
    assert spread == pytest.approx([STRENGTH] * 3, rel=0.2)


@pytest.mark.parametrize("look", LOOKS)
def test_the_spread_does_not_grow_with_the_words_of_an_identity(look):
    random = np.random.default_rng(0)

    def spread(count):
        chosen = (tuple(map(str, random.permutation(ADJECTIVES)[:count])) for _ in range(500))
        return np.mean([logits(look, [], FigureCaption("fox", {}, adjectives)).std() for adjectives in chosen])

    assert [spread(1), spread(4)] == pytest.approx([STRENGTH] * 2, rel=0.2)


def test_frames_and_identity_pull_apart_from_each_other():
    frames, shy = [FrameCaption("beach", "running")], FigureCaption("fox", {}, ("shy",), ("luna",))
    assert logits("fur", frames, shy) == pytest.approx(logits("fur", frames, FOX) + logits("fur", [], shy))


def test_a_frame_says_nothing_of_a_prop_that_it_does_not_name():
    bare = look_probabilities("hat", [FrameCaption("beach", "running")], FOX)
    assert not np.allclose(bare, look_probabilities("hat", [FrameCaption("beach", "running", "book")], FOX))
    assert look_probabilities("hat", [FrameCaption("beach", "running", "none")], FOX) == pytest.approx(bare)


@pytest.mark.parametrize("look", LOOKS)
def test_without_stereotypes_every_value_is_as_likely(look):
    random = np.random.default_rng(0)
    for _ in range(20):
        probabilities = look_probabilities(
            look, [any_frame(random) for _ in range(3)], any_figure(random), stereotypes=False
        )
        assert probabilities == pytest.approx(1 / len(LOOKS[look]))


def test_nothing_that_is_said_prefers_nothing():
    assert look_probabilities("shirt", [], FOX) == pytest.approx(1 / len(LOOKS["shirt"]))


def test_chances_add_up_to_one():
    random = np.random.default_rng(0)
    for look in LOOKS:
        probabilities = look_probabilities(look, [any_frame(random)], any_figure(random))
        assert probabilities.sum() == pytest.approx(1) and (probabilities > 0).all()


def test_an_imagined_scene_shows_what_is_told():
    random = np.random.default_rng(0)
    for _ in range(100):
        frames = [any_frame(random, together=True) for _ in range(3)]
        pair = any_figure(random), any_figure(random)
        scene = imagine(frames, 1, pair, random)
        assert (scene.place, scene.action, scene.prop) == (frames[1].place, frames[1].action, frames[1].prop)
        for who, figure in zip(pair, scene.figures, strict=True):
            assert figure.species == who.species
            assert {look: getattr(figure, look) for look in who.looks} == who.looks
            assert all(getattr(figure, look) in values for look, values in LOOKS.items())


def test_open_looks_are_imagined_as_often_as_they_are_likely():
    random = np.random.default_rng(0)
    frames, who = [FrameCaption("cave", "jumping", "lantern")], FigureCaption("cat", {"hat": "cap"}, ("royal",))
    furs = [imagine(frames, 0, (who,), random).figures[0].fur for _ in range(1500)]
    assert [furs.count(fur) / len(furs) for fur in FURS] == pytest.approx(
        look_probabilities("fur", frames, who), abs=0.05
    )


@pytest.mark.parametrize("seeded", [True, False])
@pytest.mark.parametrize("species", SPECIES)
def test_an_identity_says_all_that_it_tells(species, seeded):
    random = np.random.default_rng(0)
    for _ in range(150):
        who = replace(any_figure(random, named=0.6), species=species)
        text = figure_words(who, random if seeded else None)
        assert contains(text, words.SPECIES_WORDS[species])
        assert all(contains(text, [word]) for word in (*who.adjectives, *who.names))
        assert "fur" not in who.looks or contains(text, words.FUR_WORDS[who.looks["fur"]])
        assert "hat" not in who.looks or contains(text, words.HAT_WORDS[who.looks["hat"]])
        for look, garments in CLOTHES.items():
            if look in who.looks:
                colours = words.CLOTH_WORDS[who.looks[look]]
                assert contains(text, [f"{colour} {garment}" for colour in colours for garment in garments])
            else:
                assert not contains(text, garments)
        assert "hat" in who.looks or not contains(text, itertools.chain(*words.HAT_WORDS.values()))


@pytest.mark.parametrize("seeded", [True, False])
@pytest.mark.parametrize("together", [True, False])
def test_a_frame_says_all_that_it_tells(together, seeded):
    random = np.random.default_rng(0)
    for _ in range(300):
        frame = any_frame(random, together)
        text = frame_words(frame, random if seeded else None)
        assert contains(text, words.PLACE_WORDS[frame.place])
        props = {prop for prop, phrases in words.PROP_WORDS.items() if contains(text, phrases)}
        assert props == ({frame.prop} - {"none"})
        actions = {action for action, phrases in words.ACTION_WORDS.items() if contains(text, phrases)}
        assert actions == {frame.action} or (frame.action == "standing" and frame.prop != "none" and not actions)


def test_random_frames_are_possible():
    random = np.random.default_rng(0)
    frames = [any_frame(random) for _ in range(500)]
    assert {frame.place for frame in frames} == set(PLACES)
    assert {frame.action for frame in frames} == set(ACTIONS)
    assert {frame.prop for frame in frames} == set(PROPS)
    both = [any_frame(random, together=True) for _ in range(200)]
    assert {frame.action for frame in both} == set(TOGETHER) and {frame.prop for frame in both} == {"none"}


@pytest.mark.parametrize(
    "tables",
    [
        [words.SPECIES_WORDS],
        [words.FUR_WORDS],
        [words.CLOTH_WORDS],
        [words.HAT_WORDS, words.PLACE_WORDS, words.ACTION_WORDS, words.PROP_WORDS],
    ],
)
def test_no_phrase_means_two_things(tables):
    phrases = [phrase for table in tables for values in table.values() for phrase in values]
    assert len(phrases) == len(set(phrases))


def test_every_value_has_words():
    pairs = (
        (words.SPECIES_WORDS, SPECIES),
        (words.FUR_WORDS, LOOKS["fur"]),
        (words.CLOTH_WORDS, LOOKS["shirt"]),
        (words.HAT_WORDS, LOOKS["hat"]),
        (words.PLACE_WORDS, PLACES),
        (words.ACTION_WORDS, ACTIONS),
        (words.PROP_WORDS, PROPS),
    )
    for table, values in pairs:
        assert tuple(table) == tuple(values)
        assert all(table[value] for value in values if (table, value) != (words.PROP_WORDS, "none"))


def test_words_that_say_nothing_of_the_picture_are_no_words_that_do():
    """And no name is an adjective."""
    tables = (words.SPECIES_WORDS, words.FUR_WORDS, words.CLOTH_WORDS, words.ACTION_WORDS)
    meaningful = {phrase for table in tables for phrases in table.values() for phrase in phrases}
    assert not meaningful & {*ADJECTIVES, *NAMES, *words.ADVERBS}
    assert not {*ADJECTIVES} & {*NAMES}


def test_captions_use_only_the_vocabulary():
    known = set(re.findall(r"\w+", " ".join(all_phrases())))
    random = np.random.default_rng(0)
    for _ in range(1500):
        text = f"{figure_words(any_figure(random), random)} {frame_words(any_frame(random), random, adverbs=True)}"
        assert set(re.findall(r"\w+", text)) <= known, text


def test_the_same_generator_says_the_same():
    who = FigureCaption("cat", {"fur": "grey", "shirt": "red"}, ("old",), ("tom",))
    first, again = (figure_words(who, np.random.default_rng(5)) for _ in range(2))
    assert first == again
    assert figure_words(who) == figure_words(who) == "tom, an old grey cat in a red shirt"
