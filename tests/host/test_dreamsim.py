"""DreamSim under ComfyUI's memory management: read once, on the device when it measures, and let go."""

import gc
import sys
import types
import weakref

import numpy as np
import pytest
import torch


class Networks(torch.nn.Module):
    """As the package gives them: a module around modules, which does not let its device be set."""

    device = property(lambda self: "cpu")

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([1.0, 2.0, 3.0]), requires_grad=False)

    def embed(self, batch):
        return batch.mean((2, 3)) * self.weight


@pytest.fixture
def read(host, monkeypatch):
    """A stand-in for the package `dreamsim` with its files: weak references to the networks that were read."""
    references = []
    module = types.ModuleType("dreamsim")

    def prepare(picture):
        return torch.from_numpy(np.array(picture, np.float32) / 255).permute(2, 0, 1)[None]

    def dreamsim(**settings):
        assert settings["device"] == "cpu", "ComfyUI moves it"
        networks = Networks()
        references.append(weakref.ref(networks))
        return networks, prepare

    module.dreamsim = dreamsim
    monkeypatch.setitem(sys.modules, "dreamsim", module)
    kinds = {kind: () for kind in ("ensemble", "dino_vitb16")}
    monkeypatch.setattr(host.pack("measures.dreamsim"), "DREAMSIM_FILES", kinds)
    monkeypatch.setattr(host.pack("nodes.similarity"), "_kept", weakref.WeakValueDictionary())
    return references


def measured(new_graph, host, seed=1, kind="ensemble"):
    """A graph that measures three pictures, drawn anew for every seed."""
    graph = new_graph()
    noise = torch.rand(3, 8, 8, 3, generator=torch.Generator().manual_seed(seed))
    images = graph.add("TestCall", value=seed, name=host.function(lambda _: noise))()
    graph.capture(measures=graph.add("StoryLoom_Consistency", images=images, dreamsim=kind)(3))
    return graph


def run(host, executor, graph):
    outputs = host.validate(graph)
    executor.execute(dict(graph), "test", {}, outputs)
    assert executor.success


def entries(networks):
    """ComfyUI's entries of loaded models that hold these networks."""
    import comfy.model_management

    loaded = [(entry, entry.model) for entry in comfy.model_management.current_loaded_models]
    return [entry for entry, patcher in loaded if patcher is not None and networks in list(patcher.model.children())]


def test_it_is_read_once_for_all_executions_of_a_node(host, new_graph, read):
    executor = host.new_executor()
    for seed in (1, 2, 3):
        run(host, executor, measured(new_graph, host, seed))
    assert len(read) == 1


def test_comfyui_puts_it_onto_the_device_and_takes_it_away(host, new_graph, read):
    import comfy.model_management as management

    executor = host.new_executor()
    run(host, executor, measured(new_graph, host))
    (entry,) = entries(read[0]())
    assert entry.model.loaded_size() == entry.model.model_size() == 12
    del entry
    management.free_memory(1e32, torch.device("cpu"))
    assert entries(read[0]()) == []
    run(host, executor, measured(new_graph, host, 2))
    assert len(read) == 1 and len(entries(read[0]())) == 1


def test_another_kind_takes_its_place(host, new_graph, read):
    executor = host.new_executor()
    run(host, executor, measured(new_graph, host))
    run(host, executor, measured(new_graph, host, kind="dino_vitb16"))
    gc.collect()
    assert [networks() is None for networks in read] == [True, False]


@pytest.mark.parametrize("how", ["emptied", "gone"])
def test_it_goes_with_comfyuis_caches_and_with_the_node(host, new_graph, read, how):
    executor = host.new_executor()
    run(host, executor, measured(new_graph, host))
    gc.collect()
    assert read[0]() is not None
    if how == "emptied":
        executor.reset()
    else:
        other = new_graph()
        other.capture(x=other.add("StoryLoom_DemoSimilarity")())
        run(host, executor, other)
    gc.collect()
    assert read[0]() is None
    run(host, executor, measured(new_graph, host))
    assert len(read) == 2


def test_it_measures_what_the_package_embeds(host, new_graph, read):
    graph = measured(new_graph, host)
    measures = host.run(graph, fresh=True).measures
    pictures = torch.rand(3, 8, 8, 3, generator=torch.Generator().manual_seed(1))
    shown = (pictures * 255).round() / 255
    unit = torch.nn.functional.normalize(shown.mean((1, 2)).double() * torch.tensor([1.0, 2.0, 3.0]), dim=1)
    assert (measures.dreamsim - (1 - unit @ unit.T)).abs().max() < 1e-2
