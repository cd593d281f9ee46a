"""Pieces of graphs that the host tests share, and the references that IPCA and CSA are compared with."""

import math
import os

import safetensors.torch
import torch
from precision import CLOSE
from tiny_models import tiny_controlnet, tiny_lora

NEWER_TOO = os.environ.get("STORYLOOM_NEWER_COMFYUI_TOO") == "1"
"""These tests run on a newer ComfyUI as well, which draws the whole matrix of strange graphs."""

STORY = {
    "identity": "a red fox in a blue coat",
    "frames": "asleep in the snow\nreading on a train\ndrinking tea",
    "style": "",
}
SVR = {
    "reweighting": "svr",
    "pooled": "full",
    "literal": False,
    "order": "weaken_first",
    "weaken_alpha": 0.01,
    "weaken_beta": 0.05,
    "enhance_alpha": -0.01,
    "enhance_beta": 1.0,
    "window": "circular",
    "enhance_identity": False,
}
IPCA = {"identity_weight": 2.0, "start_percent": 0.0, "end_percent": 1.0, "blocks": "all"}
CSA = {
    "sampling_rate": 0.5,
    "anchors": 0,
    "skip_first_steps": 0,
    "start_percent": 0.0,
    "end_percent": 1.0,
    "blocks": "output",
    "seed": 3,
    "schedule": "steady",
}
FREEU = {"b1": 1.1, "b2": 1.2, "s1": 0.6, "s2": 0.4, "start_percent": 0.0, "end_percent": 1.0}
COMPARE = {
    "label_a": "without",
    "label_b": "with",
    "title": "",
    "arrangement": "rows",
    "columns": 0,
    "caption_size": 0,
}
SAMPLER = {"seed": 7, "steps": 2, "cfg": 5.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
IDENTITY_COLUMNS = range(0, 1 + 7)
"""Start token and the seven tokens of STORY's identity."""


def build(graph, encode="EncodeOnePrompt", size=(64, 64), shared_noise=True, loader="TestTiny", **changes):
    """Model, story, conditioning and latents: links to what a sampler needs. loader: a node that gives MODEL, CLIP."""
    loaded = graph.add(loader)
    story = graph.add("StoryLoom_Script", **STORY | {k: v for k, v in changes.items() if k in STORY})
    settings = SVR if encode == "EncodeOnePrompt" else {"literal": False}
    settings = settings | {k: v for k, v in changes.items() if k in settings}
    encoded = graph.add(f"StoryLoom_{encode}", clip=loaded(1), story=story(), **settings)
    latent = graph.add("StoryLoom_EmptyLatent", width=size[0], height=size[1], story=story(), shared_noise=shared_noise)
    return {
        "model": loaded(0),
        "clip": loaded(1),
        "vae": loaded(2),
        "story": story(),
        "positive": encoded(),
        "negative": graph.add("ConditioningZeroOut", conditioning=encoded())(),
        "latent_image": latent(),
    }


def ipca(graph, model, **changes):
    return graph.add("StoryLoom_IPCA", model=model, **IPCA | changes)()


def csa(graph, model, **changes):
    return graph.add("StoryLoom_ConsistentSelfAttention", model=model, **CSA | changes)()


def freeu(graph, model, **changes):
    return graph.add("StoryLoom_FreeU", model=model, **FREEU | changes)()


def lora(graph, host, model):
    """The model with a LoRA on the attention of one layer."""
    folder = host.base / "models" / "loras"
    folder.mkdir(exist_ok=True)
    safetensors.torch.save_file(tiny_lora(), folder / "test.safetensors")
    settings = {"lora_name": "test.safetensors", "strength_model": 1.0}
    return graph.add("LoraLoaderModelOnly", model=model, **settings)()


def controlled(graph, host, sides, image):
    """Both sides, positive and negative, with a ControlNet and its hint images."""
    net = call(graph, host, lambda _: tiny_controlnet(), image)
    settings = {"strength": 0.5, "start_percent": 0.0, "end_percent": 1.0}
    sides = {side: sides[side] for side in ("positive", "negative")}
    applied = graph.add("ControlNetApplyAdvanced", control_net=net, image=image, **sides, **settings)
    return {"positive": applied(0), "negative": applied(1)}


def sample(graph, parts, name, **changes):
    """A stock KSampler whose LATENT is captured as `name`."""
    keys = ("model", "positive", "negative", "latent_image")
    link = graph.add("KSampler", **SAMPLER | {key: parts[key] for key in keys} | changes)()
    graph.capture(**{name: link})
    return link


def context_windows(graph, model, length, **changes):
    """The model with context windows of so many images over the batch."""
    settings = {
        "context_length": length,
        "context_overlap": 1,
        "context_schedule": "standard_static",
        "context_stride": 1,
        "closed_loop": False,
        "fuse_method": "pyramid",
        "dim": 0,
        "freenoise": False,
        "cond_retain_index_list": "",
        "split_conds_to_windows": False,
        "latent_retain_index_list": "",
        "causal_window_fix": True,
    }
    return graph.add("ContextWindowsManual", model=model, **settings | changes)()


def call(graph, host, function, value):
    """Put function(value) into the graph."""
    return graph.add("TestCall", value=value, name=host.function(function))()


def watched(graph, host, model, seen):
    """The model, with every UNet call's options and first-order results of guidance kept in the list `seen`."""

    def watch(patcher):
        patcher = patcher.clone()

        def apply_model(executor, x, t, c_concat, c_crossattn, control, options, **kwargs):
            out = executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
            seen.append({"options": options, "rows": x.shape[0], "context": c_crossattn.shape[1], "out": out.clone()})
            return out

        patcher.add_wrapper_with_key("apply_model", "test", apply_model)
        return patcher

    return call(graph, host, watch, model)


def tag_of(host, info):
    """The story in a conditioning's dict."""
    return host.pack("prompts.tag").tag_of(info)


def story_rows(calls):
    """What the UNet said to the story in the first of these calls that held it, and how many calls there were."""
    for seen in calls:
        place = story_place(seen)
        if place is not None:
            return seen["out"].chunk(len(seen["options"]["uuids"]))[place], len(calls)
    raise AssertionError("no UNet call held the story")


def story_place(seen):
    """Which chunk of a UNet call holds the story."""
    options = seen["options"]
    known = options["storyloom"].conditionings
    keys = zip(options["cond_or_uncond"], options["uuids"], strict=True)
    return next((place for place, key in enumerate(keys) if known[key].story is not None), None)


def check_other_company(graph, host, parts, model, monkeypatch):
    """What the UNet says to the story of three frames, and to its negative, is the same at cfg 1, beside another
    positive, and in two calls. model: a link to the one that is patched.
    """
    from comfy.model_patcher import ModelPatcher

    text = graph.add("CLIPTextEncode", clip=parts["clip"], text="a lighthouse by a very wide and very cold sea")()
    both = graph.add("ConditioningCombine", conditioning_1=text, conditioning_2=parts["positive"])()
    results, negatives, base = {}, {}, graph.copy()
    for name, changes in {"together": {}, "alone": {"cfg": 1.0}, "beside": {"positive": both}, "split": {}}.items():
        if name == "split":
            monkeypatch.setattr(ModelPatcher, "get_free_memory", lambda self, device: 0)
        calls, graph = [], type(graph)(base)
        sample(graph, parts, "x", steps=1, model=watched(graph, host, model, calls), **changes)
        host.run(graph)
        results[name], count = story_rows(calls)
        assert count == (2 if name == "split" else 1)
        for seen in calls:
            for kind, out in zip(seen["options"]["cond_or_uncond"], seen["out"].split(3), strict=True):
                if kind == 1:
                    negatives[name] = out
    assert all(distance(results["together"], result) < CLOSE for result in results.values())
    assert set(negatives) == {"together", "beside", "split"}
    assert all(distance(negatives["together"], out) < CLOSE for out in negatives.values())


def distance(a, b):
    """Largest difference, in units of the largest value."""
    return ((a - b).abs().max() / a.abs().max()).item()


CAST = {
    "identity": "[Fox] a red fox\n[Owl] a grey owl in a hat",
    "frames": "[Fox] asleep in the snow\n[NC] an empty beach\n[Fox] and [Owl] arguing\n[Fox] drinking tea",
    "style": "ink of {prompt}, flat",
}
CAST_PROMPTS = [
    ("ink of a red fox, flat", [0, 3]),
    ("ink of an empty beach, flat", [1]),
    ("ink of a red fox and a grey owl in a hat, flat", [2]),
]
"""Identities of CAST and the frames behind each."""
CAST_COLUMNS = [range(8), (), range(15), range(8)]
"""Start token and identity of every frame of CAST."""


def close(a, b):
    """Whether two latents in double precision are the same but for its rounding."""
    assert a["samples"].dtype == b["samples"].dtype == torch.float64, "compare two ways of a model in double precision"
    return distance(a["samples"], b["samples"]) < CLOSE


def differ(a, b):
    return distance(a["samples"], b["samples"]) > 2e-4


LAYERS = {("input", 4): 1, ("input", 5): 1, ("input", 7): 2, ("input", 8): 2, ("middle", 0): 2}
LAYERS |= {("output", number): 2 if number < 3 else 1 for number in range(6)}
"""Attention layers of every block of the tiny SDXL."""


def biased_attention(weight, gain=1.0, columns=None):
    """Cross-attention with a dense log bias on the positive's identity columns (ordinary guider only).

    columns: those of each row, None for STORY's.
    """

    def attention(q, k, v, options):
        from comfy.ldm.modules.attention import attention_basic

        rows = q.shape[0] // len(options["cond_or_uncond"])
        out = attention_basic(q, k, v, options["n_heads"])
        bias = q.new_zeros(rows, q.shape[1], k.shape[1])
        for row, own in enumerate(columns or [IDENTITY_COLUMNS] * rows):
            bias[row, :, list(own)] = math.log(weight)
        for place, kind in enumerate(options["cond_or_uncond"]):
            if kind == 0:
                own = slice(place * rows, (place + 1) * rows)
                out[own] = attention_basic(q[own], k[own], v[own], options["n_heads"], mask=bias)
        return gain * out

    return attention


def log_bias(weight, gains=None, columns=None):
    """IPCA by another road, for every layer; gains: layer (part, number, index) -> factor of its attention there.

    columns: as in `biased_attention`.
    """

    def patch(model):
        model = model.clone()
        for (part, number), depth in LAYERS.items():
            for index in range(depth):
                gain = (gains or {}).get((part, number, index), 1.0)
                model.set_model_attn2_replace(biased_attention(weight, gain, columns), part, number, index)
        return model

    return patch


def images_of(options, rows):
    """Numbers of the images of a call: of all, or of a context window, before which the host may put one more."""
    if "context_window" not in options:
        return [*range(rows)]
    window = options["context_window"].index_list
    return [*range(window[0] - (rows - len(window)), window[0]), *window]


def masked_attention(sample_tokens, sources, rate=0.5, seed=3, skip=0, gain=1.0):
    """Self-attention over the tokens of all images with a dense mask.

    sources: images that each image looks at, where they are there; skip: steps before it begins.
    """

    def attention(q, k, v, options):
        heads, chunks = options["n_heads"], len(options["cond_or_uncond"])
        images, tokens = k.shape[0] // chunks, k.shape[1]
        step = int((options["sample_sigmas"][:-1] - options["sigmas"][0]).abs().argmin())
        seen = torch.zeros(images, images, tokens, dtype=torch.bool)
        numbers = images_of(options, images)
        for i, image in enumerate(numbers):
            seen[i, i] = True
            for j, other in enumerate(numbers):
                if other in sources[image] and step >= skip:
                    seen[i, j, sample_tokens(seed, step, other, tokens, rate)] = True
        q = q.view(chunks, images, tokens, heads, -1).transpose(2, 3)
        k, v = (x.view(chunks, 1, images * tokens, heads, -1).transpose(2, 3) for x in (k, v))
        logits = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~seen.view(images, 1, 1, -1), -torch.inf)
        return gain * (logits.softmax(-1) @ v).transpose(2, 3).flatten(3).flatten(0, 1)

    return attention


def dense_mask(host, sources, blocks=("output",), gains=None, layers=LAYERS, draw=None, **settings):
    """CSA by another road, for every layer of these parts; gains: block -> factor of its attention.

    layers: the blocks of the model that have attention; draw: what draws the tokens that others see, None: the pack's.
    """
    sample_tokens = draw or host.pack("attention.consistent").sample_tokens

    def patch(model):
        model = model.clone()
        for part, number in layers:
            if part in blocks:
                gain = (gains or {}).get((part, number), 1.0)
                attention = masked_attention(sample_tokens, sources, gain=gain, **settings)
                model.set_model_attn1_replace(attention, part, number)
        return model

    return patch
