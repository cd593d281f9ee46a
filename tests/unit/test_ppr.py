"""The resampler against its formulas written out, and what it is asked to keep apart."""

import pytest
import torch
from rounding import rounding
from torch.nn import functional as F

from storyloom.models.storymaker.ppr import PerceiverAttention, PositionalPerceiverResampler

WIDTH, IMAGE, ID, DEPTH, HEAD = 32, 24, 16, 2, 8
SMALL = {"width": WIDTH, "image_width": IMAGE, "id_width": ID, "depth": DEPTH, "head_width": HEAD}

AFFINE = ("weight", "bias")
RESAMPLER = [f"{name}.{part}" for name in ("proj_in", "proj_out", "norm_out") for part in AFFINE] + [
    f"layers.{i}.{name}"
    for i in range(4)
    for name in (
        *("0.norm1.weight", "0.norm1.bias", "0.norm2.weight", "0.norm2.bias"),
        *("0.to_q.weight", "0.to_kv.weight", "0.to_out.weight"),
        *("1.0.weight", "1.0.bias", "1.1.weight", "1.3.weight"),
    )
]
NAMES = {
    *("pos_embed", "bg_embed", "resample.latents"),
    *("proj.0.weight", "proj.0.bias", "proj.2.weight", "proj.2.bias", "norm.weight", "norm.bias"),
    *("proj_out.weight", "proj_out.bias", "norm_out.weight", "norm_out.bias"),
    *(f"perceiver_resampler.{name}" for name in RESAMPLER),
    *(f"resample.{name}" for name in RESAMPLER),
}


@pytest.fixture(scope="module")
def ppr():
    """A small network with the real numbers of tokens. All its values are drawn, biases and norms too."""
    network = PositionalPerceiverResampler(**SMALL).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in network.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 2:
            drawn /= parameter.shape[1] ** 0.5
        elif parameter.ndim == 1:
            drawn = drawn / 4 + name.endswith("weight")
        parameter.copy_(drawn)
    return network


def features(characters, seed=1, dtype=torch.float32):
    """id_embeds, character, face"""
    generator = torch.Generator().manual_seed(seed)
    sizes = (characters, ID), (characters, 257, IMAGE), (characters, 257, IMAGE)
    id_embeds, *pictures = (torch.randn(*size, generator=generator) for size in sizes)
    return [x.to(dtype) for x in (F.normalize(id_embeds), *pictures)]


def linear(w, name, x):
    bias = w.get(f"{name}.bias")
    return torch.einsum("oi,...i->...o", w[f"{name}.weight"], x) + (0 if bias is None else bias)


def norm(w, name, x):
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
    return (x - mean) / (variance + 1e-5).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]


def gelu(x):
    return x * 0.5 * (1 + torch.erf(x / 2**0.5))


def written_resampler(w, part, queries, memory):
    memory = linear(w, f"{part}.proj_in", memory)
    for i in range(DEPTH):
        at = f"{part}.layers.{i}"
        normed_memory, normed_queries = norm(w, f"{at}.0.norm1", memory), norm(w, f"{at}.0.norm2", queries)
        width = queries.shape[-1]
        kv = linear(w, f"{at}.0.to_kv", torch.cat([normed_memory, normed_queries], 1))
        q, k, v = (
            x.unflatten(-1, (-1, HEAD))
            for x in (linear(w, f"{at}.0.to_q", normed_queries), kv[..., :width], kv[..., width:])
        )
        logits = torch.einsum("bqhd,bkhd->bhqk", q * HEAD**-0.25, k * HEAD**-0.25)
        answer = torch.einsum("bhqk,bkhd->bqhd", torch.softmax(logits, -1), v).flatten(2)
        queries = queries + linear(w, f"{at}.0.to_out", answer)
        inner = linear(w, f"{at}.1.1", norm(w, f"{at}.1.0", queries))
        queries = queries + linear(w, f"{at}.1.3", gelu(inner))
    return norm(w, f"{part}.norm_out", linear(w, f"{part}.proj_out", queries))


def written(w, id_embeds, character, face):
    """Tokens from the state dict alone."""
    count = len(id_embeds)
    x = linear(w, "proj.2", gelu(linear(w, "proj.0", id_embeds))).reshape(count, 4, WIDTH)
    x = norm(w, "norm", x)
    e1 = x + written_resampler(w, "perceiver_resampler", x, face)
    e2 = written_resampler(w, "resample", w["resample.latents"].repeat(count, 1, 1), character)
    t = torch.cat([e1, e2], 1) + w["pos_embed"][:count]
    t = t + norm(w, "norm_out", linear(w, "proj_out", t))
    return torch.cat([w["bg_embed"], t]).reshape(1, 20 * (count + 1), WIDTH)


def exact(network):
    return {name: value.double() for name, value in network.state_dict().items()}


def bound(network, *given, factor=16):
    """What rounding may do to any token, measured: features and weights moved by one unit in the last place."""
    names, values = zip(*network.state_dict().items(), strict=True)

    def reference(*numbers):
        return written(dict(zip(names, numbers[len(given) :], strict=True)), *numbers[: len(given)])

    return rounding(reference, *given, *values, factor=factor)


def off(a, b):
    return (a.double() - b.double()).abs().max().item()


def differ(a, b):
    """Rows of [20, C] in which two characters' tokens differ."""
    return (a - b).abs().amax(-1) > 1e-4


def test_the_full_network_has_the_names_and_the_size_of_the_published_file():
    parameters = PositionalPerceiverResampler(device="meta").state_dict()
    assert len(NAMES) == 113 and set(parameters) == NAMES
    assert sum(value.numel() for value in parameters.values()) == 304_451_840
    shapes = {name: tuple(value.shape) for name, value in parameters.items()}
    assert shapes["pos_embed"] == (3, 20, 2048) and shapes["bg_embed"] == (1, 20, 2048)
    assert shapes["proj.0.weight"] == (1024, 512) and shapes["proj.2.weight"] == (8192, 1024)
    assert shapes["perceiver_resampler.proj_in.weight"] == (2048, 1280)
    assert shapes["perceiver_resampler.layers.3.0.to_kv.weight"] == (4096, 2048)
    assert shapes["perceiver_resampler.layers.3.1.1.weight"] == (8192, 2048)
    assert shapes["resample.latents"] == (1, 16, 1280)
    assert shapes["resample.proj_in.weight"] == (1280, 1280)
    assert shapes["resample.proj_out.weight"] == (2048, 1280)
    assert shapes["resample.layers.0.0.to_kv.weight"] == (2560, 1280)


def test_the_full_network_has_32_and_20_heads_of_64():
    network = PositionalPerceiverResampler(device="meta")
    for resampler, heads in ((network.perceiver_resampler, 32), (network.resample, 20)):
        attention = resampler.layers[0][0]
        assert attention.to_q.out_features == 64 * heads and attention.head_width == 64


@pytest.mark.parametrize("characters", [1, 2, 3])
def test_the_network_is_its_formulas(ppr, characters):
    given = features(characters)
    out = ppr(*given)
    expected = written(exact(ppr), *(x.double() for x in given))
    assert out.shape == (1, 20 * (characters + 1), WIDTH) and out.dtype == torch.float32
    assert off(out, expected) < bound(ppr, *given)


def test_the_background_comes_first_and_is_always_the_same(ppr):
    for characters in (1, 2, 3):
        assert torch.equal(ppr(*features(characters))[0, :20], ppr.bg_embed[0])


def test_unconditional_tokens_are_those_of_zero_features_with_the_background(ppr):
    for characters in (1, 2, 3):
        out = ppr.unconditional(characters)
        nobody = [torch.zeros_like(x) for x in features(characters)]
        expected = written(exact(ppr), *(x.double() for x in nobody))
        assert out.shape == (1, 20 * (characters + 1), WIDTH)
        assert off(out, expected) < bound(ppr, *nobody)
        assert torch.equal(out[0, :20], ppr.bg_embed[0])
        assert differ(out[0, 20:40], torch.zeros(20, WIDTH)).all()


def test_each_character_s_tokens_are_its_own(ppr):
    """Nothing but the embedding depends on who else is there."""
    id_embeds, character, face = features(3)
    together = ppr.character_tokens(id_embeds, character, face)
    for i in range(3):
        alone = ppr.character_tokens(*(x[i : i + 1] for x in (id_embeds, character, face)), positions=[i])
        assert off(together[i], alone[0]) < bound(ppr, id_embeds, character, face)


def test_the_order_of_characters_selects_their_embedding(ppr):
    given = features(2)
    swapped = [x.flip(0) for x in given]
    first, second = ppr.character_tokens(*given)
    assert differ(ppr.character_tokens(*swapped)[1], first).all()
    back = ppr.character_tokens(*swapped, positions=[1, 0])
    assert max(off(back[1], first), off(back[0], second)) < bound(ppr, *given)


def test_positions_choose_embeddings(ppr):
    twice = [x.repeat(2, 1, 1)[:, 0] if x.ndim == 2 else x.repeat(2, 1, 1) for x in features(1)]
    a, b = ppr.character_tokens(*twice, positions=[2, 2])
    assert off(a, b) < bound(ppr, *twice)
    a, b = ppr.character_tokens(*twice)
    assert differ(a, b).all()
    nobody = [torch.zeros_like(x) for x in features(3)]
    assert off(ppr.unconditional(1, [2])[0, 20:], ppr.unconditional(3)[0, 60:]) < bound(ppr, *nobody)


@pytest.mark.parametrize("changed, rows", [(0, range(4)), (1, range(4, 20)), (2, range(4))])
def test_identity_and_face_make_4_tokens_and_the_character_16(ppr, changed, rows):
    given = features(1)
    other = list(given)
    other[changed] = features(1, seed=2)[changed]
    differing = differ(ppr.character_tokens(*given)[0], ppr.character_tokens(*other)[0])
    assert differing.nonzero().flatten().tolist() == list(rows)


@pytest.mark.parametrize("which, rows", [("face_strength", slice(0, 4)), ("appearance_strength", slice(4, 20))])
def test_strength_0_leaves_out_one_kind_of_tokens_before_the_embedding(ppr, which, rows):
    given = features(2)
    full, without = ppr.character_tokens(*given), ppr.character_tokens(*given, **{which: 0.0})
    bare = ppr.pos_embed[:2]
    bare = bare + ppr.norm_out(ppr.proj_out(bare))
    assert off(without[:, rows], bare[:, rows]) < bound(ppr, *given)
    kept = torch.ones(20, dtype=torch.bool)
    kept[rows] = False
    assert torch.equal(without[:, kept], full[:, kept])


def test_strengths_of_1_change_nothing_and_each_character_may_have_its_own(ppr):
    given = features(3)
    full = ppr(*given)
    assert torch.equal(ppr(*given, 1.0, torch.ones(3)), full)
    mixed = ppr(*given, torch.tensor([1.0, 0.0, 0.5]), torch.tensor([0.0, 1.0, 1.0]))
    for i, (face, appearance) in enumerate([(1.0, 0.0), (0.0, 1.0), (0.5, 1.0)]):
        rows = slice(20 * (i + 1), 20 * (i + 2))
        assert off(mixed[0, rows], ppr(*given, face, appearance)[0, rows]) < bound(ppr, *given)
    assert not torch.allclose(mixed, full, atol=1e-3)


def test_blended_tokens_get_a_background(ppr):
    tokens = ppr.character_tokens(*features(2), positions=[0, 0])
    blended = tokens[0].lerp(tokens[1], 0.25)[None]
    out = ppr.with_background(blended)
    assert torch.equal(out, torch.cat([ppr.bg_embed, blended]).reshape(1, 40, WIDTH))


@pytest.mark.parametrize("characters", [0, 4])
def test_other_numbers_of_characters_are_refused(ppr, characters):
    with pytest.raises(ValueError, match=f"1 to 3 characters per image, got {characters}"):
        ppr(*features(characters))
    with pytest.raises(ValueError, match=f"got {characters}"):
        ppr.unconditional(characters)


@pytest.mark.parametrize("positions", [[0], [0, 3], [-1, 0], [0, 1, 2]])
def test_positions_that_do_not_exist_are_refused(ppr, positions):
    with pytest.raises(ValueError, match="position from 0 to 2 for each of 2 characters"):
        ppr(*features(2), positions=positions)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_half_precision(ppr, dtype):
    half = PositionalPerceiverResampler(**SMALL, dtype=dtype)
    half.load_state_dict(ppr.state_dict())
    given = features(2, dtype=dtype)
    out = half(*given)
    assert out.dtype == half.unconditional(1).dtype == dtype
    assert off(out, written(exact(half), *(x.double() for x in given))) < bound(half, *given, factor=4)


def test_large_logits_fit_half_precision():
    """q and k take half of the scaling each: products of unscaled ones, here 64 * 40 * 40, would overflow."""
    attention = PerceiverAttention(64, 64, torch.nn, dtype=torch.float16).requires_grad_(False)
    for name, value in (("to_q", torch.eye(64)), ("to_kv", torch.eye(64).repeat(2, 1)), ("to_out", torch.eye(64))):
        getattr(attention, name).weight.copy_(value)
    for norm_layer in (attention.norm1, attention.norm2):
        norm_layer.weight.fill_(40)
    signs = torch.tensor([1.0, -1.0], dtype=torch.float16).repeat(32)
    out = attention(signs.expand(1, 4, 64), signs.expand(1, 257, 64))
    assert torch.allclose(out, 40 * signs.expand(1, 4, 64), atol=0.1)


class Casting:
    """Operations that keep weights in one dtype and compute in that of their input, as hosts have them."""

    made = []

    class Linear(torch.nn.Linear):
        def __init__(self, *args, **kwargs):
            Casting.made.append(kwargs["dtype"])
            super().__init__(*args, **kwargs)

        def forward(self, x):
            return F.linear(x, self.weight.to(x), None if self.bias is None else self.bias.to(x))

    class LayerNorm(torch.nn.LayerNorm):
        def forward(self, x):
            return F.layer_norm(x, self.normalized_shape, self.weight.to(x), self.bias.to(x), self.eps)


def test_a_host_s_operations_cast_all_weights_to_the_input(ppr):
    network = PositionalPerceiverResampler(**SMALL, dtype=torch.bfloat16, operations=Casting)
    network.load_state_dict(ppr.state_dict())
    assert set(Casting.made) == {torch.bfloat16} and {p.dtype for p in network.parameters()} == {torch.bfloat16}
    given = features(2)
    expected = written(exact(network), *(x.double() for x in given))
    out = network(*given)
    assert out.dtype == torch.float32 and off(out, expected) < bound(ppr, *given)
    assert network.unconditional(2, dtype=torch.float32).dtype == torch.float32


def test_the_input_tensors_are_left_as_they_are(ppr):
    given = features(2)
    before = [x.clone() for x in given]
    ppr(*given, 0.5, torch.tensor([0.5, 0.2]))
    assert all(torch.equal(a, b) for a, b in zip(before, given, strict=True))
