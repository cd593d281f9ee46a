"""Consistent self-attention on a real model: what it does to sampling, and what it leaves alone."""

from types import SimpleNamespace

import pytest
import torch
from story_graphs import (
    CAST,
    CAST_COLUMNS,
    build,
    call,
    check_other_company,
    close,
    context_windows,
    controlled,
    csa,
    dense_mask,
    differ,
    distance,
    ipca,
    log_bias,
    lora,
    sample,
    tag_of,
    watched,
)

SIZE = (96, 64)
ALL = [[1, 2], [0, 2], [0, 1]]
ONCE = {"steps": 1, "cfg": 1.0}


def test_it_equals_a_dense_mask_and_off_is_bit_identical_to_no_node(host, graph):
    parts = build(graph, size=SIZE)
    run = {"scheduler": "simple"}  # its second step of two is large enough to show which tokens are drawn there
    sample(graph, parts, "ours", model=csa(graph, parts["model"]), **run)
    sample(graph, parts, "masked", model=call(graph, host, dense_mask(host, ALL), parts["model"]), **run)
    sample(graph, parts, "plain", **run)
    sample(graph, parts, "rate_0", model=csa(graph, parts["model"], sampling_rate=0.0), **run)
    sample(graph, parts, "shut", model=csa(graph, parts["model"], start_percent=1.0), **run)
    seen = host.run(graph)
    assert close(seen.ours, seen.masked)
    assert differ(seen.ours, seen.plain)
    assert torch.equal(seen.plain["samples"], seen.rate_0["samples"])
    assert torch.equal(seen.plain["samples"], seen.shut["samples"])


def test_steps_are_counted_by_noise_levels_also_where_a_sampler_evaluates_twice_per_step(host, graph):
    parts = build(graph, size=(64, 80))
    settings = {"sampler_name": "heun", "cfg": 1.0}
    sample(graph, parts, "ours", model=csa(graph, parts["model"], skip_first_steps=1), **settings)
    sample(graph, parts, "masked", model=call(graph, host, dense_mask(host, ALL, skip=1), parts["model"]), **settings)
    sample(graph, parts, "plain", **settings)
    seen = host.run(graph)
    assert close(seen.ours, seen.masked)
    assert differ(seen.ours, seen.plain)


def test_who_is_in_a_frame_decides_who_looks_at_whom(host, graph):
    cast = {"identity": "[Fox] a fox\n[Crow] a crow", "frames": "[Fox] asleep\n[NC] a beach\n[Fox] waves"}
    parts = build(graph, encode="EncodePerFrame", size=SIZE, **cast)
    sources = [[2], [], [0]]
    sample(graph, parts, "ours", **ONCE, model=csa(graph, parts["model"]))
    sample(graph, parts, "masked", **ONCE, model=call(graph, host, dense_mask(host, sources), parts["model"]))
    sample(graph, parts, "plain", **ONCE)
    text = graph.add("CLIPTextEncode", clip=parts["clip"], text="a lighthouse")()
    untagged = {"positive": text, "negative": text, **ONCE}
    sample(graph, parts, "any", model=csa(graph, parts["model"]), **untagged)
    sample(graph, parts, "any_masked", model=call(graph, host, dense_mask(host, ALL), parts["model"]), **untagged)
    seen = host.run(graph)
    assert close(seen.ours, seen.masked) and close(seen.any, seen.any_masked)
    changed = [distance(a, b) > 2e-4 for a, b in zip(seen.ours["samples"], seen.plain["samples"], strict=True)]
    assert changed == [True, False, True]


def test_cfg_1_split_calls_and_a_second_positive_do_not_change_the_story(host, graph, monkeypatch):
    cast = {"identity": "[Fox] a fox\n[Crow] a crow", "frames": "[Fox] asleep\n[Crow] sits\n[Fox] waves"}
    parts = build(graph, encode="EncodePerFrame", size=SIZE, **cast)
    check_other_company(graph, host, parts, csa(graph, parts["model"]), monkeypatch)


@pytest.mark.parametrize("case", ["one image", "nobody in common", "skipped"])
def test_with_nothing_to_share_it_is_bit_identical_and_warns_once(host, graph, caplog, case):
    frames = "asleep" if case == "one image" else "asleep\n[NC] a beach" if case == "nobody in common" else "a\nb"
    parts = build(graph, encode="EncodePerFrame", size=(64, 64), frames=frames)
    settings = {"skip_first_steps": 1 if case == "skipped" else 0}
    sample(graph, parts, "plain", **ONCE)
    twice = csa(graph, csa(graph, parts["model"], **settings), **settings)
    sample(graph, parts, "ours", **ONCE, model=twice)
    seen = host.run(graph)
    assert torch.equal(seen.ours["samples"], seen.plain["samples"])
    (message,) = [r.getMessage() for r in caplog.records if "has no effect" in r.getMessage()]
    assert {
        "one image": "needs at least 2 images in the batch, got 1",
        "nobody in common": "no image shares a character with another one",
        "skipped": "none of its 1 steps after the first 1 (skip_first_steps)",
    }[case] in message


def test_anchors_are_the_same_to_the_last_bit_in_every_batch_of_one_size(host, graph):
    parts = build(graph, encode="EncodePerFrame", size=(64, 64), frames="one\ntwo\nthree\nfour\nfive\nsix")
    story = host.pack("prompts.conditioning").StoryCond

    def only(*numbers):
        def pick(conditioning):
            ((context, info),) = conditioning
            tag, rows = tag_of(host, info), list(numbers)
            tag = story(tuple(tag.rows[n] for n in rows), tag.length)
            return [[context[rows], {**info, "pooled_output": info["pooled_output"][rows], "storyloom": tag}]]

        return pick

    latent = graph.add("EmptyLatentImage", width=64, height=64, batch_size=4)()
    for name, numbers in (("first", (0, 1, 2, 3)), ("second", (0, 1, 4, 5))):
        positive = call(graph, host, only(*numbers), parts["positive"])
        negative = graph.add("ConditioningZeroOut", conditioning=positive)()
        ends = {"positive": positive, "negative": negative, "latent_image": latent, "cfg": 1.0}
        sample(graph, parts, name, model=csa(graph, parts["model"], anchors=2), **ends)
    sample(graph, parts, "plain", **ends)
    seen = host.run(graph)
    first, second, plain = (part["samples"] for part in (seen.first, seen.second, seen.plain))
    assert torch.equal(first[:2], second[:2])
    assert all(distance(a, b) > 2e-4 for a, b in zip(first[2:], second[2:], strict=True))
    assert all(distance(a, b) > 2e-4 for a, b in zip(second, plain, strict=True))


def test_context_windows_look_at_the_anchors_that_they_hold(host, graph):
    parts = build(graph, encode="EncodePerFrame", size=(64, 64), frames="one\ntwo\nthree")
    windows = context_windows(graph, parts["model"], 2, causal_window_fix=False)
    base = graph.copy()
    for name, model in (("plain", windows), ("ours", csa(graph, windows, anchors=1))):
        sample(graph, parts, name, **ONCE, model=model)
    seen = host.run(graph)
    changed = [distance(a, b) > 2e-4 for a, b in zip(seen.ours["samples"], seen.plain["samples"], strict=True)]
    assert changed == [False, True, False], "the anchor is alone, and the last window does not hold it"

    def misnamed(model):
        model = model.clone()
        window = SimpleNamespace(dim=0, index_list=[0, 1], causal_anchor_index=None)
        model.model_options["transformer_options"]["context_window"] = window
        return model

    graph = type(graph)(base)
    sample(graph, parts, "x", model=call(graph, host, misnamed, csa(graph, parts["model"])))
    with pytest.raises(Exception, match="has 2 images but the model is called with 3") as failed:
        host.run(graph)
    assert failed.value.node == "KSampler"


@pytest.mark.parametrize("anchors", [0, 1])
def test_images_in_a_context_window_and_the_one_before_it_are_known_by_their_number(host, graph, anchors):
    """Newer hosts put the image before a window in front of it, as a row that they drop afterwards."""
    parts = build(graph, encode="EncodePerFrame", size=(64, 64), frames="one\ntwo\nthree\nfour\nfive")
    sources = [range(anchors)] * 5 if anchors else [range(5)] * 5
    settings = {"steps": 1}
    windows, seen = context_windows(graph, parts["model"], 3), []
    sample(graph, parts, "ours", model=csa(graph, watched(graph, host, windows, seen), anchors=anchors), **settings)
    sample(graph, parts, "masked", model=call(graph, host, dense_mask(host, sources), windows), **settings)
    sample(graph, parts, "plain", model=windows, **settings)
    result = host.run(graph)
    assert [call["options"]["context_window"].index_list for call in seen] == [[0, 1, 2], [2, 3, 4]]
    assert close(result.ours, result.masked)
    changed = [distance(a, b) > 2e-4 for a, b in zip(result.ours["samples"], result.plain["samples"], strict=True)]
    assert changed == ([False, True, True, False, False] if anchors else [True] * 5)


def test_with_ipca_in_either_order(host, graph):
    parts = build(graph, size=(64, 64))
    both = csa(graph, ipca(graph, parts["model"]))
    turned = ipca(graph, csa(graph, parts["model"]))
    reference = call(graph, host, dense_mask(host, ALL), call(graph, host, log_bias(2.0), parts["model"]))
    for name, model in (("both", both), ("turned", turned), ("reference", reference)):
        sample(graph, parts, name, **ONCE, model=model)
    sample(graph, parts, "ipca", **ONCE, model=ipca(graph, parts["model"]))
    seen = host.run(graph)
    assert torch.equal(seen.both["samples"], seen.turned["samples"])
    assert close(seen.both, seen.reference)
    assert differ(seen.both, seen.ipca)


@pytest.mark.parametrize("sampler, cfg", [("euler", 5.0), ("heun", 1.0)])
def test_with_svr_and_ipca_on_a_cast_it_equals_both_references(host, graph, sampler, cfg):
    parts = build(graph, size=(64, 96), **CAST)
    settings = {"sampler_name": sampler, "cfg": cfg}
    weighted = call(graph, host, log_bias(2.0, columns=CAST_COLUMNS), parts["model"])
    sources = [[2, 3], [], [0, 3], [0, 2]]
    sample(graph, parts, "ours", model=csa(graph, ipca(graph, parts["model"])), **settings)
    sample(graph, parts, "reference", model=call(graph, host, dense_mask(host, sources), weighted), **settings)
    sample(graph, parts, "only_csa", model=csa(graph, parts["model"]), **settings)
    sample(graph, parts, "only_ipca", model=ipca(graph, parts["model"]), **settings)
    seen = host.run(graph)
    assert close(seen.ours, seen.reference)
    assert differ(seen.ours, seen.only_csa) and differ(seen.ours, seen.only_ipca)


def test_with_a_lora_before_or_after_it(host, graph):
    parts = build(graph, size=SIZE)
    before = lora(graph, host, parts["model"])
    sample(graph, parts, "before", **ONCE, model=csa(graph, before))
    sample(graph, parts, "after", **ONCE, model=lora(graph, host, csa(graph, parts["model"])))
    sample(graph, parts, "masked", **ONCE, model=call(graph, host, dense_mask(host, ALL), before))
    sample(graph, parts, "no_lora", **ONCE, model=csa(graph, parts["model"]))
    sample(graph, parts, "no_csa", **ONCE, model=before)
    seen = host.run(graph)
    assert close(seen.before, seen.masked) and close(seen.after, seen.masked)
    assert differ(seen.before, seen.no_lora) and differ(seen.before, seen.no_csa)


def test_with_a_controlnet_that_has_a_hint_for_every_image(host, graph):
    parts = build(graph, size=SIZE)
    hints = call(graph, host, lambda latent: torch.rand(3, 64, 96, 3), parts["latent_image"])
    sides = controlled(graph, host, parts, hints) | {"steps": 1}
    sample(graph, parts, "ours", **sides, model=csa(graph, parts["model"]))
    sample(graph, parts, "masked", **sides, model=call(graph, host, dense_mask(host, ALL), parts["model"]))
    sample(graph, parts, "no_csa", **sides)
    sample(graph, parts, "no_control", steps=1, model=csa(graph, parts["model"]))
    seen = host.run(graph)
    assert close(seen.ours, seen.masked)
    assert differ(seen.ours, seen.no_csa) and differ(seen.ours, seen.no_control)


@pytest.mark.parametrize("blocks", ["middle", "output"])
def test_with_perturbed_attention_guidance_on_the_same_and_on_other_blocks(host, graph, blocks):
    parts = build(graph, size=(64, 64))

    def pag(model):
        return graph.add("PerturbedAttentionGuidance", model=model, scale=3.0)()

    masked = call(graph, host, dense_mask(host, ALL, blocks=(blocks,)), pag(parts["model"]))
    sample(graph, parts, "before", steps=1, model=csa(graph, pag(parts["model"]), blocks=blocks))
    sample(graph, parts, "after", steps=1, model=pag(csa(graph, parts["model"], blocks=blocks)))
    sample(graph, parts, "reference", steps=1, model=masked)
    sample(graph, parts, "no_pag", steps=1, model=csa(graph, parts["model"], blocks=blocks))
    seen = host.run(graph)
    assert close(seen.before, seen.reference) and close(seen.after, seen.reference)
    assert differ(seen.before, seen.no_pag)


def test_another_replacement_is_called_with_the_tokens_of_the_others_among_its_keys(host, graph):
    parts, keys = build(graph, size=(64, 64)), []

    def foreign(model):
        from comfy.ldm.modules.attention import attention_basic

        def attention(q, k, v, options):
            keys.append(k.shape[:2])
            return 0.5 * attention_basic(q, k, v, options["n_heads"])

        model = model.clone()
        model.set_model_attn1_replace(attention, "output", 4)
        return model

    reference = call(graph, host, dense_mask(host, ALL, gains={("output", 4): 0.5}), parts["model"])
    sample(graph, parts, "before", **ONCE, model=csa(graph, call(graph, host, foreign, parts["model"])))
    sample(graph, parts, "after", **ONCE, model=call(graph, host, foreign, csa(graph, parts["model"])))
    sample(graph, parts, "reference", **ONCE, model=reference)
    seen = host.run(graph)
    assert close(seen.before, seen.reference) and close(seen.after, seen.reference)
    assert keys == [(3, 16 + 2 * 8), (3, 16)] * 2, "it records, so it is called with its own tokens at the end"


def test_with_hypertile(host, graph):
    parts = build(graph, size=(128, 128))
    settings = {"tile_size": 32, "swap_size": 1, "max_depth": 1, "scale_depth": False}
    tiled = graph.add("HyperTile", model=parts["model"], **settings)()
    sample(graph, parts, "tiled", **ONCE, model=tiled)
    sample(graph, parts, "ours", **ONCE, model=csa(graph, tiled))
    sample(graph, parts, "few", **ONCE, model=csa(graph, tiled, sampling_rate=0.001))
    sample(graph, parts, "untiled", **ONCE)
    seen = host.run(graph)
    assert differ(seen.tiled, seen.untiled) and differ(seen.ours, seen.tiled)
    assert torch.equal(seen.few["samples"], seen.tiled["samples"])


def test_seeds_schedules_and_nodes_in_a_row(host, graph, models):
    parts = build(graph, size=(64, 64))
    model, _ = models
    before = str(model.wrappers), str(model.model_options)
    own = parts["model"]
    sample(graph, parts, "first", **ONCE, model=csa(graph, own))
    first = host.run(graph, fresh=True).first
    variants = {
        "again": csa(graph, own),
        "seed": csa(graph, own, seed=4),
        "rate": csa(graph, own, sampling_rate=0.25),
        "anchors": csa(graph, own, anchors=1),
        "published": csa(graph, own, schedule="published"),
        "published_again": csa(graph, own, schedule="published"),
        "blocks": csa(graph, own, blocks="output 0-2"),
        "in_a_row": csa(graph, csa(graph, own, sampling_rate=1.0)),
        "split": csa(graph, csa(graph, own, blocks="output 0-2"), blocks="output 3-5"),
    }
    for name, patched in variants.items():
        sample(graph, parts, name, **ONCE, model=patched)
    seen = vars(host.run(graph, fresh=True))
    for name in ("first", "again", "in_a_row", "split"):
        assert torch.equal(seen[name]["samples"], first["samples"]), name
    assert torch.equal(seen["published"]["samples"], seen["published_again"]["samples"])
    different = [first, *(seen[name] for name in ("seed", "rate", "anchors", "published", "blocks"))]
    assert all(differ(a, b) for i, a in enumerate(different) for b in different[:i])
    assert (str(model.wrappers), str(model.model_options)) == before


def test_blocks_that_are_not_there_are_refused(host, graph):
    parts = build(graph, size=(64, 64))
    sample(graph, parts, "x", model=csa(graph, parts["model"], blocks="input 0"))
    with pytest.raises(Exception, match='Blocks "input 0": "input 0" has no attention in this model, which') as failed:
        host.run(graph)
    assert failed.value.node == "StoryLoom_ConsistentSelfAttention"
