"""Cost of the patches: operations of a full-size SDXL step, memory in a layer and after a run. No times."""

import gc

import pytest
import torch
from story_graphs import build, csa, ipca, sample, watched
from story_makers import apply, someone


@pytest.fixture(scope="module")
def cost(host):
    return host.pack("benchmarks.cost")


@pytest.fixture(scope="module")
def unet(cost):
    """SDXL's UNet on the meta device."""
    return cost.sdxl_unet()


@pytest.fixture(scope="module")
def count(cost, unet):
    """A function: case -> operations of one SDXL step at 1024 x 1024, four frames with negative."""
    return lambda case: cost.count_step(unet, case, cost.Size())


@pytest.fixture(scope="module")
def vanilla(cost, count):
    return count(cost.Case("unpatched"))


def test_the_published_weight_adds_at_most_three_thousandths_of_a_step(cost, count, vanilla):
    case = cost.Case("a long identity", weight=2.0, identity=30)
    patched = count(case)
    assert 1.0 < patched / vanilla <= 1.003
    assert patched - vanilla == cost.expected_extra(case, cost.Size())


def test_half_of_three_other_images_adds_at_most_95_thousandths_and_half_of_what_a_mask_adds(cost, count, vanilla):
    case, masked = cost.Case("gathered", rate=0.5), cost.Case("masked", rate=0.5, masked=True)
    patched, dense = count(case), count(masked)
    assert 1.0 < patched / vanilla <= 1.095 and dense / vanilla > 1.18
    assert patched - vanilla == cost.expected_extra(case, cost.Size())
    assert dense - vanilla == cost.expected_extra(masked, cost.Size())


@pytest.mark.parametrize("depth", [2, 10])
def test_looking_at_others_takes_at_most_the_memory_of_one_layer_s_gathered_keys_and_values(host, depth):
    layers = host.pack("benchmarks.layers")
    size, rate = layers.Size(), 0.5
    peaks = {name: layers.peak_bytes(layer, depth, size) for name, layer in layers.layers(depth, size, rate).items()}
    extra = peaks["CSA"] - peaks["ordinary"]
    assert 0 < extra <= layers.gathered_bytes(depth, size, rate)


def test_a_closed_window_adds_nothing(cost, count, vanilla):
    assert count(cost.Case("closed", weight=2.0, rate=0.5, open=False)) == vanilla


@pytest.mark.parametrize("characters", [1, 2])
def test_looking_at_pictures_adds_at_most_a_hundredth_of_a_step(cost, unet, vanilla, characters):
    case = cost.Case("pictures", pictured=characters)
    first, later = cost.count_run(unet, case, cost.Size())
    assert 1.0 < later / vanilla <= 1.01
    assert later - vanilla == cost.expected_extra(case, cost.Size())
    assert first - later == cost.expected_once(case)


def objects(*kinds):
    """All live objects of these classes that the garbage collector tracks."""
    return [item for item in gc.get_objects() if issubclass(type(item), kinds)]


PATCHES = {
    "IPCA 2": lambda graph, host, maker, model: ipca(graph, model),
    "IPCA 1.5": lambda graph, host, maker, model: ipca(graph, model, identity_weight=1.5),
    "CSA": lambda graph, host, maker, model: csa(graph, model),
    "StoryMaker": lambda graph, host, maker, model: apply(
        graph, host, model, maker, someone(host, 1), lora_strength=0.0, regions=[torch.ones(1, 8, 8)]
    ),
}


@pytest.fixture
def young():
    """Makes the garbage collector track new objects only, which are far fewer."""
    gc.collect()
    gc.freeze()


@pytest.mark.parametrize("patch", PATCHES)
def test_a_run_leaves_no_tensor_and_no_view_of_a_call(host, graph, maker, young, patch):
    run, unet_call = host.pack("runtime.run"), host.pack("runtime.call")
    ours = (run.LayerAttention, run.StoryRun, unet_call.UNetCall, unet_call.SamplerCall)
    ours = (*ours, host.pack("attention.storymaker").RowGroup)
    parts = build(graph)
    sample(graph, parts, "latent", model=PATCHES[patch](graph, host, maker, parts["model"]))

    def tensors_after():
        host.run(graph, fresh=True).latent.clear()
        gc.collect()
        return objects(torch.Tensor)

    tensors_after()
    before = {id(thing) for thing in [*tensors_after(), *objects(*ours)]}
    assert [tensor.shape for tensor in tensors_after() if id(tensor) not in before] == []
    assert [view for view in objects(*ours) if id(view) not in before] == []


@pytest.mark.parametrize("patch", ["IPCA 2", "CSA", "StoryMaker"])
def test_nothing_is_carried_from_one_unet_call_to_the_next(host, graph, maker, young, patch):
    layer_attention = host.pack("runtime.run").LayerAttention
    parts = build(graph)
    counts = {}

    class Seen(list):
        """Keeps only the number of live tensors and layer attentions after each call."""

        def append(self, entry):
            entry.clear()
            gc.collect()
            super().append((len(objects(torch.Tensor)), len(objects(layer_attention))))

    for name, model in (("plain", parts["model"]), ("ours", PATCHES[patch](graph, host, maker, parts["model"]))):
        counts[name] = Seen()
        sample(graph, parts, name, steps=3, model=watched(graph, host, model, counts[name]))
    host.run(graph, fresh=True)
    assert len(counts["plain"]) == len(counts["ours"]) == 3
    grown = {name: [tensors - seen[0][0] for tensors, _ in seen] for name, seen in counts.items()}
    assert grown["ours"] == grown["plain"]
    assert [layers for _, layers in counts["ours"]] == [counts["ours"][0][1]] * 3
