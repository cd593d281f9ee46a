"""StoryLoom in strange company: other packs that are known to change how the UNet is called, and stand-ins for them."""

import asyncio
import os

import pytest
import torch
from company import attention_couple, deep_cache, passed_through, row_by_row, tiled
from situations import NODES, SITUATIONS, appended, images, patch_of
from story_graphs import NEWER_TOO, build, call, close, csa, differ, distance, freeu, ipca, log_bias, sample
from story_makers import apply, maker_of, someone, weights_of

STAND_INS = {
    "a function that passes calls through": passed_through,
    "rows one by one": row_by_row,
    "one tile at a time": tiled(1),
    "three tiles at a time": tiled(3),
    "cached features": deep_cache(),
    "no feature is reused": deep_cache(interval=1),
}


def test_the_stand_ins_draw_what_the_packs_draw(host, graph):
    """Those that only call the UNet in another way draw the same. Tiles and reused features change the picture."""
    parts = build(graph)
    sample(graph, parts, "plain", steps=3)
    for name, patch in STAND_INS.items():
        sample(graph, parts, name, steps=3, model=call(graph, host, patch, parts["model"]))
    seen = vars(host.run(graph))
    for name in ("a function that passes calls through", "rows one by one", "no feature is reused"):
        assert close(seen[name], seen["plain"])
    assert close(seen["one tile at a time"], seen["three tiles at a time"])
    assert differ(seen["one tile at a time"], seen["plain"])
    assert differ(seen["cached features"], seen["plain"])


def test_the_attention_couple_gives_parts_of_an_image_texts_of_their_own(host, graph):
    parts = build(graph)
    graph.capture(story=parts["positive"])
    sample(graph, parts, "plain")
    first = host.run(graph)
    plain, story = first.plain, first.story[0][0]
    other = torch.randn(1, 154, story.shape[-1], generator=torch.Generator().manual_seed(2)).double()
    left = torch.tensor([1.0, 0.0]).repeat_interleave(4).expand(8, 8)
    couples = {
        "no text but its own": attention_couple([other], torch.stack([torch.ones(8, 8), torch.zeros(8, 8)])),
        "the same text in both halves": attention_couple([story], torch.stack([left, 1 - left])),
        "another text in the right half": attention_couple([other], torch.stack([left, 1 - left])),
        "another text in the left half": attention_couple([other], torch.stack([1 - left, left])),
    }
    for name, patch in couples.items():
        sample(graph, parts, name, model=call(graph, host, patch, parts["model"]))
    seen = vars(host.run(graph))
    for name in ("no text but its own", "the same text in both halves"):
        assert close(seen[name], plain)
    assert differ(seen["another text in the right half"], plain)
    assert differ(seen["another text in the right half"], seen["another text in the left half"])


def test_ipca_keeps_columns_that_another_node_adds_to_the_text(host, graph):
    parts = build(graph)
    longer = call(graph, host, patch_of("attn2", appended), parts["model"])
    sample(graph, parts, "plain", model=longer)
    sample(graph, parts, "ours", model=ipca(graph, longer))
    sample(graph, parts, "reference", model=call(graph, host, log_bias(2.0), longer))
    seen = host.run(graph)
    assert differ(seen.ours, seen.plain)
    assert close(seen.ours, seen.reference)


ROWS = {
    "ipca": lambda graph, host, maker, model, **off: ipca(graph, model, **off),
    "csa": lambda graph, host, maker, model, **off: csa(graph, model, blocks="all", **off),
    "storymaker": lambda graph, host, maker, model, **off: apply(graph, host, model, maker, someone(host, 1), **off),
    "freeu": lambda graph, host, maker, model, **off: freeu(graph, model, **off),
}
OFF = {
    "ipca": {"identity_weight": 1.0},
    "csa": {"sampling_rate": 0.0},
    "storymaker": {"token_strength": 0.0, "lora_strength": 0.0},
    "freeu": dict.fromkeys(("b1", "b2", "s1", "s2"), 1.0),
}
EFFECT = 0.001
"""Least effect of a patch, in units of the largest value."""
WRONG_NUMBERS = {"one frame alone, for its details": images(1), "four tiles of one image": images(4)}
"""Situations in which the latents are not the story's frames."""
REFUSED = {
    ("one frame alone, for its details", "ipca"): "The story has 3 frames but the latent batch has 1 image",
    ("four tiles of one image", "ipca"): "The story has 3 frames but the latent batch has 4 images",
    ("rows one by one", "csa"): "needs all images of the batch in one call of the model",
}
"""(situation, patch): what the error says."""


def drawn_in(name):
    """Patches that are drawn in a situation: those that depend on rows alone, where a newer ComfyUI draws all of them.

    Samplers differ in the number and the noise levels of evaluations, which are the same to every patch.
    """
    return ("ipca", "csa") if NEWER_TOO or name.startswith("sampler ") else tuple(ROWS)


@pytest.fixture(scope="module")
def single_maker(host):
    return maker_of(host, weights_of(host, torch.float32))


@pytest.fixture(scope="module", autouse=True)
def more_nodes(host):
    import nodes

    for name in NODES:
        path = os.path.join(os.environ["COMFYUI_PATH"], "comfy_extras", f"nodes_{name}.py")
        assert asyncio.run(nodes.load_custom_node(path, module_parent="comfy_extras"))


@pytest.mark.parametrize("name", SITUATIONS)
def test_patches_act_in_strange_company_and_neutral_ones_leave_no_trace(host, graph, single_maker, name):
    parts = build(graph, loader="TestSingle", shared_noise=False)
    changes = SITUATIONS[name](graph, host, parts)
    model = changes.pop("model", parts["model"])
    sample(graph, parts, "plain", **changes, model=model)
    off = model
    for row, add in ROWS.items():
        if row in drawn_in(name) and (name, row) not in REFUSED:
            sample(graph, parts, row, **changes, model=add(graph, host, single_maker, model))
        off = add(graph, host, single_maker, off, **OFF[row])
    sample(graph, parts, "off", **changes, model=off)
    seen = {key: value["samples"] for key, value in vars(host.run(graph)).items()}
    assert torch.equal(seen["off"], seen["plain"])
    assert seen["plain"].isfinite().all()
    for row in seen.keys() & ROWS.keys():
        assert seen[row].isfinite().all(), row
        assert distance(seen[row], seen["plain"]) > EFFECT, row


@pytest.mark.parametrize("name, row", [*REFUSED])
def test_company_that_hides_a_storys_frames_is_refused(host, graph, single_maker, name, row):
    parts = build(graph, loader="TestSingle", shared_noise=False)
    changes = SITUATIONS.get(name, WRONG_NUMBERS.get(name))(graph, host, parts)
    model = ROWS[row](graph, host, single_maker, changes.get("model", parts["model"]))
    sample(graph, parts, "x", **{**changes, "model": model})
    with pytest.raises(Exception, match=REFUSED[name, row]) as refused:
        host.run(graph)
    assert str(refused.value).endswith(".")
