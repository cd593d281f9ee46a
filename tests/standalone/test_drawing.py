"""Stories on the host without ComfyUI: each method has an effect only if it is on, and the pipeline is restored."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from rounding import rounding

from storyloom.attention.identity import IdentityPreserving
from storyloom.prompts.conditioning import per_encoder
from storyloom.prompts.script import parse_story
from storyloom.prompts.svr import NPRSettings, SVRSettings, express_frame
from storyloom.prompts.tag import tag_of
from storyloom.runtime.sampling import with_patch
from storyloom.standalone import StoryPipeline
from storyloom.standalone.layers import SLOTS, Cached, attend, replaceable_attention, transformers
from storyloom.standalone.model import model_of
from storyloom.standalone.patcher import UNetPatcher
from storyloom.standalone.pipeline import METHODS
from storyloom.standalone.sampling import ModelSampling, sample_euler, story_noise


def processors(unet):
    return [getattr(block, slot).processor for t in transformers(unet) for block in t.blocks for slot in SLOTS]


def latents(draw, **settings):
    return draw(**settings).latents


def distance(a, b):
    return ((a - b).abs().max() / a.abs().max()).item()


@pytest.fixture(scope="module")
def by_method(draw):
    return {method: latents(draw, method=method) for method in METHODS}


def test_every_method_draws_another_story(by_method):
    drawn = list(by_method.values())
    for place, one in enumerate(drawn):
        assert one.isfinite().all()
        assert all(distance(one, other) > 1e-3 for other in drawn[:place])


@pytest.mark.parametrize("method, plain", [("svr+ipca", "svr"), ("svr-eot+ipca", "svr-eot"), ("ipca", "frames")])
@pytest.mark.parametrize("off", [{"identity_weight": 1.0}, {"start_percent": 1.0}])
def test_ipca_switched_off_is_bit_identical_to_none(draw, by_method, method, plain, off):
    assert torch.equal(latents(draw, method=method, **off), by_method[plain])


@pytest.mark.parametrize("method, plain", [("csa", "frames"), ("csa+svr+ipca", "svr+ipca")])
def test_csa_at_rate_0_is_bit_identical_to_none(draw, by_method, method, plain):
    assert torch.equal(latents(draw, method=method, sampling_rate=0.0), by_method[plain])


def test_the_first_frame_looks_at_nobody_when_it_is_the_only_anchor(draw, by_method):
    alone, drawn = by_method["frames"], latents(draw, method="csa", anchors=1)
    changed = [distance(a, b) > 1e-3 for a, b in zip(drawn, alone, strict=True)]
    assert changed == [False, True, True]


@pytest.mark.parametrize(
    "name, value", [("sampling_rate", 1.5), ("sampling_rate", -0.1), ("anchors", -1), ("skip_first_steps", -1)]
)
def test_settings_of_csa_outside_their_range_are_refused(draw, name, value):
    with pytest.raises(ValueError, match=f"{name} must be"):
        draw(method="csa", **{name: value})


def test_csa_acts_in_the_steps_and_blocks_that_it_is_told(draw, by_method):
    assert torch.equal(latents(draw, method="csa", skip_first_steps=1000), by_method["frames"])
    assert not torch.equal(latents(draw, method="csa", sharing_blocks="middle"), by_method["csa"])


def test_without_reweighting_and_with_the_same_noise_all_frames_are_equal(draw, by_method, monkeypatch):
    def drawn_from(noise):
        monkeypatch.setattr("storyloom.standalone.pipeline.story_noise", lambda *settings: noise)
        return latents(draw, method="none")

    bound = rounding(drawn_from, story_noise(3, 64, 64, 7, True), factor=4)
    assert all((frame - by_method["none"][0]).abs().max() < bound for frame in by_method["none"])
    assert distance(by_method["svr"][0], by_method["svr"][1]) > 1e-3


def test_the_same_seed_gives_the_same_story_whatever_ran_before(draw, by_method):
    latents(draw, method="frames", seed=8, height=96)
    assert torch.equal(latents(draw), by_method["svr+ipca"])
    assert distance(latents(draw, seed=8), by_method["svr+ipca"]) > 1e-3


def test_a_larger_weight_and_fewer_blocks_matter(draw, by_method):
    assert distance(latents(draw, identity_weight=4.0), by_method["svr+ipca"]) > 1e-3
    some = latents(draw, blocks="output 0")
    assert distance(some, by_method["svr+ipca"]) > 1e-3 and distance(some, by_method["svr"]) > 1e-4


def test_a_story_over_75_tokens_is_told_in_the_windows_that_are_asked_for(small):
    frames = [f"{word} " + "word " * 25 for word in ("asleep", "reading", "drinking")]
    settings = {"steps": 1, "progress": lambda done, steps: None}
    drawn = [StoryPipeline(small)("a red fox", frames, window=kind, **settings) for kind in ("circular", "trailing")]
    circular, trailing = (story.latents for story in drawn)
    assert torch.equal(circular[0], trailing[0]), "frames 1 and 2 in both"
    assert distance(circular[1], trailing[1]) > 1e-4


def test_frames_may_have_their_own_noise(draw):
    own = draw(method="none", shared_noise=False).latents
    assert distance(own[0], own[1]) > 1e-2
    assert torch.equal(story_noise(3, 64, 96, 5, True)[2], story_noise(2, 64, 96, 5, True)[0])


def test_pictures_need_not_be_square(draw):
    drawn = draw(width=104, height=72)
    assert drawn.latents.shape == (3, 4, 9, 13)
    assert {frame.size for frame in drawn.frames} == {(104, 72)}


def test_the_page_has_the_captions_below_the_frames(draw):
    drawn = draw(steps=1)
    assert [frame.caption for frame in drawn.story.frames][1] == "On the train."
    assert drawn.page.width > 2 * 64 and drawn.page.height > 64


def test_cfg_1_asks_the_model_for_the_story_only(draw, small):
    rows = []
    hook = small.unet.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[0]))
    try:
        one, two = latents(draw, cfg=1.0), latents(draw, cfg=5.0)
    finally:
        hook.remove()
    assert rows == [3, 3, 6, 6]
    assert distance(one, two) > 1e-3


def test_a_negative_text_is_not_the_all_zero_negative(draw, by_method):
    assert distance(latents(draw, negative="blurry"), by_method["svr+ipca"]) > 1e-3


def test_progress_counts_every_step(draw):
    seen = []
    draw(steps=3, progress=lambda done, steps: seen.append((done, steps)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def entries(small, rows=2):
    torch.manual_seed(0)
    positive = torch.randn(rows, 77, 2048), {"pooled_output": torch.randn(rows, 1280)}
    negative = torch.zeros(1, 77, 2048), {"pooled_output": torch.zeros(1, 1280)}
    return [positive], [negative], story_noise(rows, 64, 64, 3, False), small.scheduler


def test_without_patches_the_unet_is_called_as_diffusers_would(small):
    model = UNetPatcher(small.unet, ModelSampling(small.scheduler))
    positive, negative, noise, scheduler = entries(small)
    calls = []

    def listen(module, args, kwargs, out):
        calls.append((args, kwargs, out[0]))

    hook = small.unet.register_forward_hook(listen, with_kwargs=True)
    try:
        sample_euler(model, positive, negative, noise, scheduler, 1, 5.0)
    finally:
        hook.remove()
    ((args, kwargs, output),) = calls
    assert args[1].tolist() == [999] * 4
    assert kwargs["added_cond_kwargs"]["time_ids"].tolist() == [[64, 64, 0, 0, 64, 64]] * 4
    kwargs = {key: value for key, value in kwargs.items() if key != "cross_attention_kwargs"}

    @torch.no_grad()
    def called(latents):
        return small.unet(latents, *args[1:], **kwargs)[0]

    assert (called(args[0]) - output).abs().max() < rounding(called, args[0])


def test_euler_is_diffusers_own(small):
    """Without guidance, the run equals the scheduler's plain loop over the UNet."""
    positive, negative, noise, scheduler = entries(small)
    model = UNetPatcher(small.unet, ModelSampling(scheduler))
    ours = sample_euler(model, positive, negative, noise, scheduler, 3, 1.0)

    @torch.no_grad()
    def plain_loop(noise, context, pooled):
        plain = type(scheduler).from_config(scheduler.config)
        plain.set_timesteps(3)
        x = noise * plain.init_noise_sigma
        extra = {"text_embeds": pooled, "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2)}
        for t in plain.timesteps:
            out = small.unet(plain.scale_model_input(x, t), t, context, added_cond_kwargs=extra)[0]
            x = plain.step(out, t, x)[0]
        return x

    ((context, info),) = positive
    inputs = noise, context, info["pooled_output"]
    assert (plain_loop(*inputs) - ours).abs().max() < rounding(plain_loop, *inputs, factor=4)


def test_svr_eot_is_the_benchmarks_variant(small):
    story = parse_story("a red fox", "asleep\nreading")
    pipeline = StoryPipeline(small)
    (variant, info), (plain, _) = (pipeline.conditioning(story, METHODS[name][0]) for name in ("svr-eot", "none"))
    tokens = tag_of(info).rows[0].tokens
    for frame, row in enumerate(variant):
        edit = partial(express_frame, tokens=tokens, frame=frame, settings=SVRSettings(eot="scale"))
        assert torch.equal(row, per_encoder(plain[frame], edit))


@pytest.mark.parametrize(
    "method, changes",
    [
        ("svr", {"svr": SVRSettings(suppress="jointly")}),
        ("svr", {"svr": SVRSettings(enhance_identity=True)}),
        ("svr+ipca", {"svr": SVRSettings(enhance_identity=True)}),
        ("svr", {"svr": SVRSettings(eot="keep")}),
        ("npr", {"npr": NPRSettings(suppress=1.0)}),
        ("npr", {"npr": NPRSettings(express=1.0)}),
    ],
)
def test_variants_of_the_reweighting_reach_the_picture_and_the_defaults_change_nothing(
    draw, by_method, method, changes
):
    assert distance(latents(draw, method=method, **changes), by_method[method]) > 1e-4
    assert torch.equal(latents(draw, method=method, svr=SVRSettings(), npr=NPRSettings()), by_method[method])


def test_a_text_becomes_keys_and_values_once_in_a_run(draw, small):
    layer, rows = small.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k, []
    own = layer.forward

    def forward(context):
        rows.append(context.shape[0])
        return own(context)

    layer.forward = forward
    try:
        for method in ("svr", "svr+ipca", "frames"):
            draw(method=method, steps=3)
        assert layer.forward is forward
    finally:
        del layer.forward
    assert rows == [6, 6, 6]


def test_only_the_very_same_text_is_remembered():
    a, b = torch.ones(1), torch.ones(1)
    calls = []
    cached = Cached(lambda *inputs: calls.append(inputs) or sum(inputs))
    for inputs in ((a,), (a,), (b,), (a, b), (a, b), (a,)):
        assert cached(*inputs) == len(inputs)
    assert [len(inputs) for inputs in calls] == [1, 1, 2, 1]


def test_a_text_that_changes_between_steps_is_heeded(small):
    positive, negative, noise, scheduler = entries(small)
    plain = UNetPatcher(small.unet, ModelSampling(scheduler))
    drawn = {}
    for name in ("same", "halved later"):
        seen = []

        def halve(executor, x, t, c_concat, context, *args, seen=seen, name=name, **kwargs):
            seen.append(context)
            return executor(x, t, c_concat, context / 2 if name != "same" and seen[1:] else context, *args, **kwargs)

        model = plain.clone()
        model.add_wrapper_with_key("apply_model", "test", halve)
        drawn[name] = sample_euler(model, positive, negative, noise, scheduler, 2, 5.0)
        assert seen[0] is seen[1]
    assert torch.equal(drawn["same"], sample_euler(plain, positive, negative, noise, scheduler, 2, 5.0))
    assert distance(drawn["same"], drawn["halved later"]) > 1e-3


def test_a_model_is_told_of_every_story_it_draws(small):
    stories = []
    pipeline = StoryPipeline(replace(small, on_story=stories.append))
    drawn = pipeline("a red fox", ["asleep", "reading"], steps=1, progress=lambda done, steps: None)
    assert stories == [drawn.story]


@pytest.mark.parametrize("fails", [False, True])
def test_the_processors_and_weights_are_put_back(draw, small, fails):
    before, weights = processors(small.unet), [p.data_ptr() for p in small.unet.parameters()]
    inside = []

    def progress(done, steps):
        inside.append(processors(small.unet))
        if fails:
            raise RuntimeError("stopped")

    if fails:
        with pytest.raises(RuntimeError, match="stopped"):
            draw(progress=progress)
    else:
        draw(progress=progress)
    assert not any(a is b for a, b in zip(inside[0], before, strict=True))
    assert all(a is b for a, b in zip(processors(small.unet), before, strict=True))
    assert weights == [p.data_ptr() for p in small.unet.parameters()]
    assert not any("forward" in vars(module) for module in small.unet.modules())


def test_patches_stay_on_their_clone(small):
    model = UNetPatcher(small.unet, ModelSampling(small.scheduler))
    patched = with_patch(model, IdentityPreserving(2.0, 0.0, 1.0, {("middle", 0): None}), attend)
    patched.set_model_attn1_replace(lambda q, k, v, options: q, "middle", 0)
    twice = with_patch(patched, IdentityPreserving(3.0, 0.0, 1.0, {("middle", 0): None}), attend)
    assert not model.wrappers and not model.model_options["transformer_options"]
    (carried,), (both,) = (m.get_wrappers("sampler_sample", "storyloom") for m in (patched, twice))
    assert [patch.weight for patch in carried.patches] == [2.0]
    assert [patch.weight for patch in both.patches] == [2.0, 3.0]


def test_weight_patches_last_for_a_run(small):
    model = UNetPatcher(small.unet, ModelSampling(small.scheduler))
    name = "diffusion_model.middle_block.1.transformer_blocks.1.attn2.to_v.weight"
    parameter = small.unet.mid_block.attentions[0].transformer_blocks[1].attn2.to_v.weight
    before, tensor = parameter.clone(), parameter.data
    up, down = torch.ones(parameter.shape[0], 2), torch.ones(2, parameter.shape[1])
    assert model.add_patches({name: ("lora", (up, down, 1.0))}, 0.5) == [name]
    assert model.add_patches({name: ("diff", (torch.ones_like(before),)), "diffusion_model.none": (up,)}) == [name]
    positive, negative, noise, scheduler = entries(small)
    plain = sample_euler(
        UNetPatcher(small.unet, model.get_model_object("model_sampling")), positive, negative, noise, scheduler, 1, 5
    )
    assert distance(sample_euler(model, positive, negative, noise, scheduler, 1, 5.0), plain) > 1e-3
    with pytest.raises(RuntimeError), model.patched_weights():
        assert torch.allclose(parameter, before + 0.5 * 0.5 * 2 + 1)
        raise RuntimeError
    assert parameter.data.data_ptr() == tensor.data_ptr() and torch.equal(parameter, before)


def test_a_story_of_another_length_than_the_batch_is_refused(small):
    story = parse_story("a red fox", "asleep\nreading")
    positive = StoryPipeline(small).conditioning(story, "svr")
    _, negative, noise, scheduler = entries(small, rows=3)
    model = UNetPatcher(small.unet, ModelSampling(scheduler))
    model = with_patch(model, IdentityPreserving(2.0, 0.0, 1.0, {("middle", 0): None}), attend)
    with pytest.raises(ValueError, match="2 frames but the latent batch has 3 images"):
        sample_euler(model, [positive], negative, noise, scheduler, 1, 5.0)


def test_a_pipeline_of_the_users_own_draws_and_is_left_untouched(small):
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline

    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=[32] * 4,
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        latent_channels=4,
    )
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    parts = {"text_encoder": small.text_encoder, "text_encoder_2": small.text_encoder_2, "unet": small.unet, "vae": vae}
    pipeline = StableDiffusionXLPipeline(tokenizer=None, tokenizer_2=None, scheduler=scheduler, **parts)
    before = processors(small.unet)
    drawn = StoryPipeline(pipeline)("a red fox", ["asleep", "reading"], steps=1, width=64, height=64)
    assert [frame.size for frame in drawn.frames] == [(64, 64)] * 2
    assert pipeline.scheduler is scheduler and scheduler.num_inference_steps is None
    assert all(a is b for a, b in zip(processors(small.unet), before, strict=True))
    assert model_of(pipeline).width == 1024


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"method": "magic"}, 'no method "magic". Choose one of svr\\+ipca'),
        ({"steps": 0}, "at least 1 step"),
        ({"width": 100}, "width must be at least 64 pixels and a multiple of 8, got 100"),
        ({"identity_weight": 0.5}, "identity_weight must be at least 1"),
        ({"start_percent": 0.5, "end_percent": 0.2}, "is after end_percent"),
        ({"blocks": "output 77"}, '"output 77" has no attention in this model'),
        ({"style": "ink"}, "Put {prompt} once"),
    ],
)
def test_faulty_settings_are_refused_before_anything_is_drawn(draw, settings, message):
    with pytest.raises(ValueError, match=message):
        draw(**settings, progress=lambda done, steps: pytest.fail("drew"))


def test_an_sd15_pipeline_is_refused():
    from types import SimpleNamespace

    with pytest.raises(ValueError, match="no text_encoder_2. Load the checkpoint with StableDiffusionXLPipeline"):
        StoryPipeline(SimpleNamespace(unet=1, text_encoder=1, vae=1, scheduler=1))


def test_attention_can_be_replaced_only_while_the_run_lasts(small):
    with pytest.raises(RuntimeError), replaceable_attention(small.unet):
        raise RuntimeError
    assert {type(processor).__name__ for processor in processors(small.unet)} == {"AttnProcessor2_0"}
