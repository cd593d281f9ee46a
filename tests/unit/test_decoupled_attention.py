"""Decoupled cross-attention: text and pictures side by side, and StoryMaker's layer made of it."""

import math

import pytest
import torch
from rounding import rounding

from storyloom.attention.decoupled import decoupled_cross_attention

HEADS = 4


def attend(q, k, v, heads):
    """Softmax attention, written out."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return (torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), dim=-1) @ v).transpose(1, 2).flatten(2)


def tensors(*sizes, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes]


def layer(rows=3, image_rows=3, dtype=torch.float64):
    """text_out, q, k_image, v_image"""
    return tensors((rows, 10, 32), (rows, 10, 32), (image_rows, 40, 32), (image_rows, 40, 32), dtype=dtype)


def test_the_image_attention_is_added_to_the_text_s():
    text, q, k, v = layer()
    out = decoupled_cross_attention(text, q, k, v, HEADS, 0.8, attend)
    assert torch.allclose(out, text + 0.8 * attend(q, k, v, HEADS), rtol=0, atol=1e-12)
    assert not torch.allclose(out, text, atol=1e-2)


@pytest.mark.parametrize("scale", [0, 0.0, -0.0])
def test_scale_0_is_the_text_s_attention_itself_and_asks_nothing(scale):
    text, q, k, v = layer()

    def never(*args):
        raise AssertionError("was asked")

    assert decoupled_cross_attention(text, q, k, v, HEADS, scale, never) is text


def test_one_row_of_tokens_serves_all_rows():
    text, q, k, v = layer(image_rows=1)
    out = decoupled_cross_attention(text, q, k, v, HEADS, 0.7, attend)
    each = [x.repeat(3, 1, 1) for x in (k, v)]
    assert torch.allclose(out, decoupled_cross_attention(text, q, *each, HEADS, 0.7, attend), rtol=0, atol=1e-12)


def test_a_mask_lets_the_tokens_act_inside_its_region_only():
    text, q, k, v = layer()
    mask = torch.zeros(1, 10, 1)
    mask[:, 3:6] = 0.5
    out = decoupled_cross_attention(text, q, k, v, HEADS, mask, attend)
    everywhere = decoupled_cross_attention(text, q, k, v, HEADS, 0.5, attend)
    assert torch.allclose(out[:, 3:6], everywhere[:, 3:6], rtol=0, atol=1e-12)
    outside = [0, 1, 2, 6, 7, 8, 9]
    assert torch.equal(out[:, outside], text[:, outside])


def test_rows_may_have_scales_of_their_own():
    text, q, k, v = layer()
    out = decoupled_cross_attention(text, q, k, v, HEADS, torch.tensor([0.0, 0.5, 1.0]).view(3, 1, 1), attend)
    for row, scale in enumerate((0.0, 0.5, 1.0)):
        alone = [x[row : row + 1] for x in (text, q, k, v)]
        expected = decoupled_cross_attention(*alone, HEADS, scale, attend)[0]
        assert torch.allclose(out[row], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("scale", [0.8, torch.full((3, 10, 1), 0.8), torch.tensor(0.8)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_half_precision(dtype, scale):
    def reference(*tensors):
        return decoupled_cross_attention(*tensors, HEADS, 0.8, attend)

    given = layer(dtype=dtype)
    out = decoupled_cross_attention(*given, HEADS, scale, attend)
    assert out.dtype == dtype
    exact = reference(*(x.double() for x in given))
    assert (out.double() - exact).abs().max() < rounding(reference, *given, factor=4)


def test_the_input_tensors_are_left_as_they_are():
    given = [*layer(image_rows=1), torch.rand(1, 10, 1)]
    before = [x.clone() for x in given]
    decoupled_cross_attention(*given[:4], HEADS, given[4], attend)
    assert all(torch.equal(a, b) for a, b in zip(before, given, strict=True))


@pytest.mark.parametrize("strength, scale", [(0.8, 0.8), (1.0, 1.0), (0.3, 0.0), (0.0, 0.6)])
def test_merged_low_rank_weights_and_decoupled_attention_are_storymaker_s_processor(strength, scale):
    """q = x(Wq + s dWq), o = Attn(q, text) + scale Attn(q, image without dW), y = o(Wo + s dWo) + b."""
    width, context, rank = 32, 48, 3
    x, text, image, bias = tensors((2, 10, width), (2, 7, context), (2, 40, context), (width,))
    inputs = {"q": width, "k": context, "v": context, "out": width}
    weights = dict(zip(inputs, tensors(*((width, n) for n in inputs.values())), strict=True))
    up = dict(zip(inputs, tensors(*((width, rank) for _ in inputs)), strict=True))
    down = dict(zip(inputs, tensors(*((rank, n) for n in inputs.values())), strict=True))
    k_ip, v_ip = tensors((width, context), (width, context))

    def processor(target, hidden):
        return hidden @ weights[target].T + strength * (hidden @ down[target].T @ up[target].T)

    q = processor("q", x)
    o = attend(q, processor("k", text), processor("v", text), HEADS)
    o = o + scale * attend(q, image @ k_ip.T, image @ v_ip.T, HEADS)
    expected = processor("out", o) + bias

    merged = {target: weights[target] + strength * up[target] @ down[target] for target in inputs}
    q = x @ merged["q"].T
    o = attend(q, text @ merged["k"].T, text @ merged["v"].T, HEADS)
    o = decoupled_cross_attention(o, q, image @ k_ip.T, image @ v_ip.T, HEADS, scale, attend)
    result = o @ merged["out"].T + bias
    assert ((result - expected).abs().max() / expected.abs().max()).item() < 1e-12
