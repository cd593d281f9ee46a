"""A run that is interrupted or fails at any stage: the next one is right, and nothing of the broken one is left."""

import gc

import pytest
import torch
from story_graphs import build, call, csa, freeu, ipca, sample
from story_makers import apply, someone

STEPS = 3


@pytest.fixture(scope="module")
def fox(host):
    return someone(host, 1)


def story(graph, host, maker, fox, decode=None, patched=None):
    """A story with every patch of the pack, from script to page. patched: what another node does to the model."""
    parts = build(graph, size=(64, 64))
    model = apply(graph, host, parts["model"], maker, fox)
    if patched:
        model = call(graph, host, patched, model)
    latent = sample(graph, parts, "latent", model=freeu(graph, csa(graph, ipca(graph, model))), steps=STEPS)
    pictures = call(graph, host, decode or decoded, latent)
    page = {"columns": 0, "captions": True, "gap": 2, "caption_size": 0}
    graph.capture(page=graph.add("StoryLoom_Page", images=pictures, story=parts["story"], **page)())
    return graph


def decoded(latent):
    return latent["samples"][:, :3].movedim(1, -1).sigmoid().repeat_interleave(8, 1).repeat_interleave(8, 2)


@pytest.fixture(scope="module")
def undisturbed(host, new_graph, maker, fox):
    return host.run(story(new_graph(), host, maker, fox), fresh=True)


def on_call(number, act, function):
    """The function, with act() before its call of that number (1 is the first)."""
    calls = 0

    def wrapped(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == number:
            act()
        return function(*args, **kwargs)

    return wrapped


def ended(host, graph):
    """How a graph ended: the last message of an executor of its own, "execution_interrupted" or of another name."""
    executor = host.new_executor()
    executor.execute(dict(graph), "test", {}, host.validate(graph))
    return executor.status_messages[-1]


def interrupt():
    """What ComfyUI's button does, up to the next place where ComfyUI looks."""
    import comfy.model_management

    comfy.model_management.interrupt_current_processing(True)


def interrupt_now():
    """The button, at a place where ComfyUI looks at once: between steps."""
    import comfy.model_management

    interrupt()
    comfy.model_management.throw_exception_if_processing_interrupted()


STAGES = {
    "the text": ("nodes.conditioning", "encode_prompts", 1, interrupt),
    "the first step": ("runtime.run", "StoryRun.call_unet", 1, interrupt_now),
    "the last step": ("runtime.run", "StoryRun.call_unet", STEPS, interrupt_now),
    "a layer of a step": ("runtime.run", "LayerAttention.__call__", 30, interrupt_now),
    "the page": ("nodes.page", "comic_pages", 1, interrupt),
}


def disturb(host, monkeypatch, module, function, number, act):
    """Let act() happen before a function of the pack is called the so manieth time."""
    owner, _, name = function.rpartition(".")
    owner = getattr(host.pack(module), owner) if owner else host.pack(module)
    monkeypatch.setattr(owner, name, on_call(number, act, getattr(owner, name)))


@pytest.fixture
def next_is_right(host, new_graph, monkeypatch, undisturbed, models, maker, fox):
    """After the trouble: no run is alive, the model is as it was, and the same story comes out the same."""

    def check():
        monkeypatch.undo()
        gc.collect()
        run = host.pack("runtime.run").StoryRun
        assert not [thing for thing in gc.get_objects() if isinstance(thing, run)]
        model = models[0]
        assert not model.patches and not model.additional_models
        assert model.model_options["transformer_options"] == {}
        assert not any(kinds for kinds in model.wrappers.values())
        seen = host.run(story(new_graph(), host, maker, fox), fresh=True)
        assert torch.equal(seen.latent["samples"], undisturbed.latent["samples"])
        assert torch.equal(seen.page, undisturbed.page)

    return check


@pytest.mark.parametrize("stage", STAGES)
def test_after_an_interruption(host, graph, monkeypatch, maker, fox, next_is_right, stage):
    disturb(host, monkeypatch, *STAGES[stage])
    event, _ = ended(host, story(graph, host, maker, fox))
    assert event == "execution_interrupted"
    next_is_right()


def test_after_an_interruption_while_pictures_are_decoded(host, graph, maker, fox, next_is_right):
    def interrupted(latent):
        interrupt()
        return decoded(latent)

    event, _ = ended(host, story(graph, host, maker, fox, decode=interrupted))
    assert event == "execution_interrupted"
    next_is_right()


def test_after_an_exception_of_another_node_in_the_middle_of_sampling(host, graph, maker, fox, next_is_right):
    def fail():
        raise ZeroDivisionError("another node's mistake")

    def faulty(model):
        model = model.clone()
        model.set_model_attn1_patch(on_call(20, fail, lambda q, k, v, options: (q, k, v)))
        return model

    event, data = ended(host, story(graph, host, maker, fox, patched=faulty))
    assert (event, data["node_type"]) == ("execution_error", "KSampler")
    assert "another node's mistake" in data["exception_message"]
    next_is_right()


@pytest.mark.parametrize("number", [1, 12])
def test_after_no_memory_was_left_to_gather_what_others_show(
    host, graph, monkeypatch, maker, fox, next_is_right, number
):
    def full():
        raise torch.OutOfMemoryError("nothing is left")

    disturb(host, monkeypatch, "attention.gathering", "ImageGroup.of", number, full)
    event, data = ended(host, story(graph, host, maker, fox))
    assert (event, data["node_type"]) == ("execution_error", "KSampler")
    assert "nothing is left" in data["exception_message"]
    next_is_right()
