"""The attention nodes on models that are no SDXL: Stable Diffusion 1.5, and what they refuse."""

import pytest
import torch
from story_graphs import call, close, csa, dense_mask, differ, ipca, sample
from tiny_models import FLUX, SD15, tiny_model

OUTPUT = [("output", number) for number in range(3, 12)]
INPUT = [("input", number) for number in (1, 2, 4, 5, 7, 8)]
LAYERS = dict.fromkeys([*INPUT, ("middle", 0), *OUTPUT], 1)
"""Attention layers of every block of SD 1.5."""


def sd15(graph, host):
    """Links to what a sampler needs to draw three images from a prompt, with SD 1.5."""
    latent = graph.add("EmptyLatentImage", width=64, height=128, batch_size=3)()
    text = torch.randn(1, 77, 768, generator=torch.Generator().manual_seed(2))
    return {
        "model": call(graph, host, lambda _: tiny_model("SD15", SD15, torch.float64), latent),
        "positive": call(graph, host, lambda _: [[text, {}]], latent),
        "negative": call(graph, host, lambda _: [[torch.zeros(1, 77, 768), {}]], latent),
        "latent_image": latent,
    }


def test_csa_on_sd_15_equals_a_dense_mask_and_off_is_bit_identical(host, graph):
    parts = sd15(graph, host)
    masked = dense_mask(host, [[1, 2], [0, 2], [0, 1]], layers=LAYERS)
    sample(graph, parts, "ours", model=csa(graph, parts["model"]))
    sample(graph, parts, "numbered", model=csa(graph, parts["model"], blocks="output 3-11"))
    sample(graph, parts, "masked", model=call(graph, host, masked, parts["model"]))
    sample(graph, parts, "off", model=csa(graph, parts["model"], sampling_rate=0.0))
    sample(graph, parts, "plain")
    seen = host.run(graph)
    assert close(seen.ours, seen.masked)
    assert differ(seen.ours, seen.plain)
    assert torch.equal(seen.off["samples"], seen.plain["samples"])
    assert torch.equal(seen.numbered["samples"], seen.ours["samples"])


def test_blocks_of_sd_15_are_those_that_have_attention(host, graph):
    parts = sd15(graph, host)
    depths = host.pack("nodes.patching").attention_depths(tiny_model("SD15", SD15))
    assert depths == LAYERS
    sample(graph, parts, "x", model=csa(graph, parts["model"], blocks="output 0-2"))
    listed = "input 1, 2, 4, 5, 7, 8; middle 0; output 3, 4, 5, 6, 7, 8, 9, 10, 11"
    with pytest.raises(Exception, match=f'"output 0-2" has no attention in this model, which has {listed}') as failed:
        host.run(graph)
    assert failed.value.node == "StoryLoom_ConsistentSelfAttention"


@pytest.mark.parametrize("patch, node", [(csa, "StoryLoom_ConsistentSelfAttention"), (ipca, "StoryLoom_IPCA")])
def test_a_transformer_is_refused(host, graph, patch, node):
    latent = graph.add("EmptyLatentImage", width=64, height=64, batch_size=2)()
    graph.capture(x=patch(graph, call(graph, host, lambda _: tiny_model("Flux", FLUX), latent)))
    message = r"\(Flux\) is not a UNet with attention blocks.*SDXL.*SSD-1B, Vega.*SD 1\.5"
    with pytest.raises(Exception, match=message) as failed:
        host.run(graph)
    assert failed.value.node == node
