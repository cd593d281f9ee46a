"""Every patch of the pack in every kind of surroundings that a graph may have.

Each cell is drawn by the host's own executor: the result is finite and not that of the graph without the patch. All
patches together are drawn twice in every column, and each alone where there is nothing else: the same to the last bit.
With neutral settings it is the graph without them to the last bit, and so is that graph after the patched ones. REFUSED
are the cells that are an error instead. `docs/robustness.md` has the table.
"""

from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from company import attention_couple, deep_cache, row_by_row, smoothed_energy, tiled
from story_graphs import NEWER_TOO, build, call, context_windows, controlled, csa, distance, freeu, ipca, lora, sample
from story_makers import apply, maker_of, someone, weights_of
from tiny_models import SDXL, tiny_model

from storyloom.benchmarks.common import fused_attention

SIZE, LOADER = (64, 64), "TestSingle"
FRAMES = 3
BATCH, ANCHORS = 2, 1
"""Images of a batch in the row of split stories, and how many of them are anchors."""
SPLIT = "csa with anchors, split"

ROWS = {
    "ipca": (ipca, {}, {"identity_weight": 1.0}),
    "csa": (csa, {}, {"sampling_rate": 0.0}),
    SPLIT: (csa, {"anchors": ANCHORS}, {"sampling_rate": 0.0}),
    "freeu": (freeu, {}, dict.fromkeys(("b1", "b2", "s1", "s2"), 1.0)),
    "storymaker": (None, {}, {"token_strength": 0.0, "lora_strength": 0.0}),
    "all": (None, {}, {}),
}
"""Patch: what adds its node to a graph, its settings, and those that change nothing."""
DRAWN = ["all"] if NEWER_TOO else list(ROWS)
"""Rows that are drawn: on a second version of ComfyUI all patches together alone."""


def texts(graph, parts, words="a lighthouse"):
    return graph.add("CLIPTextEncode", clip=parts["clip"], text=words)()


def combined(graph, parts, story):
    both = graph.add("ConditioningCombine", conditioning_1=story, conditioning_2=texts(graph, parts))
    return {"positive": both()}


def under_lora(graph, host, parts):
    return {"model": lora(graph, host, parts["model"])}


def under_controlnet(graph, host, parts):
    return controlled(graph, host, parts, graph.add("EmptyImage", width=64, height=64, batch_size=1, color=0x3366CC)())


def hints_of_all_frames(graph, host, parts):
    hints = call(graph, host, lambda _: torch.rand(FRAMES, 64, 64, 3, generator=torch.Generator().manual_seed(4)), "")
    return controlled(graph, host, parts, hints)


def area(graph, host, parts):
    half = {"width": 0.5, "height": 1.0, "x": 0.0, "y": 0.0, "strength": 1.0}
    return combined(graph, parts, graph.add("ConditioningSetAreaPercentage", conditioning=parts["positive"], **half)())


def half(_):
    """A mask that is white on its left."""
    return torch.tensor([1.0, 0.0]).repeat_interleave(4).expand(1, 8, 8)


def mask(graph, host, parts):
    where = {"mask": call(graph, host, half, ""), "strength": 1.0, "set_cond_area": "mask bounds"}
    return combined(graph, parts, graph.add("ConditioningSetMask", conditioning=parts["positive"], **where)())


def beside_another_prompt(graph, host, parts):
    return combined(graph, parts, parts["positive"])


def averaged(graph, host, parts):
    sides = {"conditioning_to": parts["positive"], "conditioning_from": texts(graph, parts)}
    return {"positive": graph.add("ConditioningAverage", conditioning_to_strength=0.7, **sides)()}


def joined(graph, host, parts):
    sides = {"conditioning_to": parts["positive"], "conditioning_from": parts["negative"]}
    return {"positive": graph.add("ConditioningConcat", **sides)()}


def timesteps(graph, host, parts):
    def within(conditioning, start, end):
        return graph.add("ConditioningSetTimestepRange", conditioning=conditioning, start=start, end=end)()

    first, then = within(parts["positive"], 0.0, 0.5), within(texts(graph, parts), 0.5, 1.0)
    return {"positive": graph.add("ConditioningCombine", conditioning_1=first, conditioning_2=then)()}


def hooks(graph, host, parts):
    """A LoRA that acts for the story's conditioning alone."""
    lora(graph, host, parts["model"])
    hook = graph.add("CreateHookLora", lora_name="test.safetensors", strength_model=1.0, strength_clip=0.0)()
    settings = {"hooks": hook, "strength": 1.0, "set_cond_area": "default"}
    return {"positive": graph.add("ConditioningSetProperties", cond_NEW=parts["positive"], **settings)()}


def windows(graph, host, parts):
    return {"model": context_windows(graph, parts["model"], 2)}


def windows_that_keep_latents(graph, host, parts):
    return {"model": context_windows(graph, parts["model"], 2, latent_retain_index_list="0")}


def pag(graph, host, parts):
    return {"model": graph.add("PerturbedAttentionGuidance", model=parts["model"], scale=3.0)()}


def replaced(slot):
    """Surroundings in which somebody else has taken the attention of two blocks."""

    def halved(q, k, v, options):
        from comfy.ldm.modules.attention import attention_basic

        return 0.5 * attention_basic(q, k, v, options["n_heads"])

    def taken(model):
        model = model.clone()
        for key in (("output", 4), ("middle", 0, 1)):
            getattr(model, f"set_model_{slot}_replace")(halved, *key)
        return model

    return lambda graph, host, parts: {"model": call(graph, host, taken, parts["model"])}


def sag(graph, host, parts):
    return {"model": graph.add("SelfAttentionGuidance", model=parts["model"], scale=0.5, blur_sigma=2.0)()}


def merged_tokens(graph, host, parts):
    return {"model": graph.add("TomePatchModel", model=parts["model"], ratio=0.5)()}


def small_tiles(graph, host, parts):
    settings = {"tile_size": 32, "swap_size": 2, "max_depth": 1, "scale_depth": False}
    return {"model": graph.add("HyperTile", model=parts["model"], **settings)()}


def otherwise(function):
    """Surroundings in which another node calls the UNet in its own way."""
    return lambda graph, host, parts: {"model": call(graph, host, function, parts["model"])}


def coupled(model):
    """MODEL with another text for the right half, inside its cross-attention."""
    left = torch.tensor([1.0, 0.25]).repeat_interleave(4).expand(8, 8)
    text = torch.randn(1, 77, SDXL["context_dim"], generator=torch.Generator().manual_seed(6))
    return attention_couple([text], torch.stack([left, 1 - left]))(model)


def cfg_1(graph, host, parts):
    return {"cfg": 1.0}


def inpainting(graph, host, parts):
    def painted(latent):
        return {**latent, "samples": torch.randn(FRAMES, 4, 8, 8, generator=torch.Generator().manual_seed(5))}

    picture = call(graph, host, painted, parts["latent_image"])
    where = {"samples": picture, "mask": call(graph, host, half, "")}
    return {"latent_image": graph.add("SetLatentNoiseMask", **where)(), "denoise": 0.6}


def numbered_noise(graph, host, parts):
    many = graph.add("EmptyLatentImage", width=64, height=64, batch_size=8)()
    return {"latent_image": graph.add("LatentFromBatch", samples=many, batch_index=4, length=FRAMES)()}


def another_number_of_images(graph, host, parts):
    return {"latent_image": graph.add("EmptyLatentImage", width=64, height=64, batch_size=FRAMES + 1)()}


def precision(*dtypes):
    """Surroundings in which the model's weights are of this dtype, and its arithmetic too or of the second one."""
    made = cache(lambda: tiny_model("SDXL", SDXL, *dtypes))
    return lambda graph, host, parts: {"model": call(graph, host, lambda _: made(), "")}


def partly_loaded(graph, host, parts):
    return {}


def compiled(graph, host, parts):
    def compile_(model):
        from comfy_api.torch_helpers import set_torch_compile_wrapper

        model = model.clone()
        options = {"guard_filter_fn": lambda guards: ["transformer_options" not in guard.name for guard in guards]}
        set_torch_compile_wrapper(model=model, backend="eager", options=options)
        return model

    return {"model": call(graph, host, compile_, parts["model"])}


COLUMNS = {
    "nothing": lambda graph, host, parts: {},
    "LoRA": under_lora,
    "ControlNet": under_controlnet,
    "ControlNet, a hint per frame": hints_of_all_frames,
    "regional: area": area,
    "regional: mask": mask,
    "combined": beside_another_prompt,
    "averaged": averaged,
    "concatenated": joined,
    "timestep range": timesteps,
    "hooks": hooks,
    "context windows": windows,
    "context windows, retained latents": windows_that_keep_latents,
    "PAG": pag,
    "SEG-like": otherwise(smoothed_energy(("middle", 0))),
    "SAG": sag,
    "ToMe": merged_tokens,
    "HyperTile": small_tiles,
    "Attention Couple": otherwise(coupled),
    "three tiles per call": otherwise(tiled(3)),
    "one row per call": otherwise(row_by_row),
    "DeepCache-like": otherwise(deep_cache()),
    "another attn1": replaced("attn1"),
    "another attn2": replaced("attn2"),
    "cfg 1": cfg_1,
    "inpainting": inpainting,
    "batch_index": numbered_noise,
    "another number of images": another_number_of_images,
    "fp16 weights": precision(torch.float16, torch.float32),
    "bf16 weights and arithmetic": precision(torch.bfloat16),
    "partly loaded": partly_loaded,
    "torch.compile": compiled,
}

REFUSED = {(row, "another number of images"): "The story has 3 frames but the latent batch has 4" for row in ROWS}
REFUSED |= {
    (SPLIT, "another number of images"): "positive has 3 rows, but the story has 4 frames",
    (SPLIT, "ControlNet, a hint per frame"): "already has a ControlNet with several hint images",
}
REFUSED |= {
    (row, "one row per call"): "needs all images of the batch in one call of the model" for row in ("csa", SPLIT, "all")
}
"""(row, column): what the error says."""

NEVER_DRAWN = "another number of images"
"""A column that is refused without a patch too, by the conditioning (test_number_of_images.py)."""

EFFECT = 0.02
"""Least effect of a patch, in units of the largest value: more than any rounding of bfloat16."""


@contextmanager
def setting(host, column, models):
    """What must hold around the runs of a column, beside its nodes."""
    if column == "torch.compile":
        torch.compiler.reset()
        with fused_attention():  # the other kind asks for free memory, where compiling stops and begins anew
            yield
        torch.compiler.reset()
    elif column == "partly loaded":
        import comfy.model_management as management

        whole = management.LoadedModel.model_load

        def half_of_it(loaded, lowvram_model_memory=0, **settings):
            patcher = loaded.model
            room = max(1, patcher.model_size() // 2 - patcher.loaded_size())
            return whole(loaded, lowvram_model_memory=room, **settings)

        management.unload_all_models()
        models[0].detach()  # what was loaded for a graph that is gone stays, as ComfyUI has forgotten it
        management.LoadedModel.model_load = half_of_it
        try:
            yield
            assert models[0].model.model_lowvram, "the model was loaded whole"
        finally:
            management.LoadedModel.model_load = whole
            management.unload_all_models()
    else:
        yield


def patched(graph, host, maker, row, model, off=False):
    """The model with a row's patches."""
    fox = someone(host, 1)
    for name in ("ipca", "csa", "freeu", "storymaker") if row == "all" else (row,):
        add, settings, neutral = ROWS[name]
        settings = settings | (neutral if off else {})
        if name == "storymaker":
            model = apply(graph, host, model, maker, fox, **settings)
        else:
            model = add(graph, model, **settings)
    return model


def drawn(graph, parts, name, split=False, **changes):
    """A sampler whose latents are captured as `name`: of the whole story, or in batches that are joined again."""
    if not split:
        sample(graph, parts, name, **changes)
        return
    ends = parts | changes
    keys = {"latent": "latent_image", "positive": "positive", "negative": "negative"}
    links = {key: ends[value] for key, value in keys.items()}
    node = graph.add("StoryLoom_SplitBatches", batch_size=BATCH, anchors=ANCHORS, **links)
    cut = {"latent_image": node(0), "positive": node(1), "negative": node(2)}
    latents = sample(graph, parts, f"{name}, last batch", **changes | cut)
    graph.capture(**{name: graph.add("StoryLoom_JoinBatches", plan=node(5), latents=latents)(0)})


@pytest.fixture(scope="module")
def maker(host):
    """StoryMaker's adapter in the precision of most of the models here."""
    return maker_of(host, weights_of(host, torch.float32))


@pytest.fixture(scope="module")
def column(host, maker, single):
    """A function of a column's name and a type of graph: the latents of its cells by name, in three runs.

    before: the graph without a patch; cells: every row, and neutral settings; again: what is drawn a second time.
    """

    @cache
    def run(name, kind):
        def draw(*cells, fresh=name == "partly loaded"):
            graph = kind()
            parts = build(graph, size=SIZE, loader=LOADER, shared_noise=False)
            changes = COLUMNS[name](graph, host, parts)
            model = changes.get("model", parts["model"])
            for cell in cells:
                row = "all" if cell == "off" else cell
                mine = patched(graph, host, maker, row, model, cell == "off") if row in ROWS else model
                drawn(graph, parts, cell, cell == SPLIT, **{**changes, "model": mine})
            seen = vars(host.run(graph, fresh))
            return {cell: seen[cell]["samples"] for cell in cells}

        allowed = [row for row in DRAWN if (row, name) not in REFUSED]
        twice = allowed if name == "nothing" else allowed[-1:]
        with setting(host, name, single):
            before = draw("plain")
            cells = draw(*allowed, "off") if allowed else {}
            return SimpleNamespace(before=before["plain"], cells=cells, again=draw(*twice, "plain", fresh=True))

    return run


@pytest.mark.parametrize("name", COLUMNS)
@pytest.mark.parametrize("row", DRAWN)
def test_a_patch_acts_or_is_refused(host, graph, maker, column, row, name):
    if (row, name) in REFUSED:
        parts = build(graph, size=SIZE, loader=LOADER, shared_noise=False)
        changes = COLUMNS[name](graph, host, parts)
        model = patched(graph, host, maker, row, changes.get("model", parts["model"]))
        drawn(graph, parts, "x", row == SPLIT, **{**changes, "model": model})
        with pytest.raises(Exception, match=REFUSED[row, name]) as refused:
            host.run(graph)
        assert str(refused.value).endswith(".")
        return
    seen = column(name, type(graph))
    ours = seen.cells[row]
    assert ours.isfinite().all()
    assert torch.equal(seen.again.get(row, ours), ours)
    assert distance(ours, seen.before) > EFFECT


@pytest.mark.parametrize("name", [name for name in COLUMNS if name != NEVER_DRAWN])
def test_neutral_settings_and_earlier_runs_leave_no_trace(graph, column, name):
    seen = column(name, type(graph))
    assert torch.equal(seen.cells.get("off", seen.before), seen.before)
    assert torch.equal(seen.again["plain"], seen.before)


def test_stories_that_are_drawn_one_after_the_other_do_not_influence_each_other(host, graph, maker):
    def story(frames):
        graph_of_one = type(graph)()
        parts = build(graph_of_one, size=SIZE, loader=LOADER, frames=frames)
        model = patched(graph_of_one, host, maker, "all", parts["model"])
        sample(graph_of_one, parts, "drawn", model=model)
        return host.run(graph_of_one, fresh=True).drawn["samples"]

    one, other = "asleep\nwaving", "in a city\nat sea\nin a boat"
    first, second, again, second_again = (story(frames) for frames in (one, other, one, other))
    assert torch.equal(first, again) and torch.equal(second, second_again)
    assert distance(first, second[:2]) > EFFECT
