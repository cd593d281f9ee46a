"""Long stories: who is drawn with whom, what of the inputs goes along, and the way back."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from storyloom.prompts.batches import (
    join_latents,
    join_rows,
    plan_batches,
    split_conditioning,
    split_info,
    split_latent,
    split_rows,
)
from storyloom.prompts.conditioning import StoryCond, StoryRow
from storyloom.prompts.tag import tag_of, tag_text
from storyloom.prompts.tokens import StoryTokens


@given(frames=st.integers(1, 60), size=st.integers(1, 12), anchors=st.integers(0, 11))
def test_every_frame_is_drawn_and_every_batch_has_the_same_size_and_anchors(frames, size, anchors):
    if frames > size and anchors >= size:
        message = f"A batch of {size} images with {anchors} anchors has no room for other frames."
        with pytest.raises(ValueError, match=message):
            plan_batches(frames, size, anchors)
        return
    plan = plan_batches(frames, size, anchors)
    assert {len(batch) for batch in plan.batches} == {min(size, frames)}
    assert {batch[: plan.anchors] for batch in plan.batches} == {tuple(range(plan.anchors))}
    drawn = [frame for batch in plan.batches for frame in batch[plan.anchors :]]
    assert sorted(set(drawn)) == list(range(plan.anchors, frames)) and drawn == sorted(drawn)
    assert len(set(map(len, map(set, plan.batches[:-1])))) <= 1, "only the last batch is filled up"


@given(frames=st.integers(1, 40), size=st.integers(3, 8))
def test_splitting_and_joining_is_the_identity(frames, size):
    plan, rows = plan_batches(frames, size, 2), torch.arange(frames)
    assert join_rows([split_rows(rows, batch, frames) for batch in plan.batches], plan).tolist() == rows.tolist()


def test_anchors_are_taken_from_the_first_batch():
    plan = plan_batches(5, 3, 2)
    batches = [torch.full((3,), number) for number in range(3)]
    assert plan.batches == ((0, 1, 2), (0, 1, 3), (0, 1, 4))
    assert join_rows(batches, plan).tolist() == [0, 0, 0, 1, 2]


def test_batches_that_are_not_the_plan_s_are_refused():
    plan = plan_batches(6, 4, 2)
    with pytest.raises(ValueError, match=r"batches of 4 \+ 4 images, but the input has batches of 4\."):
        join_rows([torch.zeros(4)], plan)


def story(count):
    tokens = StoryTokens(range(1, 3), (range(3, 5),), 5, 77)
    rows = tuple(StoryRow(frame, (f"C{frame}",), tokens, (range(1, 3),)) for frame in range(count))
    return StoryCond(rows, 77)


def test_a_conditioning_keeps_its_tag_and_what_has_no_row_per_frame():
    context, pooled = torch.arange(5.0).view(5, 1, 1), torch.arange(5.0).view(5, 1)
    info = {"pooled_output": pooled, "storyloom": tag_text(story(5)), "strength": 0.5, "mask": torch.ones(1, 8, 8)}
    ((rows, cut),) = split_conditioning([[context, info]], (0, 3, 3), 5)
    assert rows.flatten().tolist() == cut["pooled_output"].flatten().tolist() == [0, 3, 3]
    assert [row.frame for row in tag_of(cut).rows] == [0, 3, 3]
    assert cut["strength"] == 0.5 and cut["mask"] is info["mask"]
    assert tag_of(info) == story(5) and info["pooled_output"] is pooled


def test_a_conditioning_of_one_row_holds_for_every_batch():
    context, info = torch.zeros(1, 77, 8), {"pooled_output": torch.zeros(1, 4)}
    ((rows, cut),) = split_conditioning([[context, info]], (0, 3), 5)
    assert rows is context and cut["pooled_output"] is info["pooled_output"]


def test_rows_that_are_neither_one_nor_one_per_frame_are_refused():
    with pytest.raises(ValueError, match="has 3 rows, but the story has 5 frames"):
        split_rows(torch.zeros(3, 2), (0, 1), 5)


def test_a_controlnet_that_already_holds_a_hint_per_frame_is_refused():
    def applied(images, before=None):
        return SimpleNamespace(cond_hint_original=torch.zeros(images, 3, 8, 8), previous_controlnet=before)

    for control in (applied(5), applied(1, before=applied(5))):
        with pytest.raises(ValueError, match="Split the story first"):
            split_info({"control": control}, (0, 1), 5)
    control = applied(1, before=applied(1))
    assert split_info({"control": control}, (0, 1), 5)["control"] is control


@pytest.mark.parametrize(
    ("numbers", "expected"), [(None, [0, 3, 4]), ([0] * 5, [0, 0, 0]), ([9, 8, 7, 6, 5], [9, 6, 5])]
)
def test_latents_keep_the_noise_of_their_frames(numbers, expected):
    latent = {"samples": torch.arange(5.0).view(5, 1, 1, 1), "type": "other"}
    latent |= {} if numbers is None else {"batch_index": numbers}
    cut = split_latent(latent, (0, 3, 4))
    assert cut["samples"].flatten().tolist() == [0, 3, 4]
    assert cut["batch_index"] == expected and cut["type"] == "other"


@pytest.mark.parametrize("shape", [(5, 8, 8), (5, 1, 8, 8), (1, 8, 8), (8, 8)])
def test_noise_masks_go_along(shape):
    masks = (
        torch.arange(5.0).view(-1, *[1] * (len(shape) - 1)).expand(5, *shape[1:])
        if shape[0] == 5
        else torch.ones(shape)
    )
    cut = split_latent({"samples": torch.zeros(5, 4, 1, 1), "noise_mask": masks}, (0, 3, 4))["noise_mask"]
    assert cut.shape[1:] == (1, 8, 8)
    assert cut[:, 0, 0, 0].tolist() == ([0, 3, 4] if shape[0] == 5 else [1])


def test_noise_masks_for_some_frames_are_refused():
    with pytest.raises(ValueError, match="has 3 noise masks, but the story has 5 frames"):
        split_latent({"samples": torch.zeros(5, 4, 1, 1), "noise_mask": torch.zeros(3, 1, 8, 8)}, (0, 1))


@pytest.mark.parametrize("shape, expected", [((5, 1, 8, 8), [0, 1, 2, 3, 4]), ((1, 1, 8, 8), [0] * 5)])
@pytest.mark.parametrize("size", [1, 2, 9])
def test_joined_latents_have_a_noise_mask_for_every_frame(shape, expected, size):
    plan = plan_batches(5, size, 0)
    latent = {"samples": torch.zeros(5, 4, 1, 1), "noise_mask": torch.arange(5.0)[: shape[0]].view(-1, 1, 1, 1)}
    latent["noise_mask"] = latent["noise_mask"].expand(shape)
    joined = join_latents([split_latent(latent, frames) for frames in plan.batches], plan)["noise_mask"]
    assert joined.shape == (5, 1, 8, 8) and joined[:, 0, 0, 0].tolist() == expected


def test_joined_latents_are_in_story_order_with_their_noise():
    plan = plan_batches(5, 4, 2)
    latent = {"samples": torch.arange(5.0).view(5, 1, 1, 1), "batch_index": [4, 3, 2, 1, 0]}
    joined = join_latents([split_latent(latent, frames) for frames in plan.batches], plan)
    assert joined["samples"].flatten().tolist() == [0, 1, 2, 3, 4]
    assert joined["batch_index"] == [4, 3, 2, 1, 0]
