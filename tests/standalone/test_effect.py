"""The methods have the effects that they claim, read from the pixels, and the shipped model still draws well."""

from functools import cache

import numpy as np
import pytest

from storyloom.benchmarks import effect as benchmark
from storyloom.benchmarks.effect import FIRST_SEED, FIRST_STORY, pictures_of
from storyloom.benchmarks.methods import ABLATIONS, ABLATIONS_COMPARED, COMPARED, METHODS, settings_of
from storyloom.prompts.script import parse_story
from storyloom.prompts.tag import tag_of
from storyloom.standalone import StoryPipeline
from storyloom.standalone.demo import demo_model
from storyloom.standalone.pipeline import METHODS as OF_THE_PIPELINE
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


def test_all_methods_have_settings_of_the_pipeline_and_all_comparisons_have_methods():
    for method in METHODS | ABLATIONS:
        assert settings_of(method)["method"] in OF_THE_PIPELINE
    assert settings_of("svr+ipca") == {"method": "svr+ipca"}
    assert settings_of("csa-full+svr-joint+ipca").keys() == {
        *("method", "svr", "sampling_rate", "skip_first_steps", "sharing_blocks")
    }
    assert {method for pair in COMPARED for method in pair} <= METHODS.keys()
    assert {method for pair in ABLATIONS_COMPARED for method in pair} == ABLATIONS.keys()


def test_each_ablation_changes_the_rows_that_it_is_about(pipeline):
    story = parse_story("a red fox", "asleep in the snow\nreading\ndrinking tea")

    def context(method):
        settings = settings_of(method)
        reweighting = OF_THE_PIPELINE[settings.pop("method")].reweighting
        return pipeline.conditioning(story, reweighting, **settings)

    ((plain, info), (svr, _), (npr, _)) = map(context, ("none", "svr", "npr"))
    drawn = {method: context(method)[0] for method in ABLATIONS}
    tokens = tag_of(info).rows[1].tokens
    identity, own = list(tokens.identity), list(tokens.frames[1])
    others, end = [*tokens.frames[0], *tokens.frames[2]], list(range(tokens.eot, tokens.length))

    def same(a, b, rows):
        return (a[1, rows] - b[1, rows]).abs().max() < 1e-4

    assert same(drawn["svr-eot-kept"], plain, end) and not same(svr, plain, end)
    assert not same(drawn["svr-identity"], plain, identity) and same(svr, plain, identity)
    assert not same(drawn["svr-joint"], svr, others) and same(drawn["svr-joint"], svr, identity)
    assert same(drawn["npr-plus"], plain, others) and same(drawn["npr-plus"], npr, own)
    assert same(drawn["npr-minus"], plain, own) and same(drawn["npr-minus"], npr, others)
    assert not same(npr, plain, own) and not same(npr, plain, others)


def test_the_ablations_are_tables_of_their_own(tmp_path, monkeypatch):
    """They are written to their own section of the page."""
    monkeypatch.setattr(benchmark, "OUT", tmp_path)
    monkeypatch.setattr(benchmark, "PAGE", tmp_path / "effect.md")
    benchmark.PAGE.write_text("A\n<!-- ablations shipped -->\nold\n<!-- end of ablations shipped -->\nB\n")

    def draw_all(results, methods, noises, options):
        for method in methods:
            for noise in noises:
                for number in range(options.stories):
                    frames = len(random_story(FIRST_STORY + number).frames)
                    results.save(np.zeros((frames, 24, 24, 3), np.uint8), method, noise, number)

    monkeypatch.setattr(benchmark, "draw_all", draw_all)
    monkeypatch.setattr("sys.argv", ["effect", "--ablations", "--stories", "2", "--noise", "same", "--page"])
    benchmark.main()
    page = benchmark.PAGE.read_text()
    assert page.startswith("A\n<!-- ablations shipped -->\nThe first 2 of the stories above:") and page.endswith(
        "-->\nB\n"
    )
    assert "old" not in page and page.count("| SVR, identity enhanced too | same |") == 2
    assert "NPR+ (only enhances) over NPR | same |" in page
