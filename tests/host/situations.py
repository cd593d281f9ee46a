"""Situations in which StoryLoom's patches are tried: nodes of ComfyUI, and what other packs do, in a few lines each.

Each is a function (graph, host, parts) -> changes of what a sampler gets, as the columns of `test_matrix.py` are.
"""

import torch
from company import attention_couple, deep_cache, passed_through, row_by_row, smoothed_energy, tiled
from story_graphs import LAYERS, SVR, call, context_windows, lora
from test_matrix import texts

NODES = ("sag", "tomesd", "model_downscale", "model_merging", "easycache", "nag", "attention_multiply", "apg", "tcfg")
"""ComfyUI's own nodes that are tried here, by their files."""


def node(class_type, **settings):
    """Surroundings with one of ComfyUI's nodes on MODEL."""
    return lambda graph, host, parts: {"model": graph.add(class_type, model=parts["model"], **settings)()}


def patched(patch):
    """Surroundings with a function of MODEL."""
    return lambda graph, host, parts: {"model": call(graph, host, patch, parts["model"])}


def sampler(name, steps=2, **changes):
    return lambda graph, host, parts: {"sampler_name": name, "steps": steps, **changes}


def attention(slot, function):
    """A function of MODEL that puts function(q, k, v, options) at every attention layer."""

    def patch(model):
        model = model.clone()
        for part, number in LAYERS:
            getattr(model, f"set_model_{slot}_replace")(function, part, number)
        return model

    return patch


def plain_attention(q, k, v, options):
    from comfy.ldm.modules.attention import attention_basic

    return attention_basic(q, k, v, options["n_heads"])


def more_tokens(q, k, v, options):
    """As IPAdapter does it: attention to tokens of a picture is added to the text's, in every layer."""
    tokens = torch.randn(1, 4, k.shape[-1], generator=torch.Generator().manual_seed(6)).to(k).expand(k.shape[0], -1, -1)
    return plain_attention(q, k, v, options) + 0.5 * plain_attention(q, tokens, tokens, options)


def on_the_positive(q, k, v, options):
    """As prompt-controlled packs do it: each chunk has an attention of its own, found by its number."""
    parts = zip(options["cond_or_uncond"], *(x.chunk(len(options["cond_or_uncond"])) for x in (q, k, v)), strict=True)
    return torch.cat([plain_attention(*part, options) * (1.0 if kind else 0.8) for kind, *part in parts])


def appended(n, context, value, options):
    """An attn2_patch that adds four columns to the text of every row, as embeddings of a picture are added."""
    more = torch.randn(1, 4, context.shape[-1], generator=torch.Generator().manual_seed(6)).to(context)
    longer = torch.cat([context, more.expand(context.shape[0], -1, -1)], dim=1)
    return n, longer, longer


def reordered(n, context, value, options):
    """An attn2_patch that turns the columns of the text round."""
    return n, context.flip(1), value.flip(1)


def doubled_keys(n, context, value, options):
    """An attn1_patch that adds the tokens of the first image to every image's, as reference-only does it."""
    chunks = len(options["cond_or_uncond"])
    first = torch.cat([each[:1].expand_as(each) for each in context.chunk(chunks)])
    both = torch.cat([context, first], dim=1)
    return n, both, both


def patch_of(kind, function):
    def patch(model):
        model = model.clone()
        getattr(model, f"set_model_{kind}_patch")(function)
        return model

    return patch


def chunk_by_chunk(model):
    """MODEL whose UNet is called with one conditioning after another, each with the options of its own chunk."""

    def wrapper(apply_model, args):
        kinds, uuids = args["cond_or_uncond"], args["c"]["transformer_options"]["uuids"]
        rows, outs = args["input"].shape[0] // len(kinds), []
        for place, (kind, uuid) in enumerate(zip(kinds, uuids, strict=True)):
            own = slice(place * rows, (place + 1) * rows)
            c = {k: v[own] if isinstance(v, torch.Tensor) else v for k, v in args["c"].items()}
            c["transformer_options"] = {**c["transformer_options"], "cond_or_uncond": [kind], "uuids": [uuid]}
            outs.append(apply_model(args["input"][own], args["timestep"][own], **c))
        return torch.cat(outs)

    return wrapped(wrapper, model)


def backwards(model):
    """MODEL whose UNet is called with the rows of the host's call in the opposite order."""

    def wrapper(apply_model, args):
        c = {k: v.flip(0) if isinstance(v, torch.Tensor) else v for k, v in args["c"].items()}
        return apply_model(args["input"].flip(0), args["timestep"].flip(0), **c).flip(0)

    return wrapped(wrapper, model)


def another_evaluation(model):
    """MODEL that evaluates the latents turned round as well, and takes the mean, as some guidance does."""

    def wrapper(apply_model, args):
        one, other = (apply_model(x, args["timestep"], **args["c"]) for x in (args["input"], args["input"].flip(-1)))
        return (one + other.flip(-1)) / 2

    return wrapped(wrapper, model)


def wrapped(wrapper, model):
    model = model.clone()
    model.set_model_unet_function_wrapper(wrapper)
    return model


def recorded(slot):
    """Surroundings with a recorder of attention weights, as maps of attention need it: one of each key."""

    def patch(model):
        kept = []

        def recorder(q, k, v, options):
            kept.append(torch.einsum("rqc,rkc->rqk", q, k).softmax(-1))
            return plain_attention(q, k, v, options)

        def after(args):
            keys, tokens = kept[-1].shape[-1], kept[-1].shape[-2] if slot == "attn1" else 77
            assert keys == tokens, f"{keys} keys for {tokens}"
            return args["denoised"]

        model = model.clone()
        getattr(model, f"set_model_{slot}_replace")(recorder, "middle", 0, 0)
        model.set_model_sampler_post_cfg_function(after)
        return model

    return patched(patch)


def two_areas(graph, host, parts):
    """The story on the left and again on the right, each in an area of its own."""
    halves = []
    for x in (0.0, 0.5):
        where = {"width": 0.5, "height": 1.0, "x": x, "y": 0.0, "strength": 1.0}
        halves.append(graph.add("ConditioningSetAreaPercentage", conditioning=parts["positive"], **where)())
    return {"positive": graph.add("ConditioningCombine", conditioning_1=halves[0], conditioning_2=halves[1])()}


def windows_with_anchors(graph, host, parts):
    return {"model": context_windows(graph, parts["model"], 2, causal_window_fix=True), "sampler_name": "dpmpp_2m"}


def scheduled_hooks(graph, host, parts):
    """A LoRA for the story's conditioning, off in the first half of the steps."""
    lora(graph, host, parts["model"])
    hook = graph.add("CreateHookLora", lora_name="test.safetensors", strength_model=1.0, strength_clip=0.0)()
    first = graph.add("CreateHookKeyframe", strength_mult=0.0, start_percent=0.0)()
    then = graph.add("CreateHookKeyframe", strength_mult=1.0, start_percent=0.5, prev_hook_kf=first)()
    hook = graph.add("SetHookKeyframes", hooks=hook, hook_kf=then)()
    settings = {"hooks": hook, "strength": 1.0, "set_cond_area": "default"}
    story = graph.add("ConditioningSetProperties", cond_NEW=parts["positive"], **settings)()
    return {"positive": story, "steps": 4}


def late_story(graph, host, parts):
    """The story in the later steps, another prompt before."""
    ranges = []
    for link, start, end in ((texts(graph, parts), 0.0, 0.2), (parts["positive"], 0.2, 1.0)):
        ranges.append(graph.add("ConditioningSetTimestepRange", conditioning=link, start=start, end=end)())
    both = graph.add("ConditioningCombine", conditioning_1=ranges[0], conditioning_2=ranges[1])()
    return {"positive": both, "steps": 4}


def merged(graph, host, parts):
    other = lora(graph, host, parts["model"])
    return {"model": graph.add("ModelMergeSimple", model1=parts["model"], model2=other, ratio=0.5)()}


def clip_skip(graph, host, parts):
    clip = graph.add("CLIPSetLastLayer", clip=parts["clip"], stop_at_clip_layer=-3)()
    story = graph.add("StoryLoom_EncodeOnePrompt", clip=clip, story=parts["story"], **SVR)()
    return {"positive": story}


def images(number, size=64):
    return lambda graph, host, parts: {
        "latent_image": graph.add("EmptyLatentImage", width=size, height=size, batch_size=number)()
    }


def crops(graph, host, parts):
    """Details of all frames, at another size than the page's."""
    latent = graph.add("EmptyLatentImage", width=96, height=128, batch_size=3)()
    return {"latent_image": latent, "denoise": 0.5, "steps": 4}


OTHER_CONTEXT = torch.randn(1, 77, 256, generator=torch.Generator().manual_seed(2))
LEFT = torch.tensor([1.0, 0.0]).repeat_interleave(4).expand(8, 8)
BLOCKS = ("middle", 0), ("output", 0), ("output", 1)
SAMPLERS = ("dpm_2", "heunpp2", "res_multistep", "uni_pc", "lcm", "sa_solver", "er_sde", "ddpm", "seeds_3")

SITUATIONS = {
    # rows and columns of attention
    "more columns by attn2_patch": patched(patch_of("attn2", appended)),
    "columns turned round by attn2_patch": patched(patch_of("attn2", reordered)),
    "reference tokens by attn1_patch": patched(patch_of("attn1", doubled_keys)),
    "attention couple": patched(attention_couple([OTHER_CONTEXT], torch.stack([LEFT, 1 - LEFT]))),
    "IPAdapter-like": patched(attention("attn2", more_tokens)),
    "an attention for each chunk": patched(attention("attn2", on_the_positive)),
    "token merging": node("TomePatchModel", ratio=0.5),
    "HyperTile": node("HyperTile", tile_size=32, swap_size=2, max_depth=1, scale_depth=False),
    "attention multiplied": node("UNetCrossAttentionMultiply", q=1.2, k=1.0, v=1.0, out=1.1),
    "NAG": node("NAGuidance", nag_scale=3.0, nag_alpha=0.5, nag_tau=1.5),
    # how the UNet is called
    "calls passed through": patched(passed_through),
    "rows one by one": patched(row_by_row),
    "one tile at a time": patched(tiled(1)),
    "three tiles at a time": patched(tiled(3)),
    "conditionings one by one": patched(chunk_by_chunk),
    "rows backwards": patched(backwards),
    "one more evaluation": patched(another_evaluation),
    # regions and sizes
    "an area each for one story twice": two_areas,
    "Deep Shrink": node(
        "PatchModelAddDownscale",
        block_number=3,
        downscale_factor=2.0,
        start_percent=0.0,
        end_percent=1.0,
        downscale_after_skip=True,
        downscale_method="bicubic",
        upscale_method="bicubic",
    ),
    "crops of another size": crops,
    "context windows with anchors": windows_with_anchors,
    # skipped calls
    "cached features": patched(deep_cache()),
    "EasyCache": node("EasyCache", reuse_threshold=3.0, start_percent=0.1, end_percent=1.0, verbose=False),
    "LazyCache": node("LazyCache", reuse_threshold=3.0, start_percent=0.1, end_percent=1.0, verbose=False),
    # who measures attention
    "SAG": node("SelfAttentionGuidance", scale=0.5, blur_sigma=2.0),
    "self-attention recorded": recorded("attn1"),
    "cross-attention recorded": recorded("attn2"),
    "SEG in several blocks": patched(smoothed_energy(*BLOCKS)),
    # guidance
    "RescaleCFG": node("RescaleCFG", multiplier=0.7),
    "Perp-Neg": lambda graph, host, parts: node("PerpNeg", empty_conditioning=texts(graph, parts), neg_scale=1.0)(
        graph, host, parts
    ),
    "TCFG": node("TCFG"),
    "APG": node("APG", eta=1.0, norm_threshold=5.0, momentum=0.0),
    "FreeU_V2": node("FreeU_V2", b1=1.1, b2=1.2, s1=0.6, s2=0.4),
    # conditionings and models
    "hooks with keyframes": scheduled_hooks,
    "the story begins late": late_story,
    "merged models": merged,
    "clip skip": clip_skip,
    **{f"sampler {name}": sampler(name, 3) for name in SAMPLERS},
}
