"""The methods have the effects that they claim, read from the pixels, and the shipped model still draws well."""

from functools import cache

import numpy as np
import pytest

from storyloom.benchmarks.effect import FIRST_SEED, FIRST_STORY, pictures_of
from storyloom.standalone import StoryPipeline
from storyloom.standalone.demo import demo_model
from storyloom.world.measures import StoryPictures, effect
from storyloom.world.reader import Reader
from storyloom.world.stories import random_story

STORIES, STEPS = 3, 10


@pytest.fixture(scope="module")
def pipeline():
    return StoryPipeline(demo_model())


@pytest.fixture(scope="module")
def drawn(pipeline):
    """method -> (the first stories of docs/effect.md with their scenes as read, mean reading error)"""
    reader = Reader()

    @cache
    def draw(method):
        stories, errors = [], []
        for number in range(STORIES):
            story, seed = random_story(FIRST_STORY + number), FIRST_SEED + number
            readings = reader.read_all(pictures_of(pipeline, story, method=method, steps=STEPS, seed=seed))
            stories.append(StoryPictures(story, tuple(reading.scene for reading in readings)))
            errors += [reading.error for reading in readings]
        return stories, float(np.mean(errors))

    return draw


def test_the_shipped_model_draws_what_frame_prompts_say(drawn):
    stories, error = drawn("frames")
    assert effect(stories).alignment.mean >= 0.95
    assert error < 0.06


def test_svr_restores_the_alignment_that_concatenation_loses(drawn):
    joined, expressed = (effect(drawn(method)[0]).alignment.mean for method in ("none", "svr"))
    assert joined < 0.25
    assert expressed > joined + 0.6
