"""The view of one UNet call, and how attention is put into it: whose rows, which layers, around whom."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch

from storyloom.attention.identity import IdentityPreserving
from storyloom.prompts.conditioning import StoryCond, StoryRow
from storyloom.prompts.tokens import StoryTokens
from storyloom.runtime.call import KEY, Chunk, Conditioning, SamplerCall, UNetCall
from storyloom.runtime.patch import ScheduledPatch, check_percents
from storyloom.runtime.reading import read_call, window_images
from storyloom.runtime.run import LayerAttention, StoryRun
from storyloom.runtime.sampling import StorySampling

HEADS = 4


def story(*identities, length=77, total=None):
    """A tag with one row per identity length (0: nobody is in the frame)."""
    rows = []
    for number, identity in enumerate(identities):
        own = range(1, 1 + identity)
        tokens = StoryTokens(own, (range(identity + 1, identity + 4),), identity + 4, length)
        rows.append(StoryRow(number, ("",), tokens, (own,) if identity else ()))
    return StoryCond(tuple(rows), total or length)


def conditioning(*identities, length=77):
    return Conditioning(story(*identities, length=length), length)


def ordinary(length=77):
    return Conditioning(None, length)


def call_of(*conditionings, images=3, rows=None):
    rows = rows or images
    chunks = (Chunk(range(i * rows, (i + 1) * rows), c) for i, c in enumerate(conditionings))
    return UNetCall(1.0, tuple(chunks), tuple(range(images)))


def latents(rows, height=0, width=0):
    return torch.zeros(rows, 4, height, width)


def numbers(rows):
    return list(range(rows.start, rows.stop)) if isinstance(rows, slice) else rows.tolist()


def columns_of(call, cut):
    """Row -> (columns, length) as the groups say."""
    by_row = {}
    for rows, columns, length in call.identity_groups(cut):
        for row in numbers(rows):
            assert row not in by_row
            by_row[row] = (columns, length)
    return by_row


def outside(call):
    rows = call.rows_without_identity()
    return [] if rows is None else numbers(rows)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_a_storys_rows_are_found_wherever_its_chunk_is(order):
    chunks = [conditioning(5, 5, 5), ordinary(), ordinary()]
    call = call_of(*(chunks[i] for i in order))
    place = order.index(0)
    ((rows, columns, length),) = call.identity_groups(cut=True)
    assert rows == slice(3 * place, 3 * place + 3) and columns == tuple(range(6)) and length == 77
    assert outside(call) == [row for row in range(9) if row // 3 != place]


def test_two_stories_in_one_call_keep_their_own_columns():
    call = call_of(conditioning(5, 5, 5), ordinary(), conditioning(2, 2, 2))
    by_row = columns_of(call, cut=True)
    assert [by_row[row][0] for row in (0, 2, 6, 8)] == [tuple(range(6))] * 2 + [tuple(range(3))] * 2
    assert outside(call) == [3, 4, 5]


def test_frames_with_different_identities_are_grouped_by_their_columns():
    call = call_of(ordinary(), conditioning(5, 2, 5))
    groups = {columns: rows for rows, columns, _ in call.identity_groups(cut=True)}
    assert groups[tuple(range(6))].tolist() == [3, 5] and groups[tuple(range(3))] == slice(4, 5) and len(groups) == 2


def test_a_frame_without_anybody_is_in_no_group():
    call = call_of(conditioning(5, 0, 5), ordinary())
    assert sorted(columns_of(call, cut=True)) == [0, 2]
    assert outside(call) == [1, 3, 4, 5]


def test_a_call_without_a_story_has_no_groups():
    call = call_of(ordinary(), ordinary())
    assert call.identity_groups(True) == call.identity_groups(False) == []
    assert outside(call) == list(range(6))


def test_a_call_of_a_story_alone_has_no_rows_outside():
    call = call_of(conditioning(5, 5, 5))
    assert call.rows_without_identity() is None


def test_repeated_contexts_are_cut_back_or_counted_in_every_repeat():
    call = call_of(conditioning(2, 2, 2), ordinary(154))
    assert call.context_length == 154
    assert columns_of(call, cut=True)[0] == ((0, 1, 2), 77)
    assert columns_of(call, cut=False)[0] == ((0, 1, 2, 77, 78, 79), None)


def test_contexts_are_repeated_to_their_least_common_multiple():
    call = call_of(conditioning(1, 1, 1, length=154), conditioning(1, 1, 1, length=231))
    assert call.context_length == 462
    assert columns_of(call, cut=True)[0] == ((0, 1), 154)
    by_row = columns_of(call, cut=False)
    assert by_row[0][0] == (0, 1, 154, 155, 308, 309) and by_row[3][0] == (0, 1, 231, 232)


def test_a_concatenated_conditioning_counts_the_first_part_only():
    """A tag travels with conditioning_to while its context grows by conditioning_from."""
    call = call_of(Conditioning(story(2, 2, 2), 154), ordinary(154))
    assert columns_of(call, cut=True)[0] == ((0, 1, 2), 154)
    assert columns_of(call, cut=False)[0] == ((0, 1, 2), None)


def test_windows_choose_the_rows_of_the_story():
    known = {(0, "a"): conditioning(1, 2, 3, 4), (1, "b"): ordinary()}
    window = SimpleNamespace(dim=0, index_list=[1, 3], causal_anchor_index=None)
    images = window_images({"context_window": window}, 2)
    assert images == (1, 3)
    options = {KEY: SamplerCall(1.0, known, images), "uuids": ["b", "a"], "cond_or_uncond": [1, 0]}
    call = read_call(options, latents(4))
    by_row = columns_of(call, cut=True)
    assert {row: len(columns) - 1 for row, (columns, _) in by_row.items()} == {2: 2, 3: 4}


@pytest.mark.parametrize("anchor, images", [(None, (1, 3)), (-1, (1, 3)), (0, (0, 1, 3)), (2, (2, 1, 3))])
def test_a_windows_anchor_comes_first(anchor, images):
    window = SimpleNamespace(dim=0, index_list=[1, 3], causal_anchor_index=anchor)
    assert window_images({"context_window": window}, len(images)) == images


def test_a_window_may_have_no_anchor_at_all():
    assert window_images({"context_window": SimpleNamespace(dim=0, index_list=[1])}, 1) == (1,)


@pytest.mark.parametrize("options", [{}, {"context_window": None}, {"context_window": SimpleNamespace(dim=2)}])
def test_without_a_window_over_the_batch_all_images_are_there(options):
    assert window_images(options, 3) is None


@pytest.mark.parametrize("rows", [1, 4])
def test_an_evaluation_of_other_images_than_the_story_s_is_refused_unless_all_are_alike(rows):
    unlike = UNetCall(1.0, (Chunk(range(rows), Conditioning(story(3, 5), 77)),), None)
    with pytest.raises(ValueError, match=f"called with {rows} images for a story of 2 frames"):
        unlike.identity_groups(cut=True)
    alike = UNetCall(1.0, (Chunk(range(rows), Conditioning(story(3, 3), 77)),), None)
    assert alike.identity_groups(cut=True) == [(slice(0, rows), (0, 1, 2, 3), 77)]


@pytest.mark.parametrize("rows", [1, 3, 4])
def test_a_window_of_another_length_is_refused(rows):
    window = SimpleNamespace(dim=0, index_list=[1, 3], causal_anchor_index=None)
    with pytest.raises(ValueError, match=f"has 2 images but the model is called with {rows}.*remove the context"):
        window_images({"context_window": window}, rows)


def test_tiles_of_a_story_whose_frames_are_alike_are_taken():
    call = call_of(conditioning(5, 5, 5), ordinary(), images=3, rows=12)
    assert [columns_of(call, cut=True)[row][0] for row in (0, 11)] == [tuple(range(6))] * 2
    assert outside(call) == list(range(12, 24))


def test_tiles_of_a_story_whose_frames_differ_are_refused():
    call = call_of(conditioning(5, 2, 5), images=3, rows=12)
    with pytest.raises(ValueError, match="called with 12 images for a story of 3 frames.*tiled sampling"):
        call.identity_groups(True)


def test_conditionings_are_known_by_number_and_uuid_and_strangers_are_ordinary():
    """The host gives a region's copy in the other list the same uuid."""
    tagged, number = conditioning(5, 5), [0, 1, 2, 1]
    sampler = SamplerCall(0.5, {(2, "a"): tagged, (1, "a"): ordinary(154)}, (0, 1))
    call = read_call({KEY: sampler, "uuids": ["stranger", "a", "a", "a"], "cond_or_uncond": number}, latents(8))
    assert [chunk.rows for chunk in call.chunks] == [range(0, 2), range(2, 4), range(4, 6), range(6, 8)]
    assert [chunk.conditioning.story for chunk in call.chunks] == [None, None, tagged.story, None]
    assert call.context_length == 154 and call.sigma == 0.5 and call.images == (0, 1)


def test_a_call_that_no_sampler_announced_has_no_view():
    assert read_call({}, latents(2)) is None
    assert read_call({"uuids": ["a"]}, latents(2)) is None


def attend(q, k, v, heads, mask=None, options=None):
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    logits = q @ k.mT / math.sqrt(q.shape[-1])
    logits = logits if mask is None else logits + mask
    return (torch.softmax(logits, dim=-1) @ v).transpose(1, 2).flatten(2)


def qkv(rows, columns=77):
    generator = torch.Generator().manual_seed(0)
    sizes = (5, columns, columns)
    return [torch.randn(rows, n, 32, generator=generator, dtype=torch.float64) for n in sizes]


def ipca(blocks, weight=2.0, first=10.0, last=0.0):
    return ScheduledPatch(IdentityPreserving(weight, 0.0, 1.0, blocks), first, last)


def installed(options, *patches, call=None):
    run = StoryRun(tuple(patches), attend)
    return run.installed(options, call or call_of(conditioning(7, 7, 7)))["patches_replace"]["attn2"]


def somebody(q, k, v, options):
    return attend(q, k, v, options["n_heads"])


def another(q, k, v, options):
    return somebody(q, k, v, options) + 1


def test_a_whole_block_takes_the_block_key():
    taken = installed({}, ipca({("output", 0): None, ("middle", 0): None}))
    assert set(taken) == {("output", 0), ("middle", 0)}
    assert all(isinstance(layer, LayerAttention) and layer.owner is None for layer in taken.values())


def test_a_whole_block_takes_the_layers_that_others_own_too():
    owners = {("output", 0, 1): somebody, ("output", 0): another, ("input", 4): somebody, ("output", 1, 0): somebody}
    taken = installed({"patches_replace": {"attn2": owners}}, ipca({("output", 0): None}))
    ours = {key for key, layer in taken.items() if isinstance(layer, LayerAttention)}
    assert ours == {("output", 0), ("output", 0, 1)}
    assert taken[("output", 0)].owner is another and taken[("output", 0, 1)].owner is somebody
    assert taken[("input", 4)] is somebody and taken[("output", 1, 0)] is somebody


def test_single_layers_take_their_own_keys_only():
    taken = installed({}, ipca({("output", 0): (1, 3)}))
    assert set(taken) == {("output", 0, 1), ("output", 0, 3)}


def test_a_single_layer_keeps_the_owner_of_its_block():
    owners = {("output", 0): somebody, ("output", 0, 3): another}
    taken = installed({"patches_replace": {"attn2": owners}}, ipca({("output", 0): (1, 3)}))
    assert taken[("output", 0)] is somebody
    assert taken[("output", 0, 1)].owner is somebody and taken[("output", 0, 3)].owner is another


def test_a_whole_block_and_single_layers_of_two_nodes_share_their_layers():
    whole, finer = ipca({("output", 0): None}), ipca({("output", 0): (1,)}, weight=3.0)
    taken = installed({}, whole, finer)
    assert taken[("output", 0)].patches == (whole,)
    assert taken[("output", 0, 1)].patches == (whole, finer)


def test_other_slots_and_the_given_options_stay_as_they_are():
    attn1, attn2 = {("output", 0): somebody}, {("output", 0): somebody}
    options = {"patches_replace": {"attn1": attn1, "attn2": attn2}, "n_heads": HEADS}
    run = StoryRun((ipca({("output", 0): None}),), attend)
    out = run.installed(options, call_of(ordinary()))
    assert out["patches_replace"]["attn1"] == attn1 and out["n_heads"] == HEADS
    assert options == {"patches_replace": {"attn1": attn1, "attn2": attn2}, "n_heads": HEADS}
    assert attn1 == attn2 == {("output", 0): somebody}
    untouched = {}
    run.installed(untouched, call_of(ordinary()))
    assert untouched == {}


def run_layer(call, patches, owner=None, q_k_v=None, options=None):
    layer = LayerAttention(tuple(patches), call, attend, owner)
    return layer(*q_k_v, options or {"n_heads": HEADS})


def test_an_owner_is_given_the_whole_batch_every_time():
    sizes = []

    def counting(q, k, v, options):
        sizes.append((q.shape[0], k.shape[0], v.shape[0], options))
        return somebody(q, k, v, options)

    call, options = call_of(ordinary(), conditioning(7, 7, 7)), {"n_heads": HEADS}
    run_layer(call, [ipca({}, weight=1.25)], counting, qkv(6), options)
    assert [size[:3] for size in sizes] == [(6, 6, 6)] * 3, "the third call is for a replacement that records"
    assert all(size[3] is options for size in sizes)


def test_an_owner_that_tells_rows_apart_still_does():
    """A replacement that acts on the rows of one conditioning, known by its place in the call."""

    def louder(q, k, v, options):
        out = somebody(q, k, v, options)
        out[3:] *= 10
        return out

    call, tensors = call_of(conditioning(7, 7, 7), ordinary()), qkv(6)
    ours = run_layer(call, [ipca({})], louder, tensors)
    plain = run_layer(call, [ipca({})], somebody, tensors)
    assert torch.equal(ours[:3], plain[:3]) and torch.equal(ours[3:], plain[3:] * 10)


@pytest.mark.parametrize("weight", [1.25, 2.0, 2.5])
def test_an_owner_gives_what_the_masked_host_gives(weight):
    call, tensors = call_of(ordinary(), conditioning(7, 2, 0)), qkv(6)
    with_owner = run_layer(call, [ipca({}, weight)], somebody, tensors)
    without = run_layer(call, [ipca({}, weight)], None, tensors)
    assert (with_owner - without).abs().max() < 1e-12
    assert (without - attend(*tensors, HEADS)).abs().max() > 1e-3


@pytest.mark.parametrize("owner", [None, somebody])
def test_swapped_split_and_lonely_chunks_give_the_same_rows(owner):
    tagged, negative, other = conditioning(7, 2, 7), ordinary(), ordinary()
    mine, theirs, third = ([x[i * 3 : i * 3 + 3] for x in qkv(9)] for i in range(3))
    tensors = {0: mine, 1: theirs, 2: third}
    results = []
    for order in ([0, 1], [1, 0], [0], [1, 0, 2], [2, 1, 0]):
        call = call_of(*((tagged, negative, other)[i] for i in order))
        stacked = [torch.cat(parts) for parts in zip(*(tensors[i] for i in order), strict=True)]
        results.append(run_layer(call, [ipca({})], owner, stacked).chunk(len(order))[order.index(0)])
    for result in results[1:]:
        assert (result - results[0]).abs().max() < 1e-12


@pytest.mark.parametrize("sigma, acts", [(11.0, False), (10.0, True), (5.0, True), (2.0, True), (1.9, False)])
def test_a_patch_acts_between_its_sigmas_with_both_ends(sigma, acts):
    call = UNetCall(sigma, call_of(conditioning(7, 7, 7)).chunks, (0, 1, 2))
    tensors = qkv(3)
    out = run_layer(call, [ipca({}, first=10.0, last=2.0)], None, tensors)
    assert torch.equal(out, attend(*tensors, HEADS)) is not acts


def test_patches_that_are_open_together_multiply_and_a_shut_one_is_left_out():
    call, tensors = call_of(conditioning(7, 7, 7)), qkv(3)
    both = run_layer(call, [ipca({}, 2.0), ipca({}, 1.5)], None, tensors)
    one = run_layer(call, [ipca({}, 2.0), ipca({}, 1.5, first=0.5)], None, tensors)
    assert (both - run_layer(call, [ipca({}, 3.0)], None, tensors)).abs().max() < 1e-12
    assert torch.equal(one, run_layer(call, [ipca({}, 2.0)], None, tensors))


def encoded(story=None, context=None, **info):
    """A conditioning as the host has it while it samples."""
    context = torch.ones(2, 77, 8) if context is None else context
    tag = {} if story is None else {"storyloom": story}
    return {**info, **tag, "model_conds": {"c_crossattn": SimpleNamespace(cond=context)}}


def test_an_evaluation_announces_its_conditionings_to_its_calls():
    tagged = story(7, 7)
    positive, text = encoded(tagged, uuid="p"), encoded(context=torch.ones(1, 154, 8), uuid="t")
    options = {"transformer_options": {"wrappers": {}}}
    seen = {}

    def executor(model, conds, x, timestep, model_options):
        seen.update(model_options["transformer_options"])
        return "result"

    x, sigma = torch.zeros(2, 4, 8, 8), torch.tensor([3.5, 3.5])
    run = StoryRun((), attend)
    assert run.evaluate(executor, None, [[positive, text], None, [text]], x, sigma, options) == "result"
    assert options == {"transformer_options": {"wrappers": {}}}
    call = seen[KEY]
    assert (call.sigma, call.images) == (3.5, None)
    assert {key: (c.story, c.length) for key, c in call.conditionings.items()} == {
        (0, "p"): (tagged, 77),
        (0, "t"): (None, 154),
        (2, "t"): (None, 154),
    }


def test_what_asks_for_the_picture_is_known_by_its_guiders_name_for_it():
    """Also in a copy that another node made, and where the host put a copy with the same uuid into the other list."""
    names = ("positive", "negative", "empty_negative_prompt", "middle", "cond_2")
    conds = {name: [encoded(uuid=name), encoded(uuid="region")] for name in names}
    marked, _ = sample([IdentityPreserving(2.0, 0.0, 1.0, {})], conds)
    groups = [*([dict(cond) for cond in group] for group in marked.values()), [encoded(uuid="stranger")]]
    options, seen = {"transformer_options": {}}, {}

    def executor(model, conds, x, timestep, model_options):
        seen.update(model_options["transformer_options"])

    StoryRun((), attend).evaluate(executor, None, groups, torch.zeros(2, 4, 8, 8), torch.ones(2), options)
    expected = dict(enumerate([True, False, False, False, True, False]))
    positives = {key: known.positive for key, known in seen[KEY].conditionings.items()}
    assert len(positives) == 11 and positives == {(number, uuid): expected[number] for number, uuid in positives}
    unknown = read_call(seen | {"uuids": ["nobody's"], "cond_or_uncond": [0]}, latents(2))
    assert unknown.chunks[0].conditioning.positive is False


def sample(patches, conds, images=2, sigmas=(10.0, 5.0, 0.0)):
    """A sampling run up to the sampler: the conditionings and the model options that it is given."""
    model_sampling = SimpleNamespace(percent_to_sigma=lambda percent: 10 * (1 - percent))
    original = {name: list(group) for name, group in conds.items()}
    guider = SimpleNamespace(
        conds=conds, original_conds=original, inner_model=SimpleNamespace(model_sampling=model_sampling)
    )
    given = {"model_options": {"transformer_options": {"wrappers": {"apply_model": {"other": ["theirs"]}}}}}
    seen = []
    sampling = StorySampling(tuple(patches), attend)
    sampling(lambda *args: seen.append(args), guider, torch.tensor(sigmas), given, None, torch.zeros(images, 4, 8, 8))
    assert given == {"model_options": {"transformer_options": {"wrappers": {"apply_model": {"other": ["theirs"]}}}}}
    ((guider, _, extra_args, *_),) = seen
    return guider.conds, extra_args["model_options"]["transformer_options"]["wrappers"]


def test_a_run_adds_its_wrappers_beside_those_of_others():
    _, wrappers = sample([IdentityPreserving(2.0, 0.0, 1.0, {})], {"positive": [encoded(story(7, 7))]})
    assert set(wrappers) == {"apply_model", "calc_cond_batch"}
    assert set(wrappers["apply_model"]) == {"other", "storyloom"}


def test_a_window_that_ends_before_it_starts_is_refused():
    for window in ((0.0, 1.0), (0.5, 0.5)):
        check_percents(*window)
    with pytest.raises(ValueError, match="start_percent 0.5 is after end_percent 0.2, so the patch would never act"):
        check_percents(0.5, 0.2)


def test_neutral_settings_add_nothing_to_a_run():
    _, wrappers = sample([IdentityPreserving(1.0, 0.0, 1.0, {})], {"positive": [encoded(story(7, 7))]})
    assert wrappers == {"apply_model": {"other": ["theirs"]}}


def test_a_conditioning_of_zeros_is_no_story():
    """ConditioningZeroOut keeps the tag."""
    tagged = story(7, 7)
    conds = {"positive": [encoded(tagged)], "negative": [encoded(tagged, torch.zeros(2, 77, 8))]}
    seen, _ = sample([IdentityPreserving(2.0, 0.0, 1.0, {})], conds)
    assert seen["positive"][0]["storyloom"] is tagged and "storyloom" not in seen["negative"][0]


@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("weight", [1.0, 2.0])
def test_a_batch_of_another_size_than_the_story_is_refused(images, weight):
    with pytest.raises(
        ValueError, match=f"story has 2 frames but the latent batch has {images} images?. .*Empty story"
    ):
        sample([IdentityPreserving(weight, 0.0, 1.0, {})], {"positive": [encoded(story(7, 7))]}, images)


def test_settings_without_effect_are_reported_once(caplog):
    sample([IdentityPreserving(2.0, 0.0, 1.0, {})], {"positive": [encoded()]})
    sample([IdentityPreserving(2.0, 0.6, 0.9, {})], {"positive": [encoded(story(7, 7))]})
    sample([IdentityPreserving(2.0, 0.0, 0.1, {})], {"positive": [encoded(story(7, 7))]})
    messages = (record.getMessage() for record in caplog.records)
    first, second = (message for message in messages if "has no effect" in message)
    assert "no conditioning comes from a StoryLoom encode node" in first
    assert "none of its 2 steps lies between start_percent 0.6 and end_percent 0.9" in second
