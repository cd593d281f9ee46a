"""A long story in batches is the same story."""

import pytest
import torch
from story_graphs import build, call, close, controlled, csa, dense_mask, differ, distance, ipca, sample

FRAMES = "\n".join(["asleep in the snow", "reading on a train", "drinking tea", "waving", "in a city"])


def split(graph, parts, size=3, anchors=1, **inputs):
    keys = {"latent": "latent_image", "positive": "positive", "negative": "negative"}
    links = {name: parts[key] for name, key in keys.items()} | inputs
    return graph.add("StoryLoom_SplitBatches", batch_size=size, anchors=anchors, **links)


def join(graph, node, **inputs):
    return graph.add("StoryLoom_JoinBatches", plan=node(5), **inputs)


def in_batches(graph, parts, node, name, **changes):
    """A stock KSampler that draws the batches of a Split node, whose joined LATENT is captured as `name`."""
    cut = {"latent_image": node(0), "positive": node(1), "negative": node(2)}
    drawn = sample(graph, parts, "last", **cut | changes)
    graph.capture(**{name: join(graph, node, latents=drawn)(0)})
    return drawn


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(("sampler", "encode"), [("euler", "EncodePerFrame"), ("heun", "EncodeOnePrompt")])
def test_batches_are_the_frames_of_one_run_in_story_order(host, graph, sampler, encode, shared):
    parts = build(graph, encode, size=(72, 88), frames=FRAMES, shared_noise=shared)
    model, settings = ipca(graph, parts["model"]), {"sampler_name": sampler}
    sample(graph, parts, "whole", model=model, **settings)
    in_batches(graph, parts, split(graph, parts), "joined", model=model, **settings)
    result = host.run(graph)
    assert result.last["samples"].shape[0] == 3
    assert result.joined["samples"].shape == result.whole["samples"].shape
    assert close(result.joined, result.whole)
    assert result.joined["batch_index"] == ([0] * 5 if shared else [*range(5)])


@pytest.mark.parametrize("masks", [5, 1])
def test_inpainting_from_numbered_noise(host, graph, masks):
    def painted(latent):
        numbers, mask = [40, 3, 3, 17, 8], torch.rand(masks, 1, 12, 8).round()
        return {"samples": torch.randn(5, 4, 12, 8), "noise_mask": mask, "batch_index": numbers}

    def pictures(latent):
        return latent["samples"][:, :3].movedim(1, 3)

    parts = build(graph, "EncodePerFrame", size=(64, 96), frames=FRAMES)
    parts["latent_image"] = call(graph, host, painted, parts["latent_image"])
    node = split(graph, parts)
    sample(graph, parts, "whole", denoise=0.6)
    drawn = in_batches(graph, parts, node, "joined", denoise=0.6)
    decoded = join(graph, node, images=call(graph, host, pictures, drawn))
    graph.capture(painted=parts["latent_image"], decoded=decoded(1))
    result = host.run(graph)
    assert close(result.joined, result.whole)
    assert torch.equal(result.decoded, pictures(result.joined))
    assert result.joined["batch_index"] == result.painted["batch_index"]
    mask = result.painted["noise_mask"].expand(5, 1, 12, 8)
    assert torch.equal(result.joined["noise_mask"], mask), "a second pass paints at the same places"
    moved = (result.joined["samples"] - result.painted["samples"]).abs().amax(1, keepdim=True) > 1e-4
    assert torch.equal(moved, mask > 0)


def test_every_frame_keeps_its_own_controlnet_hint_and_negative(host, graph):
    def turned(conditioning):
        ((context, info),) = conditioning
        return [[context.flip(0), {"pooled_output": info["pooled_output"].flip(0)}]]

    parts = build(graph, "EncodePerFrame", size=(64, 64), frames=FRAMES)
    parts["negative"] = call(graph, host, turned, parts["positive"])
    hints = call(graph, host, lambda story: torch.rand(5, 64, 64, 3), parts["story"])
    node = split(graph, parts, image=hints)
    sample(graph, parts, "whole", **controlled(graph, host, parts, hints))
    sides = {"positive": node(1), "negative": node(2)}
    in_batches(graph, parts, node, "joined", **controlled(graph, host, sides, node(3)))
    sample(graph, parts, "no_control")
    result = host.run(graph)
    assert close(result.joined, result.whole)
    assert differ(result.whole, result.no_control)


def test_every_frame_keeps_its_own_mask_for_a_prompt(host, graph):
    parts = build(graph, "EncodePerFrame", size=(64, 64), frames=FRAMES)
    text = graph.add("CLIPTextEncode", clip=parts["clip"], text="a lighthouse")()
    masks = call(graph, host, lambda story: torch.rand(5, 8, 8).round(), parts["story"])

    def masked(positive, mask):
        where = {"mask": mask, "strength": 1.0, "set_cond_area": "default"}
        placed = graph.add("ConditioningSetMask", conditioning=positive, **where)()
        return graph.add("ConditioningCombine", conditioning_1=placed, conditioning_2=text)()

    whole = parts | {"positive": masked(parts["positive"], masks)}
    before, after = split(graph, whole), split(graph, parts, mask=masks)
    sample(graph, whole, "whole", cfg=1.0)
    in_batches(graph, parts, before, "before", cfg=1.0)
    in_batches(graph, parts, after, "after", cfg=1.0, positive=masked(after(1), after(4)))
    sample(graph, parts, "no_mask", cfg=1.0)
    result = host.run(graph)
    assert close(result.before, result.whole) and close(result.after, result.whole)
    assert differ(result.whole, result.no_mask)


LOOKS = {2: [[1], [0], *[[0, 1]] * 5], 0: [[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2], [5], [4]]}
"""By the number of anchors: whom every frame of a story looks at that is drawn in batches of four."""


@pytest.mark.parametrize("sampler, anchors", [("euler", 2), ("heun", 2), ("euler_ancestral", 2), ("euler", 0)])
def test_with_csa_frames_look_at_the_anchors_or_at_their_own_batch(host, graph, sampler, anchors):
    """Without anchors the last batch is two frames and fillers, at which nobody looks again."""
    looks, batches = LOOKS[anchors], []
    frames = "\n".join(f"picture {number}" for number in range(len(looks)))
    parts = build(graph, "EncodePerFrame", size=(64, 64), frames=frames, shared_noise=False)
    settings = {"sampler_name": sampler, "cfg": 1.0}
    sample(graph, parts, "whole", model=call(graph, host, dense_mask(host, looks), parts["model"]), **settings)
    sample(graph, parts, "plain", **settings)
    model, node = csa(graph, parts["model"], anchors=anchors), split(graph, parts, 4, anchors)
    drawn = in_batches(graph, parts, node, "joined", model=model, **settings)
    graph.capture(last=call(graph, host, lambda latent: batches.append(latent["samples"]), drawn))
    result = host.run(graph)
    assert [len(batch) for batch in batches] == [4] * (3 if anchors else 2)
    assert all(torch.equal(batch[:anchors], batches[0][:anchors]) for batch in batches)
    if sampler != "euler_ancestral":  # it draws noise by the place in the batch
        assert close(result.joined, result.whole)
        pairs = zip(result.joined["samples"], result.plain["samples"], strict=True)
        assert all(distance(a, b) > 2e-4 for a, b in pairs)


def test_pictures_and_masks_go_along_and_come_back(host, graph):
    parts = build(graph, "EncodePerFrame", size=(64, 64), frames=FRAMES)
    shades = call(graph, host, lambda story: torch.rand(5, 8, 8, 3), parts["story"])
    masks = call(graph, host, lambda images: images[..., 0], shades)
    node = split(graph, parts, image=shades, mask=masks)
    back = call(graph, host, lambda mask: mask[..., None], node(4))
    joined, joined_masks = join(graph, node, images=node(3)), join(graph, node, images=back)
    single = split(graph, parts, mask=call(graph, host, lambda masks: masks[0], masks))
    graph.capture(shades=shades, joined=joined(1), masks=joined_masks(1), nothing=joined(0), single=single(4))
    result = host.run(graph)
    assert torch.equal(result.joined, result.shades)
    assert torch.equal(result.masks[..., 0], result.shades[..., 0])
    assert result.nothing is None
    assert torch.equal(result.single, result.shades[:1, ..., 0]), "one mask, as some nodes give it, holds for all"


def test_a_story_that_fits_is_one_batch(host, graph):
    parts = build(graph, "EncodePerFrame", size=(64, 64), frames=FRAMES)
    node = split(graph, parts, size=8, anchors=2)
    graph.capture(latent=node(0), joined=join(graph, node, latents=node(0))(0))
    result = host.run(graph)
    assert result.latent["samples"].shape[0] == result.joined["samples"].shape[0] == 5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"anchors": 3}, "A batch of 3 images with 3 anchors has no room for other frames"),
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


def test_a_noise_mask_for_some_frames_is_refused(host, graph):
    parts = build(graph, "EncodePerFrame", size=(64, 64), frames=FRAMES)
    mask = {"noise_mask": torch.ones(3, 1, 8, 8)}
    parts["latent_image"] = call(graph, host, lambda latent: latent | mask, parts["latent_image"])
    graph.capture(x=split(graph, parts)(0))
    with pytest.raises(Exception, match="the input latent has 3 noise masks, but the story has 5 frames"):
        host.run(graph)


@pytest.mark.parametrize("hints", [(5,), (5, 1)])
def test_a_controlnet_with_a_hint_for_every_frame_that_was_applied_before_is_refused(host, graph, hints):
    parts = build(graph, "EncodePerFrame", size=(64, 64), frames=FRAMES)
    for count in hints:
        hint = graph.add("EmptyImage", width=64, height=64, batch_size=count, color=0)()
        parts |= controlled(graph, host, parts, hint)
    graph.capture(x=split(graph, parts)(1))
    with pytest.raises(Exception, match="input positive already has a ControlNet with several hint images. Split"):
        host.run(graph)


def test_batches_of_another_story_are_refused(host, graph):
    parts = build(graph, "EncodePerFrame", size=(64, 64), frames=FRAMES)
    node = split(graph, parts)
    graph.capture(x=join(graph, node, latents=parts["latent_image"])(0))
    with pytest.raises(Exception, match=r"batches of 3 \+ 3 images, but the input has batches of 5"):
        host.run(graph)


def test_nothing_to_join_is_refused(host, graph):
    parts = build(graph, "EncodePerFrame", size=(64, 64), frames=FRAMES)
    graph.capture(x=join(graph, split(graph, parts))(0))
    with pytest.raises(Exception, match="connect latents from KSampler or images"):
        host.run(graph)
