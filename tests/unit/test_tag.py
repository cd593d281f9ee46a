"""The tag of a story's conditioning as text, and the dict that checks the number of images."""

import copy
import io
import json
import random
from dataclasses import replace

import pytest
import torch

from storyloom.prompts.conditioning import TAG, StoryCond, StoryRow
from storyloom.prompts.options import StoryOptions
from storyloom.prompts.tag import read_tag, tag_of, tag_text
from storyloom.prompts.tokens import StoryTokens

TOKENS = StoryTokens(range(1, 4), (range(4, 6), range(6, 9)), 9, 77)
NOBODY = StoryTokens(range(1, 1), (range(1, 5),), 5, 154)
STORY = StoryCond(
    (
        StoryRow(0, ("Fox", "Ö\ud800"), TOKENS, (range(1, 2), range(3, 4))),
        StoryRow(4, (), NOBODY, ()),
        StoryRow(2, ("",), TOKENS, (range(1, 4),)),
    ),
    154,
    ("Fox", "Ö\ud800", ""),
    anchors=1,
)


@pytest.mark.parametrize("story", [STORY, StoryCond(STORY.rows[:1], 77)])
def test_a_tag_is_plain_text_that_reads_back_as_the_same_story(story):
    text = tag_text(story)
    assert type(text) is str and text.isascii() and json.loads(text)["version"] == 1
    assert read_tag(text) == story and tag_of({TAG: text}) == tag_of({TAG: story}) == story and tag_of({}) is None


def test_a_text_is_parsed_once():
    assert tag_of({TAG: tag_text(STORY)}) is tag_of({TAG: tag_text(STORY)})


def changed(**values):
    return json.dumps(json.loads(tag_text(STORY)) | values)


def with_row(place, value):
    row = json.loads(tag_text(STORY))["rows"][0]
    return changed(rows=[[*row[:place], value, *row[place + 1 :]]])


@pytest.mark.parametrize(
    "text",
    [
        changed(version=2),
        changed(version=None),
        changed(later=1),
        changed(rows=[]),
        changed(rows={"0": 1}),
        changed(rows=[[0]]),
        changed(length=0),
        changed(length=100),
        changed(length=77.0),
        changed(length=10**9),
        changed(cast="Fox"),
        changed(cast=[1]),
        changed(anchors=-1),
        with_row(0, -1),
        with_row(0, True),
        tag_text(STORY).replace("154", "1" * 5000),
        with_row(1, "Fox"),
        with_row(2, [5, 4]),
        with_row(2, [1, 78]),
        with_row(2, [1, 2, 3]),
        with_row(3, [[1, float("nan")]]),
        with_row(4, 78),
        with_row(5, 0),
        with_row(6, None),
        "",
        "null",
        "[]",
        "a story of another pack",
        "[" * 100_000,
        5,
        {"rows": []},
        None.__class__,
        torch.zeros(2),
    ],
    ids=lambda text: str(text)[-24:],
)
def test_anything_else_is_refused_with_one_sentence(text):
    with pytest.raises(ValueError, match="has a story tag that this version of StoryLoom cannot read"):
        tag_of({TAG: text})


def test_a_damaged_text_is_a_story_or_refused():
    generator, text = random.Random(5), tag_text(STORY)
    signs = [*'0123456789[]{},:"-.eE', "null", "true", "\\ud800", "\0"]
    for _ in range(3000):
        start = generator.randrange(len(text))
        damaged = text[:start] + generator.choice(signs) + text[start + generator.randrange(4) :]
        try:
            story = read_tag(damaged)
        except ValueError as error:
            assert "cannot read" in str(error)
        else:
            for row in range(len(story.rows)):
                assert all(column < story.length for column in story.identity_columns(row))


def options(**more):
    return StoryOptions({"pooled_output": torch.ones(3, 4), TAG: tag_text(STORY), **more})


@pytest.mark.parametrize("copied", [StoryOptions.copy, copy.copy, copy.deepcopy, lambda info: info])
@pytest.mark.parametrize("images", [1, 4])
def test_another_number_of_images_is_refused_also_by_a_copy(copied, images):
    info = copied(options(cross_attn=torch.ones(3, 154, 8)))
    with pytest.raises(ValueError, match=rf"The story has 3 frames but the latent batch has {images} images?\. Use"):
        info["noise"] = torch.zeros(images, 4, 8, 8)
    info["noise"] = torch.zeros(3, 4, 8, 8)
    assert info["pooled_output"].shape == (3, 4) and tag_of(info) == STORY


def test_zeros_and_conditionings_without_a_story_take_any_number_of_images():
    for context in (torch.zeros(3, 154, 8), None):
        info = options(cross_attn=context)
        info["noise"] = torch.zeros(4, 4, 8, 8)
    untagged = StoryOptions(cross_attn=torch.ones(3, 154, 8))
    untagged["noise"] = torch.zeros(4, 4, 8, 8)


def test_a_saved_conditioning_holds_only_what_a_safe_reader_accepts():
    file = io.BytesIO()
    torch.save([[torch.ones(3, 154, 8), options(strength=0.5)]], file)
    file.seek(0)
    ((context, info),) = torch.load(file, weights_only=True)
    assert isinstance(info, dict) and {type(value) for value in info.values()} == {torch.Tensor, str, float}
    assert torch.equal(context, torch.ones(3, 154, 8)) and tag_of(info) == STORY


def test_copies_are_independent():
    info = options()
    other = copy.deepcopy(info)
    other["pooled_output"] += 1
    other[TAG] = tag_text(replace(STORY, anchors=0))
    assert torch.equal(info["pooled_output"], torch.ones(3, 4)) and tag_of(info) == STORY
