"""The trainable attention of StoryMaker: against a written-out reference, the pack's own, and an unpatched UNet."""

import math
from dataclasses import replace

import pytest
import torch
from small_training import CONTEXT, NUMBERS, call, tiny_adapter, tiny_batch, tiny_unet

from storyloom.attention.decoupled import decoupled_cross_attention
from storyloom.training.storymaker.drops import NOTHING, drawn
from storyloom.training.storymaker.processors import ImageContext, grid, group_maps, probabilities

pytest.importorskip("diffusers", reason="the training runs on diffusers")
CLOSE = {"rtol": 0, "atol": 1e-9}


def image_of(adapter, batch, **settings):
    tokens, keep = adapter.tokens(batch, drawn(NOTHING, batch.counts, torch.Generator()))
    return ImageContext(tokens, keep, **settings)


@pytest.fixture
def batch():
    return tiny_batch((1, 3, 2))


def softmax_attention(q, k, v, heads, keep=None):
    """Attention row by row and head by head, in plain formulas; also the probabilities, summed over the heads."""
    out, maps = torch.zeros_like(q), torch.zeros(q.shape[0], q.shape[1], k.shape[1], dtype=q.dtype)
    width = q.shape[-1] // heads
    for row in range(q.shape[0]):
        seen = torch.arange(k.shape[1]) if keep is None else keep[row].nonzero().flatten()
        for head in range(heads):
            part = slice(head * width, head * width + width)
            logits = q[row, :, part] @ k[row, seen, part].T / math.sqrt(width)
            weights = logits.exp() / logits.exp().sum(-1, keepdim=True)
            out[row, :, part] = weights @ v[row, seen, part]
            maps[row][:, seen] += weights
    return out, maps


def test_a_cross_attention_layer_is_the_written_out_formula(batch):
    unet = tiny_unet()
    adapter = tiny_adapter(unet)
    adapter.install(unet)
    name = "mid_block.attentions.0.transformer_blocks.1.attn2"
    layer, own = unet.get_submodule(name), adapter.processors[adapter.names.index(f"{name}.processor")]
    torch.manual_seed(1)
    x, text = torch.randn(3, 4, layer.to_q.in_features).double(), torch.randn(3, 7, CONTEXT).double()
    image = image_of(adapter, batch, maps=[], strength=0.7, lora=0.6)
    with torch.no_grad():
        seen = layer(x, encoder_hidden_states=text, image=image)

        def projected(base, which, inputs):
            low = getattr(own, f"to_{which}_lora")
            return inputs @ (base.weight + 0.6 * low.up.weight @ low.down.weight).T

        q, k, v = projected(layer.to_q, "q", x), projected(layer.to_k, "k", text), projected(layer.to_v, "v", text)
        k_image, v_image = image.tokens @ own.to_k_ip.weight.T, image.tokens @ own.to_v_ip.weight.T
        of_text, _ = softmax_attention(q, k, v, layer.heads)
        of_image, weights = softmax_attention(q, k_image, v_image, layer.heads, image.keep)
        expected = projected(layer.to_out[0], "out", of_text + 0.7 * of_image) + layer.to_out[0].bias
    torch.testing.assert_close(seen, expected, **CLOSE)
    (maps,) = image.maps
    assert maps.shape == (3, 4, 2, 2)
    for row, count in enumerate(batch.counts):
        for group in range(4):
            wanted = weights[row, :, 20 * group : 20 * group + 20].sum(-1).view(2, 2) / layer.heads
            torch.testing.assert_close(maps[row, group], wanted, **CLOSE)
            assert maps[row, group].any() == (group <= count)
    torch.testing.assert_close(maps.sum(1), torch.ones(3, 2, 2).double(), **CLOSE)


@pytest.mark.parametrize("maps", [None, []], ids=["fused", "recorded"])
def test_it_equals_the_pack_s_attention_with_merged_lora(batch, maps):
    """Weights merged into the UNet, and the pack's decoupled attention, as StoryMaker's file is used."""
    trained, merged = tiny_unet(), tiny_unet()
    adapter = tiny_adapter(trained)
    adapter.install(trained)
    image = image_of(adapter, batch, maps=maps, strength=0.8, lora=0.5)

    class Decoupled:
        def __init__(self, own):
            self.own = own

        def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image=None):
            context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
            q, k, v = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
            out, _ = softmax_attention(q, k, v, attn.heads)
            if encoder_hidden_states is not None:
                pair = self.own.to_k_ip(image.tokens), self.own.to_v_ip(image.tokens)
                out = decoupled_cross_attention(
                    out, q, *pair, attn.heads, 0.8, lambda *x: softmax_attention(*x, image.keep)[0]
                )
            return attn.to_out[0](out)

    with torch.no_grad():
        for name, own in zip(adapter.names, adapter.processors, strict=True):
            layer = merged.get_submodule(name.removesuffix(".processor"))
            for which, base in (("q", layer.to_q), ("k", layer.to_k), ("v", layer.to_v), ("out", layer.to_out[0])):
                low = getattr(own, f"to_{which}_lora")
                base.weight += 0.5 * low.up.weight @ low.down.weight
        merged.set_attn_processor(
            {name: Decoupled(own) for name, own in zip(adapter.names, adapter.processors, strict=True)}
        )
        seen, expected = call(trained, batch, image), call(merged, batch, image)
    torch.testing.assert_close(seen, expected, **CLOSE)
    assert not torch.allclose(seen, call(tiny_unet(), batch), **CLOSE)


def test_both_strengths_0_leave_the_unet_bit_identical(batch):
    unet = tiny_unet().requires_grad_(False)  # PyTorch multiplies otherwise where weights need gradients
    with torch.no_grad():
        plain = call(unet, batch)
        adapter = tiny_adapter(unet)
        adapter.install(unet)
        off = image_of(adapter, batch, strength=0.0, lora=0.0)
        assert torch.equal(call(unet, batch, off), plain)
        for on in (replace(off, strength=1.0), replace(off, lora=1.0)):
            assert not torch.equal(call(unet, batch, on), plain)


def test_a_mask_of_the_text_is_kept(batch):
    """As diffusers passes it: a bias for each text token."""
    unet = tiny_unet().requires_grad_(False)
    mask = torch.ones(3, 7)
    mask[1, 4:] = 0

    def masked(image=None):
        return unet(
            batch.latents,
            3,
            batch.context,
            encoder_attention_mask=mask,
            added_cond_kwargs={"text_embeds": batch.pooled, "time_ids": batch.time_ids},
            cross_attention_kwargs=None if image is None else {"image": image},
        ).sample

    with torch.no_grad():
        plain = masked()
        adapter = tiny_adapter(unet)
        adapter.install(unet)
        off = image_of(adapter, batch, strength=0.0, lora=0.0)
        assert torch.equal(masked(off), plain)
        assert not torch.equal(call(unet, batch, off, t=torch.tensor([3] * 3)), plain)


def test_a_character_changes_its_own_picture_only(batch):
    unet = tiny_unet()
    adapter = tiny_adapter(unet)
    adapter.install(unet)
    with torch.no_grad():
        before = call(unet, batch, image_of(adapter, batch))
        for character, picture in enumerate([0, 1, 1, 1, 2, 2]):
            other = {name: getattr(batch, name).clone() for name in ("id_embeds", "face", "character")}
            for features in other.values():
                features[character] = features[character].flip(-1)
            after = call(unet, batch, image_of(adapter, replace(batch, **other)))
            changes = (after - before).abs().amax((1, 2, 3))
            assert changes[picture] > 1e-4
            changes[picture] = 0
            assert changes.max() < 1e-9


def test_pictures_of_mixed_counts_equal_each_one_alone(batch):
    unet = tiny_unet()
    adapter = tiny_adapter(unet)
    adapter.install(unet)
    first = 0
    with torch.no_grad():
        together = call(unet, batch, image_of(adapter, batch))
        for picture, count in enumerate(batch.counts):
            rows, own = slice(picture, picture + 1), slice(first, first + count)
            alone = replace(
                batch,
                counts=(count,),
                **{name: getattr(batch, name)[rows] for name in ("latents", "context", "pooled", "time_ids")},
                **{name: getattr(batch, name)[own] for name in ("id_embeds", "face", "character")},
            )
            image = image_of(adapter, alone)
            assert image.tokens.shape[1] == 20 * (1 + count)
            torch.testing.assert_close(call(unet, alone, image), together[rows], **CLOSE)
            first += count


@pytest.mark.parametrize("checkpointing", [False, True])
def test_maps_are_recorded_once_per_layer_and_carry_gradients(batch, checkpointing):
    """Gradient checkpointing computes each layer again in the backward pass."""
    unet = tiny_unet()
    adapter = tiny_adapter(unet)
    adapter.install(unet)
    if checkpointing:
        unet.enable_gradient_checkpointing()
    image = image_of(adapter, batch, maps=[])
    predicted = call(unet, batch, image)
    layers = sum(processor.cross for processor in adapter.processors)
    assert len(image.maps) == layers
    loss = predicted.square().mean() + sum(each.square().mean() for each in image.maps)
    loss.backward()
    assert len(image.maps) == layers
    gradients = [parameter.grad for parameter in adapter.parameters()]
    if not checkpointing:
        assert all(gradient is not None and gradient.any() for gradient in gradients)
        return
    unet.disable_gradient_checkpointing()
    adapter.zero_grad()
    image = image_of(adapter, batch, maps=[])
    (call(unet, batch, image).square().mean() + sum(each.square().mean() for each in image.maps)).backward()
    for parameter, gradient in zip(adapter.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, **CLOSE)


def test_maps_alone_give_gradients_to_the_queries_and_to_the_image_keys(batch):
    unet = tiny_unet()
    adapter = tiny_adapter(unet)
    adapter.install(unet)
    image = image_of(adapter, batch, maps=[])
    call(unet, batch, image)
    image.maps[-1].square().mean().backward()
    last = [own for own, name in zip(adapter.processors, adapter.names, strict=True) if "up_blocks" in name][-1]
    assert last.cross
    assert last.to_k_ip.weight.grad.any() and last.to_q_lora.up.weight.grad.any()
    assert last.to_v_ip.weight.grad is None and last.to_out_lora.up.weight.grad is None
    assert adapter.ppr.pos_embed.grad.any()


def test_a_repeated_block_is_recorded_each_time(batch):
    unet = tiny_unet()
    transformer = unet.mid_block.attentions[0]
    transformer.transformer_blocks = torch.nn.ModuleList([transformer.transformer_blocks[0]] * 3)
    adapter = tiny_adapter(unet)
    adapter.install(unet)
    middle = [key for key in adapter.keys if key[0] == "middle"]
    assert middle == [("middle", 0, 0)] * 2
    image = image_of(adapter, batch, maps=[])
    call(unet, batch, image)
    assert len(image.maps) == sum(processor.cross for processor in adapter.processors) + 2


@pytest.mark.parametrize(
    "pixels, size, expected",
    [
        (64, None, (8, 8)),
        (12 * 8, (24, 16), (12, 8)),
        (6 * 4, (24, 16), (6, 4)),
        (5 * 3, (18, 11), (5, 3)),
        (160, (10, 16), (10, 16)),
    ],
)
def test_a_layer_s_grid_comes_from_the_latents(pixels, size, expected):
    assert grid(pixels, size) == expected


def test_a_grid_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"A layer has 60 pixels, which latents of \(24, 16\) cannot have"):
        grid(60, (24, 16))


def test_maps_of_a_wide_picture_keep_rows_and_columns():
    torch.manual_seed(0)
    q, k = torch.randn(1, 8, 6).double(), torch.randn(1, 40, 6).double()
    weights = probabilities(q, k, 2, None)
    maps = group_maps(weights, (4, 8))
    assert maps.shape == (1, 4, 2, 4)
    torch.testing.assert_close(maps[0, 1, 1, 2], weights[0, :, 6, 20:].sum() / 2, **CLOSE)


def test_half_precision_has_probabilities_in_single():
    q = torch.full((1, 2, 8), 150.0, dtype=torch.float16)
    weights = probabilities(q, q.repeat(1, 10, 1), 1, None)
    assert weights.dtype == torch.float32
    assert weights.isfinite().all()


def test_the_tiny_unet_has_sdxl_s_order():
    names = list(tiny_unet().attn_processors)
    parts = [name.split(".")[0] for name in names]
    assert list(dict.fromkeys(parts)) == ["down_blocks", "up_blocks", "mid_block"]
    assert len(names) == 2 * (sum(NUMBERS["transformer_depth"]) + sum(NUMBERS["transformer_depth_output"]) + 2)
