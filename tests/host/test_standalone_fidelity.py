"""Both hosts agree: tokens, conditionings, the UNet's options and outputs, whole Euler runs."""

from functools import partial
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from precision import CLOSE, kept_double
from rounding import moved, rounding
from story_graphs import CAST, CSA, STORY, SVR, build, call, csa, distance, ipca
from story_makers import APPLY, apply, someone
from tiny_models import TEXT_HEAD, WIDE, WIDE_TEXT, fill_, tiny_clip, tiny_model

pytestmark = pytest.mark.skipif(
    not (find_spec("diffusers") and find_spec("open_clip")),
    reason='the host without ComfyUI needs its packages: pip install "storyloom[standalone]"',
)

STEPS, SIZE, SEED = 3, (96, 64), 7
SCHEDULES = {
    "epsilon": {"timestep_spacing": "leading", "steps_offset": 1},
    "v_prediction": {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True},
}
TEXTS = [
    "",
    "a red fox in a blue coat",
    "A Red  FOX,\tin a blue coat!!! ...and more",
    "it's the fox's den, they'll've 12 eggs & 3.5kg of \"salt\"",
    "naïve café, Ünïcödé, 狐狸在雪中, лиса, 🦊 fox's, e\u0301 Å",
    "(snow:1.2) \\(plain\\) [brackets] <tag> a/b_c-d #1 @home 50% {x}",
    "supercalifragilisticexpialidocious antidisestablishmentarianism zzzzxqqj",
    "a fox and a crow " * 40,
    "&amp; &lt;b&gt; it\u2019s \u201cquoted\u201d \u2026 \ufb01sh",
]


@pytest.fixture(scope="module", autouse=True)
def in_double(host):
    """Diffusers' Euler scheduler in double precision too: its sigmas, and so its latents, would be single."""
    from diffusers import EulerDiscreteScheduler

    def set_timesteps(euler, *args, **kwargs):
        original(euler, *args, **kwargs)
        euler.sigmas = euler.sigmas.double()

    original = EulerDiscreteScheduler.set_timesteps
    with kept_double(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(EulerDiscreteScheduler, "set_timesteps", set_timesteps)
        yield


@pytest.fixture(scope="module")
def standalone(models):
    """The tiny SDXL of the host tests on diffusers: a UNet and text encoders with the same weights.

    The UNet is in double precision, and the text encoders, whose tables of words are large, in single.

    They are cloned, because a model that a graph has run holds inference tensors, which modules do not accept.
    """
    models[0].detach()  # removes patches that an earlier file has merged into the weights
    return converted(*models)


def converted(model, clip):
    """(UNet, text encoders) on diffusers with the weights of a MODEL and a CLIP."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    from storyloom.standalone.demo import build_with_weights
    from storyloom.standalone.text import TextEncoders
    from storyloom.standalone.unet import build_unet, to_diffusers

    config = model.model.model_config.unet_config
    own = {name: tensor.clone() for name, tensor in model.model.diffusion_model.state_dict().items()}
    unet = build_with_weights(partial(build_unet, config, config["num_head_channels"]), to_diffusers(own, config))
    encoders = []
    for key, kind, activation in (("l", CLIPTextModel, "quick_gelu"), ("g", CLIPTextModelWithProjection, "gelu")):
        theirs = getattr(clip.cond_stage_model, f"clip_{key}").transformer
        width = theirs.text_projection.weight.shape[0]
        small = {"num_hidden_layers": 3, "intermediate_size": 64, "num_attention_heads": width // TEXT_HEAD}
        config = CLIPTextConfig(
            hidden_size=width, projection_dim=width, hidden_act=activation, eos_token_id=49407, **small
        )
        weights = {name: tensor.clone().float() for name, tensor in theirs.state_dict().items()}
        if key == "l":
            weights.pop("text_projection.weight")
        encoders.append(build_with_weights(partial(kind, config), weights))
    return unet, TextEncoders(*encoders, torch.device("cpu"))


def scheduler(kind):
    from diffusers import EulerDiscreteScheduler

    return EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=kind, **SCHEDULES[kind]
    )


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_are_the_same(models, text):
    from storyloom.standalone.text import tokenize

    assert tokenize(text) == models[1].tokenize(text, return_word_ids=True, disable_weights=True)


@pytest.mark.parametrize("text", TEXTS)
def test_encodings_are_the_same(models, standalone, text):
    from storyloom.standalone.text import tokenize

    clip = models[1]
    ((context, info),) = clip.encode_from_tokens_scheduled(clip.tokenize(text, disable_weights=True), show_pbar=False)
    assert_encoded_the_same(standalone[1], lambda encoders: encoders(tokenize(text)), context, info)


@pytest.mark.parametrize("method", ["svr", "npr", "none", "frames"])
def test_conditionings_are_the_same(host, graph, standalone, method):
    encode, changes = ("EncodePerFrame", {}) if method == "frames" else ("EncodeOnePrompt", {"reweighting": method})
    graph.capture(positive=build(graph, encode, literal=True, **changes)["positive"])
    ((context, info),) = host.run(graph).positive
    summary = assert_encoded_the_same(standalone[1], lambda encoders: conditioning(encoders, method), context, info)
    assert repr(summary["storyloom"]) == repr(info["storyloom"])


LONG = {"identity": "[Fox] a red fox\n[Owl] an owl", "style": ""} | {
    "frames": "\n".join(f"{who} {'word ' * 30}" for who in ("[Fox]", "[Owl] [Fox]", "[NC]", "[Fox] far", "[Fox] near"))
}


@pytest.mark.parametrize("window", ["circular", "trailing"])
@pytest.mark.parametrize("script", [CAST, LONG], ids=["cast", "long"])
def test_conditionings_of_casts_and_windows_are_the_same(host, graph, standalone, script, window):
    graph.capture(positive=build(graph, literal=True, window=window, **script)["positive"])
    ((context, info),) = host.run(graph).positive
    summary = assert_encoded_the_same(
        standalone[1], lambda encoders: conditioning(encoders, "svr", script, window), context, info
    )
    assert repr(summary["storyloom"]) == repr(info["storyloom"])


def assert_encoded_the_same(encoders, encode, context, info):
    """Assert that a text's context and pooled output equal ours up to rounding. Returns our info.

    encode: encodes the text with the encoders it is given. The rounding error is estimated by moving word embeddings by
    one unit in the last place.
    """
    ours, summary = encode(encoders)
    tables = [encoder.get_input_embeddings() for encoder in encoders.encoders.values()]
    hooks = [table.register_forward_hook(lambda module, args, out: moved(out)) for table in tables]
    try:
        shifted, shifted_summary = encode(encoders)
    finally:
        for hook in hooks:
            hook.remove()
    for mine, other, theirs in (
        (ours, shifted, context),
        (summary["pooled_output"], shifted_summary["pooled_output"], info["pooled_output"]),
    ):
        assert distance(mine, theirs) < 16 * distance(mine, other) < 1e-3
    return summary


def conditioning(encoders, method, script=STORY, window="circular"):
    from storyloom.prompts.script import parse_story
    from storyloom.standalone.conditioning import frame_by_frame, one_prompt
    from storyloom.standalone.text import tokenize

    story = parse_story(script["identity"], script["frames"], script["style"])
    return (
        frame_by_frame(tokenize, encoders, story)
        if method == "frames"
        else one_prompt(tokenize, encoders, story, method, window)
    )


def weakened(seen):
    """An attention replacement that halves the keys and records its options."""

    def replacement(q, k, v, options):
        seen.append({key: value for key, value in options.items()})
        q, k, v = (part.unflatten(2, (options["n_heads"], -1)).transpose(1, 2) for part in (q, k, v))
        return F.scaled_dot_product_attention(q, k / 2, v).transpose(1, 2).flatten(2)

    return replacement


REPLACED = [
    ("attn1", "input", 4, None),
    ("attn1", "output", 1, 0),
    ("attn2", "middle", 0, 1),
    ("attn2", "output", 5, None),
]


def replace_attention(model, seen):
    model = model.clone()
    for slot, *place in REPLACED:
        getattr(model, f"set_model_{slot}_replace")(weakened(seen), *place)
    return model


PATCHED = ["plain", "ipca", "csa", "replaced", "ipca on replaced", "csa and ipca on replaced"]


@pytest.mark.parametrize("cfg", [5.0, 1.0])
@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("patched", PATCHED)
def test_the_unet_and_a_whole_run_are_the_same(host, graph, standalone, patched, kind, cfg):
    theirs = on_comfyui(host, graph, patched, kind, cfg)
    ours = on_diffusers(standalone, patched, kind, cfg, theirs["positive"])
    assert len(ours["unet"]) == len(theirs["unet"]) == STEPS
    assert all(distance(*pair) < CLOSE for pair in zip(ours["unet"], theirs["unet"], strict=True))
    assert ours["samples"].dtype == theirs["samples"].dtype == torch.float64
    assert distance(ours["samples"], theirs["samples"]) < CLOSE
    if "replaced" in patched:
        assert_same_options(ours["options"], theirs["options"])
    else:
        assert not ours["options"] and not theirs["options"]


def test_the_frames_of_a_cast_are_the_same(host, graph, standalone):
    theirs = on_comfyui(host, graph, "ipca", "epsilon", 5.0, CAST)
    ours = on_diffusers(standalone, "ipca", "epsilon", 5.0, theirs["positive"], CAST)
    assert len(ours["samples"]) == 4 and distance(ours["samples"], theirs["samples"]) < CLOSE


REGION = torch.linspace(0, 1, 48).view(1, 6, 8)
"""Where the second character acts."""


@pytest.mark.parametrize("patched, script", [("plain", STORY), ("csa and ipca on replaced", STORY), ("ipca", CAST)])
def test_storymaker_is_the_same(host, graph, standalone, weights, maker, patched, script):
    names = ("Owl", "Fox") if script is CAST else ("", "")
    people = tuple(someone(host, seed, name) for seed, name in enumerate(names, start=1))
    theirs = on_comfyui(host, graph, patched, "epsilon", 5.0, script, (maker, people))
    ours = on_diffusers(standalone, patched, "epsilon", 5.0, theirs["positive"], script, (weights, people))
    assert all(distance(*pair) < CLOSE for pair in zip(ours["unet"], theirs["unet"], strict=True))
    assert distance(ours["samples"], theirs["samples"]) < CLOSE
    without = on_diffusers(standalone, patched, "epsilon", 5.0, theirs["positive"], script)
    assert distance(without["samples"], ours["samples"]) > 0.01


def test_storymaker_off_is_bit_identical(host, graph, standalone, weights):
    encoded, settings = on_comfyui(host, graph, "plain", "epsilon", 5.0)["positive"], ("plain", "epsilon", 5.0)
    before = {name: value.clone() for name, value in standalone[0].state_dict().items()}
    plain = on_diffusers(standalone, *settings, encoded)
    off = {"token_strength": 0.0, "lora_strength": 0.0}
    ours = on_diffusers(standalone, *settings, encoded, made=(weights, (someone(host, 1),), off))
    assert torch.equal(plain["samples"], ours["samples"])
    on_diffusers(standalone, *settings, encoded, made=(weights, (someone(host, 1),)))
    assert all(torch.equal(value, before[name]) for name, value in standalone[0].state_dict().items())


def on_comfyui(host, graph, patched, kind, cfg, script=STORY, made=None):
    """made: StoryMaker's adapter and the characters, the second of them in REGION."""
    parts = build(graph, size=SIZE, literal=True, **script)
    model, options, outputs = parts["model"], [], []
    if kind == "v_prediction":
        model = graph.add("ModelSamplingDiscrete", model=model, sampling=kind, zsnr=True)()
    if "replaced" in patched:
        model = call(graph, host, lambda patcher: replace_attention(patcher, options), model)
    if "ipca" in patched:
        model = ipca(graph, model)
    if "csa" in patched:
        model = csa(graph, model)
    if made is not None:
        maker, people = made
        model = apply(graph, host, model, maker, *people, regions=(None, REGION))

    def record_outputs(patcher):
        patcher = patcher.clone()

        def diffusion_model(executor, *args, **kwargs):
            out = executor(*args, **kwargs)
            outputs.append(out.clone())
            return out

        patcher.add_wrapper_with_key("diffusion_model", "test", diffusion_model)
        return patcher

    model = call(graph, host, record_outputs, model)
    euler = scheduler(kind)
    euler.set_timesteps(STEPS)
    settings = {key: parts[key] for key in ("positive", "negative", "latent_image")}
    settings |= {"model": model, "add_noise": True, "noise_seed": SEED, "cfg": cfg}
    sampler = graph.add("KSamplerSelect", sampler_name="euler")()
    sigmas = call(graph, host, lambda _: euler.sigmas, parts["story"])
    samples = graph.add("SamplerCustom", sampler=sampler, sigmas=sigmas, **settings)()
    graph.capture(samples=samples, positive=parts["positive"])
    seen = host.run(graph)
    return {"samples": seen.samples["samples"], "positive": seen.positive, "unet": outputs, "options": options}


def on_diffusers(standalone, patched, kind, cfg, encoded, script=STORY, made=None):
    """encoded: the host's conditioning, used in place of ours, which differs by rounding.

    made: StoryMaker's weights, the characters and other strengths than APPLY's.
    """
    from storyloom.attention.consistent import ConsistentAttention
    from storyloom.attention.identity import IdentityPreserving
    from storyloom.runtime.sampling import with_patch
    from storyloom.standalone.layers import attend, blocks_of
    from storyloom.standalone.patcher import UNetPatcher
    from storyloom.standalone.sampling import ModelSampling, sample_euler, story_noise
    from storyloom.standalone.storymaker import Characters, storymaker_of, with_characters

    unet, encoders = standalone
    model, options, outputs = UNetPatcher(unet, ModelSampling(scheduler(kind))), [], []
    if "replaced" in patched:
        model = replace_attention(model, options)
    if "ipca" in patched:
        model = with_patch(model, IdentityPreserving(2.0, 0.0, 1.0, blocks_of(unet, "all")), attend)
    if "csa" in patched:
        model = with_patch(model, ConsistentAttention(**CSA | {"blocks": blocks_of(unet, "output")}), attend)
    if made is not None:
        made_of, people, *changes = made
        regions = (None, REGION)[: len(people)]
        strengths = {**APPLY, **(changes[0] if changes else {})}
        model = with_characters(model, Characters(storymaker_of(made_of), people, regions, **strengths))
    _, our_info = conditioning(encoders, SVR["reweighting"], script)
    ((context, their_info),) = encoded
    info = {**our_info, "pooled_output": their_info["pooled_output"]}
    negative = torch.zeros_like(context), {"pooled_output": torch.zeros_like(info["pooled_output"])}
    noise = story_noise(len(context), SIZE[1], SIZE[0], SEED, shared=True).double()
    # a schedule that starts below the largest sigma: ComfyUI scales the noise by it, diffusers by a larger one
    if kind == "epsilon":
        euler = scheduler(kind)
        euler.set_timesteps(STEPS)
        noise = noise * euler.sigmas[0] / euler.init_noise_sigma
    hook = unet.register_forward_hook(lambda module, args, out: outputs.append(out[0].clone()))
    try:
        samples = sample_euler(model, [(context, info)], [negative], noise, scheduler(kind), STEPS, cfg)
    finally:
        hook.remove()
    return {"samples": samples / 0.13025, "unet": outputs, "options": options}


def assert_same_options(ours, theirs):
    """Assert that a replacement is called for the same layers in the same order, with the same options."""
    own = {"prefetch_dynamic_vbars", "callbacks", "wrappers", "uuids", "storyloom"}
    assert len(ours) == len(theirs) > STEPS
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.keys() - own == other.keys() - own
        assert len(mine["uuids"]) == len(other["uuids"])
        for key in mine.keys() - own:
            if isinstance(mine[key], torch.Tensor):
                assert distance(other[key].double(), mine[key].double()) < CLOSE, key
            else:
                assert mine[key] == other[key], key


def test_blocks_and_windows_mean_the_same(host, models, standalone):
    from storyloom.standalone.layers import attention_depths
    from storyloom.standalone.sampling import ModelSampling

    model = models[0]
    assert attention_depths(standalone[0]) == host.pack("nodes.patching").attention_depths(model)
    ours, theirs = ModelSampling(scheduler("epsilon")), model.get_model_object("model_sampling")
    for percent in (0.0, 1.0):
        assert ours.percent_to_sigma(percent) == theirs.percent_to_sigma(percent)
    for percent in (0.001, 0.25, 0.5, 0.999):  # the host looks it up in single precision
        bound = rounding(theirs.sigma, torch.tensor([(1 - percent) * (len(theirs.sigmas) - 1)]))
        assert abs(ours.percent_to_sigma(percent) - theirs.percent_to_sigma(percent)) < bound


def test_weight_patches_have_the_same_names_and_arithmetic(models, standalone):
    from storyloom.standalone.patcher import UNetPatcher
    from storyloom.standalone.sampling import ModelSampling

    name = "diffusion_model.output_blocks.1.1.transformer_blocks.1.attn2.to_k.weight"
    weight = models[0].model.state_dict()[name]
    difference = torch.linspace(-1, 1, weight.numel(), dtype=weight.dtype).view_as(weight)
    model = UNetPatcher(standalone[0], ModelSampling(scheduler("epsilon")))
    assert model.add_patches({name: (difference,), "diffusion_model.no.such": (difference,)}, 0.5) == [name]
    patched = models[0].clone()
    assert patched.add_patches({name: (difference,)}, 0.5) == [name]
    before = {key: value.clone() for key, value in standalone[0].state_dict().items()}
    with model.patched_weights():
        changed = {
            key: value for key, value in standalone[0].state_dict().items() if not torch.equal(value, before[key])
        }
        ((key, value),) = changed.items()
        assert distance(weight + 0.5 * difference, value) < CLOSE
    assert all(torch.equal(value, before[key]) for key, value in standalone[0].state_dict().items())


def test_a_checkpoint_file_of_comfyui_loads_without_a_hub(host, tmp_path, monkeypatch):
    import comfy.sd
    from comfy.ldm.models.autoencoder import AutoencoderKL

    from storyloom.standalone import checkpoint

    ddconfig = {"double_z": True, "z_channels": 4, "resolution": 64, "in_channels": 3, "out_ch": 3, "dropout": 0.0}
    ddconfig |= {"ch": 32, "ch_mult": [1, 1, 1, 1], "num_res_blocks": 2, "attn_resolutions": []}
    network = fill_(AutoencoderKL(embed_dim=4, ddconfig=ddconfig), 2)
    vae = comfy.sd.VAE(sd=network.state_dict(), config={"params": {"embed_dim": 4, "ddconfig": ddconfig}})
    path = tmp_path / "tiny.safetensors"
    model, clip = tiny_model("SDXL", WIDE), tiny_clip(widths=WIDE_TEXT)
    comfy.sd.save_checkpoint(str(path), model, clip, vae)

    own = model.model.model_config.unet_config
    monkeypatch.setattr(checkpoint, "UNET", own)
    monkeypatch.setattr(checkpoint, "HEAD_CHANNELS", own["num_head_channels"])
    small = {"num_hidden_layers": 3, "intermediate_size": 64}
    monkeypatch.setattr(checkpoint, "CLIP_L", checkpoint.CLIP_L | small)
    monkeypatch.setattr(checkpoint, "CLIP_G", checkpoint.CLIP_G | small)
    monkeypatch.setattr(checkpoint, "VAE", checkpoint.VAE | {"block_out_channels": [32] * 4})
    pipeline = checkpoint.load_checkpoint(path)
    unet, text = converted(model, clip)
    assert weights_equal(pipeline.unet, unet)
    for key, encoder in (("l", pipeline.text_encoder), ("g", pipeline.text_encoder_2)):
        assert weights_equal(encoder, text.encoders[key])
    latents = torch.linspace(-1, 1, 4 * 8 * 6).view(1, 4, 8, 6)
    with torch.no_grad():
        picture = pipeline.vae.decode(latents / 0.13025)[0]
        bound = rounding(network.decode, latents / 0.13025)
        assert (picture - network.decode(latents / 0.13025)).abs().max() < bound < 1e-3


def weights_equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key].double(), b[key].double()) for key in a)
