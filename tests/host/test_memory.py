"""CSA's memory in a real ComfyUI: its estimate knows what is gathered, and slices of it draw the same pictures."""

import pytest
import torch
from story_graphs import build, call, context_windows, csa, differ, distance, sample
from tiny_models import SDXL, tiny_model

FRAMES = "\n".join(f"picture {number}" for number in range(5))


@pytest.fixture
def loaded(monkeypatch):
    """(memory_required, minimum_memory_required) of every sampling run, as ComfyUI loads its models for them."""
    import comfy.model_management
    import comfy.sampler_helpers

    load, requests = comfy.model_management.load_models_gpu, []

    def load_models_gpu(models, memory_required=0, minimum_memory_required=None, **kwargs):
        if minimum_memory_required is not None:
            requests.append((memory_required, minimum_memory_required))
        return load(models, memory_required=memory_required, minimum_memory_required=minimum_memory_required, **kwargs)

    monkeypatch.setattr(comfy.model_management, "load_models_gpu", load_models_gpu)
    return requests


def largest(images, tokens=32 * 24, channels=32, itemsize=4):
    """Bytes of keys and values that the upper level of the tiny UNet gathers at 512 x 384 with a rate of a half."""
    return 2 * images * (tokens + (images - 1) * (tokens // 2)) * channels * itemsize


def test_the_estimate_for_a_run_has_room_for_what_is_gathered(host, graph, loaded):
    parts = build(graph, "EncodePerFrame", size=(512, 384), frames=FRAMES)
    parts["latent_image"] = graph.add("EmptyLatentImage", width=512, height=384, batch_size=5)()

    def windowed(model):
        return context_windows(graph, model, 3, causal_window_fix=False)

    models = {
        "plain": parts["model"],
        "csa": csa(graph, parts["model"]),
        "off": csa(graph, parts["model"], sampling_rate=0.0),
        "windows": windowed(parts["model"]),
        "windows, csa": csa(graph, windowed(parts["model"])),
        "csa, windows": windowed(csa(graph, parts["model"])),
    }
    base, room = graph.copy(), {}
    for name, model in models.items():
        graph = type(graph)(base)
        sample(graph, parts, name, model=model, steps=1, cfg=1.0)
        host.run(graph)
        (room[name],) = loaded
        loaded.clear()
    assert room["off"] == room["plain"]
    for name, plain, images in (("csa", "plain", 5), ("windows, csa", "windows", 3), ("csa, windows", "windows", 3)):
        two, one = (a - b for a, b in zip(room[name], room[plain], strict=True))
        column = room[plain][1] / 64
        assert largest(images) <= one <= largest(images) + column, name
        assert two == pytest.approx(2 * one), "one for each of positive and negative"


def test_the_figures_are_those_of_the_tokens_and_channels_of_the_layers(host, graph, models):
    """Level by level, as the UNet's own self-attention is called; the sides of the latents are odd."""
    parts, seen = build(graph, size=(72, 88)), set()

    def noted(model):
        def attention(q, k, v, options):
            seen.add((k.shape[2], k.shape[1]))
            return v

        model = model.clone()
        for part, number in blocks:
            model.set_model_attn1_replace(attention, part, number)
        return model

    patching = host.pack("nodes.patching")
    blocks = patching.blocks_of(models[0], "all")
    levels = patching.attention_levels(models[0], blocks)
    sample(graph, parts, "x", model=call(graph, host, noted, parts["model"]), steps=1)
    host.run(graph)
    assert seen == {(level.channels, level.tokens((11, 9))) for level in levels} and len(seen) == 2
    assert patching.attention_levels(models[0], [("middle", 0)]) == (levels[-1],)


def test_sdxl_needs_the_figures_that_the_readme_tells(host):
    cost, patching = host.pack("benchmarks.cost"), host.pack("nodes.patching")

    class Model:
        def get_model_object(self, name):
            return cost.sdxl_unet()

    levels = patching.attention_levels(Model(), cost.OUTPUT)
    assert {(level.channels, level.tokens((128, 128))) for level in levels} == {(640, 4096), (1280, 1024)}
    patch = host.pack("attention.consistent").ConsistentAttention(0.5, 0, 1, 0.0, 1.0, {}, 0, levels=levels)
    figures = [patch.gathers(None, images, (128, 128), 2, whole=True) / 2**20 for images in (4, 8, 16, 32)]
    assert figures == [100, 360, 1360, 5280]
    table = host.pack("benchmarks.layers").by_batch(cost.Size(), 0.5)
    assert [row[:2] for row in table] == [["4", "100"], ["8", "360"], ["16", "1360"], ["32", "5280"]]
    assert [row[2] for row in table] == ["100", "225", "255", "248"]


@pytest.mark.parametrize("frames", [8, 16])
def test_a_full_size_layer_of_a_large_batch_needs_little_more_than_the_limit(host, frames):
    layers, limit = host.pack("benchmarks.layers"), host.pack("runtime.memory").GATHER_LIMIT
    size = layers.Size(frames)
    peaks = {name: layers.peak_bytes(layer, 2, size) for name, layer in layers.layers(2, size, 0.5).items()}
    extra = peaks["CSA"] - peaks["ordinary"]
    results = 4096 * 640 * 2 * frames
    assert extra <= limit + results < layers.gathered_bytes(2, size, 0.5) / 2


@pytest.mark.parametrize("anchors", [0, 2])
def test_a_story_that_is_gathered_in_slices_is_the_same_story(host, graph, monkeypatch, anchors):
    """In double precision, so that no order of sums is mistaken for another story."""
    module, gathering, rows = host.pack("attention.consistent"), host.pack("attention.gathering"), []
    parts = build(graph, "EncodePerFrame", frames=FRAMES)
    precise = call(graph, host, lambda model: tiny_model("SDXL", SDXL, torch.float64), parts["model"])
    base = graph.copy()
    within = gathering.ImageGroup.within

    def noted(group, limit, k):
        parts = within(group, limit, k)
        rows.append([len(torch.arange(len(k))[part.rows]) for part in parts])
        return parts

    monkeypatch.setattr(gathering.ImageGroup, "within", noted)
    drawn = {}
    for name, limit in (("whole", module.GATHER_LIMIT), ("slices", 1)):
        monkeypatch.setattr(module, "GATHER_LIMIT", limit)
        graph = type(graph)(base)
        rows.clear()
        sample(graph, parts, "x", model=csa(graph, precise, anchors=anchors))
        sample(graph, parts, "plain", model=precise)
        drawn[name] = host.run(graph, fresh=True)
        assert {count for group in rows for count in group} == ({1} if limit == 1 else {5} if not anchors else {2, 3})
    assert distance(drawn["whole"].x["samples"], drawn["slices"].x["samples"]) < 1e-9
    assert differ(drawn["whole"].x, drawn["whole"].plain)
