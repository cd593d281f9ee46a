"""The options that an attention replacement receives at each layer, and the names of layers and parameters."""

import pytest
import torch

from storyloom.models.demo import model as demo
from storyloom.standalone.layers import attend, attention_depths, transformers
from storyloom.standalone.patcher import UNetPatcher
from storyloom.standalone.sampling import ModelSampling, sample_euler, story_noise
from storyloom.standalone.unet import build_unet, diffusers_names, to_diffusers, unet_numbers

ORDER = [("input", n) for n in (4, 5, 7, 8)] + [("middle", 0)] + [("output", n) for n in range(6)]


def run(small, model, size=(72, 104), cfg=5.0, context=77):
    positive = torch.ones(2, context, 2048), {"pooled_output": torch.ones(2, 1280)}
    negative = torch.zeros(1, 77, 2048), {"pooled_output": torch.zeros(1, 1280)}
    noise = story_noise(2, *size, seed=1, shared=False)
    return sample_euler(model, [positive], [negative], noise, small.scheduler, 2, cfg)


@pytest.fixture
def model(small):
    return UNetPatcher(small.unet, ModelSampling(small.scheduler))


def recorder(calls, name=None):
    def replacement(q, k, v, options):
        calls.append((name, q.shape, k.shape, options))
        return attend(q, k, v, options["n_heads"], None, options)

    return replacement


def test_blocks_are_numbered_as_in_the_original_code(small, numbers):
    assert [t.block for t in transformers(small.unet)] == ORDER
    names = diffusers_names(numbers)
    for transformer in transformers(small.unet):
        part, number = transformer.block
        prefix = "middle_block.1" if part == "middle" else f"{part}_blocks.{number}.1"
        for index, block in enumerate(transformer.blocks):
            name = names[f"{prefix}.transformer_blocks.{index}.attn2.to_k.weight"]
            assert small.unet.get_parameter(name) is block.attn2.to_k.weight
    assert attention_depths(small.unet)["output", 2] == 2 and attention_depths(small.unet)["input", 5] == 1


@pytest.mark.parametrize("slot", ["attn1", "attn2"])
def test_a_replacement_at_every_layer_is_told_everything_and_changes_nothing(small, model, slot):
    calls, patched = [], model.clone()
    for block in ORDER:
        getattr(patched, f"set_model_{slot}_replace")(recorder(calls), *block)
    assert torch.equal(run(small, patched), run(small, model))
    layers = [(t, i) for t in transformers(small.unet) for i in range(len(t.blocks))]
    assert len(calls) == 2 * len(layers)
    sides = {0: (9, 13), 1: (5, 7), 2: (3, 4)}
    for (_, q, k, options), (transformer, index) in zip(calls, layers * 2, strict=True):
        h, w = sides[transformer.level]
        assert options["block"] == transformer.block and options["block_index"] == index
        assert options["transformer_index"] == ORDER.index(transformer.block)
        assert q == (4, h * w, options["n_heads"] * options["dim_head"]) and options["dim_head"] == 16
        assert k[1] == (h * w if slot == "attn1" else 77)
        assert options["activations_shape"] == [4, q[2], h, w]
        assert options["original_shape"] == [4, 4, 9, 13]
        assert options["cond_or_uncond"] == [1, 0] and len(set(options["uuids"])) == 2
        assert options["sigmas"].shape == (2,) and options["sample_sigmas"].shape == (3,)
        assert "patches_replace" not in options
    sigmas = [options["sigmas"][0].item() for *_, options in calls]
    assert sorted(set(sigmas), reverse=True) == calls[0][3]["sample_sigmas"].tolist()[:2]


def test_a_layers_own_replacement_hides_its_blocks(small, model):
    calls = []
    model.set_model_attn2_replace(recorder(calls, "block"), "middle", 0)
    model.set_model_attn2_replace(recorder(calls, "layer"), "middle", 0, 1)
    run(small, model)
    assert [(name, options["block_index"]) for name, *_, options in calls] == [("block", 0), ("layer", 1)] * 2


def test_with_cfg_1_there_is_one_chunk(small, model):
    calls = []
    model.set_model_attn1_replace(recorder(calls), "middle", 0, 0)
    run(small, model, cfg=1.0)
    assert [options["cond_or_uncond"] for *_, options in calls] == [[0], [0]]


def test_contexts_of_unequal_length_are_repeated_to_a_common_one(small, model):
    calls = []
    model.set_model_attn2_replace(recorder(calls), "middle", 0, 0)
    run(small, model, context=154)
    assert {k[1] for _, _, k, _ in calls} == {154}


def test_wrappers_run_from_the_first_to_the_last_around_every_call(small, model):
    order = []

    def wrapper(name):
        def call(executor, *args, **kwargs):
            order.append(name)
            return executor(*args, **kwargs)

        return call

    for kind in ("sampler_sample", "calc_cond_batch", "apply_model"):
        model.add_wrapper_with_key(kind, "a", wrapper(f"{kind} a"))
        model.add_wrapper_with_key(kind, "b", wrapper(f"{kind} b"))
    model.remove_wrappers_with_key("apply_model", "b")
    run(small, model)
    step = ["calc_cond_batch a", "calc_cond_batch b", "apply_model a"]
    assert order == ["sampler_sample a", "sampler_sample b", *step, *step]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"context_dim": 256, "adm_in_channels": 2048},
        {
            "transformer_depth": [0, 0, 1, 1, 1, 1],
            "transformer_depth_middle": 1,
            "transformer_depth_output": [0, 0, 0, 1, 1, 1, 1, 1, 1],
        },
        {"channel_mult": [1, 1, 2]},
    ],
)
def test_every_parameter_has_a_name_in_both_layouts(changes):
    numbers = {**demo.UNET, **changes}
    with torch.device("meta"):
        unet = build_unet(numbers, demo.HEAD_CHANNELS)
    names = diffusers_names(numbers)
    weights = unet.state_dict()
    assert set(names.values()) == set(weights) and len(names) == len(weights)
    assert weights["add_embedding.linear_1.weight"].shape[1] == numbers["adm_in_channels"]
    original = {name: weights[theirs] for name, theirs in names.items()}
    assert original["input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"].shape[1] == numbers["context_dim"]
    assert to_diffusers(original, numbers).keys() == weights.keys()
    assert diffusers_names(unet_numbers(unet.config)) == names


def test_a_layout_that_diffusers_cannot_build_is_refused():
    with pytest.raises(ValueError, match="one transformer depth"):
        build_unet({**demo.UNET, "transformer_depth_middle": 3}, 16)


def test_a_replacement_may_write_into_keys_and_values(small, model):
    drawn = []
    for halve in (lambda part: part / 2, lambda part: part.div_(2)):
        patched = model.clone()
        patched.set_model_attn2_replace(
            lambda q, k, v, options, halve=halve: attend(q, halve(k), halve(v), options["n_heads"], None, options),
            "middle",
            0,
        )
        drawn.append(run(small, patched))
    assert torch.equal(*drawn) and not torch.equal(drawn[0], run(small, model))
