"""IPCA on a real model: what it does to sampling, and what it leaves alone."""

import pytest
import torch
from precision import CLOSE
from story_graphs import (
    CAST,
    CAST_COLUMNS,
    build,
    call,
    close,
    differ,
    distance,
    ipca,
    log_bias,
    sample,
    story_place,
    story_rows,
    tag_of,
    watched,
)


@pytest.mark.parametrize("weight", [2.0, 3.0, 1.25])
@pytest.mark.parametrize("sampler, cfg, size", [("euler", 5.0, (192, 128)), ("heun", 1.0, (128, 128))])
def test_it_equals_a_log_bias_on_the_identity_columns(host, graph, weight, sampler, cfg, size):
    parts = build(graph, size=size)
    settings = {"sampler_name": sampler, "cfg": cfg}
    sample(graph, parts, "ours", model=ipca(graph, parts["model"], identity_weight=weight), **settings)
    sample(graph, parts, "biased", model=call(graph, host, log_bias(weight), parts["model"]), **settings)
    sample(graph, parts, "plain", **settings)
    seen = host.run(graph)
    assert close(seen.ours, seen.biased)
    assert differ(seen.ours, seen.plain)


@pytest.mark.parametrize("weight", [2.0, 1.25])
def test_an_enhanced_identity_counts_as_it_is_in_each_frames_row(host, graph, weight):
    parts = build(graph, enhance_identity=True)
    sample(graph, parts, "ours", model=ipca(graph, parts["model"], identity_weight=weight))
    sample(graph, parts, "biased", model=call(graph, host, log_bias(weight), parts["model"]))
    sample(graph, parts, "alone")
    plain = build(graph)
    sample(graph, plain, "not_enhanced", model=ipca(graph, plain["model"], identity_weight=weight))
    seen = host.run(graph)
    assert close(seen.ours, seen.biased)
    assert differ(seen.ours, seen.alone) and differ(seen.ours, seen.not_enhanced)


@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_weight_1_and_a_window_that_never_opens_are_bit_identical_to_no_node(host, graph, sampler):
    parts = build(graph, size=(128, 192))
    sample(graph, parts, "plain", sampler_name=sampler)
    sample(graph, parts, "neutral", sampler_name=sampler, model=ipca(graph, parts["model"], identity_weight=1.0))
    shut = ipca(graph, parts["model"], start_percent=1.0)
    sample(graph, parts, "shut", sampler_name=sampler, model=shut)
    seen = host.run(graph)
    assert torch.equal(seen.plain["samples"], seen.neutral["samples"])
    assert torch.equal(seen.plain["samples"], seen.shut["samples"])


def test_a_window_acts_only_inside_it(host, graph):
    parts = build(graph)
    calls, late = [], ipca(graph, parts["model"], start_percent=0.5)
    sample(graph, parts, "late", steps=4, model=watched(graph, host, late, calls))
    plain = []
    sample(graph, parts, "plain", steps=4, model=watched(graph, host, parts["model"], plain))
    host.run(graph)
    equal = [torch.equal(a["out"], b["out"]) for a, b in zip(calls, plain, strict=True)]
    assert equal == [True, True, False, False]


def test_the_negative_and_an_ordinary_positive_are_left_alone(host, graph):
    parts = build(graph)
    other = graph.add("CLIPTextEncode", clip=parts["clip"], text="a lighthouse")()
    both = graph.add("ConditioningCombine", conditioning_1=parts["positive"], conditioning_2=other)()
    plain, patched = [], []
    settings = {"positive": both, "steps": 1}
    sample(graph, parts, "a", model=watched(graph, host, parts["model"], plain), **settings)
    sample(graph, parts, "b", model=watched(graph, host, ipca(graph, parts["model"]), patched), **settings)
    host.run(graph)
    (before,), (after,) = plain, patched
    kinds = before["options"]["cond_or_uncond"]
    assert sorted(kinds) == [0, 0, 1] and kinds == after["options"]["cond_or_uncond"]
    pairs = zip(before["out"].chunk(3), after["out"].chunk(3), strict=True)
    small, smaller, large = sorted((distance(a, b) for a, b in pairs), key=lambda change: change > CLOSE)
    assert max(small, smaller) < CLOSE < 2e-4 < large


def positive_result(host, graph, parts, **settings):
    """What the UNet says to the story's rows in the first step."""
    calls = []
    model = watched(graph, host, ipca(graph, parts["model"]), calls)
    sample(graph, parts, "x", steps=1, model=model, **settings)
    host.run(graph)
    return story_rows(calls)


def test_cfg_1_split_calls_and_a_second_positive_do_not_change_the_story(host, graph, monkeypatch):
    from comfy.model_patcher import ModelPatcher

    parts = build(graph)
    together, calls = positive_result(host, graph, parts)
    assert calls == 1
    alone, _ = positive_result(host, graph, parts, cfg=1.0)
    other = graph.add("CLIPTextEncode", clip=parts["clip"], text="a lighthouse by a very wide and very cold sea")()
    both = graph.add("ConditioningCombine", conditioning_1=other, conditioning_2=parts["positive"])()
    beside, _ = positive_result(host, graph, parts, positive=both)
    monkeypatch.setattr(ModelPatcher, "get_free_memory", lambda self, device: 0)
    split, calls = positive_result(host, graph, parts)
    assert calls == 2
    for result in (alone, beside, split):
        assert distance(together, result) < CLOSE


def test_repeated_contexts_of_unequal_length_do_not_change_the_story(host, graph):
    parts = build(graph)
    together, _ = positive_result(host, graph, parts)
    long = graph.add("CLIPTextEncode", clip=parts["clip"], text="a very long prompt " * 30)()
    calls = []
    model = watched(graph, host, ipca(graph, parts["model"]), calls)
    sample(graph, parts, "x", steps=1, model=model, negative=long)
    host.run(graph)
    result, count = story_rows(calls)
    assert count == 1 and calls[0]["context"] == 2 * 77
    assert distance(together, result) < CLOSE


def test_dual_cfg_and_perp_neg_find_the_story_wherever_the_guider_puts_it(host, graph):
    parts = build(graph)
    expected, _ = positive_result(host, graph, parts)
    calls = []
    model = watched(graph, host, ipca(graph, parts["model"]), calls)
    text = graph.add("CLIPTextEncode", clip=parts["clip"], text="a lighthouse")()
    dual = graph.add(
        "DualCFGGuider",
        model=model,
        cond1=parts["positive"],
        cond2=text,
        negative=parts["negative"],
        cfg_conds=4.0,
        cfg_cond2_negative=3.0,
        style="regular",
    )()
    perp = graph.add(
        "PerpNegGuider",
        model=model,
        positive=parts["positive"],
        negative=text,
        empty_conditioning=parts["negative"],
        cfg=5.0,
        neg_scale=1.0,
    )()
    for name, guider in (("dual", dual), ("perp", perp)):
        noise = graph.add("RandomNoise", noise_seed=7)()
        chosen = graph.add("KSamplerSelect", sampler_name="euler")()
        sigmas = graph.add("BasicScheduler", model=parts["model"], scheduler="normal", steps=1, denoise=1.0)()
        out = graph.add(
            "SamplerCustomAdvanced",
            noise=noise,
            guider=guider,
            sampler=chosen,
            sigmas=sigmas,
            latent_image=parts["latent_image"],
        )()
        graph.capture(**{name: out})
        calls.clear()
        host.run(graph)
        result, _ = story_rows(calls)
        assert distance(expected, result) < CLOSE, name
        del graph[str(len(graph))]
        assert any(kind != 0 for kind in calls[0]["options"]["cond_or_uncond"])


def test_concatenated_and_averaged_conditionings_keep_the_identity(host, graph):
    parts = build(graph)
    text = graph.add("CLIPTextEncode", clip=parts["clip"], text="at night")()
    another = build(graph, identity="at night", frames="moon\nstars\nfog")["positive"]
    longer = graph.add("ConditioningConcat", conditioning_to=parts["positive"], conditioning_from=another)()
    mixed = graph.add(
        "ConditioningAverage",
        conditioning_to=parts["positive"],
        conditioning_from=text,
        conditioning_to_strength=0.8,
    )()
    model = ipca(graph, parts["model"])
    for name, positive in (("concat", longer), ("average", mixed)):
        biased = call(graph, host, log_bias(2.0), parts["model"])
        sample(graph, parts, f"{name}_ours", positive=positive, model=model, cfg=1.0)
        sample(graph, parts, f"{name}_biased", positive=positive, model=biased, cfg=1.0)
        sample(graph, parts, f"{name}_plain", positive=positive, cfg=1.0)
    seen = vars(host.run(graph))
    for name in ("concat", "average"):
        assert close(seen[f"{name}_ours"], seen[f"{name}_biased"])
        assert differ(seen[f"{name}_ours"], seen[f"{name}_plain"])


def test_a_batch_of_frames_equals_single_runs(host, graph):
    parts = build(graph)
    sample(graph, parts, "batch", model=ipca(graph, parts["model"]))
    frame = host.pack("prompts.conditioning")

    def only(number):
        def pick(conditioning):
            (context, info), tag = conditioning[0], tag_of(host, conditioning[0][1])
            rows = frame.StoryCond((tag.rows[number],), tag.length)
            pooled = info["pooled_output"][number : number + 1]
            return [[context[number : number + 1], {**info, "pooled_output": pooled, "storyloom": rows}]]

        return pick

    for number in range(3):
        one = call(graph, host, only(number), parts["positive"])
        latent = graph.add("EmptyLatentImage", width=64, height=64, batch_size=1)()
        negative = graph.add("ConditioningZeroOut", conditioning=one)()
        changes = {"positive": one, "negative": negative, "latent_image": latent}
        sample(graph, parts, f"frame{number}", model=ipca(graph, parts["model"]), **changes)
    seen = vars(host.run(graph))
    single = torch.cat([seen[f"frame{number}"]["samples"] for number in range(3)])
    assert distance(seen["batch"]["samples"], single) < CLOSE


def test_frames_encoded_alone_keep_their_identity_too(host, graph):
    parts = build(graph, encode="EncodePerFrame", frames="asleep\nreading\n[NC] an empty beach")
    plain, patched = [], []
    sample(graph, parts, "a", steps=1, model=watched(graph, host, parts["model"], plain))
    sample(graph, parts, "b", steps=1, model=watched(graph, host, ipca(graph, parts["model"]), patched))
    host.run(graph)
    before, _ = story_rows(patched)
    place = story_place(patched[0])
    reference = plain[0]["out"].chunk(2)[place]
    changed = [distance(a, b) > 2e-4 for a, b in zip(before, reference, strict=True)]
    assert changed == [True, True, False], "the frame without a character must stay as it is"


@pytest.mark.parametrize("weight", [2.0, 1.25])
def test_every_frame_of_a_cast_keeps_its_own_identity_and_one_without_a_character_is_left_alone(host, graph, weight):
    parts = build(graph, **CAST)
    biased = call(graph, host, log_bias(weight, columns=CAST_COLUMNS), parts["model"])
    sample(graph, parts, "ours", model=ipca(graph, parts["model"], identity_weight=weight))
    sample(graph, parts, "biased", model=biased)
    sample(graph, parts, "plain")
    seen = host.run(graph)
    ours, plain = seen.ours["samples"], seen.plain["samples"]
    assert close(seen.ours, seen.biased)
    assert torch.equal(ours[1], plain[1]), "the frame without a character must stay as it is"
    assert all(distance(ours[row], plain[row]) > 2e-4 for row in (0, 2, 3))


def test_as_many_unet_calls_as_without(host, graph):
    parts = build(graph)
    plain, patched = [], []
    sample(graph, parts, "a", model=watched(graph, host, parts["model"], plain))
    sample(graph, parts, "b", model=watched(graph, host, ipca(graph, parts["model"]), patched))
    host.run(graph)
    assert [seen["rows"] for seen in plain] == [seen["rows"] for seen in patched]


def test_the_incoming_model_is_left_as_it_was_and_branches_do_not_leak(host, graph, models):
    parts = build(graph)
    model, _ = models
    wrappers, options = str(model.wrappers), str(model.model_options)
    again = type(graph)(graph)
    sample(graph, parts, "before")
    sample(graph, parts, "two", model=ipca(graph, parts["model"], identity_weight=2.0))
    sample(graph, parts, "four", model=ipca(graph, parts["model"], identity_weight=4.0))
    doubled = ipca(graph, ipca(graph, parts["model"]), identity_weight=2.0)
    sample(graph, parts, "twice", model=doubled)
    seen = host.run(graph)
    sample(again, parts, "after")
    after = host.run(again, fresh=True).after
    assert (str(model.wrappers), str(model.model_options)) == (wrappers, options)
    assert torch.equal(seen.before["samples"], after["samples"])
    assert differ(seen.two, seen.four)
    assert close(seen.twice, seen.four), "two nodes in a row multiply"


def test_blocks_narrow_it_down(host, graph):
    parts = build(graph)
    strings = ["all", "output", "input, middle", "output 0.1", "middle"]
    for number, blocks in enumerate(strings):
        sample(graph, parts, f"b{number}", model=ipca(graph, parts["model"], blocks=blocks))
    split = ipca(graph, ipca(graph, parts["model"], blocks="input, middle"), blocks="output")
    sample(graph, parts, "split", model=split)
    seen = vars(host.run(graph))
    results = [seen[f"b{number}"] for number in range(len(strings))]
    assert all(differ(a, b) for i, a in enumerate(results) for b in results[:i])
    assert close(seen["split"], seen["b0"])


@pytest.mark.parametrize("images", [1, 2, 4, 6])
def test_a_batch_that_does_not_fit_the_story_is_refused(host, graph, images):
    parts = build(graph)
    latent = graph.add("EmptyLatentImage", width=128, height=128, batch_size=images)()
    sample(graph, parts, "x", latent_image=latent, model=ipca(graph, parts["model"], identity_weight=1.0))
    with pytest.raises(Exception, match=f"story has 3 frames but the latent batch has {images}") as failed:
        host.run(graph)
    assert failed.value.node == "KSampler"


def test_a_model_node_without_a_story_warns_once_a_run(host, graph, caplog):
    parts = build(graph)
    text = graph.add("CLIPTextEncode", clip=parts["clip"], text="a lighthouse")()
    model = ipca(graph, parts["model"])
    sample(graph, parts, "x", positive=text, negative=text, model=model, steps=3)
    host.run(graph)
    assert len([r for r in caplog.records if "has no effect" in r.message]) == 1


def test_an_error_in_sampling_leaves_nothing_behind(host, graph):
    parts = build(graph)
    model = ipca(graph, parts["model"])
    sample(graph, parts, "before", model=model)
    before = host.run(graph).before

    def fail(patcher):
        patcher = patcher.clone()

        def stop(args):
            raise RuntimeError("stopped by a test")

        patcher.set_model_sampler_post_cfg_function(stop)
        return patcher

    sample(graph, parts, "broken", model=call(graph, host, fail, model))
    with pytest.raises(Exception, match="stopped by a test"):
        host.run(graph)
    again = type(graph)(list(graph.items())[:-3])
    assert torch.equal(host.run(again, fresh=True).before["samples"], before["samples"])


def test_the_same_seed_gives_the_same_picture_again_and_beside_other_nodes(host, graph):
    parts = build(graph)
    sample(graph, parts, "first", model=ipca(graph, parts["model"]))
    first = host.run(graph, fresh=True).first
    again = host.run(graph, fresh=True).first
    sample(graph, parts, "unrelated", seed=99, model=ipca(graph, parts["model"], identity_weight=3.0))
    beside = host.run(graph, fresh=True).first
    assert torch.equal(first["samples"], again["samples"])
    assert torch.equal(first["samples"], beside["samples"])
