"""Other nodes that call the UNet in their own way: with tiles, row by row, with more rows, or not at all."""

import pytest
import torch
from company import attention_couple, deep_cache, passed_through, row_by_row, tiled
from precision import CLOSE
from story_graphs import (
    IDENTITY_COLUMNS,
    LAYERS,
    STORY,
    biased_attention,
    build,
    call,
    close,
    csa,
    differ,
    distance,
    freeu,
    ipca,
    log_bias,
    sample,
)
from story_makers import apply, maker_of, someone, weights_of

SIZE = (96, 64)
WEIGHTS = [2.0, 1.5]


@pytest.fixture(scope="module")
def maker(host):
    return maker_of(host, weights_of(host))


def patches(graph, host, maker):
    """Functions that add a patch to a model, by name."""
    return {
        "ipca": lambda model: ipca(graph, model),
        "ipca 1.5": lambda model: ipca(graph, model, identity_weight=1.5),
        "csa": lambda model: csa(graph, model),
        "freeu": lambda model: freeu(graph, model),
        "storymaker": lambda model: apply(graph, host, model, maker, someone(host, 1)),
    }


def everything(graph, host, maker, without=()):
    """A function that adds all patches to a model, with a weight of 1.5."""

    def patch(model):
        for name, add in patches(graph, host, maker).items():
            if name not in ("ipca", *without):
                model = add(model)
        return model

    return patch


def drawn(host, graph, models, **changes):
    """Latents by name for models by name."""
    parts = build(graph, size=SIZE)
    for name, make in models.items():
        sample(graph, parts, name, **{"model": make(parts["model"])} | changes)
    return vars(host.run(graph))


def within(graph, host, patch, function):
    """A model with another node's function and then a patch of the pack."""
    return lambda model: patch(call(graph, host, function, model))


@pytest.mark.parametrize("name", ["ipca", "csa", "storymaker", "all"])
def test_several_tiles_in_one_call_are_drawn_as_one_after_the_other(host, graph, maker, name):
    patch = everything(graph, host, maker) if name == "all" else patches(graph, host, maker)[name]
    seen = drawn(
        host,
        graph,
        {
            "one": within(graph, host, patch, tiled(1)),
            "three": within(graph, host, patch, tiled(3)),
            "plain": lambda model: call(graph, host, tiled(3), model),
        },
    )
    assert close(seen["three"], seen["one"])
    assert differ(seen["one"], seen["plain"])


@pytest.mark.parametrize("weight", WEIGHTS)
def test_ipca_in_stacked_tiles_counts_the_identity_of_the_positive(host, graph, weight):
    """The reference goes by position, so it is right with one tile per call."""
    seen = drawn(
        host,
        graph,
        {
            "ours": lambda model: call(graph, host, tiled(3), ipca(graph, model, identity_weight=weight)),
            "reference": lambda model: call(graph, host, tiled(1), call(graph, host, log_bias(weight), model)),
        },
    )
    assert close(seen["ours"], seen["reference"])


def test_row_by_row_is_as_in_one_call(host, graph, maker):
    patch = everything(graph, host, maker, without=["csa"])
    seen = drawn(
        host,
        graph,
        {"whole": patch, "rows": within(graph, host, patch, row_by_row), "plain": lambda model: model},
    )
    assert close(seen["rows"], seen["whole"]) and differ(seen["whole"], seen["plain"])


def test_csa_refuses_a_model_that_is_called_row_by_row(host, graph):
    with pytest.raises(Exception, match="needs all images of the batch in one call of the model") as refused:
        drawn(host, graph, {"rows": within(graph, host, lambda model: csa(graph, model), row_by_row)})
    assert str(refused.value).endswith(".")


def test_a_function_that_computes_the_same_changes_nothing(host, graph, maker):
    """Also one that runs the UNet's blocks itself and never calls the model."""
    patch = everything(graph, host, maker)
    seen = drawn(
        host,
        graph,
        {
            "whole": patch,
            "passed through": within(graph, host, patch, passed_through),
            "own blocks": within(graph, host, patch, deep_cache(interval=1)),
            "plain": lambda model: model,
        },
    )
    assert close(seen["passed through"], seen["whole"]) and close(seen["own blocks"], seen["whole"])
    assert differ(seen["whole"], seen["plain"])


def test_every_patch_acts_beside_a_cache_of_deep_features(host, graph, maker, caplog):
    every = {name: within(graph, host, patch, deep_cache()) for name, patch in patches(graph, host, maker).items()}
    plain = {"plain": lambda model: call(graph, host, deep_cache(), model)}
    seen = drawn(host, graph, every | plain, steps=3)
    for name in every:
        assert seen[name]["samples"].isfinite().all() and differ(seen[name], seen["plain"]), name
    assert "never called it" not in caplog.text


def bypassing(model):
    """MODEL with a function that returns the latents as they are."""
    model = model.clone()
    model.set_model_unet_function_wrapper(lambda apply_model, args: args["input"])
    return model


def test_a_run_that_never_calls_a_patch_warns_once(host, graph, caplog):
    drawn(
        host,
        graph,
        {"bypassed": lambda model: call(graph, host, bypassing, freeu(graph, csa(graph, ipca(graph, model))))},
        steps=3,
    )
    messages = [record.getMessage() for record in caplog.records if "never called it" in record.getMessage()]
    (message,) = messages
    assert (
        "No effect in this run: Identity-preserving cross-attention, Consistent self-attention, Story FreeU." in message
    )


def test_a_run_that_calls_every_patch_does_not_warn(host, graph, caplog):
    drawn(host, graph, {"drawn": lambda model: freeu(graph, csa(graph, ipca(graph, model)))})
    assert "never called it" not in caplog.text


def test_a_region_stays_where_it_is_in_every_tile(host, graph, maker):
    """A corner that one tile alone covers is not changed by a region in the opposite one, and its own is."""
    parts = build(graph, size=SIZE)
    latent = 12, 8

    def corner(bottom):
        mask, side = torch.zeros(1, *latent), slice(-2, None) if bottom else slice(0, 2)
        mask[:, side, side] = 1.0
        return mask

    for batch in (1, 3):
        for name, region in {"none": torch.zeros(1, *latent), "top": corner(False), "bottom": corner(True)}.items():
            model = call(graph, host, tiled(batch), parts["model"])
            model = apply(graph, host, model, maker, someone(host, 1), regions=[region])
            sample(graph, parts, f"{name}{batch}", model=model, steps=1)
    seen = {name: value["samples"] for name, value in vars(host.run(graph)).items()}
    for batch in (1, 3):
        none, top, bottom = (seen[f"{name}{batch}"] for name in ("none", "top", "bottom"))
        first, last = (..., slice(0, 3), slice(0, 2)), (..., slice(-3, None), slice(-2, None))
        assert distance(none[last], top[last]) < CLOSE and distance(none[first], bottom[first]) < CLOSE
        assert distance(none[first], top[first]) > 2e-4 and distance(none[last], bottom[last]) > 2e-4
    assert all(distance(seen[f"{name}3"], seen[f"{name}1"]) < CLOSE for name in ("none", "top", "bottom"))


def doubled(model):
    """MODEL whose UNet is called with latents of twice the size."""
    model = model.clone()

    def wrapper(apply_model, args):
        large = torch.nn.functional.interpolate(args["input"], scale_factor=2)
        return torch.nn.functional.avg_pool2d(apply_model(large, args["timestep"], **args["c"]), 2)

    model.set_model_unet_function_wrapper(wrapper)
    return model


def test_latents_of_another_size_are_refused_where_regions_have_no_place(host, graph, maker):
    parts = build(graph, size=SIZE)
    larger = call(graph, host, doubled, parts["model"])
    mask = torch.ones(1, 12, 8)
    sample(graph, parts, "regions", model=apply(graph, host, larger, maker, someone(host, 1), regions=[mask]))
    with pytest.raises(Exception, match="cannot place its regions"):
        host.run(graph)


def test_latents_of_another_size_are_drawn_without_regions(host, graph, maker):
    every = patches(graph, host, maker)

    def ours(model):
        return every["storymaker"](every["csa"](every["ipca"](call(graph, host, doubled, model))))

    seen = drawn(host, graph, {"ours": ours, "plain": lambda model: call(graph, host, doubled, model)})
    assert seen["ours"]["samples"].isfinite().all() and differ(seen["ours"], seen["plain"])


def couple(contexts):
    """Attention Couple with a text for the right half, of one or two windows."""
    left = torch.tensor([1.0, 0.25], dtype=torch.float64).repeat_interleave(4).expand(12, 8)
    return attention_couple(contexts, torch.stack([left, *[1 - left] * len(contexts)]))


def region_text(windows, seed=0):
    from tiny_models import SDXL

    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, 77 * windows, SDXL["context_dim"], generator=generator, dtype=torch.float64)


def biased_rows(weight, regions):
    """IPCA by another road on the first of the rows that Attention Couple repeats for the positive."""

    def attention(q, k, v, options):
        from comfy.ldm.modules.attention import attention_basic

        out = attention_basic(q, k, v, options["n_heads"])
        rows = q.shape[0] // sum(1 if kind == 1 else 1 + regions for kind in options["cond_or_uncond"])
        start = 0
        for kind in options["cond_or_uncond"]:
            if kind == 0:
                own = slice(start, start + rows)
                alone = {**options, "cond_or_uncond": [0]}
                columns = [[c + repeat for repeat in range(0, k.shape[1], 77) for c in IDENTITY_COLUMNS]] * rows
                out[own] = biased_attention(weight, columns=columns)(q[own], k[own], v[own], alone)
            start += rows if kind == 1 else (1 + regions) * rows
        return out

    def patch(model):
        model = model.clone()
        for (part, number), depth in LAYERS.items():
            for index in range(depth):
                model.set_model_attn2_replace(attention, part, number, index)
        return model

    return patch


@pytest.mark.parametrize("split", [False, True], ids=["together", "split"])
@pytest.mark.parametrize("windows", [(1,), (2, 1)], ids=["one region", "two regions of other lengths"])
@pytest.mark.parametrize("weight", WEIGHTS)
def test_rows_that_another_node_adds_to_cross_attention_are_left_to_it(
    host, graph, monkeypatch, weight, windows, split
):
    contexts = [region_text(length, seed) for seed, length in enumerate(windows)]
    if split:
        from comfy.model_patcher import ModelPatcher

        monkeypatch.setattr(ModelPatcher, "get_free_memory", lambda self, device: 0)
    seen = drawn(
        host,
        graph,
        {
            "ours": lambda model: ipca(graph, call(graph, host, couple(contexts), model), identity_weight=weight),
            "reference": lambda model: call(
                graph, host, biased_rows(weight, len(contexts)), call(graph, host, couple(contexts), model)
            ),
            "plain": lambda model: call(graph, host, couple(contexts), model),
        },
    )
    assert close(seen["ours"], seen["reference"]) and differ(seen["ours"], seen["plain"])


def turned(model):
    """MODEL whose cross-attention gets its rows in the opposite order."""
    model = model.clone()
    model.set_model_attn2_patch(lambda q, context, value, options: (q.flip(0), context.flip(0), value.flip(0)))
    model.set_model_attn2_output_patch(lambda out, options: out.flip(0))
    return model


@pytest.mark.parametrize("weight", WEIGHTS)
def test_rows_that_another_node_moves_in_cross_attention_keep_their_frame(host, graph, weight):
    def ours(model):
        return ipca(graph, apply(graph, host, model, maker, someone(host, 1)), identity_weight=weight)

    maker = maker_of(host, weights_of(host))
    seen = drawn(
        host,
        graph,
        {
            "turned": lambda model: ours(call(graph, host, turned, model)),
            "whole": ours,
            "plain": lambda model: call(graph, host, turned, model),
        },
    )
    assert close(seen["turned"], seen["whole"]) and differ(seen["whole"], seen["plain"])


def test_other_patches_act_beside_added_rows(host, graph, maker):
    contexts = [region_text(1)]
    every = {name: within(graph, host, patch, couple(contexts)) for name, patch in patches(graph, host, maker).items()}
    seen = drawn(host, graph, every | {"plain": lambda model: call(graph, host, couple(contexts), model)})
    for name in every:
        assert seen[name]["samples"].isfinite().all() and differ(seen[name], seen["plain"]), name


@pytest.mark.parametrize("batch", [1, 3])
def test_regions_keep_their_place_in_tiles_with_added_rows(host, graph, maker, batch):
    """With one tile per call the place is known; with several it is refused."""
    parts = build(graph, size=SIZE)
    bottom = torch.zeros(1, 12, 8)
    bottom[:, -2:, -2:] = 1.0
    model = call(graph, host, couple([region_text(1)]), call(graph, host, tiled(batch), parts["model"]))
    for name, region in {"none": torch.zeros(1, 12, 8), "bottom": bottom}.items():
        ours = apply(graph, host, model, maker, someone(host, 1), regions=[region])
        sample(graph, parts, name, model=ours, steps=1)
    if batch > 1:
        with pytest.raises(Exception, match="cannot place its regions"):
            host.run(graph)
        return
    seen = {name: value["samples"] for name, value in vars(host.run(graph)).items()}
    first, last = (..., slice(0, 3), slice(0, 2)), (..., slice(-3, None), slice(-2, None))
    assert distance(seen["none"][first], seen["bottom"][first]) < CLOSE
    assert distance(seen["none"][last], seen["bottom"][last]) > 2e-4


def multiplied(model):
    """MODEL with an `attn2_patch` that changes nothing."""
    model = model.clone()
    model.set_model_attn2_patch(lambda q, context, value, options: (q, context, value))
    return model


def test_a_row_alone_keeps_its_image_beside_a_patch_of_cross_attention(host, graph, maker):
    """The negative's text is the same for all images: only the call tells them apart."""

    def ours(model):
        masks = torch.stack([torch.ones(12, 8), torch.zeros(12, 8), torch.ones(12, 8)])
        return apply(graph, host, call(graph, host, multiplied, model), maker, someone(host, 1), regions=[masks])

    seen = drawn(host, graph, {"whole": ours, "rows": within(graph, host, ours, row_by_row)})
    assert close(seen["rows"], seen["whole"])


def with_other_texts(model):
    """MODEL whose UNet is called with more rows and other texts than those of the batch."""
    model = model.clone()

    def wrapper(apply_model, args):
        c = {k: torch.cat([v, v]) if isinstance(v, torch.Tensor) else v for k, v in args["c"].items()}
        c["c_crossattn"] = c["c_crossattn"] + 0.1
        out = apply_model(torch.cat([args["input"]] * 2), torch.cat([args["timestep"]] * 2), **c)
        return out.chunk(2)[0]

    model.set_model_unet_function_wrapper(wrapper)
    return model


@pytest.mark.parametrize("name, acts", [("freeu", True), ("ipca", False), ("csa", False), ("storymaker", False)])
def test_rows_that_match_nothing_are_refused_by_those_who_need_them(host, graph, maker, name, acts):
    patch = patches(graph, host, maker)[name]
    models = {
        "ours": within(graph, host, patch, with_other_texts),
        "plain": lambda model: call(graph, host, with_other_texts, model),
    }
    if acts:
        seen = drawn(host, graph, models)
        assert differ(seen["ours"], seen["plain"])
    else:
        with pytest.raises(Exception, match="12 rows that are not those of the batch and its prompts"):
            drawn(host, graph, models)


def guided_by_itself(graph, model, **settings):
    return graph.add("SelfAttentionGuidance", model=model, scale=0.5, blur_sigma=2.0, **settings)()


def test_a_node_that_records_attention_gets_the_layers_own_tokens(host, graph):
    seen = drawn(
        host,
        graph,
        {
            "both": lambda model: csa(graph, guided_by_itself(graph, model), blocks="all"),
            "csa": lambda model: csa(graph, model, blocks="all"),
            "sag": lambda model: guided_by_itself(graph, model),
        },
    )
    assert seen["both"]["samples"].isfinite().all()
    assert differ(seen["both"], seen["csa"]) and differ(seen["both"], seen["sag"])


@pytest.mark.parametrize("slot", ["attn1", "attn2"])
def test_the_last_call_of_a_recorder_has_the_layers_own_tokens(host, graph, slot):
    kept, count = {}, len(STORY["frames"].splitlines())

    def recorded(model):
        def attention(q, k, v, options):
            from comfy.ldm.modules.attention import attention_basic

            kept[(*options["block"], options["block_index"])] = q.shape, k.shape
            return attention_basic(q, k, v, options["n_heads"])

        model = model.clone()
        for block in (("output", 1), ("middle", 0)):
            getattr(model, f"set_model_{slot}_replace")(attention, *block)
        return model

    def both(model):
        return ipca(graph, csa(graph, call(graph, host, recorded, model), blocks="all"))

    seen = drawn(host, graph, {"both": both, "ours": lambda model: ipca(graph, csa(graph, model, blocks="all"))})
    assert len(kept) == 4
    assert all(
        query[0] == 2 * count and keys[1] == (query[1] if slot == "attn1" else 77) for query, keys in kept.values()
    )
    assert close(seen["both"], seen["ours"])
