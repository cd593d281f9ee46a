"""StoryLoom's patches beside everything else that a graph may put on a model."""

import pytest
import torch
from precision import CLOSE
from story_graphs import (
    IDENTITY_COLUMNS,
    LAYERS,
    SAMPLER,
    build,
    call,
    close,
    context_windows,
    controlled,
    differ,
    distance,
    ipca,
    log_bias,
    lora,
    sample,
    watched,
)
from tiny_models import SHALLOW, tiny_model

from storyloom.benchmarks.common import fused_attention

IPCA_WEIGHTS = [2.0, 1.5]


def foreign(seen, gain=0.5):
    """Another node's cross-attention: ordinary, times `gain`, and it notes every call."""

    def attention(q, k, v, options):
        from comfy.ldm.modules.attention import attention_basic

        seen.append((*options["block"], options["block_index"]))
        assert q.shape[0] == len(options["cond_or_uncond"]) * 3, "a replacement wants the whole batch"
        return gain * attention_basic(q, k, v, options["n_heads"])

    return attention


def put(attention, *keys):
    """A node that sets a cross-attention replacement at these keys."""

    def replace(model):
        model = model.clone()
        for key in keys:
            model.set_model_attn2_replace(attention, *key)
        return model

    return replace


@pytest.mark.parametrize("weight", IPCA_WEIGHTS)
@pytest.mark.parametrize("first", ["theirs", "ours"])
@pytest.mark.parametrize(
    "key, layers",
    [(("output", 1), [("output", 1, 0), ("output", 1, 1)]), (("output", 1, 1), [("output", 1, 1)])],
    ids=["block", "layer"],
)
def test_another_replacement_is_called_wherever_it_was_set(host, graph, weight, first, key, layers):
    parts, seen = build(graph), []
    theirs = put(foreign(seen), key)
    if first == "theirs":
        both = ipca(graph, call(graph, host, theirs, parts["model"]), identity_weight=weight)
    else:
        both = call(graph, host, theirs, ipca(graph, parts["model"], identity_weight=weight))
    sample(graph, parts, "both", model=both)
    reference = log_bias(weight, dict.fromkeys(layers, 0.5))
    sample(graph, parts, "reference", model=call(graph, host, reference, parts["model"]))
    sample(graph, parts, "without_ours", model=call(graph, host, theirs, parts["model"]))
    result = host.run(graph)
    assert set(seen) == set(layers)
    assert close(result.both, result.reference)
    assert differ(result.both, result.without_ours)


def test_a_layer_choice_inside_a_block_that_someone_owns(host, graph):
    parts, seen = build(graph), []
    theirs = call(graph, host, put(foreign(seen), ("output", 1)), parts["model"])
    sample(graph, parts, "one", model=ipca(graph, theirs, blocks="output 1.0"))
    sample(graph, parts, "none", model=theirs)
    result = host.run(graph)
    assert set(seen) == {("output", 1, 0), ("output", 1, 1)}
    assert differ(result.one, result.none)


def test_with_a_lora(host, graph):
    parts = build(graph)
    before = lora(graph, host, parts["model"])
    sample(graph, parts, "before", model=ipca(graph, before))
    sample(graph, parts, "after", model=lora(graph, host, ipca(graph, parts["model"])))
    sample(graph, parts, "reference", model=call(graph, host, log_bias(2.0), before))
    sample(graph, parts, "no_lora", model=ipca(graph, parts["model"]))
    result = host.run(graph)
    assert close(result.before, result.reference)
    assert close(result.after, result.reference)
    assert differ(result.before, result.no_lora)


def test_with_a_controlnet(host, graph):
    parts = build(graph)
    hint = graph.add("EmptyImage", width=128, height=128, batch_size=1, color=0x3366CC)()
    sides = controlled(graph, host, parts, hint)
    sample(graph, parts, "ours", model=ipca(graph, parts["model"]), **sides)
    sample(graph, parts, "reference", model=call(graph, host, log_bias(2.0), parts["model"]), **sides)
    sample(graph, parts, "no_ipca", **sides)
    sample(graph, parts, "no_control", model=ipca(graph, parts["model"]))
    result = host.run(graph)
    assert close(result.ours, result.reference)
    assert differ(result.ours, result.no_ipca)
    assert differ(result.ours, result.no_control)


@pytest.mark.parametrize("weight", IPCA_WEIGHTS)
def test_an_override_of_the_attention_kernel_sees_our_layers_too(host, graph, weight):
    """Other packs exchange the kernel by an entry of transformer_options."""

    def overridden(seen):
        def override(kernel, *args, **kwargs):
            seen.append(args[1].shape[1])
            return kernel(*args, **kwargs)

        def patch(model):
            model = model.clone()
            model.model_options["transformer_options"]["optimized_attention_override"] = override
            return model

        return patch

    parts = build(graph)
    plain, ours = [], []
    settings = {"steps": 1, "cfg": 1.0}
    sample(graph, parts, "a", model=call(graph, host, overridden(plain), parts["model"]), **settings)
    patched = ipca(graph, parts["model"], identity_weight=weight)
    sample(graph, parts, "b", model=call(graph, host, overridden(ours), patched), **settings)
    host.run(graph)
    times, others = weight.as_integer_ratio()
    counted = 77 * others + len(IDENTITY_COLUMNS) * (times - others)
    assert ours == [counted if keys == 77 else keys for keys in plain] and 77 in plain


def test_the_host_s_attention_precision_is_kept(host, monkeypatch):
    from comfy.ldm.modules import attention

    seen = []
    monkeypatch.setattr(attention, "optimized_attention", lambda *args, **kwargs: seen.append(kwargs))
    options = {"attn_precision": torch.float32}
    host.pack("nodes.patching").attend(None, None, None, 1, None, options)
    assert seen == [{"mask": None, "attn_precision": torch.float32, "transformer_options": options}]


@pytest.mark.parametrize("weight", IPCA_WEIGHTS)
def test_another_replacement_is_called_once_more_and_not_once_per_frame(host, graph, weight):
    """Descriptions at different places in every frame: one more call serves all that are of the same length."""
    frames = "[Fox] asleep\nvery cold, [Fox] sits\nat sea, on a boat, [Fox] waves"
    parts, seen = build(graph, encode="EncodePerFrame", identity="[Fox] a fox\n[Crow] a crow", frames=frames), []
    theirs = call(graph, host, put(foreign(seen, 1.0), ("middle", 0)), parts["model"])
    sample(graph, parts, "owned", steps=1, model=ipca(graph, theirs, identity_weight=weight))
    sample(graph, parts, "free", steps=1, model=ipca(graph, parts["model"], identity_weight=weight))
    result = host.run(graph)
    assert len(seen) == 3 * LAYERS["middle", 0], "the last one has the layer's own tokens, as it records"
    assert close(result.owned, result.free)


def test_with_perturbed_attention_guidance(host, graph):
    parts = build(graph)

    def pag(model):
        return graph.add("PerturbedAttentionGuidance", model=model, scale=3.0)()

    sample(graph, parts, "before", model=ipca(graph, pag(parts["model"])))
    sample(graph, parts, "after", model=pag(ipca(graph, parts["model"])))
    sample(graph, parts, "reference", model=call(graph, host, log_bias(2.0), pag(parts["model"])))
    sample(graph, parts, "no_pag", model=ipca(graph, parts["model"]))
    result = host.run(graph)
    assert close(result.before, result.reference)
    assert close(result.after, result.reference)
    assert differ(result.before, result.no_pag)


def test_a_replacement_that_appears_in_the_middle_of_a_run_is_kept(host, graph):
    """As PAG and its relatives do it: a block key written into the options of one more evaluation."""
    seen = []

    def guidance(attention):
        def patch(model):
            import comfy.model_patcher
            import comfy.samplers

            model = model.clone()

            def after(args):
                options = comfy.model_patcher.set_model_options_patch_replace(
                    args["model_options"].copy(), attention, "attn2", "middle", 0
                )
                (extra,) = comfy.samplers.calc_cond_batch(
                    args["model"], [args["cond"]], args["input"], args["sigma"], options
                )
                return args["denoised"] + (args["cond_denoised"] - extra)

            model.set_model_sampler_post_cfg_function(after)
            return model

        return patch

    parts = build(graph)
    sample(graph, parts, "ours", model=call(graph, host, guidance(foreign(seen)), ipca(graph, parts["model"])))
    sample(graph, parts, "plain", model=call(graph, host, guidance(foreign([])), parts["model"]))
    result = host.run(graph)
    assert set(seen) == {("middle", 0, 0), ("middle", 0, 1)}
    once_more = 2  # as it records
    assert len(seen) == 2 * once_more * SAMPLER["steps"], "theirs must not replace the story's own evaluation"
    assert differ(result.ours, result.plain)


def test_replacements_of_a_hook_are_kept(host, graph):
    """A conditioning's own transformer options arrive only with its UNet call."""
    import comfy.hooks

    parts, seen = build(graph), []

    def hooked(conditioning):
        hook = comfy.hooks.TransformerOptionsHook(
            transformers_dict={"patches_replace": {"attn2": {("output", 1, 0): foreign(seen)}}}
        )
        group = comfy.hooks.HookGroup()
        group.add(hook)
        return [[context, {**info, "hooks": group}] for context, info in conditioning]

    positive = call(graph, host, hooked, parts["positive"])
    settings = {"positive": positive, "cfg": 1.0}
    sample(graph, parts, "ours", model=ipca(graph, parts["model"]), **settings)
    reference = log_bias(2.0, {("output", 1, 0): 0.5})
    sample(graph, parts, "reference", model=call(graph, host, reference, parts["model"]), cfg=1.0)
    result = host.run(graph)
    assert set(seen) == {("output", 1, 0)}
    assert close(result.ours, result.reference)


@pytest.mark.parametrize("region", ["positive", "negative", "both"])
def test_regions_of_the_picture(host, graph, region):
    """For a region on one side the host copies its conditioning, tag and uuid included, to the other side."""
    parts = build(graph, size=(128, 128))
    text = graph.add("CLIPTextEncode", clip=parts["clip"], text="a lighthouse")()

    def left(conditioning):
        area = {"width": 64, "height": 128, "x": 0, "y": 0, "strength": 1.0}
        return graph.add("ConditioningSetArea", conditioning=conditioning, **area)()

    positive = left(parts["positive"]) if region != "negative" else parts["positive"]
    positive = graph.add("ConditioningCombine", conditioning_1=positive, conditioning_2=text)()
    negative = left(text) if region != "positive" else text
    negative = graph.add("ConditioningCombine", conditioning_1=negative, conditioning_2=text)()
    settings = {"positive": positive, "negative": negative, "steps": 1}
    ours, plain = [], []
    sample(graph, parts, "ours", model=watched(graph, host, ipca(graph, parts["model"]), ours), **settings)
    sample(graph, parts, "plain", model=watched(graph, host, parts["model"], plain), **settings)
    result = host.run(graph)
    assert differ(result.ours, result.plain)
    chunks = [
        (kind, distance(a, b) > 2e-4)
        for with_ours, without in zip(ours, plain, strict=True)
        for kind, a, b in zip(
            with_ours["options"]["cond_or_uncond"],
            with_ours["out"].chunk(len(with_ours["options"]["uuids"])),
            without["out"].chunk(len(with_ours["options"]["uuids"])),
            strict=True,
        )
    ]
    assert not any(changed for kind, changed in chunks if kind == 1), "the negative must stay as it is"
    assert any(changed for kind, changed in chunks if kind == 0)


@pytest.mark.parametrize("length", [2, 3])
def test_context_windows_over_the_batch_know_which_frame_is_which(host, graph, length):
    frames = "asleep\n[NC] an empty beach\nreading\n[NC] a lighthouse\nwaving"
    parts = build(graph, encode="EncodePerFrame", frames=frames)
    ours, plain = [], []
    run = {"cfg": 1.0, "steps": 1}
    sample(graph, parts, "whole", model=ipca(graph, parts["model"]), **run)
    sample(
        graph,
        parts,
        "windowed",
        model=watched(graph, host, context_windows(graph, ipca(graph, parts["model"]), length), ours),
        **run,
    )
    sample(
        graph, parts, "plain", model=watched(graph, host, context_windows(graph, parts["model"], length), plain), **run
    )
    result = host.run(graph)
    assert len(ours) == len(plain) > 1
    assert close(result.whole, result.windowed), "frames do not see each other here, so windows change nothing"
    touched = (result.windowed["samples"] - result.plain["samples"]).flatten(1).abs().amax(1) > 1e-3
    assert touched.tolist() == [True, False, True, False, True]


def test_a_model_that_was_compiled_without_the_patch_still_runs_it_and_follows_its_window(host, graph, caplog):
    """ComfyUI compiles without guards on transformer_options: the patch would never be called, or freeze at step 1."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    def compiled(model):
        model = model.clone()
        options = {"guard_filter_fn": lambda guards: ["transformer_options" not in guard.name for guard in guards]}
        set_torch_compile_wrapper(model=model, backend="eager", options=options)
        return model

    parts = build(graph)
    late = {"start_percent": 0.4}
    model = call(graph, host, lambda _: tiny_model("SDXL", SHALLOW, torch.float64), parts["model"])
    base = call(graph, host, compiled, model)
    plain, eager, patched = [], [], []
    sample(graph, parts, "a", steps=3, model=watched(graph, host, base, plain))
    sample(graph, parts, "b", steps=3, model=watched(graph, host, ipca(graph, model, **late), eager))
    sample(graph, parts, "c", steps=3, model=watched(graph, host, ipca(graph, base, **late), patched))
    torch.compiler.reset()
    with fused_attention():  # the other kind asks for free memory, where compiling stops and begins anew
        host.run(graph)
    torch.compiler.reset()
    expected = [distance(a["out"], b["out"]) for a, b in zip(plain, eager, strict=True)]
    changes = [distance(a["out"], b["out"]) for a, b in zip(plain, patched, strict=True)]
    assert expected[0] < CLOSE and expected[1] > 1e-4, expected
    assert changes == pytest.approx(expected, rel=0, abs=CLOSE)
    assert "torch.compile node is left out" not in caplog.text


def test_a_compiled_call_of_ours_is_never_frozen(host):
    """Whoever compiles with the guards on transformer_options dropped still gets the attention of the call at hand."""
    run, unet_call = host.pack("runtime.run"), host.pack("runtime.call")
    patch = host.pack("attention.identity").IdentityPreserving(2.0, 0.0, 1.0, {("middle", 0): None})
    window = host.pack("runtime.patch").ScheduledPatch(patch, 5.0, 0.0)
    seen = []

    def options(sigma):
        attention = run.LayerAttention((window,), unet_call.UNetCall(sigma, (), None), note, None)
        return {"patches_replace": attention, "n_heads": 1}

    def note(q, k, v, heads, mask, options):
        return q

    def layer(q, transformer_options):
        return transformer_options["patches_replace"](q * 2, q, q, transformer_options) + 1

    filtered = {"guard_filter_fn": lambda guards: ["transformer_options" not in guard.name for guard in guards]}
    torch.compiler.reset()
    compiled = torch.compile(layer, backend="eager", options=filtered)
    scheduled = host.pack("runtime.patch").ScheduledPatch
    original = scheduled.acts_at
    scheduled.acts_at = lambda self, sigma: seen.append(sigma) or original(self, sigma)
    try:
        for sigma in (9.0, 4.0):
            compiled(torch.ones(1, 2, 4), options(sigma))
    finally:
        scheduled.acts_at = original
        torch.compiler.reset()
    assert seen == [9.0, 4.0]
