"""A UNet that is compiled keeps the patches of a run, and is exactly what it is without the compiler."""

import pytest
import torch
from story_graphs import NEWER_TOO, build, call, csa, freeu, ipca, sample
from tiny_models import SHALLOW, tiny_model

from storyloom.benchmarks.common import fused_attention


def nothing(graph, model):
    return model


def pag(graph, model):
    return graph.add("PerturbedAttentionGuidance", model=ipca(graph, model), scale=3.0)()


def both(graph, model):
    return csa(graph, ipca(graph, model, identity_weight=1.5, end_percent=0.5))


RUNS = {
    "without a patch": (nothing, {}),
    "IPCA": (ipca, {}),
    "a later window": (lambda graph, model: ipca(graph, model, start_percent=0.4), {}),
    "off again": (nothing, {}),
    "on again": (ipca, {}),
    "one block": (lambda graph, model: ipca(graph, model, blocks="middle"), {}),
    "one layer": (lambda graph, model: ipca(graph, model, blocks="output 1.0"), {}),
    "IPCA and CSA": (both, {}),
    "PAG": (pag, {}),
    "no PAG": (ipca, {}),
    "cfg 1": (ipca, {"cfg": 1.0}),
    "another size": (ipca, {"size": (96, 128)}),
    "and back": (csa, {}),
}

SHORT = ("without a patch", "IPCA", "off again", "IPCA and CSA", "one block", "another size")
"""Enough for a ComfyUI beside a newer one, which goes through all runs."""


@pytest.fixture
def draw(host, new_graph):
    """Draws with a UNet that all runs share: draw(patches, compiled, size, ...) -> latents."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper
    from comfy_extras.nodes_torch_compile import skip_torch_compile_dict

    model = tiny_model("SDXL", SHALLOW, torch.float64)

    def draw(patches, compiled, size=(64, 64), backend="eager", **changes):
        def compile_(_):
            patcher = model.clone()
            if compiled:
                options = {"guard_filter_fn": skip_torch_compile_dict}
                set_torch_compile_wrapper(model=patcher, backend=backend, options=options)
            return patcher

        graph = new_graph()
        parts = build(graph, size=size)
        link = patches(graph, call(graph, host, compile_, parts["model"]))
        sample(graph, parts, "latent", model=link, **{"steps": 3} | changes)
        return host.run(graph).latent["samples"]

    torch.compiler.reset()
    with fused_attention():  # the other kind asks for free memory, where compiling stops and begins anew
        yield draw
    torch.compiler.reset()


def left_out(caplog):
    return [record.message for record in caplog.records if "torch.compile node is left out" in record.message]


def test_every_run_is_as_without_the_compiler_whatever_was_compiled_before(draw, caplog):
    """ComfyUI's own compiled UNet would never call a patch after a run without one, or freeze at the first step's."""
    from torch._dynamo.utils import counters

    runs = {name: RUNS[name] for name in (SHORT if NEWER_TOO else RUNS)}
    expected = {name: draw(patches, False, **changes) for name, (patches, changes) in runs.items()}
    off = expected["without a patch"]
    counters.clear()
    for name, (patches, changes) in runs.items():
        latents = draw(patches, True, **changes)
        assert torch.equal(latents, expected[name]), name
        if patches is not nothing and latents.shape == off.shape:
            assert not torch.equal(latents, off), name
    assert left_out(caplog) == []
    assert not counters["graph_break"]
    graphs = counters["stats"]["unique_graphs"]
    assert 2 <= graphs <= 5, "one of ComfyUI's, and ours for another batch and another size, not for every run"


def test_with_what_a_compiled_unet_would_not_notice_the_run_is_uncompiled(draw, caplog):
    def ours(graph, model):
        return freeu(graph, ipca(graph, model))

    assert torch.equal(draw(ours, True), draw(ours, False))
    assert len(left_out(caplog)) == 1 and "output_block_patch" in left_out(caplog)[0]


def test_a_network_that_does_not_compile_whole_runs_uncompiled(draw, caplog, monkeypatch):
    from comfy.ldm.modules.attention import FeedForward

    forward = FeedForward.forward

    def broken(layer, x):
        torch._dynamo.graph_break()
        return forward(layer, x)

    monkeypatch.setattr(FeedForward, "forward", broken)
    assert torch.equal(draw(ipca, True), draw(ipca, False))
    assert len(left_out(caplog)) == 1


def test_an_unknown_backend_might_play_the_first_call_again_and_is_refused(draw, caplog):
    assert torch.equal(draw(ipca, True, backend="aot_eager"), draw(ipca, False))
    assert len(left_out(caplog)) == 1 and '"inductor"' in left_out(caplog)[0]


def test_which_settings_patches_live_through(host):
    compilable = host.pack("runtime.compiled").compilable
    guards = {"guard_filter_fn": len}
    assert compilable({"backend": "inductor", "mode": None, "options": guards})
    assert not compilable(None)
    for changes in ({"backend": "cudagraphs"}, {"mode": "reduce-overhead"}, {"options": {"triton.cudagraphs": True}}):
        assert not compilable({"backend": "inductor", "mode": None, "options": guards} | changes)
