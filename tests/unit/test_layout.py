"""Rows of a UNet call that are recognised by their content."""

import pytest
import torch

from storyloom.prompts.conditioning import StoryCond, StoryRow
from storyloom.prompts.tokens import StoryTokens
from storyloom.runtime.call import KEY, Conditioning, SamplerCall
from storyloom.runtime.layout import RowSource, RowSpan, rows_by_content, spans_of
from storyloom.runtime.reading import has_moved_rows, read_call, with_added_rows

IMAGES, SIDE = 3, (6, 8)
NEGATIVE, POSITIVE = (1, "n"), (0, "p")


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def whole():
    return random(IMAGES, 4, *SIDE)


@pytest.fixture
def texts():
    """The context of a negative of one row, and of a story."""
    return random(1, 77, 8, seed=1), random(IMAGES, 77, 8, seed=2)


def stacked(whole, texts, boxes):
    """Rows and contexts of a call: for each box of the images, both conditionings for all images."""
    tiles = [whole[:, :, top : top + height, left : left + width] for height, width, top, left in boxes]
    negative, story = texts
    return torch.cat([tile for tile in tiles for _ in texts]), torch.cat(
        [negative.expand_as(story), story] * len(boxes)
    )


def test_tiles_and_their_rows_are_recognised_wherever_they_are(whole, texts):
    boxes = [(4, 5, 0, 0), (4, 5, 2, 3), (4, 5, 0, 3)]
    latents, context = stacked(whole, texts, boxes)
    sources = rows_by_content(latents, context, whole, texts)
    assert sources == [RowSource(text, image, box) for box in boxes for text in (0, 1) for image in range(IMAGES)]
    order = torch.randperm(len(latents), generator=torch.Generator().manual_seed(3))
    assert rows_by_content(latents[order], context[order], whole, texts) == [sources[row] for row in order.tolist()]


def test_contexts_that_the_host_repeated_are_recognised(whole, texts):
    latents, context = stacked(whole, texts, [(*SIDE, 0, 0)])
    repeated = rows_by_content(latents, context.repeat(1, 3, 1), whole, texts)
    assert repeated == rows_by_content(latents, context, whole, texts)


def test_a_context_of_another_node_is_not_recognised(whole, texts):
    latents, context = stacked(whole, texts, [(*SIDE, 0, 0)])
    context[4] += 1
    sources = rows_by_content(latents, context, whole, texts)
    assert [row for row, source in enumerate(sources) if source is None] == [4]
    assert rows_by_content(None, context[:, :50], whole, texts) == [None] * 6


def test_images_with_the_same_noise_and_text_keep_their_order(whole, texts):
    same = whole[:1].expand_as(whole)
    both = texts[0], texts[0]
    latents, context = stacked(same, (texts[0], texts[0].expand(IMAGES, -1, -1)), [(*SIDE, 0, 0)])
    sources = rows_by_content(latents, context, same, both)
    assert [(source.conditioning, source.image) for source in sources] == [
        (n, i) for n in (0, 1) for i in range(IMAGES)
    ]


def test_images_with_the_same_noise_and_text_keep_their_order_row_by_row(whole, texts):
    same, text = whole[:1].expand_as(whole), texts[0]
    for _ in range(2):
        taken = set()
        rows = [rows_by_content(same[:1], text, same, [text], taken=taken) for _ in range(IMAGES)]
        assert [source.image for (source,) in rows] == [*range(IMAGES)]


def test_latents_that_are_no_part_of_the_images_have_no_place(whole, texts):
    latents, context = stacked(whole, texts, [(*SIDE, 0, 0)])
    for other in (latents * 2, torch.nn.functional.interpolate(latents, scale_factor=2)):
        assert {source.tile for source in rows_by_content(other, context, whole, texts)} == {None}


def test_spans_hold_one_conditioning_one_tile_and_every_image_once():
    one, two = (2, 2, 0, 0), (2, 2, 0, 2)
    sources = [RowSource(0, 0, one), RowSource(0, 1, one), RowSource(0, 0, one), None, None, RowSource(1, 2, two)]
    assert spans_of(sources) == [
        RowSpan(range(0, 2), 0, (0, 1), one),
        RowSpan(range(2, 3), 0, (0,), one),
        RowSpan(range(3, 5), None, (), None),
        RowSpan(range(5, 6), 1, (2,), two),
    ]


def story():
    tokens = StoryTokens(range(1, 4), (range(4, 6),), 6, 77)
    return StoryCond(tuple(StoryRow(number, ("",), tokens, (range(1, 4),)) for number in range(IMAGES)), 77)


def sampler_call(whole, texts, **changes):
    known = {NEGATIVE: Conditioning(None, 77, False), POSITIVE: Conditioning(story(), 77)}
    contexts = dict(zip((NEGATIVE, POSITIVE), texts, strict=True))
    return SamplerCall(1.0, known, None, size=SIDE, latents=whole, contexts=contexts, **changes)


def options_of(sampler):
    return {KEY: sampler, "cond_or_uncond": [1, 0], "uuids": ["n", "p"]}


def test_an_ordinary_call_is_never_compared(whole, texts, monkeypatch):
    import storyloom.runtime.reading as reading

    monkeypatch.setattr(reading, "rows_by_content", None)
    latents, context = stacked(whole, texts, [(*SIDE, 0, 0)])
    call = read_call(options_of(sampler_call(whole, texts)), latents, context)
    assert [chunk.rows for chunk in call.chunks] == [range(0, 3), range(3, 6)]
    assert all(chunk.located and chunk.whole and chunk.area is None for chunk in call.chunks)


def test_a_wrapped_call_in_another_order_is_recognised(whole, texts):
    latents, context = stacked(whole, texts, [(*SIDE, 0, 0)])
    swapped = [3, 4, 5, 0, 1, 2]
    call = read_call(options_of(sampler_call(whole, texts, wrapped=True)), latents[swapped], context[swapped])
    first, second = call.chunks
    assert first.conditioning.story and not second.conditioning.story and first.images == second.images == (0, 1, 2)


def test_a_wrapped_call_with_images_in_another_order_is_recognised(whole, texts):
    latents, context = stacked(whole, texts, [(*SIDE, 0, 0)])
    turned = [2, 1, 0, 5, 4, 3]
    call = read_call(options_of(sampler_call(whole, texts, wrapped=True)), latents[turned], context[turned])
    assert [chunk.images for chunk in call.chunks] == [(2, 1, 0)] * 2


def test_stacked_tiles_are_chunks_of_their_own(whole, texts):
    boxes = [(4, 5, 0, 0), (4, 5, 2, 3)]
    call = read_call(options_of(sampler_call(whole, texts)), *stacked(whole, texts, boxes))
    assert [chunk.rows for chunk in call.chunks] == [range(start, start + 3) for start in (0, 3, 6, 9)]
    assert [chunk.area for chunk in call.chunks] == [boxes[0], boxes[0], boxes[1], boxes[1]]
    assert [chunk.conditioning.story is not None for chunk in call.chunks] == [False, True] * 2
    ((rows, columns, _),) = call.identity_groups(cut=True)
    assert rows.tolist() == [3, 4, 5, 9, 10, 11] and columns == (0, 1, 2, 3)


def test_one_row_at_a_time_keeps_its_image(whole, texts):
    latents, context = stacked(whole, texts, [(*SIDE, 0, 0)])
    call = read_call(options_of(sampler_call(whole, texts)), latents[5:], context[5:])
    (chunk,) = call.chunks
    assert chunk.images == (2,) and not chunk.whole and chunk.area is None and chunk.located
    assert [image.number for image in call.images_of(chunk)] == [2]


def test_windows_number_the_images_of_recognised_rows(whole, texts):
    sampler = sampler_call(whole, texts)
    sampler = SamplerCall(**{**vars(sampler), "images": (0, 4, 5)})
    latents, context = stacked(whole, texts, [(*SIDE, 0, 0)])
    call = read_call(options_of(sampler), latents[4:], context[4:])
    assert call.chunks[0].images == (4, 5)


def test_rows_that_cannot_be_recognised_are_an_error_for_those_who_need_them(whole, texts):
    latents, context = stacked(whole, texts, [(*SIDE, 0, 0)])
    call = read_call(options_of(sampler_call(whole, texts)), latents[:4], context[:4] + 1)
    with pytest.raises(ValueError, match="4 rows that are not those of the batch"):
        call.images_of(call.chunks[0])
    with pytest.raises(ValueError, match="4 rows that are not those of the batch"):
        call.identity_groups(cut=True)


def test_a_call_whose_list_of_conditionings_another_node_has_cut_is_recognised(whole, texts):
    latents, context = stacked(whole, texts, [(*SIDE, 0, 0)])
    options = options_of(sampler_call(whole, texts)) | {"cond_or_uncond": [0]}
    (chunk,) = read_call(options, latents[3:], context[3:]).chunks
    assert chunk.conditioning.story and chunk.whole


def test_added_rows_are_in_the_tile_of_the_call_if_there_is_one(whole, texts):
    boxes = [(4, 5, 0, 0), (4, 5, 2, 3)]
    options = options_of(sampler_call(whole, texts))
    for count, expected in ((1, [(boxes[0], True)]), (2, [(None, False)])):
        latents, context = stacked(whole, texts, boxes[:count])
        call = read_call(options, latents, context)
        seen = with_added_rows(call, options, torch.cat([context, context[:1] + 1]))
        assert {(chunk.tile, chunk.located) for chunk in seen.chunks} == {*expected}


def test_a_row_alone_keeps_its_image_where_texts_are_equal(whole, texts):
    latents, context = stacked(whole, texts, [(*SIDE, 0, 0)])
    options = options_of(sampler_call(whole, texts))
    call = read_call(options, latents[2:3], context[2:3])
    assert not has_moved_rows(call, options, context[2:3])
    assert [chunk.images for chunk in with_added_rows(call, options, context[2:3]).chunks] == [(2,)]


def test_added_rows_are_foreign_unless_they_have_a_conditionings_text(whole, texts):
    latents, context = stacked(whole, texts, [(*SIDE, 0, 0)])
    options = options_of(sampler_call(whole, texts))
    call = read_call(options, latents, context)
    region = random(IMAGES, 77, 8, seed=9)
    seen = with_added_rows(call, options, torch.cat([context[3:], region, context[:3]]).bfloat16())
    assert [(chunk.rows, chunk.foreign) for chunk in seen.chunks] == [
        (range(0, 3), False),
        (range(3, 6), True),
        (range(6, 9), False),
    ]
    assert seen.chunks[0].conditioning.story and seen.rows == 9 and seen.context_length == 77
