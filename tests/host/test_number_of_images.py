"""A batch that is not the story's is refused without a StoryLoom node on the model, however the story is used."""

import pytest
import torch
from story_graphs import build, call, context_windows, controlled, differ, sample, watched

LOADER = "TestSingle"
MESSAGE = r'The story has 3 frames but the latent batch has {}\. Use "Empty story latent"'


def empty(graph, images):
    return graph.add("EmptyLatentImage", width=64, height=64, batch_size=images)()


def one_of(graph, latent):
    return graph.add("LatentFromBatch", samples=latent, batch_index=2, length=1)()


def one_by_one(graph, latent):
    return graph.add("RebatchLatents", latents=latent, batch_size=1)()


BATCHES = {
    "one": ("1 image", lambda graph, parts: empty(graph, 1)),
    "four": ("4 images", lambda graph, parts: empty(graph, 4)),
    "the third of the batch": ("1 image", lambda graph, parts: one_of(graph, parts["latent_image"])),
    "one by one": ("1 image", lambda graph, parts: one_by_one(graph, parts["latent_image"])),
}


@pytest.mark.parametrize("encode", ["EncodeOnePrompt", "EncodePerFrame"])
@pytest.mark.parametrize("batch", BATCHES)
def test_a_batch_of_another_size_is_refused_without_a_patch(host, graph, encode, batch):
    parts = build(graph, encode, loader=LOADER)
    counted, latent = BATCHES[batch]
    sample(graph, parts, "out", latent_image=latent(graph, parts))
    with pytest.raises(Exception, match=MESSAGE.format(counted)) as failed:
        host.run(graph)
    assert failed.value.node == "KSampler"


def text(graph, parts):
    return graph.add("CLIPTextEncode", clip=parts["clip"], text="a lighthouse")()


def in_an_area(graph, host, parts):
    where = {"width": 0.5, "height": 1.0, "x": 0.0, "y": 0.0, "strength": 1.0}
    area = graph.add("ConditioningSetAreaPercentage", conditioning=parts["positive"], **where)()
    return graph.add("ConditioningCombine", conditioning_1=text(graph, parts), conditioning_2=area)()


def masked(graph, host, parts):
    where = {"mask": call(graph, host, lambda _: torch.ones(1, 8, 8), ""), "strength": 1.0, "set_cond_area": "default"}
    return graph.add("ConditioningSetMask", conditioning=parts["positive"], **where)()


def in_the_first_steps(graph, host, parts):
    return graph.add("ConditioningSetTimestepRange", conditioning=parts["positive"], start=0.0, end=0.5)()


def averaged(graph, host, parts):
    sides = {"conditioning_to": parts["positive"], "conditioning_from": text(graph, parts)}
    return graph.add("ConditioningAverage", conditioning_to_strength=0.7, **sides)()


def lengthened(graph, host, parts):
    sides = {"conditioning_to": parts["positive"], "conditioning_from": parts["negative"]}
    return graph.add("ConditioningConcat", **sides)()


def controlled_by_a_hint(graph, host, parts):
    hint = graph.add("EmptyImage", width=64, height=64, batch_size=1, color=0x3366CC)()
    return controlled(graph, host, parts, hint)["positive"]


WAYS = [in_an_area, masked, in_the_first_steps, averaged, lengthened, controlled_by_a_hint]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_the_check_travels_with_the_conditioning(host, graph, way):
    parts = build(graph, loader=LOADER)
    sample(graph, parts, "out", positive=way(graph, host, parts), latent_image=empty(graph, 4))
    with pytest.raises(Exception, match=MESSAGE.format("4 images")):
        host.run(graph)


@pytest.mark.parametrize("side", ["positive", "negative"])
def test_either_side_of_guidance_is_checked(host, graph, side):
    parts = build(graph, loader=LOADER)
    sides = {"positive": text(graph, parts), "negative": text(graph, parts), side: parts["positive"]}
    sample(graph, parts, "out", latent_image=empty(graph, 2), **sides)
    with pytest.raises(Exception, match=MESSAGE.format("2 images")):
        host.run(graph)


def test_zeros_of_a_story_are_a_negative_for_any_number_of_images(host, graph):
    parts = build(graph, loader=LOADER)
    sample(graph, parts, "out", positive=text(graph, parts), latent_image=empty(graph, 4))
    assert host.run(graph).out["samples"].shape[0] == 4


def test_the_batches_of_a_split_story_are_checked(host, graph):
    parts = build(graph, loader=LOADER, frames="one\ntwo\nthree\nfour\nfive")
    inputs = {"latent": parts["latent_image"], "positive": parts["positive"], "negative": parts["negative"]}
    node = graph.add("StoryLoom_SplitBatches", batch_size=3, anchors=1, **inputs)
    sides = {"positive": node(1), "negative": node(2)}
    sample(graph, parts, "out", latent_image=node(0), **sides)
    assert host.run(graph).out["samples"].shape[0] == 3
    sample(graph, parts, "out", latent_image=empty(graph, 2), **sides)
    with pytest.raises(Exception, match=MESSAGE.format("2 images")):
        host.run(graph)


def plain(conditioning):
    """The same conditioning in an ordinary dict, which checks nothing."""
    return [[context, dict(info)] for context, info in conditioning]


def test_the_check_costs_no_call_and_changes_no_bit(host, graph):
    parts = build(graph, loader=LOADER)
    seen = {"checked": [], "plain": []}
    unchecked = {side: call(graph, host, plain, parts[side]) for side in ("positive", "negative")}
    for name, sides in {"checked": {}, "plain": unchecked}.items():
        sample(graph, parts, name, model=watched(graph, host, parts["model"], seen[name]), **sides)
    sample(graph, parts, "four", latent_image=empty(graph, 4), **unchecked)
    out = host.run(graph)
    assert torch.equal(out.checked["samples"], out.plain["samples"])
    assert [each["rows"] for each in seen["checked"]] == [each["rows"] for each in seen["plain"]] == [6, 6]
    assert out.four["samples"].shape[0] == 4, "an ordinary dict is not checked, as the README says of loaded ones"


def test_context_windows_over_the_batch_are_not_mistaken_for_another_batch(host, graph):
    parts = build(graph, loader=LOADER, frames="one\ntwo\nthree\nfour\nfive")
    windowed = context_windows(graph, parts["model"], 2)
    unchecked = {side: call(graph, host, plain, parts[side]) for side in ("positive", "negative")}
    sample(graph, parts, "checked", model=windowed)
    sample(graph, parts, "plain", model=windowed, **unchecked)
    sample(graph, parts, "other", model=windowed, positive=parts["negative"])
    out = host.run(graph)
    assert torch.equal(out.checked["samples"], out.plain["samples"]) and differ(out.checked, out.other)
    sample(graph, parts, "out", model=windowed, latent_image=empty(graph, 4))
    with pytest.raises(Exception, match="The story has 5 frames but the latent batch has 4 images"):
        host.run(graph)
