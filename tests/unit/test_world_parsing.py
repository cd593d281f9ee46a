"""Parsing inverts the world's captions; stories that cannot be measured are rejected with a reason, not guessed."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as some

from storyloom.prompts.script import StoryScriptError
from storyloom.world import parsing, words
from storyloom.world.captions import FigureCaption, FrameCaption, any_figure, any_frame, figure_words, frame_words
from storyloom.world.parsing import parse_error, parse_frame, parse_identity, parse_world_story
from storyloom.world.scene import LOOKS, SPECIES
from storyloom.world.stories import random_story, random_story_of_two

SEEDS = some.integers(0, 2**32 - 1)


def some_of(words):
    return some.lists(some.sampled_from(words), max_size=3, unique=True).map(tuple)


FIGURES = some.builds(
    FigureCaption,
    some.sampled_from(SPECIES),
    some.fixed_dictionaries({}, optional={look: some.sampled_from(values) for look, values in LOOKS.items()}),
    some_of(words.ADJECTIVES),
    some_of(words.NAMES),
)


@given(FIGURES, SEEDS)
def test_an_identity_is_heard_as_it_was_told_with_adjectives_and_names(who, seed):
    assert parse_identity(figure_words(who, np.random.default_rng(seed))) == who
    assert parse_identity(figure_words(who)) == who


@given(SEEDS, some.booleans())
def test_a_frame_is_heard_as_it_was_told_whatever_adverbs_stand_in_it(seed, together):
    random = np.random.default_rng(seed)
    caption = any_frame(random, together)
    assert parse_frame(frame_words(caption, random, adverbs=True)) == caption
    assert parse_frame(frame_words(caption)) == caption


@given(SEEDS)
def test_words_around_an_identity_change_nothing(seed):
    random = np.random.default_rng(seed)
    who = any_figure(random)
    before, after = random.choice(words.BEFORE), random.choice(words.AFTER)
    assert parse_identity(f"{before} {figure_words(who, random)}{after}") == who


def test_no_phrase_means_two_things_without_its_articles():
    tables = {
        "frames": (words.PLACE_WORDS, words.ACTION_WORDS, words.PROP_WORDS),
        "identities": (words.SPECIES_WORDS, words.HAT_WORDS),
    }
    for group in tables.values():
        meanings = {}
        for table in group:
            for value, phrases in table.items():
                for phrase in phrases:
                    assert meanings.setdefault(parsing._words(phrase), (id(table), value)) == (id(table), value)


def test_the_longest_phrase_counts():
    phrases = {("top",): ("place", "top"), ("top", "hat"): ("hat", "top hat")}
    assert list(parsing._read("the top hat on top", phrases)) == [("hat", "top hat"), ("", "on"), ("place", "top")]


@pytest.mark.parametrize(
    ("text", "species", "looks"),
    [
        ("a red fox in a blue coat", "fox", {"fur": "red", "shirt": "blue"}),
        ("a red fox in a coat", "fox", {"fur": "red"}),
        ("A RED, shy fox!", "fox", {"fur": "red"}),
        ("a rabbit with brown fur and green pants without a hat", "rabbit", {"fur": "brown", "trousers": "green"}),
        ("a girl with silver curls in a scarlet jacket", "girl", {"fur": "grey", "shirt": "red"}),
        ("a robot of black steel", "robot", {"fur": "black"}),
        ("a teddy bear", "bear", {}),
        ("a fox in a coat and red trousers", "fox", {"trousers": "red"}),
        ("a fox with a red scarf and a coat", "fox", {}),
        ("a green fox in a pink coat", "fox", {}),
        ("a cat in a white shirt and a baseball cap", "cat", {"shirt": "white", "hat": "cap"}),
        ("a cat with a purple top hat in a violet hoodie", "cat", {"shirt": "purple", "hat": "top hat"}),
        ("a cat with no crown and no coat", "cat", {}),
    ],
)
def test_colours_belong_to_the_next_noun_and_what_is_not_known_stays_open(text, species, looks):
    without = {"hat": "none"} if "without a hat" in text else {}
    caption = parse_identity(text)
    assert (caption.species, dict(caption.looks)) == (species, looks | without)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a dragon in a blue coat",
        "without a cat",
        "a girl with a cat",
        "a black and white cat",
        "a red fox with brown fur",
        "a fox with a cap and a crown",
    ],
)
def test_an_identity_without_one_species_and_one_value_of_each_look_is_not_heard(text):
    assert parse_identity(text) is None


@pytest.mark.parametrize(
    ("text", "caption"),
    [
        ("asleep in the snow", FrameCaption("snow", "sleeping")),
        ("reading a book on a train", FrameCaption("train", "standing", "book")),
        ("sitting with his red umbrella in a city", FrameCaption("city", "sitting", "umbrella")),
        ("waving, without an umbrella, by the sea", FrameCaption("beach", "waving")),
        ("walking in the night city with a lamp", FrameCaption("city", "standing", "lantern")),
        ("leaping and dancing in the (woods:1.2)", FrameCaption("forest", "jumping")),
    ],
)
def test_a_frame_is_heard_in_an_artist_s_words(text, caption):
    assert parse_frame(text) == caption


@pytest.mark.parametrize(
    "text",
    [
        "",
        "in the snow",
        "running",
        "drinking tea by the sea",
        "asleep and running in the snow",
        "waving at home at night",
    ],
)
def test_a_frame_without_one_place_and_something_to_do_is_not_heard(text):
    assert parse_frame(text) is None


@pytest.mark.parametrize("story", [*map(random_story, range(20)), *map(random_story_of_two, range(20))])
def test_a_whole_story_is_heard_from_its_script(story):
    assert parse_world_story(story.identity_text(), story.frames_text().splitlines()) == story


def test_captions_and_notes_are_not_heard():
    story = parse_world_story("a fox # a cat", ["asleep in the snow # running on the beach"])
    assert story.identities == (FigureCaption("fox"),) and story.frames == (FrameCaption("snow", "sleeping"),)


CAST = "[Fox] a red fox\n[Bear] a bear"


@pytest.mark.parametrize(
    ("identity", "frames", "reason"),
    [
        ("a crow", ["asleep in the snow"], '"a crow" is not one of cat, '),
        ("a fox", ["asleep in the snow", "on a train"], 'Frame 2, "on a train", needs one place and an action'),
        (CAST, ["[NC] sitting in the snow"], "Frame 1 shows 0 characters"),
        (CAST, ["[Fox] and [Bear] reading in the snow"], "two characters can only be standing, "),
    ],
)
def test_a_story_that_cannot_be_measured_says_why(identity, frames, reason):
    assert parse_world_story(identity, frames) is None
    assert reason in parse_error(identity, frames)


def test_everybody_is_shown_where_they_are_named():
    story = parse_world_story(CAST, ["[Bear] asleep in the snow", "[Fox] and [Bear] waving on the beach"])
    assert [who.species for who in story.identities] == ["fox", "bear"] and story.shown == ((1,), (0, 1))
    assert parse_error(CAST, ["[Bear] asleep in the snow"]) == ""


def test_a_faulty_script_is_refused_as_everywhere():
    with pytest.raises(StoryScriptError, match="empty"):
        parse_world_story("", ["asleep in the snow"])
