"""StoryMaker without ComfyUI: characters change the pictures, off changes nothing, and misfits are refused."""

from dataclasses import replace

import pytest
import torch
from PIL import Image

from storyloom.models.demo.storymaker import random_weights
from storyloom.models.storymaker.characters import CharacterReference, features_of, save_character
from storyloom.models.storymaker.ppr import PositionalPerceiverResampler
from storyloom.models.storymaker.weights import StoryMakerWeights
from storyloom.standalone import __main__ as command
from storyloom.standalone.layers import transformers
from storyloom.standalone.storymaker import Characters, storymaker_of


def weights_for(unet, dtype=torch.float16):
    """StoryMaker's weights with random numbers for the layers of a UNet."""
    generator = torch.Generator().manual_seed(5)

    def random(*shape):
        return (torch.randn(shape, generator=generator) / shape[-1] ** 0.5).to(dtype)

    lora, image_kv = {}, {}
    names = {module: name for name, module in unet.named_modules()}
    for transformer in transformers(unet):
        for index, block in enumerate(transformer.blocks):
            width, context = block.attn2.to_k.weight.shape
            image_kv[(*transformer.block, index)] = random(width, context), random(width, context)
            for layer in (block.attn1, block.attn2):
                for target, linear in {
                    "q": layer.to_q,
                    "k": layer.to_k,
                    "v": layer.to_v,
                    "out": layer.to_out[0],
                }.items():
                    name = f"{names[layer]}.processor.to_{target}_lora"
                    out, into = linear.weight.shape
                    lora |= {f"{name}.down.weight": random(2, into), f"{name}.up.weight": random(out, 2)}
    network = PositionalPerceiverResampler(image_width=64, id_width=32, depth=1, device="meta")
    ppr = {name: tensor.to(dtype) for name, tensor in random_weights(network.state_dict()).items()}
    return StoryMakerWeights(ppr, lora, image_kv)


def someone(seed, name="", width=64):
    generator = torch.Generator().manual_seed(seed)
    vector = torch.nn.functional.normalize(torch.randn(32, generator=generator), dim=0)
    face, whole = torch.randn(2, 257, width, generator=generator)
    return CharacterReference(name, ((features_of((vector, face), whole), 1.0),), torch.zeros(8, 8, 3))


@pytest.fixture(scope="module")
def characters(small):
    return Characters(storymaker_of(weights_for(small.unet)), (someone(1),))


def latents(draw, characters=None, **settings):
    return draw(method="frames", characters=characters, captions=False, **settings).latents


def test_pictures_change_with_the_character_and_with_each_half(draw, characters):
    plain, ours = latents(draw), latents(draw, characters)
    other = latents(draw, replace(characters, references=(someone(2),)))
    tokens, lora = (latents(draw, replace(characters, **{off: 0.0})) for off in ("lora_strength", "token_strength"))
    drawn = [plain, ours, other, tokens, lora]
    assert all(not torch.allclose(a, b, atol=1e-3) for i, a in enumerate(drawn) for b in drawn[:i])


def test_off_is_bit_identical_and_the_model_stays_as_it_is(draw, small, characters):
    before = {name: value.clone() for name, value in small.unet.state_dict().items()}
    plain = latents(draw)
    latents(draw, characters)
    assert all(torch.equal(value, before[name]) for name, value in small.unet.state_dict().items())
    assert torch.equal(plain, latents(draw, replace(characters, token_strength=0.0, lora_strength=0.0)))
    assert torch.equal(plain, latents(draw))


def test_a_negative_strength_of_the_lora_subtracts_it(draw, characters):
    ours, minus = (latents(draw, replace(characters, lora_strength=strength)) for strength in (0.8, -0.8))
    assert not torch.allclose(ours, minus, atol=1e-3)


def test_a_character_of_another_encoder_is_refused(draw, characters):
    with pytest.raises(ValueError, match="features of width 48, but this adapter needs 32 and 64"):
        latents(draw, replace(characters, references=(someone(1, width=48),)))


def test_an_adapter_for_another_unet_is_refused(draw, small):
    weights = weights_for(small.unet)
    weights.image_kv.pop(("middle", 0, 1))
    with pytest.raises(ValueError, match="needs the 16 cross-attention layers of SDXL .* but the 17 layers"):
        latents(draw, Characters(storymaker_of(weights), (someone(1),)))


def test_a_lora_for_another_unet_is_refused(draw, small):
    weights = weights_for(small.unet)
    weights.lora["mid_block.attentions.0.transformer_blocks.7.attn1.processor.to_q_lora.up.weight"] = torch.ones(2, 2)
    with pytest.raises(ValueError, match="no layer mid_block.attentions.0.transformer_blocks.7.attn1.to_q.weight"):
        latents(draw, Characters(storymaker_of(weights), (someone(1),)))


COMMAND = ["a red fox", "asleep", "reading", "--steps", "1"]


def test_character_files_are_drawn_by_the_command_line(tmp_path):
    features = features_of(None, torch.ones(257, 1280))
    paths = [tmp_path / f"{name}.safetensors" for name in ("Ann", "Bob")]
    for path in paths:
        save_character(path, CharacterReference(path.stem, ((features, 1.0),), torch.zeros(8, 8, 3)))
    options = [*COMMAND, "--character", *map(str, paths), "--token-strength", "0.5", "--lora-strength", "0.25"]
    made = command._characters(command._parser().parse_args(options))
    assert [reference.name for reference in made.references] == ["Ann", "Bob"]
    assert (made.token_strength, made.lora_strength) == (0.5, 0.25)
    assert command._characters(command._parser().parse_args(COMMAND)) is None


def test_the_command_line_s_characters_reach_the_page(tmp_path, monkeypatch, small, characters):
    monkeypatch.setattr("storyloom.standalone.demo.demo_model", lambda: small)
    pages = []
    for made in (None, characters):
        monkeypatch.setattr(command, "_characters", lambda options, made=made: made)
        assert command.main([*COMMAND, "-o", str(tmp_path / "page.png")]) == 0
        pages.append(Image.open(tmp_path / "page.png").tobytes())
    assert pages[0] != pages[1]
