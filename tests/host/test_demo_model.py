"""The demo model is an SDXL for the host in everything but its size, and it draws what it is told."""

import numpy as np
import pytest
import torch
from rounding import rounding
from story_graphs import build, differ, ipca, sample

from storyloom.benchmarks.common import fused_attention
from storyloom.world.measures import StoryPictures, effect
from storyloom.world.reader import Reader
from storyloom.world.scene import SIZE
from storyloom.world.stories import random_story

STEPS = 8
SAMPLERS = [("dpmpp_2m", "sgm_uniform"), ("euler_ancestral", "simple")]


@pytest.fixture(scope="module")
def demo(host):
    return host.pack("nodes.demo").DemoModel.execute().result


@pytest.fixture(scope="module")
def stock():
    """ComfyUI's own numbers of SDXL, recognised by what a checkpoint's tensors look like."""
    from comfy.model_detection import unet_config_from_diffusers_unet

    def empty(*shape):
        return torch.empty(shape, device="meta")

    tensors = {"conv_in.weight": empty(320, 4, 3, 3), "add_embedding.linear_1.weight": empty(1280, 2816)}
    for level, depth in enumerate((0, 2, 10)):
        for layer in range(2):
            tensors[f"down_blocks.{level}.resnets.{layer}.conv1.weight"] = empty(1)
            for block in range(depth):
                name = f"down_blocks.{level}.attentions.{layer}.transformer_blocks.{block}.attn2.to_k.weight"
                tensors[name] = empty(320 * 2**level, 2048)
    config = unet_config_from_diffusers_unet(tensors)
    assert config["transformer_depth_middle"] == 10
    return config


def stock_unet(stock):
    """The full SDXL's UNet without numbers."""
    import comfy.ops
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    options = {"device": torch.device("meta"), "operations": comfy.ops.disable_weight_init}
    return UNetModel(**{**stock, "dtype": torch.float32, "num_head_channels": 64}, **options)


def attention_layers(unet, device):
    """(block, index, kind) of every attention layer in the order of a call, as patches see them."""
    seen = []

    def record(kind):
        def patch(q, k, v, options):
            seen.append(
                (tuple(options["block"]), options["block_index"], kind, k.shape[-1] if kind == "attn2" else None)
            )
            return q, k, v

        return patch

    patches = {f"{kind}_patch": [record(kind)] for kind in ("attn1", "attn2")}
    inputs = [torch.zeros(shape, device=device) for shape in ((1, 4, 16, 16), (1,), (1, 77, 2048), (1, 2816))]
    with torch.no_grad(), fused_attention():
        unet(*inputs[:2], context=inputs[2], y=inputs[3], transformer_options={"patches": patches})
    return seen


def test_its_numbers_are_stock_sdxl_s_but_for_the_channels(host, demo, stock):
    import comfy.latent_formats
    import comfy.model_base

    model = demo[0]
    assert type(model.model) is comfy.model_base.SDXL
    assert isinstance(model.model.latent_format, comfy.latent_formats.SDXL)
    ours = host.pack("models.demo.model").UNET
    assert stock["model_channels"] == 320 and ours["model_channels"] == 32
    same = set(ours) & set(stock) - {"model_channels"}
    assert {key: ours[key] for key in same} == {key: stock[key] for key in same}
    assert {"context_dim", "adm_in_channels", "transformer_depth", "channel_mult", "num_res_blocks"} <= same


def test_its_layers_and_hooks_are_stock_sdxl_s(host, demo, stock):
    ours, theirs = demo[0].model.diffusion_model, stock_unet(stock)
    assert {name for name, _ in ours.named_parameters()} == {name for name, _ in theirs.named_parameters()}
    layers = attention_layers(theirs, "meta")
    assert len(layers) == 140
    assert attention_layers(ours, "cpu") == layers


def test_its_conditioning_has_sdxl_s_shape(demo):
    import comfy.sdxl_clip

    clip = demo[1]
    assert isinstance(clip.tokenizer, comfy.sdxl_clip.SDXLTokenizer)
    context, info = clip.encode_from_tokens_scheduled(clip.tokenize("a fox in the snow"))[0]
    assert context.shape == (1, 77, 2048) and info["pooled_output"].shape == (1, 1280)
    assert 20 < context[0, 1:6, :768].norm(dim=1).mean() < 40
    assert 25 < context[0, 1:6, 768:].norm(dim=1).mean() < 50


def test_it_is_the_same_every_time_it_is_loaded(host, demo):
    again = host.pack("nodes.demo").DemoModel.execute().result
    pairs = [(demo[0].model, again[0].model), (demo[1].cond_stage_model, again[1].cond_stage_model)]
    for first, second in pairs:
        for a, b in zip(first.parameters(), second.parameters(), strict=True):
            assert torch.equal(a, b)


def test_its_vae_decodes_and_encodes_squares(demo):
    vae = demo[2]
    latents = torch.randn(2, 4, 8, 6, generator=torch.Generator().manual_seed(1)) * 0.3
    latents[:, 3] = (latents[:, :3] * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1)
    picture = vae.decode(latents / 0.13025)
    assert picture.shape == (2, 64, 48, 3)
    assert torch.equal(picture[:, ::8, ::8], picture[:, 7::8, 7::8])
    bound = rounding(lambda given: vae.encode(vae.decode(given)), latents / 0.13025)
    assert (vae.encode(picture) - latents / 0.13025).abs().max() < bound < 1e-3


def test_it_predicts_v_from_zero_terminal_snr(demo):
    import comfy.model_sampling

    sampling = demo[0].model.model_sampling
    assert isinstance(sampling, comfy.model_sampling.V_PREDICTION)
    assert sampling.sigma_max > 1000


def story_parts(graph, story, size=192):
    texts = {"identity": story.identity_text(), "frames": story.frames_text()}
    return build(graph, "EncodePerFrame", (size, size), loader="StoryLoom_DemoModel", **texts)


@pytest.mark.parametrize(("sampler", "scheduler"), SAMPLERS)
def test_any_sampler_draws_what_it_is_told(host, graph, sampler, scheduler):
    story = random_story(3, frames=2)
    parts = story_parts(graph, story)
    latents = sample(graph, parts, "samples", steps=STEPS, sampler_name=sampler, scheduler=scheduler)
    graph.capture(images=graph.add("VAEDecode", samples=latents, vae=parts["vae"])())
    images = host.run(graph).images
    assert images.shape == (2, 8 * SIZE, 8 * SIZE, 3)
    scenes = tuple(reading.scene for reading in Reader().read_all(images.numpy()))
    rates = effect([StoryPictures(story, scenes)]).rates
    assert rates["species"].mean == rates["place"].mean == 1.0


def test_a_head_that_it_draws_has_the_vector_of_the_same_head_in_the_world(host, graph):
    """In pictures as they are drawn, whose colours are not exactly the world's."""
    texts = {
        "identity": "a red fox in a green coat and white trousers with a crown",
        "frames": "asleep in the snow\nreading a book in the meadow",
    }
    parts = build(graph, "EncodePerFrame", (192, 192), loader="StoryLoom_DemoModel", **texts)
    latents = sample(graph, parts, "samples", steps=STEPS, cfg=3.0)
    graph.capture(images=graph.add("VAEDecode", samples=latents, vae=parts["vae"])())
    faces, world, draw = (host.pack(name) for name in ("models.demo.faces", "world.scene", "world.draw"))
    heads = faces.DemoFaces()
    for image in host.run(graph).images:
        pixels = (image * 255).round().byte().numpy()
        (face,), _ = heads.find(pixels)
        drawn = draw.draw(world.Scene("desert", "waving", "none", (face.who,)), np.random.default_rng(0))
        (same,), _ = heads.find(drawn)
        assert heads.id_embed(pixels, face) @ heads.id_embed(drawn, same) > 0.95


def test_a_story_on_it_keeps_its_model_untouched_and_feels_ipca(host, graph):
    parts = story_parts(graph, random_story(1, frames=2), size=64)
    sample(graph, parts, "plain", steps=1)
    alone = type(graph)(graph)
    sample(graph, parts, "patched", steps=1, model=ipca(graph, parts["model"], identity_weight=4.0))
    result = host.run(graph)
    assert torch.isfinite(result.plain["samples"]).all()
    assert differ(result.plain, result.patched)
    assert torch.equal(result.plain["samples"], host.run(alone, fresh=True).plain["samples"])


def test_a_lora_for_sdxl_finds_its_layers(host, graph):
    import safetensors.torch

    folder = host.base / "models" / "loras"
    folder.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(3)
    shapes = {
        "lora_unet_output_blocks_1_1_transformer_blocks_7_attn2_to_v": (128, 2048),
        "lora_te1_text_model_encoder_layers_0_self_attn_q_proj": (768, 768),
        "lora_te2_text_model_encoder_layers_0_mlp_fc1": (128, 1280),
    }
    halves = {}
    for name, (rows, columns) in shapes.items():
        halves[f"{name}.lora_up.weight"] = torch.randn(rows, 4, generator=generator) / 4
        halves[f"{name}.lora_down.weight"] = torch.randn(4, columns, generator=generator) / 4
    safetensors.torch.save_file(halves, folder / "demo.safetensors")
    parts = story_parts(graph, random_story(1), size=96)
    settings = {"lora_name": "demo.safetensors", "strength_model": 1.0, "strength_clip": 1.0}
    loaded = graph.add("LoraLoader", model=parts["model"], clip=parts["clip"], **settings)
    graph.capture(model=loaded(0), clip=loaded(1))
    sample(graph, parts, "plain", steps=1)
    sample(graph, parts, "lora", steps=1, model=loaded(0))
    result = host.run(graph)
    assert len(result.model.patches) == 1 and len(result.clip.patcher.patches) == 2
    assert differ(result.plain, result.lora)


def test_words_that_it_does_not_know_are_named_in_the_log(demo, caplog):
    clip = demo[1]
    clip.encode_from_tokens(clip.tokenize("a fox in the snow beside a lighthouse, quixotic"))
    (message,) = [record.getMessage() for record in caplog.records if "demo model" in record.getMessage()]
    assert "lighthouse, quixotic" in message.replace("beside, ", "") and "fox" not in message
    caplog.clear()
    clip.encode_from_tokens(clip.tokenize("a fox in the snow"))
    assert not [record for record in caplog.records if "demo model" in record.getMessage()]
