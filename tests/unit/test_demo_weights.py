"""The demo's file becomes the layers of SDXL, and nothing that it says is lost on the way."""

import math

import pytest
import torch
from rounding import rounding
from safetensors.torch import load_file, save_file

from storyloom.models.demo import model as demo
from storyloom.prompts.tokens import END, START

SPELLING = {1: "light", 2: "house</w>", 3: "fox</w>", 4: ",</w>", 5: "house</w>"}


def off(a, b):
    return (a.double() - b.double()).abs().max().item()


@pytest.fixture(scope="module")
def weights():
    return demo.load_weights()


def test_the_file_is_small_and_holds_one_block_per_transformer():
    assert demo.FILE.stat().st_size < 20e6
    stored = load_file(demo.FILE)
    assert all(value.dtype == torch.float16 for name, value in stored.items() if name != "vocabulary")
    assert not any(".transformer_blocks.1." in name for name in stored)
    assert len(stored["vocabulary"]) >= 300


def test_every_value_is_finite_and_in_float32(weights):
    for part in (weights.unet, weights.clip_l, weights.clip_g):
        for name, value in part.items():
            assert value.dtype == torch.float32 and value.isfinite().all(), name


def test_the_unet_has_sdxl_s_depths_and_widths(weights):
    depths = {}
    for name in weights.unet:
        if ".transformer_blocks." in name:
            head, rest = name.split(".transformer_blocks.")
            depths[head] = max(depths.get(head, 0), 1 + int(rest.split(".")[0]))
    assert depths == {
        **{f"input_blocks.{n}.1": 2 for n in (4, 5)},
        **{f"input_blocks.{n}.1": 10 for n in (7, 8)},
        "middle_block.1": 10,
        **{f"output_blocks.{n}.1": 10 if n < 3 else 2 for n in range(6)},
    }
    assert weights.unet["input_blocks.4.1.transformer_blocks.1.attn2.to_k.weight"].shape == (64, 2048)
    assert weights.unet["label_emb.0.0.weight"].shape[1] == 2816


def test_repeated_blocks_are_equal_and_share_no_memory(weights):
    first, last = (weights.unet[f"middle_block.1.transformer_blocks.{j}.ff.net.2.weight"] for j in (0, 9))
    assert torch.equal(first, last) and first.data_ptr() != last.data_ptr()


@pytest.mark.parametrize("width", [768, 1280])
def test_the_basis_is_orthonormal_and_has_no_mean(width):
    def products(basis):
        return basis.double().T @ basis.double()

    def sums(basis):
        return basis.double().sum(0)

    basis = demo.basis(width)
    assert off(products(basis), torch.eye(demo.NARROW)) < rounding(products, basis)
    assert off(sums(basis), torch.zeros(demo.NARROW)) < rounding(sums, basis)


def test_keys_see_through_the_basis_what_they_were_trained_on(weights):
    stored = load_file(demo.FILE)["unet.middle_block.1.transformer_blocks.0.attn2.to_k.weight"].double()
    narrow = torch.randn(5, 2 * demo.NARROW, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    halves = zip(narrow.chunk(2, 1), ("l", "g"), (768, 1280), strict=True)
    wide = torch.cat(
        [
            half @ demo.basis(width).double().T * demo.ROW_NORM[which] / math.sqrt(demo.NARROW)
            for half, which, width in halves
        ],
        1,
    )
    key = weights.unet["middle_block.1.transformer_blocks.9.attn2.to_k.weight"]
    bound = rounding(lambda key: wide @ key.double().T, key)
    assert off(wide @ key.double().T, narrow @ stored.T) < bound


def test_words_that_were_not_learnt_are_one_unknown_word(weights):
    for part in (weights.clip_l, weights.clip_g):
        table = part["text_model.embeddings.token_embedding.weight"]
        learnt = torch.zeros(demo.TOKENS, dtype=torch.bool)
        learnt[list(weights.vocabulary)] = True
        unknown = table[~learnt]
        assert torch.equal(unknown, unknown[:1].expand_as(unknown))
        assert not (table[learnt] == unknown[0]).all(1).any()
        assert len(table[learnt].unique(dim=0)) == learnt.sum()


def test_unknown_words_are_whole_words_and_named_once():
    tokens = [START, 3, 4, 1, 2, 3, 1, 5, END, END]
    assert demo.unknown_words(tokens, SPELLING, {3, 4}) == ["lighthouse"]
    assert demo.unknown_words(tokens, SPELLING, {1, 3, 4, 5}) == ["lighthouse"]
    assert demo.unknown_words(tokens, SPELLING, set(SPELLING)) == []


def test_the_autoencoder_draws_squares_and_reads_them_back():
    pixels = torch.randint(0, 256, (2, 6, 5, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    latents = demo.to_latents(pixels)
    encoder, decoder = demo.autoencoder()
    picture = decoder(latents)
    bound = rounding(torch.clone, latents)
    assert off(picture.movedim(1, -1), demo.decode(latents)) < bound
    assert off(encoder.double()(picture.double()), latents) < bound
    assert torch.equal((demo.to_pictures(latents) * 255).round().to(torch.uint8), pixels)


def damaged(folder, change):
    path = folder / "demo.safetensors"
    change(path)
    return path


def shortened(path):
    path.write_bytes(demo.FILE.read_bytes()[:100_000])


def empty(path):
    path.write_bytes(b"")


def another_model(path):
    save_file({"vocabulary": torch.zeros(3, dtype=torch.int32)}, path)


def other_widths(path):
    stored = load_file(demo.FILE)
    stored["l.embedding"] = stored["l.embedding"][:, :64].contiguous()
    save_file(stored, path)


@pytest.mark.parametrize("change", [shortened, empty, another_model, other_widths, lambda path: None])
def test_a_wrong_file_is_refused_with_one_sentence(tmp_path, change):
    with pytest.raises(demo.DemoFileError, match=r"demo\.safetensors") as refused:
        demo.load_weights(damaged(tmp_path, change))
    assert "\n" not in str(refused.value)
