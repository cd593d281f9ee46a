"""A long story in batches is the same story."""

import pytest
import torch
from story_graphs import build, call, close, ipca, sample

FRAMES = "\n".join(["asleep in the snow", "reading on a train", "drinking tea", "waving", "in a city"])


def split(graph, parts, size=3, anchors=1, **inputs):
    keys = {"latent": "latent_image", "positive": "positive", "negative": "negative"}
    links = {name: parts[key] for name, key in keys.items()} | inputs
    return graph.add("StoryLoom_SplitBatches", batch_size=size, anchors=anchors, **links)


def join(graph, node, **inputs):
    return graph.add("StoryLoom_JoinBatches", plan=node(5), **inputs)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(("sampler", "encode"), [("euler", "EncodePerFrame"), ("heun", "EncodeOnePrompt")])
def test_batches_are_the_frames_of_one_run_in_story_order(host, graph, sampler, encode, shared):
    parts = build(graph, encode, size=(64, 96), frames=FRAMES, shared_noise=shared)
    model, settings = ipca(graph, parts["model"]), {"sampler_name": sampler}
    sample(graph, parts, "whole", model=model, **settings)
    node = split(graph, parts)
    cut = {"latent_image": node(0), "positive": node(1), "negative": node(2)}
    drawn = sample(graph, {**parts, **cut}, "last", model=model, **settings)
    graph.capture(joined=join(graph, node, latents=drawn)(0))
    result = host.run(graph)
    assert result.last["samples"].shape[0] == 3
    assert result.joined["samples"].shape == result.whole["samples"].shape
    assert close(result.joined, result.whole)
    assert result.joined["batch_index"] == ([0] * 5 if shared else [*range(5)])


def test_pictures_and_masks_go_along_and_come_back(host, graph):
    parts = build(graph, "EncodePerFrame", size=(64, 64), frames=FRAMES)
    shades = call(graph, host, lambda story: torch.rand(5, 8, 8, 3), parts["story"])
    masks = call(graph, host, lambda images: images[..., 0], shades)
    node = split(graph, parts, image=shades, mask=masks)
    back = call(graph, host, lambda mask: mask[..., None], node(4))
    joined, joined_masks = join(graph, node, images=node(3)), join(graph, node, images=back)
    graph.capture(shades=shades, joined=joined(1), masks=joined_masks(1), nothing=joined(0))
    result = host.run(graph)
    assert torch.equal(result.joined, result.shades)
    assert torch.equal(result.masks[..., 0], result.shades[..., 0])
    assert result.nothing is None


def test_a_story_that_fits_is_one_batch(host, graph):
    parts = build(graph, "EncodePerFrame", size=(64, 64), frames=FRAMES)
    node = split(graph, parts, size=8, anchors=2)
    graph.capture(latent=node(0), joined=join(graph, node, latents=node(0))(0))
    result = host.run(graph)
    assert result.latent["samples"].shape[0] == result.joined["samples"].shape[0] == 5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"anchors": 3}, "A batch of 3 images has no room beside 3 anchors"),
        ({"image": 2}, "the input image has 2 rows, but the story has 5 frames"),
    ],
)
def test_what_cannot_be_split_is_refused(host, graph, settings, message):
    parts = build(graph, "EncodePerFrame", size=(64, 64), frames=FRAMES)
    if "image" in settings:
        count = {"width": 8, "height": 8, "color": 0, "batch_size": settings["image"]}
        settings = {"image": graph.add("EmptyImage", **count)()}
    graph.capture(x=split(graph, parts, **settings)(0))
    with pytest.raises(Exception, match=message):
        host.run(graph)


def test_batches_of_another_story_are_refused(host, graph):
    parts = build(graph, "EncodePerFrame", size=(64, 64), frames=FRAMES)
    node = split(graph, parts)
    graph.capture(x=join(graph, node, latents=parts["latent_image"])(0))
    with pytest.raises(Exception, match=r"batches of 3 \+ 3 images, but what arrives are batches of 5"):
        host.run(graph)


def test_nothing_to_join_is_refused(host, graph):
    parts = build(graph, "EncodePerFrame", size=(64, 64), frames=FRAMES)
    graph.capture(x=join(graph, split(graph, parts))(0))
    with pytest.raises(Exception, match="connect latents from KSampler or images"):
        host.run(graph)
