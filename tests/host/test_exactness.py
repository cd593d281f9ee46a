"""The bound of comparisons in double precision is far above rounding, and far below any real fault."""

import pytest
import torch
from precision import CLOSE, kept_double
from story_graphs import (
    build,
    call,
    controlled,
    csa,
    dense_mask,
    distance,
    freeu,
    ipca,
    log_bias,
    lora,
    sample,
)
from story_makers import Reference, apply, someone

ONCE = {"steps": 1, "cfg": 1.0}
ALL = [[1, 2], [0, 2], [0, 1]]


def distances(host, graph, ours, models):
    """How far the story that each of these models draws is from the one that ours draws."""
    parts = build(graph, "EncodePerFrame", size=(64, 64))
    sample(graph, parts, "ours", **ONCE, model=ours(parts["model"]))
    for name, model in models.items():
        sample(graph, parts, name, **ONCE, model=model(parts["model"]))
    seen = vars(host.run(graph))
    assert seen["ours"]["samples"].dtype == torch.float64
    return {name: distance(seen["ours"]["samples"], seen[name]["samples"]) for name in models}


def assert_faults_detected(differences):
    """The first of these is the right one, and all others are faults."""
    right, *faults = differences
    assert 100 * differences[right] < CLOSE
    assert all(differences[fault] > 20 * CLOSE for fault in faults), differences


def test_ipca_of_another_weight_or_with_one_column_too_many(host, graph):
    def biased(weight, end):
        patch = log_bias(weight, columns=[range(end)] * 3)
        return lambda model: call(graph, host, patch, model)

    faults = {"weight": biased(1.98, 8), "one too many": biased(2.0, 9), "one too few": biased(2.0, 7)}
    differences = distances(host, graph, lambda model: ipca(graph, model), {"right": biased(2.0, 8), **faults})
    assert_faults_detected(differences)


def test_csa_with_one_token_too_many_another_seed_or_step(host, graph):
    sample_tokens = host.pack("attention.consistent").sample_tokens

    def one_more(seed, step, image, tokens, rate):
        drawn = sample_tokens(seed, step, image, tokens, rate)
        if image > 0:
            return drawn
        left = next(token for token in range(tokens) if token not in drawn.tolist())
        return torch.cat([drawn, torch.tensor([left])])

    def later(seed, step, *others):
        return sample_tokens(seed, step + 1, *others)

    def masked(**settings):
        patch = dense_mask(host, ALL, **settings)
        return lambda model: call(graph, host, patch, model)

    faults = {"one too many": masked(draw=one_more), "seed": masked(seed=4), "step": masked(draw=later)}
    differences = distances(host, graph, lambda model: csa(graph, model), {"right": masked(), **faults})
    assert_faults_detected(differences)


def test_storymaker_of_another_strength(host, graph, maker, weights):
    reference, fox = Reference(host, weights), someone(host, 1)

    def known(tokens, lora):
        def patch(model):
            return reference.looks((fox,), strength=tokens)(reference.edits(lora)(model))

        return lambda model: call(graph, host, patch, model)

    faults = {"tokens": known(0.79, 0.8), "changes": known(0.8, 0.79)}
    differences = distances(
        host, graph, lambda model: apply(graph, host, model, maker, fox), {"right": known(0.8, 0.8), **faults}
    )
    assert_faults_detected(differences)


def test_freeu_of_another_factor(host, graph):
    def filtered(**changes):
        return lambda model: freeu(graph, model, **changes)

    faults = {
        name: filtered(**{name: value}) for name, value in {"b1": 1.09, "b2": 1.19, "s1": 0.59, "s2": 0.39}.items()
    }
    assert_faults_detected(distances(host, graph, filtered(), {"right": filtered(), **faults}))


def rounded(tensor):
    """Whether all numbers are of single precision."""
    return torch.equal(tensor, tensor.float().to(tensor))


def test_nothing_of_a_run_is_rounded_to_single_precision_on_its_way(host, graph, monkeypatch):
    """What leaves the UNet and the sampler, beside a ControlNet, and weights that a LoRA has changed."""
    from comfy.model_sampling import EPS

    def denoised(sampling, sigma, output, x):
        outputs.append(output)
        return original(sampling, sigma, output, x)

    outputs, original = [], EPS.calculate_denoised
    monkeypatch.setattr(EPS, "calculate_denoised", denoised)
    parts = build(graph, size=(64, 64))
    hint = graph.add("EmptyImage", width=64, height=64, batch_size=1, color=0x3366CC)()
    sides, base = controlled(graph, host, parts, hint), lora(graph, host, parts["model"])
    sample(graph, parts, "x", **sides, model=base)
    graph.capture(model=base)
    seen = host.run(graph)
    name = next(iter(seen.model.patches))
    with kept_double():
        weight = seen.model.patch_weight_to_device(name, return_weight=True)
    assert not rounded(weight)
    assert len(outputs) == 2 and not any(map(rounded, outputs))
    assert not rounded(seen.x["samples"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_nothing_is_kept_that_is_not_double_and_nothing_where_nobody_rounds(host, dtype):
    value = torch.ones(2, dtype=torch.float64)
    with kept_double():
        assert value.float().dtype == torch.float32, "this file is none of those that round"
        assert value.to(dtype).dtype == dtype
    import comfy.model_management as management

    cpu = torch.device("cpu")
    with kept_double():
        assert management.cast_to_device(value, cpu, torch.float32).dtype == torch.float64
        assert management.cast_to_device(value, cpu, torch.float16).dtype == torch.float16
        assert management.cast_to_device(value.to(dtype), cpu, torch.float32).dtype == torch.float32
    assert management.cast_to_device(value, cpu, torch.float32).dtype == torch.float32
