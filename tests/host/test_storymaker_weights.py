"""StoryMaker's weights: what is computed when, where they are meanwhile, and where its changes of the UNet land."""

from dataclasses import replace

import pytest
import torch
from precision import CLOSE, kept_double
from rounding import moved
from story_graphs import build, call, context_windows, distance, sample, watched
from story_makers import Reference, apply, layers, loaded_for, someone, weights_of
from test_storymaker import ONCE, TRIO

EFFECT = 1e-4
"""Far above rounding, and far below what StoryMaker does."""


@pytest.fixture
def counted(maker, monkeypatch):
    """How often tokens and every projection of them were asked for."""
    counts, tokens = {}, maker.adapter.tokens

    def count(name):
        counts[name] = counts.get(name, 0) + 1

    def counted(*args, **kwargs):
        count("tokens")
        return tokens(*args, **kwargs)

    monkeypatch.setattr(maker.adapter, "tokens", counted)
    hooks = [
        module.register_forward_hook(lambda *_, name=name: count(name))
        for name, module in maker.adapter.projections.items()
    ]
    yield counts
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("case", ["story", "windows"])
def test_tokens_keys_and_values_are_made_once_in_a_run_for_every_cast(host, graph, maker, counted, case):
    """TRIO has frames of four different casts; nobody is made for the frame of nobody."""
    parts = build(graph, "EncodePerFrame", size=(64, 64), **TRIO)
    model = apply(graph, host, parts["model"], maker, *(someone(host, seed) for seed in (1, 2, 3)))
    model = context_windows(graph, model, 3) if case == "windows" else model
    sample(graph, parts, "x", steps=3, sampler_name="heun", model=model)
    host.run(graph)
    assert counted.pop("tokens") == 4
    assert set(counted) == {f"{'_'.join(map(str, key))}_{which}" for key in layers() for which in "kv"}
    assert set(counted.values()) == {2 * 4}


def test_without_tokens_the_adapter_is_neither_loaded_nor_asked(host, graph, maker, counted):
    import comfy.model_management as management

    management.unload_all_models()
    parts = build(graph, size=(64, 64))
    model = apply(graph, host, parts["model"], maker, someone(host, 1), token_strength=0.0)
    sample(graph, parts, "x", **ONCE, model=watched(graph, host, model, calls := []))
    host.run(graph)
    assert loaded_for(maker) == [] and counted == {}
    assert "storyloom" not in calls[0]["options"], "what is in the weights costs nothing"


def test_partly_loaded_it_gives_the_same(host, weights):
    maker, cpu = host.pack("nodes.storymaker_patcher").storymaker_of(weights), torch.device("cpu")
    adapter, patcher = maker.adapter, maker.patcher
    people = [someone(host, 1), someone(host, 2)]

    def answers():
        tokens = adapter.tokens(people, 1.0, 1.0, cpu)
        return [*tokens, *(part for layer in layers() for part in adapter.keys_values(layer, tokens[0]))]

    whole = answers()
    states = []
    for load in (
        lambda: patcher.load(cpu, lowvram_model_memory=patcher.model_size() // 2),
        lambda: patcher.partially_unload(cpu, patcher.model_size() // 4),
        lambda: patcher.load(cpu, full_load=True),
        lambda: patcher.detach(),
    ):
        load()
        states.append(patcher.loaded_size())
        assert all(torch.equal(a, b) for a, b in zip(answers(), whole, strict=True))
    assert 0 < states[0] < states[2] == patcher.model_size()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_are_computed_with_in_the_models_precision(host, graph, dtype):
    weights = weights_of(host, dtype)
    maker, reference = host.pack("nodes.storymaker_patcher").storymaker_of(weights), Reference(host, weights)
    assert {value.dtype for value in maker.adapter.state_dict().values()} == {dtype}
    parts, fox = build(graph, size=(64, 64)), someone(host, 1)
    sample(graph, parts, "ours", **ONCE, model=apply(graph, host, parts["model"], maker, fox))
    for name, known in (("reference", reference), ("moved", Reference(host, nudged(weights)))):
        sample(graph, parts, name, **ONCE, model=call(graph, host, known.all_of((fox,)), parts["model"]))
    seen = host.run(graph)
    rounding = distance(seen.reference["samples"], seen.moved["samples"])
    assert distance(seen.ours["samples"], seen.reference["samples"]) < 16 * rounding < EFFECT


def nudged(weights):
    """Weights that are one unit in the last place of single precision away."""
    single = {name: moved(value.float()) for name, value in (weights.ppr | weights.lora).items()}
    image_kv = {key: tuple(moved(matrix.float()) for matrix in pair) for key, pair in weights.image_kv.items()}
    return replace(
        weights,
        ppr={name: single[name] for name in weights.ppr},
        lora={name: single[name] for name in weights.lora},
        image_kv=image_kv,
    )


def test_changes_of_the_model_are_the_edited_weights(host, maker, weights, models):
    """Every target of every layer, by the weights themselves."""
    import comfy.model_management

    comfy.model_management.unload_all_models()  # and with them what other tests have put into the weights
    model = models[0].clone()
    host.pack("nodes.storymaker").add_lora(model, maker.lora, 0.7)
    assert len(model.patches) == 8 * len(layers()) == len(weights.lora) // 2
    edited = Reference(host, weights).edits(0.7)(models[0]).model.diffusion_model.state_dict()
    plain = models[0].model.diffusion_model.state_dict()
    with kept_double():
        patched = {
            name.removeprefix("diffusion_model."): model.patch_weight_to_device(name, return_weight=True)
            for name in model.patches
        }
    changed = {name for name in edited if not torch.equal(edited[name], plain[name])}
    assert set(patched) == changed
    assert max(distance(edited[name], patched[name]) for name in changed) < CLOSE


def test_changes_that_find_no_layer_are_refused_and_named(host, graph, weights, caplog):
    storymaker = host.pack("nodes.storymaker_patcher")
    name, nowhere = next(iter(weights.lora)).partition(".processor")[0], "down_blocks.0.attentions.0"
    lost = {key.replace(name, nowhere): value for key, value in weights.lora.items()}
    maker = storymaker.StoryMaker(storymaker.storymaker_of(weights).patcher, lost)
    parts = build(graph, size=(64, 64))
    graph.capture(x=apply(graph, host, parts["model"], maker, someone(host, 1)))
    total = 8 * len(layers())
    with pytest.raises(Exception, match=f"Only {total - 4} of StoryMaker's {total} LoRA changes match") as refused:
        host.run(graph)
    assert refused.value.node == "StoryLoom_ApplyStoryMaker"
    q, k, v, out = (f"{nowhere}.processor.to_{target}" for target in ("q", "k", "v", "out"))
    assert f"Without a match: {q}, {k}, {v} and 1 more. Load an SDXL checkpoint." in str(refused.value)
    assert f"StoryMaker LoRA changes without a matching layer in this model: {q}, {k}, {v}, {out}" in caplog.messages


def test_all_560_changes_of_the_whole_file_find_their_layer_in_a_full_size_sdxl(host):
    import comfy.lora
    import comfy.model_base
    import comfy.supported_models

    storymaker, cost = host.pack("models.storymaker.weights"), host.pack("benchmarks.cost")
    config = comfy.supported_models.SDXL({**cost.SDXL, "dtype": torch.float16})
    config.unet_config |= cost.SDXL
    config.set_inference_dtype(torch.float16, None)
    model = config.get_model({}, "", device=torch.device("meta"))
    shapes = storymaker._adapter_shapes({})
    adapter = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    weights = storymaker.load_storymaker(adapter)
    names = comfy.lora.model_lora_keys_unet(model, {})
    patches = comfy.lora.load_lora(dict(weights.lora), names)
    assert len(weights.lora) == 2 * 560 and len(patches) == 560
    sizes = {name: value.shape for name, value in model.state_dict().items()}
    for name, patch in patches.items():
        up, down = patch.weights[:2]
        assert (up.shape[0], down.shape[1]) == sizes[name]
    widths = {key: k.shape[0] for key, (k, _) in weights.image_kv.items()}
    patcher = comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))
    assert host.pack("nodes.patching").attention_widths(patcher) == (widths, storymaker.CONTEXT)


@pytest.mark.parametrize(
    "family, reason", [("SD15", "SD15\\) are 768 wide"), ("SSD1B", "the 13 of this model \\(SSD1B\\) differ")]
)
def test_other_families_are_refused_by_name(host, graph, maker, family, reason):
    from tiny_models import SD15, SDXL, tiny_model

    smaller = SDXL | {"transformer_depth": [0, 0, 1, 1, 1, 1], "transformer_depth_middle": 0}
    layout = {"SD15": SD15, "SSD1B": smaller}[family]
    model = call(graph, host, lambda _: tiny_model(family, layout), "")
    graph.capture(x=apply(graph, host, model, maker, someone(host, 1)))
    with pytest.raises(Exception, match=reason) as refused:
        host.run(graph)
    assert refused.value.node == "StoryLoom_ApplyStoryMaker" and "load an SDXL checkpoint" in str(refused.value)
