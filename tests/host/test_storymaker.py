"""StoryMaker on a real model: characters from pictures, beside the text."""

import pytest
import torch
from precision import CLOSE
from story_graphs import (
    CSA,
    biased_attention,
    build,
    call,
    check_other_company,
    close,
    context_windows,
    controlled,
    csa,
    dense_mask,
    differ,
    distance,
    freeu,
    ipca,
    lora,
    sample,
    tag_of,
    watched,
)
from story_makers import IMAGE, Reference, apply, loaded_for, pooled, someone
from tiny_models import SDXL, tiny_model
from torch.nn.functional import adaptive_avg_pool2d

ONCE = {"steps": 1, "cfg": 5.0}
SIZE = (64, 96)


@pytest.fixture(scope="module")
def reference(host, weights):
    return Reference(host, weights)


@pytest.fixture(scope="module")
def fox(host):
    return someone(host, 1)


@pytest.fixture(scope="module")
def owl(host):
    return someone(host, 2)


@pytest.mark.parametrize("sampler, cfg, size", [("euler", 5.0, (64, 96)), ("heun", 1.0, (104, 72))])
def test_it_equals_text_plus_picture_attention_over_edited_weights(
    host, graph, maker, reference, fox, owl, sampler, cfg, size
):
    parts = build(graph, size=size)
    run = {"sampler_name": sampler, "cfg": cfg}
    sample(graph, parts, "ours", model=apply(graph, host, parts["model"], maker, fox, owl), **run)
    known = call(graph, host, reference.all_of((fox, owl)), parts["model"])
    sample(graph, parts, "reference", model=known, **run)
    sample(graph, parts, "plain", **run)
    seen = host.run(graph)
    assert close(seen.ours, seen.reference)
    assert differ(seen.ours, seen.plain)


def test_off_is_bit_identical_and_what_arrives_stays_as_it_is(host, graph, maker, models, fox):
    parts, (model, _) = build(graph, size=(64, 64)), models

    def state():
        return str(model.wrappers), str(model.model_options), model.patches.copy(), model.additional_models.copy()

    before, kept = state(), {name: value.clone() for name, value in maker.adapter.state_dict().items()}
    sample(graph, parts, "plain", **ONCE)
    for name, changes in {
        "off": {"token_strength": 0.0, "lora_strength": 0.0},
        "shut": {"start_percent": 1.0, "lora_strength": 0.0},
        "on": {},
    }.items():
        sample(graph, parts, name, **ONCE, model=apply(graph, host, parts["model"], maker, fox, **changes))
    sample(graph, parts, "again", **ONCE)
    seen = host.run(graph)
    for name in ("off", "shut", "again"):
        assert torch.equal(seen.plain["samples"], getattr(seen, name)["samples"]), name
    assert differ(seen.plain, seen.on)
    assert state() == before
    assert all(torch.equal(value, kept[name]) for name, value in maker.adapter.state_dict().items())


def test_every_input_counts_and_the_same_inputs_give_the_same_picture(host, graph, maker, fox, owl):
    parts = build(graph, size=(64, 64))
    model, left = parts["model"], torch.tensor([1.0, 0.0]).expand(1, 2, 2)
    cat = someone(host, 3)
    variants = {
        "token_strength": apply(graph, host, model, maker, fox, owl, token_strength=0.4),
        "lora_strength": apply(graph, host, model, maker, fox, owl, lora_strength=0.4),
        "face_strength": apply(graph, host, model, maker, fox, owl, face_strength=0.5),
        "appearance_strength": apply(graph, host, model, maker, fox, owl, appearance_strength=0.5),
        "window": apply(graph, host, model, maker, fox, owl, end_percent=0.1),
        "start": apply(graph, host, model, maker, fox, owl, start_percent=0.1),
        "first": apply(graph, host, model, maker, cat, owl),
        "second": apply(graph, host, model, maker, fox, cat),
        "order": apply(graph, host, model, maker, owl, fox),
        "alone": apply(graph, host, model, maker, fox),
        "three": apply(graph, host, model, maker, fox, owl, cat),
        "region_1": apply(graph, host, model, maker, fox, owl, regions=[left]),
        "region_2": apply(graph, host, model, maker, fox, owl, regions=[None, left]),
    }
    variants |= {name: apply(graph, host, model, maker, fox, owl) for name in ("ours", "again")}
    for name, patched in variants.items():
        sample(graph, parts, name, model=patched, cfg=1.0, scheduler="simple")
    seen = vars(host.run(graph))
    assert torch.equal(seen["ours"]["samples"], seen.pop("again")["samples"])
    results = list(seen.items())
    same = [
        (a, b)
        for i, (a, x) in enumerate(results)
        for b, y in results[:i]
        if distance(x["samples"], y["samples"]) < 1e-5
    ]
    assert same == []


def test_cfg_1_split_calls_and_a_second_positive_do_not_change_the_story(host, graph, maker, fox, owl, monkeypatch):
    parts = build(graph, size=SIZE)
    check_other_company(graph, host, parts, apply(graph, host, parts["model"], maker, fox, owl), monkeypatch)


def guider_of(graph, name, parts, model, text):
    """A guider of the host that has the story as its positive."""
    positive, negative = parts["positive"], parts["negative"]
    inputs = {
        "BasicGuider": {"conditioning": positive},
        "DualCFGGuider": {"cond1": positive, "cond2": text, "negative": negative, "style": "regular"}
        | {"cfg_conds": 4.0, "cfg_cond2_negative": 3.0},
        "PerpNegGuider": {"positive": positive, "negative": text, "empty_conditioning": negative}
        | {"cfg": 5.0, "neg_scale": 1.0},
        "DualModelGuider": {"positive": positive, "negative": text, "model_negative": model, "cfg": 5.0},
    }
    return graph.add(name, model=model, **inputs[name])()


@pytest.mark.parametrize(
    "name, own", [("BasicGuider", (0,)), ("DualCFGGuider", (2,)), ("PerpNegGuider", (0,)), ("DualModelGuider", None)]
)
def test_whatever_is_not_the_positive_gets_the_tokens_of_nobody(host, graph, maker, reference, fox, name, own):
    """A guider with a model for each side calls both number 0, in turn."""
    import nodes

    if name not in nodes.NODE_CLASS_MAPPINGS:
        pytest.skip("this ComfyUI has no such guider")
    parts, turn = build(graph, size=(64, 64)), []

    class InTurn:
        def __contains__(self, number):
            turn.append(number)
            layers_of_a_call = 17 * 3
            return (len(turn) - 1) // layers_of_a_call % 2 == 0

    text = graph.add("CLIPTextEncode", clip=parts["clip"], text="a lighthouse")()
    known = call(graph, host, reference.all_of((fox,), positive=own or InTurn()), parts["model"])
    wrong = call(graph, host, reference.all_of((fox,), positive=(0, 1, 2)), parts["model"])
    models = {"ours": apply(graph, host, parts["model"], maker, fox), "reference": known, "wrong": wrong}
    noise, chosen = graph.add("RandomNoise", noise_seed=7)(), graph.add("KSamplerSelect", sampler_name="euler")()
    sigmas = graph.add("BasicScheduler", model=parts["model"], scheduler="normal", steps=1, denoise=1.0)()
    for case, model in models.items():
        links = {"guider": guider_of(graph, name, parts, model, text), "latent_image": parts["latent_image"]}
        drawn = graph.add("SamplerCustomAdvanced", noise=noise, sampler=chosen, sigmas=sigmas, **links)()
        graph.capture(**{case: drawn})
    seen = host.run(graph)
    assert close(seen.ours, seen.reference)
    assert differ(seen.ours, seen.wrong) is (name != "BasicGuider")


def test_a_conditioning_that_is_not_the_guiders_own_gets_the_tokens_of_nobody(host, graph, maker, reference, fox):
    """The model node of Perp-Neg evaluates its empty conditioning alone, as number 0."""
    parts, calls = build(graph, size=(64, 64)), []
    text = graph.add("CLIPTextEncode", clip=parts["clip"], text="")()
    ours = apply(graph, host, parts["model"], maker, fox, lora_strength=0.0)
    for name, model in (("ours", ours), ("never", call(graph, host, reference.looks((fox,), (), 0.8), parts["model"]))):
        calls.append([])
        model = graph.add("PerpNeg", model=model, empty_conditioning=text, neg_scale=1.0)()
        sample(graph, parts, name, **ONCE, model=watched(graph, host, model, calls[-1]))
    host.run(graph)
    (_, ours), (_, never) = calls
    assert distance(ours["out"], never["out"]) < CLOSE


def test_two_branches_and_nodes_in_a_row(host, graph, maker, reference, fox, owl):
    parts = build(graph, size=(64, 64))
    one = apply(graph, host, parts["model"], maker, fox, lora_strength=0.0)
    other = apply(graph, host, parts["model"], maker, owl, lora_strength=0.0, token_strength=0.5)
    row = apply(graph, host, one, maker, owl, lora_strength=0.0, token_strength=0.5)
    turned = apply(graph, host, other, maker, fox, lora_strength=0.0)
    half = {"lora_strength": 0.4}
    twice = apply(
        graph, host, apply(graph, host, parts["model"], maker, fox, **half), maker, fox, **half, token_strength=0.0
    )
    sees_fox = reference.looks((fox,))

    def both(model):
        text = sees_fox(model).model_options["transformer_options"]["patches_replace"]["attn2"][("middle", 0)]
        return reference.looks((owl,), strength=0.5, text=text)(model)

    references = {"first": sees_fox, "reference": both, "edited": reference.all_of((fox,))}
    models = {"one": one, "row": row, "other": other, "turned": turned, "one_again": one, "twice": twice}
    models |= {name: call(graph, host, patch, parts["model"]) for name, patch in references.items()}
    for name, model in models.items():
        sample(graph, parts, name, **ONCE, model=model)
    seen = host.run(graph)
    assert close(seen.one, seen.first) and torch.equal(seen.one["samples"], seen.one_again["samples"])
    assert close(seen.row, seen.reference) and close(seen.turned, seen.reference)
    assert close(seen.twice, seen.edited), "changes of the model add as well"
    assert differ(seen.one, seen.row) and differ(seen.other, seen.row) and differ(seen.one, seen.other)
    assert len(loaded_for(maker)) <= 1, "an adapter that two nodes use is loaded once"


def foreign(model):
    """Another node's cross-attention, as an IP-Adapter puts it."""
    from comfy.ldm.modules.attention import attention_basic

    def attention(q, k, v, options):
        return 0.5 * attention_basic(q, k, v, options["n_heads"])

    model = model.clone()
    model.set_model_attn2_replace(attention, "output", 1)
    return model


def halved(q, k, v, options):
    from comfy.ldm.modules.attention import attention_basic

    gain = 0.5 if options["block"] == ("output", 1) else 1.0
    return gain * attention_basic(q, k, v, options["n_heads"])


def pag(graph, host, model):
    return graph.add("PerturbedAttentionGuidance", model=model, scale=3.0)()


def everyone_looks(graph, host, model):
    return call(graph, host, dense_mask(host, [[1, 2], [0, 2], [0, 1]], seed=CSA["seed"]), model)


def without_change(graph, host, model):
    return model


COMPANY = {
    "IPCA": (lambda graph, host, model: ipca(graph, model), without_change, {"text": biased_attention(2.0)}),
    "CSA": (lambda graph, host, model: csa(graph, model), everyone_looks, {}),
    "FreeU": (lambda graph, host, model: freeu(graph, model), lambda graph, host, model: freeu(graph, model), {}),
    "a LoRA": (lambda graph, host, model: lora(graph, host, model), None, {}),
    "PAG": (pag, pag, {}),
    "another replacement": (
        lambda graph, host, model: call(graph, host, foreign, model),
        without_change,
        {"text": halved},
    ),
    "windows": (lambda graph, host, model: context_windows(graph, model, 2), None, {}),
}
"""What else may stand on a model: by itself, in the reference (None: the same), and its view of the text."""


@pytest.mark.parametrize("name", COMPANY)
def test_in_company_on_either_side_of_it(host, graph, maker, reference, fox, name):
    theirs, in_reference, text = COMPANY[name]
    parts = build(graph, size=(64, 64))
    settings = {"lora_strength": 0.0}
    plain = parts["model"]
    models = {
        "before": apply(graph, host, theirs(graph, host, plain), maker, fox, **settings),
        "after": theirs(graph, host, apply(graph, host, plain, maker, fox, **settings)),
        "reference": call(graph, host, reference.looks((fox,), **text), (in_reference or theirs)(graph, host, plain)),
        "without_ours": theirs(graph, host, plain),
        "without_theirs": apply(graph, host, plain, maker, fox, **settings),
    }
    for case, model in models.items():
        sample(graph, parts, case, **ONCE, model=model)
    seen = host.run(graph)
    assert close(seen.before, seen.reference) and close(seen.after, seen.reference)
    assert differ(seen.before, seen.without_ours)
    assert differ(seen.before, seen.without_theirs) or name == "windows"


def test_with_a_controlnet_and_a_lora_beside_its_own(host, graph, maker, reference, fox):
    parts = build(graph, size=(64, 64))
    hint = graph.add("EmptyImage", width=64, height=64, batch_size=1, color=0x3366CC)()
    sides, plain = controlled(graph, host, parts, hint) | ONCE, parts["model"]
    known = lora(graph, host, call(graph, host, reference.all_of((fox,)), plain))
    sample(graph, parts, "before", **sides, model=apply(graph, host, lora(graph, host, plain), maker, fox))
    sample(graph, parts, "after", **sides, model=lora(graph, host, apply(graph, host, plain, maker, fox)))
    sample(graph, parts, "reference", **sides, model=known)
    sample(graph, parts, "no_lora", **sides, model=apply(graph, host, plain, maker, fox))
    sample(graph, parts, "no_control", **ONCE, model=lora(graph, host, apply(graph, host, plain, maker, fox)))
    seen = host.run(graph)
    assert close(seen.before, seen.reference) and close(seen.after, seen.reference)
    assert differ(seen.before, seen.no_lora) and differ(seen.before, seen.no_control)


TRIO = {
    "identity": "[Fox] a red fox\n[Owl] a grey owl\n[Cat] a fat cat",
    "frames": "[Owl] sits\n[NC] a beach\n[Fox] and [Cat] argue\n[Fox] and [Owl] wave\n[Cat] asleep",
}
SHOWN = [(1,), (), (0, 2), (0, 1), (2,)]
"""Who is in the frames, by the order of the characters' description."""


def chosen(number):
    """A function of CONDITIONING that keeps one row, and no word of the story."""

    def choose(conditioning):
        ((context, info),) = conditioning
        return [[context[number : number + 1], {"pooled_output": info["pooled_output"][number : number + 1]}]]

    return choose


def lonely(graph, host, parts, number):
    """Both sides and the latents of one frame by itself: no tag, and the noise that it has in the story."""
    positive = call(graph, host, chosen(number), parts["positive"])
    alone = call(
        graph, host, lambda latent: {"samples": latent["samples"][:1], "batch_index": [number]}, parts["latent_image"]
    )
    return {
        "positive": positive,
        "negative": graph.add("ConditioningZeroOut", conditioning=positive)(),
        "latent_image": alone,
    }


@pytest.mark.parametrize(
    "encode, names, order",
    [
        ("EncodePerFrame", ("Fox", "Owl", "Cat"), (0, 1, 2)),
        ("EncodeOnePrompt", ("", "", ""), (1, 0, 2)),
        ("EncodePerFrame", ("", "FOX", ""), (1, 0, 2)),
    ],
    ids=["named", "by first appearance", "one named"],
)
def test_every_frame_gets_the_characters_that_its_line_names(host, graph, maker, encode, names, order):
    """As single runs with those characters alone, in the order in which they are connected."""
    parts = build(graph, encode, size=(64, 64), shared_noise=False, **TRIO)
    people = [someone(host, 11 + number, name) for number, name in enumerate(names)]
    model, settings = parts["model"], {"lora_strength": 0.0}
    sample(graph, parts, "story", **ONCE, model=apply(graph, host, model, maker, *people, **settings))
    sample(graph, parts, "plain", **ONCE)
    for number, shown in enumerate(SHOWN):
        wanted = [person for person, role in zip(people, order, strict=True) if role in shown]
        alone = apply(graph, host, model, maker, *wanted, **settings) if wanted else model
        sample(graph, parts, f"frame_{number}", **ONCE, **lonely(graph, host, parts, number), model=alone)
    seen = vars(host.run(graph))
    for number, (image, plain) in enumerate(zip(seen["story"]["samples"], seen["plain"]["samples"], strict=True)):
        assert distance(image[None], seen[f"frame_{number}"]["samples"]) < CLOSE, number
        assert (distance(image, plain) > 1e-2) is bool(SHOWN[number]), number


def test_batches_of_a_long_story_have_the_same_characters(host, graph, maker):
    """The last batch begins with the third character of the story, who stays the third."""
    parts = build(graph, "EncodePerFrame", size=(64, 64), shared_noise=False, **TRIO)
    model = apply(graph, host, parts["model"], maker, *(someone(host, seed) for seed in (21, 22, 23)))
    keys = {"latent": "latent_image", "positive": "positive", "negative": "negative"}
    node = graph.add("StoryLoom_SplitBatches", batch_size=2, anchors=0, **{k: parts[v] for k, v in keys.items()})
    cut = {"latent_image": node(0), "positive": node(1), "negative": node(2)}
    sample(graph, parts, "whole", **ONCE, model=model)
    drawn = sample(graph, parts, "last", **ONCE, **cut, model=model)
    graph.capture(joined=graph.add("StoryLoom_JoinBatches", plan=node(5), latents=drawn)(0))
    seen = host.run(graph)
    assert close(seen.whole, seen.joined)


@pytest.mark.parametrize("case", ["nobody of them", "window"])
def test_a_run_without_its_characters_is_as_without_the_node_and_warns_once(host, graph, maker, caplog, case):
    parts = build(
        graph, "EncodePerFrame", size=(64, 64), identity=TRIO["identity"], frames="[Fox] sits\n[NC] a beach\n[Owl] x"
    )
    rows = slice(0, 2)

    def some(conditioning):
        ((context, info),) = conditioning
        tag = tag_of(host, info)
        tag = type(tag)(tag.rows[rows], tag.length, tag.cast)
        return [[context[rows], {**info, "pooled_output": info["pooled_output"][rows], "storyloom": tag}]]

    positive = call(graph, host, some, parts["positive"])
    latent = graph.add("EmptyLatentImage", width=64, height=64, batch_size=2)()
    ends = {"positive": positive, "negative": positive, "latent_image": latent, **ONCE}
    settings = {"lora_strength": 0.0} | ({"start_percent": 0.9} if case == "window" else {})
    owl = someone(host, 5, "Fox" if case == "window" else "Owl")
    twice = apply(graph, host, apply(graph, host, parts["model"], maker, owl, **settings), maker, owl, **settings)
    sample(graph, parts, "ours", **ends, model=twice)
    sample(graph, parts, "plain", **ends)
    seen = host.run(graph)
    assert torch.equal(seen.ours["samples"], seen.plain["samples"])
    (message,) = [r.getMessage() for r in caplog.records if "has no effect" in r.getMessage()]
    reasons = {
        "nobody of them": "none of its characters is in these frames",
        "window": "lies between start_percent 0.9",
    }
    assert message.startswith("Apply StoryMaker has no effect in this run: ") and reasons[case] in message


def test_a_name_that_the_story_does_not_know_is_refused(host, graph, maker):
    parts = build(graph, "EncodePerFrame", size=(64, 64), **TRIO)
    model = apply(graph, host, parts["model"], maker, someone(host, 1, "fox"), someone(host, 2, "Wolf"))
    sample(graph, parts, "x", **ONCE, model=model)
    with pytest.raises(
        Exception, match='The story has no character named "Wolf". Its characters are Owl, Fox, Cat. '
    ) as failed:
        host.run(graph)
    assert failed.value.node == "KSampler" and str(failed.value).endswith(".")


def test_a_model_in_half_precision_draws_characters_in_their_regions(host, graph, maker, fox):
    def halved(model):
        other = tiny_model("SDXL", SDXL)
        other.model.half().manual_cast_dtype = None
        other.model.diffusion_model.dtype = torch.float16
        return other

    parts, alone = build(graph, size=(64, 64)), {"steps": 1, "cfg": 1.0}
    model = call(graph, host, halved, parts["model"])
    settings = {"regions": [shape(8, 8, 1) > 0.5], "lora_strength": 0.0, "token_strength": 2.0}
    sample(graph, parts, "plain", **alone, model=model)
    sample(graph, parts, "ours", **alone, model=apply(graph, host, model, maker, fox, **settings))
    sample(graph, parts, "precise", **alone, model=apply(graph, host, parts["model"], maker, fox, **settings))
    seen = host.run(graph)
    ours, precise, plain = (latent["samples"] for latent in (seen.ours, seen.precise, seen.plain))
    assert 4 * distance(ours, precise) < distance(ours, plain)


def shape(height, width, seed, count=1):
    """Soft masks."""
    return torch.rand(count, height, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("masks", [1, 3])
def test_regions_are_masks_of_attention(host, graph, maker, reference, fox, owl, masks):
    """Soft ones, of another size than the picture; the second character has none."""
    parts = build(graph, size=(104, 72))
    soft = shape(30, 44, 3, masks)
    everywhere = torch.ones(1, 1, 1)

    def regions(grid, image):
        return torch.stack([pooled(soft[image % masks], (9, 13))(grid), everywhere[0].expand(grid)])

    settings = {"lora_strength": 0.0}
    ours = apply(graph, host, parts["model"], maker, fox, owl, regions=[soft], **settings)
    white = apply(graph, host, parts["model"], maker, fox, owl, regions=[everywhere, everywhere[0]], **settings)
    known = call(graph, host, reference.looks((fox, owl), regions=regions), parts["model"])
    sample(graph, parts, "ours", **ONCE, model=ours)
    sample(graph, parts, "white", **ONCE, model=white)
    sample(graph, parts, "none", **ONCE, model=apply(graph, host, parts["model"], maker, fox, owl, **settings))
    sample(graph, parts, "reference", **ONCE, model=known)
    seen = host.run(graph)
    assert close(seen.ours, seen.reference)
    assert close(seen.white, seen.none) and differ(seen.ours, seen.none)


def test_a_region_of_nothing_leaves_a_character_out(host, graph, maker, reference, fox, owl):
    parts = build(graph, size=(64, 64))
    nowhere, settings = torch.zeros(1, 8, 8), {"lora_strength": 0.0}
    ours = apply(graph, host, parts["model"], maker, fox, owl, regions=[None, nowhere], **settings)
    known = call(graph, host, reference.looks((fox,)), parts["model"])
    sample(graph, parts, "ours", steps=1, cfg=1.0, model=ours)
    sample(graph, parts, "reference", steps=1, cfg=1.0, model=known)
    seen = host.run(graph)
    assert close(seen.ours, seen.reference)


@pytest.mark.parametrize("side", ["positive", "negative"])
def test_a_region_is_of_the_whole_picture_also_where_a_prompt_is_for_a_part(host, graph, maker, reference, fox, side):
    parts = build(graph, size=(192, 128))
    soft = shape(16, 24, 4)
    text = graph.add("CLIPTextEncode", clip=parts["clip"], text="a lighthouse")()
    area = {"width": 128, "height": 64, "x": 64, "y": 24, "strength": 1.0}
    placed = graph.add("ConditioningSetArea", conditioning=text, **area)()
    both = graph.add("ConditioningCombine", conditioning_1=placed, conditioning_2=parts[side])()

    def regions(grid, image):
        part = soft[:, 3:11, 8:24] if grid in ((4, 8), (2, 4)) else soft
        return adaptive_avg_pool2d(part, grid)

    settings = {"lora_strength": 0.0}
    ours = apply(graph, host, parts["model"], maker, fox, regions=[soft], **settings)
    known = call(graph, host, reference.looks((fox,), regions=regions), parts["model"])
    sample(graph, parts, "ours", **ONCE | {side: both}, model=ours)
    sample(graph, parts, "reference", **ONCE | {side: both}, model=known)
    sample(graph, parts, "plain", **ONCE | {side: both})
    seen = host.run(graph)
    assert close(seen.ours, seen.reference) and differ(seen.ours, seen.plain)


def test_a_prompt_with_a_mask_and_context_windows_with_areas(host, graph, maker, reference, fox):
    parts = build(graph, size=(64, 96))
    text = graph.add("CLIPTextEncode", clip=parts["clip"], text="a lighthouse")()
    mask = call(graph, host, lambda _: shape(8, 8, 6).round(), "")
    where = {"mask": mask, "strength": 1.0, "set_cond_area": "default"}
    masked = graph.add("ConditioningSetMask", conditioning=text, **where)()
    area = {"width": 64, "height": 64, "x": 0, "y": 32, "strength": 1.0}
    placed = graph.add("ConditioningSetArea", conditioning=text, **area)()
    plain, settings = context_windows(graph, parts["model"], 2), {"lora_strength": 0.0}
    for name, other in (("masked", masked), ("placed", placed)):
        both = graph.add("ConditioningCombine", conditioning_1=other, conditioning_2=parts["positive"])()
        ends = {"positive": both, **ONCE}
        sample(graph, parts, f"{name}_ours", **ends, model=apply(graph, host, plain, maker, fox, **settings))
        sample(graph, parts, f"{name}_reference", **ends, model=call(graph, host, reference.looks((fox,)), plain))
    seen = host.run(graph)
    assert close(seen.masked_ours, seen.masked_reference) and close(seen.placed_ours, seen.placed_reference)


@pytest.mark.parametrize("split", ["by frame", "by place"])
def test_masks_of_a_long_story_are_of_its_frames_or_of_a_batch(host, graph, maker, split):
    parts = build(graph, "EncodePerFrame", size=(64, 64), shared_noise=False, frames="one\ntwo\nthree\nfour\nfive")
    soft, person = shape(8, 8, 7, 5), someone(host, 1)
    keys = {"latent": "latent_image", "positive": "positive", "negative": "negative"}
    links = {k: parts[v] for k, v in keys.items()} | {"mask": call(graph, host, lambda _: soft, "")}
    node = graph.add("StoryLoom_SplitBatches", batch_size=3, anchors=1, **links)
    cut = {"latent_image": node(0), "positive": node(1), "negative": node(2)}
    whole = apply(graph, host, parts["model"], maker, person, regions=[soft])
    model = whole
    if split == "by place":
        model = apply(graph, host, parts["model"], maker, person)
        graph[model[0]]["inputs"]["region_1"] = node(4)
    sample(graph, parts, "whole", **ONCE, model=whole)
    sample(graph, parts, "unmasked", **ONCE, model=apply(graph, host, parts["model"], maker, person))
    drawn = sample(graph, parts, "last", **ONCE, **cut, model=model)
    graph.capture(joined=graph.add("StoryLoom_JoinBatches", plan=node(5), latents=drawn)(0))
    seen = host.run(graph)
    assert close(seen.whole, seen.joined) and differ(seen.whole, seen.unmasked)


@pytest.mark.parametrize("tagged", [True, False])
@pytest.mark.parametrize("masks", [0, 2])
def test_another_number_of_masks_than_of_images_is_refused(host, graph, maker, fox, tagged, masks):
    parts = build(graph, size=(64, 64))
    text = graph.add("CLIPTextEncode", clip=parts["clip"], text="a lighthouse")()
    ends = {} if tagged else {"positive": text, "negative": text}
    model = apply(graph, host, parts["model"], maker, fox, regions=[torch.ones(masks, 8, 8)])
    sample(graph, parts, "x", **ONCE, **ends, model=model)
    with pytest.raises(Exception, match=f"A region has {masks} masks, but the batch has 3 images. Use one mask"):
        host.run(graph)


@pytest.mark.parametrize(
    "case, reason",
    [
        ("nan", r"region_2 contains NaN or infinity: check the node that produced it"),
        ("nothing", r"region_2 has shape \[1, 0, 8\] instead of \[masks, height, width\]: connect a MASK"),
        ("nobody's", "region_3 is connected but character_3 is not: connect that character, or disconnect the region"),
        (
            "width",
            rf'The character "Fox" has a face vector of 32 numbers and features of width 48, but .* 32 and {IMAGE}: ',
        ),
        ("window", "start_percent 0.9 is after end_percent 0.2"),
    ],
)
def test_what_is_of_no_use_is_refused_with_what_to_change(host, graph, maker, fox, case, reason):
    parts = build(graph, size=(64, 64))
    other = someone(host, 2, "Fox", image=48) if case == "width" else someone(host, 2)
    wrong = {"nan": torch.full((1, 8, 8), torch.nan), "nothing": torch.ones(1, 0, 8)}.get(case)
    regions = [None, wrong, torch.ones(1, 8, 8) if case == "nobody's" else None]
    settings = {"start_percent": 0.9, "end_percent": 0.2} if case == "window" else {}
    graph.capture(x=apply(graph, host, parts["model"], maker, fox, other, regions=regions, **settings))
    with pytest.raises(Exception, match=reason) as refused:
        host.run(graph)
    assert refused.value.node == "StoryLoom_ApplyStoryMaker" and str(refused.value).endswith(".")
