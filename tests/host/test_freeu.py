"""FreeU by block on a real model: what it does to sampling, and what it leaves alone."""

from types import SimpleNamespace

import pytest
import torch
from story_graphs import (
    FREEU,
    build,
    call,
    close,
    controlled,
    csa,
    differ,
    freeu,
    ipca,
    sample,
    watched,
)
from tiny_models import SDXL, tiny_model

ONCE = {"steps": 1, "cfg": 1.0}
OFF = {"b1": 1.0, "b2": 1.0, "s1": 1.0, "s2": 1.0}


def fourier(model):
    """FreeU by another road: the published filter, by block, where ComfyUI's own FreeU stands."""

    def patch(h, skip, options):
        part, number = options["block"]
        assert part == "output"
        if number < 6:
            b, s = (FREEU["b1"], FREEU["s1"]) if number < 3 else (FREEU["b2"], FREEU["s2"])
            half = h.shape[1] // 2
            h = torch.cat([h[:, :half] * b, h[:, half:]], dim=1)
            spectrum = torch.fft.fftshift(torch.fft.fft2(skip), dim=(-2, -1))
            row, column = skip.shape[-2] // 2, skip.shape[-1] // 2
            spectrum[..., row - 1 : row + 1, column - 1 : column + 1] *= s
            skip = torch.fft.ifft2(torch.fft.ifftshift(spectrum, dim=(-2, -1))).real.to(skip.dtype)
        return h, skip

    model = model.clone()
    model.set_model_output_block_patch(patch)
    return model


def stock(graph, model):
    return graph.add("FreeU", model=model, b1=1.3, b2=1.4, s1=0.9, s2=0.2)()


@pytest.mark.parametrize("sampler, cfg, size", [("euler", 5.0, (192, 128)), ("heun", 1.0, (104, 136))])
def test_it_equals_the_published_filter_and_off_is_bit_identical_to_no_node(host, graph, sampler, cfg, size):
    parts = build(graph, size=size)
    settings = {"sampler_name": sampler, "cfg": cfg}
    sample(graph, parts, "ours", model=freeu(graph, parts["model"]), **settings)
    sample(graph, parts, "filtered", model=call(graph, host, fourier, parts["model"]), **settings)
    sample(graph, parts, "plain", **settings)
    sample(graph, parts, "neutral", model=freeu(graph, parts["model"], **OFF), **settings)
    sample(graph, parts, "shut", model=freeu(graph, parts["model"], start_percent=1.0), **settings)
    seen = host.run(graph)
    assert close(seen.ours, seen.filtered)
    assert differ(seen.ours, seen.plain)
    assert torch.equal(seen.plain["samples"], seen.neutral["samples"])
    assert torch.equal(seen.plain["samples"], seen.shut["samples"])


def test_split_calls_do_not_change_it(host, graph, monkeypatch):
    from comfy.model_patcher import ModelPatcher

    parts, calls = build(graph, size=(64, 64)), []
    sample(graph, parts, "x", steps=1, model=watched(graph, host, freeu(graph, parts["model"]), calls))
    together = host.run(graph).x
    monkeypatch.setattr(ModelPatcher, "get_free_memory", lambda self, device: 0)
    assert close(host.run(graph, fresh=True).x, together)
    assert [seen["rows"] for seen in calls] == [6, 3, 3]


def test_every_factor_acts_by_itself(host, graph):
    parts = build(graph, size=(64, 64))
    sample(graph, parts, "plain", **ONCE)
    for name in OFF:
        sample(graph, parts, name, model=freeu(graph, parts["model"], **OFF | {name: FREEU[name]}), **ONCE)
    seen = vars(host.run(graph))
    results = [seen[name] for name in ("plain", *OFF)]
    assert all(differ(a, b) for i, a in enumerate(results) for b in results[:i])


def test_a_window_acts_only_inside_it(host, graph):
    parts, calls, plain = build(graph, size=(64, 64)), [], []
    late = freeu(graph, parts["model"], start_percent=0.5)
    sample(graph, parts, "late", steps=4, model=watched(graph, host, late, calls))
    sample(graph, parts, "plain", steps=4, model=watched(graph, host, parts["model"], plain))
    host.run(graph)
    equal = [torch.equal(a["out"], b["out"]) for a, b in zip(calls, plain, strict=True)]
    assert equal == [True, True, False, False]


def test_blocks_count_and_not_channels_where_the_stock_node_differs(host, graph):
    """In SDXL's widths the stock node reaches one block too far in both stages."""
    proportioned, measured = tiny_model("SDXL", {**SDXL, "channel_mult": [1, 2, 4]}), {}
    blocks = proportioned.model.diffusion_model.output_blocks

    def measure(factors):
        """A function that notes what every output block would get, and then compares with what it gets."""

        def begin(model):
            def note(h, skip, options):
                number = options["block"][1]
                before = h.clone(), skip.clone()

                def compare(layer, args):
                    handle.remove()
                    after, half = args[0].split([h.shape[1], skip.shape[1]], dim=1), h.shape[1] // 2
                    assert torch.equal(after[0][:, half:], before[0][:, half:])
                    gain = after[0][:, :half].norm() / before[0][:, :half].norm()
                    part = after[1].mean((-2, -1)).norm() / before[1].mean((-2, -1)).norm()
                    factors[number] = (round(gain.item(), 4), round(part.item(), 4))

                handle = blocks[number][0].register_forward_pre_hook(compare)
                return h, skip

            model = model.clone()
            model.set_model_output_block_patch(note)
            return model

        return begin

    parts = build(graph, size=(64, 64))
    base = call(graph, host, lambda _: proportioned, parts["model"])
    values = {name: FREEU[name] for name in OFF}
    for name, node in (("StoryLoom_FreeU", FREEU), ("FreeU", values)):
        measured[name] = {}
        watching = call(graph, host, measure(measured[name]), base)
        sample(graph, parts, name, model=graph.add(name, model=watching, **node)(), **ONCE)
    host.run(graph)
    first, second, none = (1.1, 0.6), (1.2, 0.4), (1.0, 1.0)
    assert [measured["StoryLoom_FreeU"][n] for n in range(9)] == [first] * 3 + [second] * 3 + [none] * 3
    assert [measured["FreeU"][n] for n in range(9)] == [first] * 4 + [second] * 3 + [none] * 2


def test_beside_the_stock_node_in_either_order_and_two_in_a_row(host, graph, models):
    parts = build(graph, size=(64, 64))
    own, (model, _) = parts["model"], models
    before = str(model.wrappers), str(model.model_options)
    sample(graph, parts, "plain", **ONCE)
    sample(graph, parts, "after", model=freeu(graph, stock(graph, own)), **ONCE)
    sample(graph, parts, "ahead", model=stock(graph, freeu(graph, own)), **ONCE)
    sample(graph, parts, "reference", model=call(graph, host, fourier, stock(graph, own)), **ONCE)
    sample(graph, parts, "stock", model=stock(graph, own), **ONCE)
    sample(graph, parts, "ours", model=freeu(graph, own), **ONCE)
    sample(graph, parts, "twice", model=freeu(graph, freeu(graph, own)), **ONCE)
    twice = call(graph, host, fourier, call(graph, host, fourier, own))
    sample(graph, parts, "reference_twice", model=twice, **ONCE)
    seen = host.run(graph)
    assert close(seen.after, seen.reference) and torch.equal(seen.after["samples"], seen.ahead["samples"])
    assert close(seen.twice, seen.reference_twice)
    different = [seen.after, seen.stock, seen.ours, seen.twice, seen.plain]
    assert all(differ(a, b) for i, a in enumerate(different) for b in different[:i])
    assert (str(model.wrappers), str(model.model_options)) == before


def test_with_ipca_and_csa_in_either_order(host, graph):
    parts = build(graph, size=(64, 64))
    attentive = csa(graph, ipca(graph, parts["model"]))
    sample(graph, parts, "last", model=freeu(graph, attentive), **ONCE)
    sample(graph, parts, "first", model=csa(graph, ipca(graph, freeu(graph, parts["model"]))), **ONCE)
    sample(graph, parts, "reference", model=call(graph, host, fourier, attentive), **ONCE)
    sample(graph, parts, "without", model=attentive, **ONCE)
    sample(graph, parts, "alone", model=freeu(graph, parts["model"]), **ONCE)
    seen = host.run(graph)
    assert torch.equal(seen.last["samples"], seen.first["samples"])
    assert close(seen.last, seen.reference)
    assert differ(seen.last, seen.without) and differ(seen.last, seen.alone)


def test_with_a_controlnet_whose_additions_are_filtered_with_the_skips(host, graph):
    parts = build(graph, size=(64, 64))
    hint = graph.add("EmptyImage", width=64, height=64, batch_size=1, color=0x3366CC)()
    sides = {**ONCE, **controlled(graph, host, parts, hint)}
    sample(graph, parts, "ours", model=freeu(graph, parts["model"]), **sides)
    sample(graph, parts, "reference", model=call(graph, host, fourier, parts["model"]), **sides)
    sample(graph, parts, "no_freeu", **sides)
    sample(graph, parts, "no_control", model=freeu(graph, parts["model"]), **ONCE)
    seen = host.run(graph)
    assert close(seen.ours, seen.reference)
    assert differ(seen.ours, seen.no_freeu) and differ(seen.ours, seen.no_control)


def test_without_a_story_it_acts_alike(host, graph):
    parts = build(graph, size=(64, 64))
    text = graph.add("CLIPTextEncode", clip=parts["clip"], text="a lighthouse")()
    latent = graph.add("EmptyLatentImage", width=64, height=64, batch_size=1)()
    ordinary = {"positive": text, "negative": text, "latent_image": latent, **ONCE}
    sample(graph, parts, "ours", model=freeu(graph, parts["model"]), **ordinary)
    sample(graph, parts, "reference", model=call(graph, host, fourier, parts["model"]), **ordinary)
    sample(graph, parts, "plain", **ordinary)
    seen = host.run(graph)
    assert close(seen.ours, seen.reference) and differ(seen.ours, seen.plain)


def test_a_window_that_ends_before_it_starts_is_refused(host, graph):
    graph.capture(x=freeu(graph, graph.add("TestTiny")(), start_percent=0.8, end_percent=0.5))
    with pytest.raises(Exception, match=r"start_percent 0\.8 is after end_percent 0\.5") as failed:
        host.run(graph)
    assert failed.value.node == "StoryLoom_FreeU"


@pytest.mark.parametrize(
    "blocks, stages",
    [
        ([2, 2, 2], (range(3), range(3, 6))),
        ([2, 2, 2, 2], (range(3), range(3, 6))),
        ([1, 1, 1], (range(2), range(2, 4))),
    ],
    ids=["SDXL", "SD 1.5", "KOALA"],
)
def test_a_stage_is_what_lies_between_two_enlargements(host, blocks, stages):
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel, Upsample
    from comfy.ops import disable_weight_init

    unet = UNetModel(
        image_size=32,
        in_channels=4,
        model_channels=32,
        out_channels=4,
        num_res_blocks=blocks,
        channel_mult=[1] * len(blocks),
        num_head_channels=16,
        use_spatial_transformer=True,
        transformer_depth=[0] * sum(blocks),
        transformer_depth_middle=-1,
        transformer_depth_output=[0] * (sum(blocks) + len(blocks)),
        context_dim=8,
        device=torch.device("meta"),
        operations=disable_weight_init,
    )
    model = SimpleNamespace(get_model_object=lambda name: unet)
    assert host.pack("nodes.patching").lowest_stages(model) == stages
    last = [n for n, block in enumerate(unet.output_blocks) if any(isinstance(layer, Upsample) for layer in block)]
    assert last[:2] == [stage[-1] for stage in stages]


def test_other_networks_are_refused(host):
    transformer = SimpleNamespace(get_model_object=lambda name: torch.nn.Linear(1, 1), model=torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match=r"\(Linear\) is not a UNet with output blocks.*SDXL.*SSD-1B, Vega.*SD 1\.5"):
        host.pack("nodes.patching").lowest_stages(transformer)
