"""StoryMaker's networks are on the device while they make keys and values, and never beside the UNet."""

import gc
import weakref

import pytest
import torch
from story_graphs import build, call, sample
from story_makers import TOKENS, apply, layers, loaded_for, someone, width_of
from test_storymaker import ONCE, TRIO, guider_of
from tiny_models import SDXL, tiny_model

RUN = {"steps": 2, "cfg": 5.0}


def numbers_of(casts):
    """How many numbers keys and values of these casts are in all layers, for the positive and the negative."""
    widths = sum(width_of(part, number) for part, number, _ in layers())
    return 2 * 2 * widths * sum(TOKENS * (1 + characters) for characters in casts)


@pytest.fixture
def seen(maker):
    """The models on the device at each computation of a projection."""
    resident = []

    def look(*_):
        import comfy.model_management

        loaded = [entry.model for entry in comfy.model_management.current_loaded_models]
        resident.append({patcher.model for patcher in loaded if patcher is not None})

    hooks = [module.register_forward_hook(look) for module in maker.adapter.projections.values()]
    yield resident
    for hook in hooks:
        hook.remove()


@pytest.fixture
def loads(maker, monkeypatch):
    """The models of every call of ComfyUI's loader that holds this adapter."""
    import comfy.model_management as management

    load, calls = management.load_models_gpu, []

    def noted(models, *args, **kwargs):
        if any(patcher.model is maker.adapter for patcher in models):
            calls.append([patcher.model for patcher in models])
        return load(models, *args, **kwargs)

    management.unload_all_models()
    monkeypatch.setattr(management, "load_models_gpu", noted)
    return calls


def watched(graph, host, maker, model, calls, stop=None):
    """The model, whose UNet calls leave what is loaded and what the run keeps in `calls`. stop: what the first raises.

    A patch's keys are (patch, layer, characters, positive) with a device behind what was used.
    """

    def watch(patcher):
        patcher = patcher.clone()

        def apply_model(executor, *args, **kwargs):
            if stop is not None:
                raise stop
            out = executor(*args, **kwargs)
            kept = args[5]["storyloom"].cache
            pairs = {key: made for key, made in kept.items() if len(key) == 4 and isinstance(made, tuple)}
            calls.append((len(loaded_for(maker)), pairs))
            return out

        patcher.add_wrapper_with_key("apply_model", "test", apply_model)
        return patcher

    return call(graph, host, watch, model)


def test_the_adapter_is_loaded_alone_and_gone_when_the_unet_is_called(host, graph, maker, models, seen, loads):
    parts, calls = build(graph, "EncodePerFrame", size=(64, 64), **TRIO), []
    people = [someone(host, seed) for seed in (1, 2, 3)]
    model = watched(graph, host, maker, apply(graph, host, parts["model"], maker, *people), calls)
    sample(graph, parts, "x", model=model, **RUN)
    host.run(graph)
    unet = models[0].model
    assert loads == [[maker.adapter]] and loaded_for(maker) == []
    assert seen and all(maker.adapter in loaded and unet not in loaded for loaded in seen)
    assert len(calls) == RUN["steps"] and {loaded for loaded, _ in calls} == {0}
    kept = calls[0][1]
    casts = {characters for _, _, characters, _ in kept}
    assert len(casts) == 4
    numbers = sum(part.numel() for pair in kept.values() for part in pair)
    assert numbers == numbers_of([len(characters) for characters in casts])
    assert all(calls[1][1][key] is pair for key, pair in kept.items())


def test_keys_and_values_are_kept_in_the_models_precision(host, graph, maker):
    parts, calls = build(graph, size=(64, 64)), []
    half = call(graph, host, lambda _: tiny_model("SDXL", SDXL, torch.float16, torch.float16), "")
    model = apply(graph, host, half, maker, someone(host, 1))
    sample(graph, parts, "x", model=watched(graph, host, maker, model, calls), **ONCE)
    host.run(graph)
    parts_kept = [part for pair in calls[0][1].values() for part in pair]
    assert {part.dtype for part in parts_kept} == {torch.float16}
    assert sum(part.nbytes for part in parts_kept) == 2 * numbers_of([1])


@pytest.mark.parametrize("changes", [{"start_percent": 1.0}, {"token_strength": 0.0}])
def test_a_patch_without_effect_loads_nothing(host, graph, maker, seen, loads, changes):
    parts = build(graph, size=(64, 64))
    model = apply(graph, host, parts["model"], maker, someone(host, 1), **changes)
    sample(graph, parts, "x", model=model, **ONCE)
    host.run(graph)
    assert loads == [] and seen == []


def test_a_guider_without_a_negative_has_nothing_made_for_one(host, graph, maker):
    parts, calls = build(graph, size=(64, 64)), []
    model = watched(graph, host, maker, apply(graph, host, parts["model"], maker, someone(host, 1)), calls)
    sampled = graph.add(
        "SamplerCustomAdvanced",
        noise=graph.add("RandomNoise", noise_seed=1)(),
        guider=guider_of(graph, "BasicGuider", parts, model, parts["negative"]),
        sampler=graph.add("KSamplerSelect", sampler_name="euler")(),
        sigmas=graph.add("BasicScheduler", model=model, scheduler="normal", steps=1, denoise=1.0)(),
        latent_image=parts["latent_image"],
    )
    graph.capture(x=sampled())
    host.run(graph)
    assert {positive for _, _, _, positive in calls[0][1]} == {True}


def test_nodes_in_a_row_share_one_load_and_other_adapters_come_after_each_other(host, graph, maker, weights, loads):
    other = host.pack("nodes.storymaker_patcher").storymaker_of(weights)
    parts, calls = build(graph, size=(64, 64)), []
    fox, owl = someone(host, 1), someone(host, 2)
    model = apply(graph, host, parts["model"], maker, fox, end_percent=0.9)
    model = apply(graph, host, model, other, owl, lora_strength=0.0)
    model = apply(graph, host, model, maker, owl, lora_strength=0.0)
    sample(graph, parts, "x", model=watched(graph, host, maker, model, calls), **ONCE)
    host.run(graph)
    assert loads == [[maker.adapter]] and loaded_for(other) == []
    assert len({patch for patch, *_ in calls[0][1]}) == 3


@pytest.mark.parametrize("case", ["story", "regions"])
def test_what_nobody_foresaw_is_made_during_the_run_and_is_the_same(host, graph, maker, loads, monkeypatch, case):
    parts = build(graph, "EncodePerFrame", size=(64, 64), **TRIO)
    people = [someone(host, seed) for seed in (1, 2, 3)]
    regions = [torch.tensor([[1.0, 0.0]])] if case == "regions" else []
    model = apply(graph, host, parts["model"], maker, *people, regions=regions)
    sample(graph, parts, "x", model=model, **RUN)
    precomputed = host.run(graph).x["samples"]
    monkeypatch.setattr(host.pack("runtime.sampling"), "precompute", lambda *_: {})
    assert torch.equal(host.run(graph, fresh=True).x["samples"], precomputed)
    assert len(loads) == 1 and loaded_for(maker) == []


def test_an_error_while_they_are_made_leaves_nothing_and_the_next_run_works(host, graph, maker, monkeypatch):
    parts = build(graph, size=(64, 64))
    sample(graph, parts, "x", model=apply(graph, host, parts["model"], maker, someone(host, 1)), **ONCE)
    right = host.run(graph).x["samples"]
    compute, made = maker.adapter.keys_values, []

    def fails(layer, tokens):
        if len(made) == 3:
            raise RuntimeError("out of memory")
        made.append(weakref.ref(pair := compute(layer, tokens)[0]))
        return pair, pair

    with monkeypatch.context() as broken:
        broken.setattr(maker.adapter, "keys_values", fails)
        with pytest.raises(Exception, match="out of memory"):
            host.run(graph, fresh=True)
    gc.collect()
    assert loaded_for(maker) == [] and len(made) == 3 and all(part() is None for part in made)
    assert torch.equal(host.run(graph, fresh=True).x["samples"], right)


def test_an_interrupted_run_lets_everything_go_and_the_next_one_works(host, graph, new_graph, maker, models):
    import comfy.model_management as management

    def started(graph, stop):
        parts, calls = build(graph, size=(64, 64)), []
        model = apply(graph, host, parts["model"], maker, someone(host, 1))
        sample(graph, parts, "x", model=watched(graph, host, maker, model, calls, stop), **ONCE)
        return calls

    calls = started(graph, None)
    right = host.run(graph).x["samples"]
    parts_kept = [weakref.ref(part) for pair in calls.pop()[1].values() for part in pair]
    gc.collect()
    assert parts_kept and all(part() is None for part in parts_kept), "they are of one run"
    stopped = new_graph()
    started(stopped, management.InterruptProcessingException())
    executor, outputs = host.new_executor(), host.validate(stopped)
    executor.execute(dict(stopped), "test", {}, outputs)
    assert "execution_interrupted" in [event for event, _ in executor.status_messages]
    assert loaded_for(maker) == []
    assert torch.equal(host.run(graph, fresh=True).x["samples"], right)


def test_with_little_memory_it_gives_the_same(host, graph, maker, monkeypatch):
    import comfy.model_management as management

    parts = build(graph, size=(64, 64))
    sample(graph, parts, "x", model=apply(graph, host, parts["model"], maker, someone(host, 1)), **ONCE)
    whole = host.run(graph).x["samples"]
    load, sizes = management.load_models_gpu, []

    def partly(models, *args, **kwargs):
        load(models, *args, **kwargs)
        for patcher in models:
            if patcher.model is maker.adapter:
                patcher.partially_unload(torch.device("cpu"), patcher.model_size() // 2)
                sizes.append(patcher.loaded_size() / patcher.model_size())

    monkeypatch.setattr(management, "load_models_gpu", partly)
    assert torch.equal(host.run(graph, fresh=True).x["samples"], whole)
    assert len(sizes) == 1 and 0 < sizes[0] < 1 and loaded_for(maker) == []
