"""Stories on several cards at once: ComfyUI gives each its own copy of the model, and every card some of the prompts.

Two names of the CPU stand for two cards.
"""

from threading import get_ident

import pytest
import torch
from story_graphs import build, call, close, csa, differ, ipca, sample
from story_makers import apply, loaded_for, someone
from test_storymaker import TRIO
from tiny_models import SDXL, tiny_model

OTHER = torch.device("cpu", 0)
RUN = {"steps": 2, "cfg": 5.0}


@pytest.fixture(autouse=True)
def several_cards(host):
    import comfy.model_patcher

    if not hasattr(comfy.model_patcher.ModelPatcher, "match_multigpu_clones"):
        pytest.skip("this ComfyUI samples on one card only")


def fresh(disable_dynamic=False):
    return tiny_model("SDXL", SDXL, torch.float64)


def spread(patcher):
    """As ComfyUI's node for several cards does it, for one more."""
    patcher = patcher.clone()
    patcher.cached_patcher_init = (fresh, ())
    other = patcher.deepclone_multigpu(new_load_device=OTHER)
    other.is_multigpu_base_clone = True
    patcher.set_additional_models("multigpu", [other])
    patcher.match_multigpu_clones()
    return patcher


def watched(graph, host, model, calls):
    """The model, whose calls leave (card, thread, conditionings) in `calls`."""

    def watch(patcher):
        patcher = patcher.clone()

        def apply_model(executor, *args, **kwargs):
            options = args[5]
            calls.append((options.get("multigpu_thread_device"), get_ident(), tuple(options["cond_or_uncond"])))
            return executor(*args, **kwargs)

        patcher.add_wrapper_with_key("apply_model", "test", apply_model)
        return patcher

    return call(graph, host, watch, model)


def patched(graph, host, maker, model):
    """All methods, without StoryMaker's LoRA: the host merges that in single precision on a second card."""
    people = [someone(host, seed) for seed in (1, 2, 3)]
    model = ipca(graph, model)
    model = apply(graph, host, model, maker, *people, regions=[torch.tensor([[1.0, 0.0]])], lora_strength=0.0)
    return csa(graph, model)


@pytest.mark.parametrize("first", ["cards", "patches"])
def test_a_story_is_the_same_on_one_card_and_on_two(host, graph, maker, first):
    parts = build(graph, size=(64, 64), **TRIO)
    sample(graph, parts, "plain", **RUN)
    sample(graph, parts, "one", model=patched(graph, host, maker, parts["model"]), **RUN)
    calls = []
    if first == "cards":
        model = patched(graph, host, maker, call(graph, host, spread, parts["model"]))
    else:
        model = call(graph, host, spread, patched(graph, host, maker, parts["model"]))
    sample(graph, parts, "two", model=watched(graph, host, model, calls), **RUN)
    seen = host.run(graph)
    assert close(seen.one, seen.two) and differ(seen.plain, seen.two)
    assert {card for card, *_ in calls} == {torch.device("cpu"), OTHER}
    assert len({thread for _, thread, _ in calls}) == 2 and {chunks for *_, chunks in calls} == {(0,), (1,)}
    assert loaded_for(maker) == []


def test_more_prompts_than_cards(host, graph, maker):
    """A second positive and an area make four calls of two cards, which share what was made for the run."""
    parts = build(graph, size=(64, 64), **TRIO)
    other = graph.add("CLIPTextEncode", clip=parts["clip"], text="rain")()
    part = {"width": 0.5, "height": 1.0, "x": 0.5, "y": 0.0, "strength": 1.0}
    area = graph.add("ConditioningSetAreaPercentage", conditioning=other, **part)()
    both = graph.add("ConditioningCombine", conditioning_1=parts["positive"], conditioning_2=area)()
    model = patched(graph, host, maker, parts["model"])
    sample(graph, parts, "one", model=model, positive=both, **RUN)
    calls = []
    spread_out = watched(graph, host, call(graph, host, spread, model), calls)
    sample(graph, parts, "two", model=spread_out, positive=both, **RUN)
    seen = host.run(graph)
    assert close(seen.one, seen.two)
    assert {card for card, *_ in calls} == {torch.device("cpu"), OTHER}
