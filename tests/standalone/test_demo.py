"""The demo model's warnings about a story."""

import logging

from storyloom.prompts.script import parse_story
from storyloom.standalone.demo import warn_of_unknown_words
from storyloom.standalone.text import tokenize


def ids(text):
    return frozenset(token for window in tokenize(text)["l"] for token, _, word in window if word)


def warnings(caplog, known, *story):
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        warn_of_unknown_words(ids(known), parse_story(*story))
    return [record.getMessage() for record in caplog.records]


def test_words_that_it_does_not_know_are_named_once(caplog):
    frames = "asleep in the lighthouse # Unspoken.\n[NC] a key and a lighthouse"
    messages = warnings(
        caplog, "a fox asleep in the and ink of", "[Fox] a vermillion fox", frames, "ink of {prompt} gouache"
    )
    assert messages == ["The demo model was not trained on: vermillion, lighthouse, key, gouache. It draws the rest."]


def test_known_words_are_not_worth_a_word(caplog):
    assert warnings(caplog, "a red fox, asleep", "a red fox", "asleep, asleep") == []
