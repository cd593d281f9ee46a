"""The demo model is a genuine SDXL for the host, and the page never loses pictures."""

import pytest
import torch
from story_graphs import STORY, differ, ipca, sample

WIDE_STORY = {"frames": "asleep # one\nreading # two\nwaving # three"}


@pytest.fixture(scope="module")
def demo(host):
    return host.pack("nodes.demo").DemoModel.execute().result


def test_it_has_sdxl_s_layout(host, demo):
    import comfy.model_base

    model, clip, vae = demo
    assert type(model.model) is comfy.model_base.SDXL
    assert host.pack("nodes.patching").attention_depths(model) == {
        ("input", 4): 2,
        ("input", 5): 2,
        ("input", 7): 10,
        ("input", 8): 10,
        ("middle", 0): 10,
        **{("output", number): 10 if number < 3 else 2 for number in range(6)},
    }
    context, info = clip.encode_from_tokens_scheduled(clip.tokenize("a fox"))[0]
    assert context.shape == (1, 77, 2048) and info["pooled_output"].shape == (1, 1280)
    assert vae.decode(torch.zeros(1, 4, 8, 8)).shape == (1, 64, 64, 3)


def test_it_is_the_same_every_time_it_is_loaded(host, demo):
    again = host.pack("nodes.demo").DemoModel.execute().result
    for first, second in ((demo[0].model.diffusion_model, again[0].model.diffusion_model),):
        for a, b in zip(first.parameters(), second.parameters(), strict=True):
            assert torch.equal(a, b)


def test_a_story_on_it_keeps_its_model_untouched_and_feels_ipca(host, graph):
    loader = graph.add("StoryLoom_DemoModel")
    story = graph.add("StoryLoom_Script", **STORY)
    encoded = graph.add("StoryLoom_EncodePerFrame", clip=loader(1), story=story(), literal=False)
    latent = graph.add("StoryLoom_EmptyLatent", width=64, height=64, story=story(), shared_noise=True)
    parts = {
        "model": loader(0),
        "positive": encoded(),
        "negative": graph.add("ConditioningZeroOut", conditioning=encoded())(),
        "latent_image": latent(),
    }
    sample(graph, parts, "plain", steps=1)
    sample(graph, parts, "patched", steps=1, model=ipca(graph, parts["model"], identity_weight=4.0))
    result = host.run(graph)
    assert torch.isfinite(result.plain["samples"]).all()
    assert differ(result.plain, result.patched)


@pytest.mark.parametrize("images", [2, 3, 5])
def test_a_page_is_made_also_when_images_and_frames_differ(host, graph, caplog, images):
    story = graph.add("StoryLoom_Script", **STORY | WIDE_STORY)
    pictures = graph.add("EmptyImage", width=96, height=64, batch_size=images, color=0x3366CC)
    page = graph.add(
        "StoryLoom_Page", images=pictures(), story=story(), columns=1, captions=True, gap=4, caption_size=0
    )
    graph.capture(page=page())
    image = host.run(graph).page
    assert image.shape[0] == 1 and image.shape[3] == 3 and image.shape[1] > images * 64
    assert 0 <= image.min() and image.max() <= 1
    warned = [r.message for r in caplog.records if f"{images} images but 3 frames" in r.message]
    assert bool(warned) == (images != 3)
