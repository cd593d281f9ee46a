"""What IPCA costs: operations of a full-size SDXL step, and what a sampling run leaves in memory. No times."""

import gc

import pytest
import torch
from story_graphs import build, ipca, sample, watched


@pytest.fixture(scope="module")
def cost(host):
    return host.pack("benchmarks.cost")


@pytest.fixture(scope="module")
def count(cost):
    """Operations of one SDXL step at 1024 x 1024, four frames with negative, in a case of the benchmark."""
    unet = cost.sdxl_unet()
    return lambda case: cost.count_step(unet, case, cost.Size())


@pytest.fixture(scope="module")
def vanilla(cost, count):
    return count(cost.Case("unpatched"))


def test_the_published_weight_adds_at_most_three_thousandths_of_a_step(cost, count, vanilla):
    case = cost.Case("a long identity", weight=2.0, identity=30)
    patched = count(case)
    assert 1.0 < patched / vanilla <= 1.003
    assert patched - vanilla == cost.expected_extra(case, cost.Size())


def test_a_closed_window_adds_nothing(cost, count, vanilla):
    assert count(cost.Case("closed", weight=2.0, open=False)) == vanilla


def objects(*kinds):
    """Everything alive of these classes, known to the garbage collector."""
    return [thing for thing in gc.get_objects() if issubclass(type(thing), kinds)]


@pytest.mark.parametrize("weight", [2.0, 1.5])
def test_a_run_leaves_no_tensor_and_no_view_of_a_call(host, graph, weight):
    sampling, unet_call = host.pack("attention.sampling"), host.pack("attention.unet_call")
    ours = (sampling.LayerAttention, sampling.StoryRun, unet_call.UNetCall, unet_call.SamplerCall)
    parts = build(graph)
    sample(graph, parts, "latent", model=ipca(graph, parts["model"], identity_weight=weight))

    def run():
        host.run(graph, fresh=True).latent.clear()
        gc.collect()
        return objects(torch.Tensor)

    run()
    before = {id(thing) for thing in [*run(), *objects(*ours)]}
    assert [tensor.shape for tensor in run() if id(tensor) not in before] == []
    assert [view for view in objects(*ours) if id(view) not in before] == []


def test_nothing_is_carried_from_one_unet_call_to_the_next(host, graph):
    sampling = host.pack("attention.sampling")
    parts = build(graph)
    counts = {}

    class Seen(list):
        """Keeps nothing of a call but how many tensors and layer attentions were alive when it had ended."""

        def append(self, entry):
            entry.clear()
            gc.collect()
            super().append((len(objects(torch.Tensor)), len(objects(sampling.LayerAttention))))

    for name, model in (("plain", parts["model"]), ("ipca", ipca(graph, parts["model"]))):
        counts[name] = Seen()
        sample(graph, parts, name, steps=3, model=watched(graph, host, model, counts[name]))
    host.run(graph, fresh=True)
    assert len(counts["plain"]) == len(counts["ipca"]) == 3
    grown = {name: [tensors - seen[0][0] for tensors, _ in seen] for name, seen in counts.items()}
    assert grown["ipca"] == grown["plain"]
    assert [layers for _, layers in counts["ipca"]] == [counts["ipca"][0][1]] * 3
