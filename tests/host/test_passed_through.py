"""What the host puts into a call's options reaches the attention function below the patches unchanged.

Newer hosts choose an attention function by an entry of their own, for example `preferred_attention` of a checkpoint.
"""

import pytest
import torch
from story_graphs import build, call, close, csa, differ, ipca, sample
from story_makers import apply, someone

ONCE = {"steps": 1, "cfg": 5.0}
CHOICE = {"preferred_attention": "int8", "attention_of_tomorrow": {"scale": 0.5}}
HALVED = 0.5
"""What the stand-in for another attention function does to the output."""


def choosing(kinds, seen):
    """A host that chooses its attention function by an entry of the options: a stand-in that halves the output.

    It keeps the entries that begin with a key of CHOICE, the keyword arguments, and the layer of every call.
    """

    def attention(kernel, q, k, v, heads, *args, transformer_options, **kwargs):
        out = kernel(q, k, v, heads, *args, transformer_options=transformer_options, **kwargs)
        layer = (*transformer_options["block"], transformer_options["block_index"])
        chosen = {key: transformer_options[key] for key in CHOICE if key in transformer_options}
        seen.append((layer, chosen, kwargs.get("attn_precision")))
        return out * HALVED if chosen.get("preferred_attention") == "int8" else out

    def patch(model):
        model = model.clone()
        model.model_options["transformer_options"] |= {"optimized_attention_override": attention} | kinds
        return model

    return patch


PATCHES = {
    "IPCA, whole weight": lambda graph, host, model, maker: ipca(graph, model, identity_weight=2.0),
    "IPCA, fractional weight": lambda graph, host, model, maker: ipca(graph, model, identity_weight=1.5),
    "CSA": lambda graph, host, model, maker: csa(graph, model, blocks="all"),
    "CSA with anchors": lambda graph, host, model, maker: csa(graph, model, blocks="all", anchors=1),
    "StoryMaker": lambda graph, host, model, maker: apply(graph, host, model, maker, someone(host, 1)),
    "all": lambda graph, host, model, maker: apply(
        graph, host, csa(graph, ipca(graph, model), blocks="all"), maker, someone(host, 1)
    ),
}


@pytest.mark.parametrize("patch", PATCHES)
def test_every_layer_s_attention_gets_the_host_s_choice(host, graph, maker, patch):
    parts = build(graph)
    ours, plain = [], []
    model = call(graph, host, choosing(CHOICE, ours), parts["model"])
    sample(graph, parts, "ours", model=PATCHES[patch](graph, host, model, maker), **ONCE)
    sample(graph, parts, "plain", model=call(graph, host, choosing(CHOICE, plain), parts["model"]), **ONCE)
    host.run(graph)
    assert {layer for layer, *_ in ours} == {layer for layer, *_ in plain}
    assert len(ours) > len(plain)  # at least one layer attends in several parts
    for layer, chosen, precision in ours:
        assert chosen == CHOICE, layer
        assert precision == plain[0][2], layer


@pytest.mark.parametrize("patch", PATCHES)
def test_the_choice_acts_below_the_patches(host, graph, maker, patch):
    """The chosen function's result is ours: halved with the choice, whole without it."""
    parts = build(graph)
    for name, kinds in {"chosen": CHOICE, "other": {}}.items():
        model = call(graph, host, choosing(kinds, []), parts["model"])
        sample(graph, parts, name, model=PATCHES[patch](graph, host, model, maker), **ONCE)
    sample(graph, parts, "ours", model=PATCHES[patch](graph, host, parts["model"], maker), **ONCE)
    seen = host.run(graph)
    assert close(seen.other, seen.ours)
    assert differ(seen.chosen, seen.ours)
    assert torch.isfinite(seen.chosen["samples"]).all()
