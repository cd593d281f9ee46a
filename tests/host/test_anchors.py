"""A split story tells consistent self-attention its anchors."""

import pytest
import torch
from story_graphs import build, call, csa, distance, sample

FRAMES = "\n".join(f"picture {number}" for number in range(6))
ONCE = {"steps": 1, "cfg": 1.0}


def drawn(graph, host, parts, name, split, own, prompt=None):
    """Batches of four that a story is drawn in, as a list.

    split, own: anchors of Split a long story and of consistent self-attention; prompt: another positive.
    """
    batches = []
    links = {"latent": parts["latent_image"], "positive": prompt or parts["positive"], "negative": parts["negative"]}
    node = graph.add("StoryLoom_SplitBatches", batch_size=4, anchors=split, **links)
    ends = {"latent_image": node(0), "positive": node(1), "negative": node(2)}
    latents = sample(graph, parts, name, model=csa(graph, parts["model"], anchors=own), **ONCE | ends)
    graph.capture(**{name: call(graph, host, lambda latent: batches.append(latent["samples"]), latents)})
    return batches


def conflicts(caplog):
    return [r.getMessage() for r in caplog.records if "Split a long story" in r.getMessage()]


def equal(a, b):
    return len(a) == len(b) and all(torch.equal(one, other) for one, other in zip(a, b, strict=True))


def test_a_split_story_s_anchors_are_taken_where_none_are_set(host, graph, caplog):
    parts = build(graph, "EncodePerFrame", frames=FRAMES, shared_noise=False)
    taken = drawn(graph, host, parts, "taken", split=2, own=0)
    both = drawn(graph, host, parts, "both", split=2, own=2)
    alone = drawn(graph, host, parts, "alone", split=0, own=0)
    host.run(graph)
    assert len(taken) == 2 and equal(taken, both)
    assert torch.equal(taken[0][:2], taken[1][:2])
    assert all(distance(a, b) > 2e-4 for a, b in zip(taken[0], alone[0], strict=True))
    assert conflicts(caplog) == []


@pytest.mark.parametrize("split, own", [(2, 1), (1, 3), (0, 2)])
def test_of_two_numbers_that_differ_the_story_s_counts_and_one_warning_names_both(host, graph, caplog, split, own):
    parts = build(graph, "EncodePerFrame", frames=FRAMES, shared_noise=False)
    ours = drawn(graph, host, parts, "ours", split=split, own=own)
    host.run(graph)
    (message,) = conflicts(caplog)
    assert (
        f"anchors is {own} in Consistent self-attention, but {split} in Split a long story. {split} is used" in message
    )
    caplog.clear()
    agreed = drawn(graph, host, parts, "agreed", split=split, own=0)
    host.run(graph)
    assert equal(ours, agreed) and len(ours) == 2
    assert conflicts(caplog) == []


def test_without_a_story_or_a_split_the_widget_alone_counts(host, graph, caplog):
    parts = build(graph, "EncodePerFrame", frames=FRAMES, shared_noise=False)
    text = graph.add("CLIPTextEncode", clip=parts["clip"], text="a lighthouse")()
    zero, two = (drawn(graph, host, parts, f"own {own}", split=2, own=own, prompt=text) for own in (0, 2))
    for own in (0, 2):
        sample(graph, parts, f"whole_{own}", model=csa(graph, parts["model"], anchors=own), **ONCE)
    result = host.run(graph)
    assert torch.equal(two[0][:2], two[1][:2]) and not torch.equal(zero[0][:2], zero[1][:2])
    assert not equal([result.whole_0["samples"]], [result.whole_2["samples"]])
    assert conflicts(caplog) == []


def test_a_story_that_fits_one_batch_has_its_anchors_too(host, graph):
    parts = build(graph, "EncodePerFrame", frames="one\ntwo\nthree", shared_noise=False)
    taken = drawn(graph, host, parts, "taken", split=2, own=0)
    sample(graph, parts, "whole", model=csa(graph, parts["model"], anchors=2), **ONCE)
    result = host.run(graph)
    assert equal(taken, [result.whole["samples"]])
