"""Consistent self-attention: gathered keys are the published mask, and the draws depend on their key alone."""

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from rounding import rounding

from storyloom.attention.consistent import ConsistentAttention, anchor_sources, consistent_self_attention, sample_tokens
from storyloom.prompts.conditioning import StoryCond, StoryRow
from storyloom.prompts.tokens import StoryTokens
from storyloom.runtime.call import (
    KEY,
    Chunk,
    Conditioning,
    Image,
    SamplerCall,
    UNetCall,
    batch_images,
)
from storyloom.runtime.chain import Chain
from storyloom.runtime.patch import ScheduledPatch
from storyloom.runtime.reading import nearest_step, read_call
from storyloom.runtime.run import LayerAttention

HEADS, WIDTH = 4, 32


def attend(q, k, v, heads, mask=None):
    """Softmax attention, written out; mask: True where a key is seen."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    logits = q @ k.mT / math.sqrt(q.shape[-1])
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf)
    return (torch.softmax(logits, dim=-1) @ v).transpose(1, 2).flatten(2)


def masked(q, k, v, subsets, sources):
    """The published form: all tokens of all images as keys, and a dense mask."""
    images, tokens = k.shape[:2]
    seen = torch.zeros(images, images, tokens, dtype=torch.bool)
    for i, others in enumerate(sources):
        seen[i, i] = True
        for j in others:
            seen[i, j, subsets[j]] = True
    everything = [x.flatten(0, 1).expand(images, -1, -1) for x in (k, v)]
    return attend(q, *everything, HEADS, seen.view(images, 1, 1, -1))


def qkv(images=3, tokens=24, dtype=torch.float64):
    generator = torch.Generator().manual_seed(images)
    return [torch.randn(images, tokens, WIDTH, generator=generator).to(dtype) for _ in range(3)]


def off(a, b):
    return (a.double() - b.double()).abs().max().item()


def counting(calls, answer=attend):
    """attend(q, k, v, heads), which takes no mask and notes its shapes."""

    def plain(q, k, v, heads):
        assert k.shape == v.shape and k.shape[0] == q.shape[0]
        calls.append(tuple(k.shape[:2]))
        return answer(q, k, v, heads)

    return plain


def subset(*rows):
    return torch.tensor(rows, dtype=torch.long)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("images", [2, 3, 4])
def test_gathered_keys_equal_the_published_mask(images, dtype):
    tensors, calls = qkv(images, dtype=dtype), []
    before = [x.clone() for x in tensors]
    subsets = [sample_tokens(1, 2, image, 24, 0.5) for image in range(images)]
    sources = anchor_sources(images, 0)
    out = consistent_self_attention(*tensors, HEADS, subsets, sources, counting(calls))
    bound = rounding(lambda *x: masked(*x, subsets, sources), *tensors, factor=4 if dtype == torch.bfloat16 else 16)
    assert out.dtype == dtype and off(out, masked(*(x.double() for x in tensors), subsets, sources)) < bound
    assert calls == [(images, 24 + 12 * (images - 1))], "equally many keys are one call"
    assert all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True))
    assert off(out, attend(*tensors, HEADS)) > 1e-3


@settings(max_examples=40)
@given(some.data())
def test_any_subsets_and_sources_equal_the_mask(data):
    images, tokens = data.draw(some.integers(1, 5)), data.draw(some.integers(1, 8))
    rows = some.lists(some.integers(0, tokens - 1), unique=True).map(lambda chosen: subset(*chosen))
    subsets = [data.draw(rows) for _ in range(images)]
    places = some.lists(some.sampled_from(range(images)), unique=True)
    sources = [[j for j in data.draw(places) if j != i] for i in range(images)]
    tensors, calls = qkv(images, tokens), []
    out = consistent_self_attention(*tensors, HEADS, subsets, sources, counting(calls))
    assert off(out, masked(*tensors, subsets, sources)) < 1e-12
    lengths = {tokens + sum(len(subsets[j]) for j in seen) for seen in sources}
    assert sorted({keys for _, keys in calls}) == sorted(lengths) and len(calls) == len(lengths)


def test_rate_1_is_attention_over_all_images():
    q, k, v = qkv(3)
    subsets = [sample_tokens(0, 0, image, 24, 1.0) for image in range(3)]
    out = consistent_self_attention(q, k, v, HEADS, subsets, anchor_sources(3, 0), attend)
    everything = (x.flatten(0, 1).expand(3, -1, -1) for x in (k, v))
    assert off(out, attend(q, *everything, HEADS)) < 1e-12


@pytest.mark.parametrize("images, rate", [(1, 0.5), (3, 0.0)])
def test_with_nothing_to_see_it_is_one_untouched_call(images, rate):
    tensors, calls = qkv(images), []

    def same(*given):
        calls.append([a is b for a, b in zip(given, tensors, strict=False)])
        return attend(*given)

    subsets = [sample_tokens(0, 0, image, 24, rate) for image in range(images)]
    out = consistent_self_attention(*tensors, HEADS, subsets, anchor_sources(images, 0), same)
    assert calls == [[True] * 3] and torch.equal(out, attend(*tensors, HEADS))


def test_everyone_sees_everyone_without_anchors():
    assert anchor_sources(3, 0) == [[1, 2], [0, 2], [0, 1]]


def test_anchors_look_at_anchors_and_the_others_at_them():
    assert anchor_sources(4, 2) == [[1], [0], [0, 1], [0, 1]]
    assert anchor_sources(3, 1) == [[], [0], [0]]
    assert anchor_sources(2, 5) == anchor_sources(2, 0)


def test_anchors_are_known_by_their_number_in_the_story():
    assert anchor_sources([0, 1, 7], 2) == [[1], [0], [0, 1]]
    assert anchor_sources([7, 1, 8], 2) == [[1], [], [1]]
    assert anchor_sources([4, 5], 2) == [[], []], "a window without the anchors"


def test_an_image_that_is_there_again_is_looked_at_once():
    assert anchor_sources([4, 5, 5], 0) == [[1], [0], [0]]
    assert anchor_sources([0, 0, 3, 3], 1) == [[], [], [0], [0]]


def test_anchors_do_not_depend_on_later_frames():
    q, k, v = qkv(6)
    results = []
    for numbers in ([0, 1], [0, 1, 2, 3, 4, 5], [0, 1, 4, 5]):
        rows = [x[numbers] for x in (q, k, v)]
        subsets = [sample_tokens(3, 1, number, 24, 0.5) for number in numbers]
        results.append(consistent_self_attention(*rows, HEADS, subsets, anchor_sources(numbers, 2), attend))
    assert off(results[0], results[1][:2]) < 1e-12 and off(results[1][[4, 5]], results[2][2:]) < 1e-12


@settings(max_examples=60)
@given(some.integers(0, 2**64 - 1), some.integers(0, 99), some.integers(0, 99), some.integers(0, 80), some.floats(0, 1))
def test_a_sample_has_a_fixed_size_and_no_token_twice(seed, step, image, tokens, rate):
    chosen = sample_tokens(seed, step, image, tokens, rate)
    assert chosen.dtype == torch.long and chosen.device.type == "cpu"
    assert len(chosen) == math.floor(rate * tokens)
    assert chosen.tolist() == sorted(set(chosen.tolist())) and set(chosen.tolist()) <= set(range(tokens))


def test_a_sample_depends_on_its_key_and_on_nothing_else():
    key = (5, 3, 1, 64, 0.5)
    first = sample_tokens(*key)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert torch.equal(sample_tokens(*key), first) and torch.equal(torch.get_rng_state(), state)
    for changed in ((6, 3, 1, 64), (5, 4, 1, 64), (5, 3, 2, 64), (3, 5, 1, 64), (5, 1, 3, 64)):
        assert not torch.equal(sample_tokens(*changed, 0.5), first)
    with torch.device("meta"):
        assert torch.equal(sample_tokens(*key), first)


def test_the_draws_of_today_are_those_of_yesterday():
    """The same seed must give the same picture in another process and in a later version."""
    assert sample_tokens(7, 2, 0, 16, 0.25).tolist() == [2, 6, 8, 9]
    assert sample_tokens(7, 2, 0, 16, 0.25, bernoulli=True).tolist() == [2, 8]


def test_bernoulli_draws_vary_in_number_around_the_rate():
    numbers = [len(sample_tokens(0, step, 0, 400, 0.3, bernoulli=True)) for step in range(50)]
    assert len(set(numbers)) > 5 and abs(sum(numbers) / 50 - 120) < 6
    assert len(sample_tokens(0, 0, 0, 9, 0.0, True)) == 0 and len(sample_tokens(0, 0, 0, 9, 1.0, True)) == 9


def story(*characters, frames=None):
    tokens = StoryTokens(range(1, 3), (range(3, 5),), 5, 77)
    numbers = frames or range(len(characters))
    return StoryCond(tuple(StoryRow(n, c, tokens, ()) for n, c in zip(numbers, characters, strict=True)), 77)


def call_of(*stories, images=3, step=1, steps=10, run=None, window=None):
    chunks = (Chunk(range(i * images, (i + 1) * images), Conditioning(s, 77)) for i, s in enumerate(stories))
    return UNetCall(1.0, tuple(chunks), window, step, steps, run)


def csa(rate=0.5, anchors=0, skip=1, seed=4, schedule="steady", blocks=None):
    return ConsistentAttention(rate, anchors, skip, 0.0, 1.0, blocks or {}, seed, schedule)


def options(block=("output", 1), index=0):
    return {"n_heads": HEADS, "block": block, "block_index": index}


def host(q, k, v, heads, mask, options):
    assert mask is None
    return attend(q, k, v, heads)


def owner(q, k, v, options):
    return attend(q, k, v, options["n_heads"])


def layer(call, patch, tensors, own=None, layer_options=None):
    return patch.attend(*tensors, HEADS, call, Chain(layer_options or options(), host, own))


def expected(tensors, chunks, sources, numbers, rate=0.5, seed=4, step=1):
    """Every chunk by the mask; sources: for each of them."""
    results = []
    for place, seen in zip(range(chunks), sources, strict=True):
        rows = [x.chunk(chunks)[place] for x in tensors]
        subsets = [sample_tokens(seed, step, number, rows[1].shape[1], rate) for number in numbers]
        results.append(masked(*rows, subsets, seen))
    return torch.cat(results)


ALL = [[1, 2], [0, 2], [0, 1]]
FOX, CROW, BOTH, NOBODY = ("Fox",), ("Crow",), ("Crow", "Fox"), ()


@pytest.mark.parametrize("own", [None, owner])
@pytest.mark.parametrize(
    "cast, sources",
    [
        (None, ALL),
        ((FOX, FOX, FOX), ALL),
        ((FOX, NOBODY, FOX), [[2], [], [0]]),
        ((FOX, CROW, BOTH), [[2], [2], [0, 1]]),
    ],
)
def test_every_chunk_shares_alike_and_only_frames_with_a_common_character_do(own, cast, sources):
    run = cast and story(*cast)
    tensors = qkv(6)
    out = layer(call_of(None, run, run=run), csa(), tensors, own)
    assert off(out, expected(tensors, 2, [sources] * 2, range(3))) < 1e-12
    alone = layer(call_of(None, run=run), csa(), [x[:3] for x in tensors], own)
    assert off(alone, out[:3]) < 1e-12, "the negative alone, when calls are split"


def test_swapped_split_and_further_chunks_give_the_same_rows():
    run, tensors = story(FOX, CROW, BOTH), qkv(9)
    pieces = [[x[i * 3 : i * 3 + 3] for x in tensors] for i in range(3)]
    results = []
    for order in ([0, 1], [1, 0], [0], [2, 1, 0]):
        call = call_of(*(run if i == 0 else None for i in order), run=run)
        stacked = [torch.cat(parts) for parts in zip(*(pieces[i] for i in order), strict=True)]
        results.append(layer(call, csa(), stacked).chunk(len(order))[order.index(0)])
    assert all(off(result, results[0]) < 1e-12 for result in results)


@pytest.mark.parametrize("own", [None, owner])
def test_anchors_and_windows_go_by_the_frame_s_number(own):
    run, tensors = story(*[FOX] * 3, frames=(0, 1, 6)), qkv(3)
    out = layer(call_of(run, run=run), csa(anchors=2), tensors, own)
    assert off(out, expected(tensors, 1, [[[1], [0], [0, 1]]], (0, 1, 6))) < 1e-12
    whole = story(*[FOX] * 5)
    windowed = layer(call_of(None, run=whole, window=(4, 0, 2)), csa(anchors=1), tensors, own)
    assert off(windowed, expected(tensors, 1, [[[1], [], [1]]], (4, 0, 2))) < 1e-12
    untagged = layer(call_of(None, window=(4, 0, 2)), csa(anchors=1), tensors, own)
    assert off(windowed, untagged) == 0


def alike(call, patch, tensors, own=None, layer_options=None):
    """Whether a layer makes one call with the very tensors that it was given."""
    seen = []

    def note(q, k, v, *rest):
        seen.append([a is b for a, b in zip((q, k, v), tensors, strict=True)])
        return q

    layer_options = layer_options or options()
    given = Chain(layer_options, note, own and note)
    assert patch.attend(*tensors, HEADS, call, given) is tensors[0] or seen != [[True] * 3]
    return seen == [[True] * 3]


@pytest.mark.parametrize("own", [None, owner])
def test_where_nobody_shares_the_layer_is_one_untouched_call(own):
    tensors = qkv(3)
    assert alike(call_of(None, window=(4, 5, 6)), csa(anchors=2), tensors, own)
    assert alike(call_of(None, run=story(FOX, CROW, NOBODY)), csa(), tensors, own)
    assert alike(call_of(None), csa(rate=0.01), tensors, own), "less than one token"
    assert not alike(call_of(None), csa(), tensors)


@pytest.mark.parametrize("rows, run, window", [(2, 3, None), (4, 3, None), (3, None, (0, 1)), (2, 5, (0, 1, 2))])
def test_an_unknown_number_of_images_is_refused(rows, run, window):
    call = call_of(None, images=rows, run=run and story(*[FOX] * run), window=window)
    wanted = run if window is None else len(window)
    with pytest.raises(ValueError, match=f"called with {rows} images for a story of {wanted} frames"):
        layer(call, csa(), qkv(rows))


def test_a_replacement_that_looks_at_no_query_is_asked_as_without_us():
    def perturbed(q, k, v, options):
        return v

    tensors = qkv(3)
    assert torch.equal(layer(call_of(None), csa(), tensors, perturbed), tensors[2])


def test_a_replacement_is_given_the_whole_batch_once_for_every_number_of_keys():
    calls = []

    def counted(q, k, v, options):
        calls.append((q.shape[0], k.shape[:2], v.shape[:2]))
        return owner(q, k, v, options)

    layer(call_of(None, None), csa(anchors=2), qkv(6), counted)
    own = 24
    assert calls == [(6, (6, n), (6, n)) for n in (own + 12, own + 24, own)], "the last is for one that records"


@pytest.mark.parametrize("own", [None, owner])
@pytest.mark.parametrize("cut", ["queries", "everything"])
def test_tiles_look_at_the_same_tile_of_other_images(own, cut):
    """HyperTile cuts the queries into tiles along the rows; the host reads keys as equally many rows."""
    q, k, v = qkv(2 * 3, tokens=24)
    tiles = [x.reshape(12, 12, WIDTH) for x in (q, k, v)]
    given = [tiles[0], k, v] if cut == "queries" else tiles
    out = layer(call_of(None, None), csa(), given, own)
    for tile in range(2):
        same = [x[tile::2] for x in tiles]
        assert off(out[tile::2], expected(same, 2, [ALL] * 2, range(3))) < 1e-12


def test_steps_before_the_first_are_skipped_and_layers_of_a_step_share_their_draws():
    tensors = qkv(3)
    opened = ScheduledPatch(csa(skip=2), 5.0, 0.0)

    def run(step, block=("output", 1)):
        return LayerAttention((opened,), call_of(None, step=step), host, None)(*tensors, options(block))

    plain = attend(*tensors, HEADS)
    assert [torch.equal(run(step), plain) for step in range(4)] == [True, True, False, False]
    assert torch.equal(run(2), run(2, ("output", 5))) and off(run(2), run(3)) > 1e-3


def test_the_published_schedule_leaves_layers_out_by_its_probabilities():
    tensors = qkv(3, tokens=4)
    plain = attend(*tensors, HEADS)

    def left_out(step):
        patch = csa(schedule="published", rate=1.0)
        call, layers = call_of(None, step=step, steps=10), [options(("output", n // 10), n % 10) for n in range(300)]
        return sum(torch.equal(layer(call, patch, tensors, layer_options=each), plain) for each in layers) / 300

    assert 0.22 < left_out(3) < 0.38 and 0.04 < left_out(4) < 0.17


def test_the_published_schedule_draws_tokens_by_chance():
    tensors = qkv(3)
    subsets = [sample_tokens(4, 9, image, 24, 0.5, bernoulli=True) for image in range(3)]
    layers = [options(("output", n), 0) for n in range(4)]
    results = [layer(call_of(None, step=9), csa(schedule="published"), tensors, layer_options=each) for each in layers]
    assert min(off(result, masked(*tensors, subsets, ALL)) for result in results) < 1e-12


def test_samples_are_drawn_once_for_all_layers_of_a_resolution(monkeypatch):
    from storyloom.attention import consistent

    drawn = []

    def noted(*key, **kwargs):
        drawn.append(key)
        return sample_tokens(*key, **kwargs)

    monkeypatch.setattr(consistent, "sample_tokens", noted)
    call, patch = call_of(None, None), csa()
    for tokens in (24, 24, 6, 6):
        layer(call, patch, qkv(6, tokens))
    assert drawn == [(4, 1, image, tokens, 0.5) for tokens in (24, 6) for image in range(3)]


def test_of_two_nodes_the_one_nearer_to_the_sampler_counts():
    first, second = csa(0.2), csa(0.7)
    assert first.combine(second) is second
    assert csa(0.0).neutral and not first.neutral


def test_frames_share_when_somebody_is_in_both_or_nobody_knows():
    fox, both, empty, unknown = (Image(0, c, 0) for c in (FOX, BOTH, NOBODY, None))
    assert fox.shares_a_character(both) and unknown.shares_a_character(unknown)
    assert not empty.shares_a_character(empty) and not fox.shares_a_character(empty)
    assert batch_images(story(FOX, CROW, frames=(3, 8)), [1, 0]) == [Image(8, CROW, 1), Image(3, FOX, 0)]
    assert batch_images(None, [2]) == [Image(2, None, 2)]


def test_steps_are_known_by_the_nearest_noise_level():
    sigmas = (10.0, 5.0, 1.0)
    assert [nearest_step(sigma, sigmas) for sigma in (14.0, 10.0, 8.0, 7.0, 5.0, 1.1, 0.0)] == [0, 0, 0, 1, 1, 2, 2]
    assert nearest_step(3.0, ()) == 0


def test_the_view_of_a_call_carries_step_and_story():
    run = story(FOX)
    sampler = SamplerCall(0.5, {}, None, 3, 8, run)
    call = read_call({KEY: sampler, "uuids": ["a"], "cond_or_uncond": [0]}, torch.zeros(1, 4, 0, 0))
    assert (call.step, call.steps, call.story) == (3, 8, run)


@pytest.mark.parametrize(
    "patch, run, images, reason",
    [
        (csa(), None, 1, "needs at least 2 images in the batch, got 1"),
        (csa(), story(FOX, CROW, NOBODY), 3, "no image shares a character with another one"),
        (
            csa(anchors=1),
            story(NOBODY, FOX, FOX),
            3,
            "no image shares a character with one of the first 1 ",
        ),
        (csa(), story(FOX, CROW, BOTH), 3, None),
        (csa(), None, 2, None),
    ],
)
def test_a_run_in_which_nothing_can_be_shared_says_why(patch, run, images, reason):
    assert re.search(reason or "^None$", str(patch.no_effect_reason(run, images)))
