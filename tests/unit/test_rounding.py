"""Bounds that are measured: nothing but rounding lies within them, and every real fault far outside."""

import math
from dataclasses import replace

import pytest
import torch
from rounding import moved, rounding

from storyloom.attention.consistent import anchor_sources, consistent_self_attention, sample_tokens
from storyloom.attention.decoupled import decoupled_cross_attention
from storyloom.attention.freeu import scale_low_frequencies
from storyloom.attention.identity import identity_cross_attention
from storyloom.models.storymaker.ppr import PositionalPerceiverResampler
from storyloom.prompts.svr import SVRSettings, express_frame
from storyloom.prompts.tokens import StoryTokens

FAR = 20
"""A fault moves a result at least so many times as far as rounding may."""
HEADS, IDENTITY, NUMBERS = 4, range(8), (0, 1, 2)
TOKENS = StoryTokens(range(1, 8), (range(8, 12), range(12, 17)), 17, 77)
SUBSETS = [sample_tokens(0, 1, image, 24, 0.5) for image in NUMBERS]


def numbers(*shapes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_every_element_moves_by_one_unit_in_the_last_place(dtype):
    (x,) = numbers((300,), dtype=dtype)
    x[:3] = torch.tensor([0.0, 1.0, -1.0])
    before = x.clone()
    result = moved(x)
    up, down = (torch.nextafter(x, torch.full_like(x, end)) for end in (math.inf, -math.inf))
    assert result.dtype == dtype and torch.equal(x, before)
    assert ((result == up) | (result == down)).all() and (result != x).all()
    assert 0.4 < (result == up).float().mean() < 0.6
    assert torch.equal(moved(x), result) and not torch.equal(moved(x, seed=1), result)


def test_every_tensor_has_signs_of_its_own_and_everything_else_is_handed_on():
    seen, (x,) = [], numbers((50,))

    def reference(*given):
        seen.append(given)
        return given[0] + 1, given[2]

    words, index = ["a"], torch.arange(3)
    assert rounding(reference, x, words, x.clone(), index) > 0
    (a, b, c, d), (e, f, g, h) = seen
    assert a is x and b is f is words and d is h is index and torch.equal(a, c)
    assert torch.equal(e, moved(x)) and not torch.equal(e, g)


def test_the_bound_is_the_largest_difference_times_the_factor():
    x = torch.tensor([1.0, 100.0], dtype=torch.float64)
    assert rounding(lambda x: 1000 * x, x, factor=16) == pytest.approx(16 * 1000 * 2**-46, rel=0.1)
    assert rounding(lambda x: 1000 * x, x, factor=32) == pytest.approx(32 * 1000 * 2**-46, rel=0.1)
    assert rounding(lambda x: (x[:1], 1000 * x[1:]), x) == rounding(lambda x: 1000 * x, x)


def test_the_bound_is_never_below_a_few_units_in_the_last_place():
    x = torch.tensor([3.0, 4.0])
    assert rounding(lambda x: x.round(), x) == 4 * 2**-23 * 4
    assert rounding(lambda x: x.round().half(), x) == 4 * 2**-10 * 4


@pytest.mark.parametrize(
    "reference, given, message",
    [
        (torch.clone, [torch.zeros(3, dtype=torch.long)], "nothing to move"),
        (lambda x: 0 * x, [torch.ones(3)], "largest result is 0.0"),
        (torch.log, [torch.zeros(3)], "largest result is (inf|nan)"),
    ],
)
def test_what_cannot_be_measured_is_refused(reference, given, message):
    with pytest.raises(ValueError, match=message):
        rounding(reference, *given)


def with_ipca(columns=IDENTITY, weight=2.0):
    def attended(q, k, v):
        return identity_cross_attention(q, k, v, HEADS, columns, weight, attend)

    return attended


def with_csa(subsets=SUBSETS, anchors=0):
    def attended(q, k, v):
        return consistent_self_attention(q, k, v, HEADS, subsets, anchor_sources(NUMBERS, anchors), attend)

    return attended


def with_svr(**changes):
    def reweighted(hidden):
        return express_frame(hidden, TOKENS, 1, replace(SVRSettings(), **changes))

    return reweighted


def with_ppr(first_row=0, **strengths):
    network = PositionalPerceiverResampler(width=32, image_width=24, id_width=16, depth=2, head_width=8)
    with torch.no_grad():
        for parameter, drawn in zip(
            network.parameters(), numbers(*(p.shape for p in network.parameters())), strict=True
        ):
            parameter.copy_(drawn / (parameter.shape[-1] ** 0.5 if parameter.ndim > 1 else 4))

    @torch.no_grad()
    def tokens(identity, character, face):
        face = face.clone()
        face[:, 0] = face[:, first_row]
        return network(identity, character, face, **strengths)

    return tokens


def with_pictures(strength=0.8):
    def attended(text, q, k, v):
        return decoupled_cross_attention(text, q, k, v, HEADS, strength, attend)

    return attended


def attend(q, k, v, heads, mask=None):
    """Softmax attention, written out."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    logits = q @ k.mT / math.sqrt(q.shape[-1]) + (0 if mask is None else mask)
    return (torch.softmax(logits, dim=-1) @ v).transpose(1, 2).flatten(2)


def one_more(subset):
    return torch.tensor(sorted([*subset.tolist(), min(set(range(24)) - set(subset.tolist()))]))


TEXT = (3, 10, 32), (3, 77, 32), (3, 77, 32)
PICTURE = ((3, 24, 32),) * 3
FEATURES = (2, 16), (2, 257, 24), (2, 257, 24)
FAULTS = {
    "IPCA: weight 1.98 for 2": (with_ipca(), with_ipca(weight=1.98), TEXT),
    "IPCA: one column too many": (with_ipca(), with_ipca(range(9)), TEXT),
    "IPCA: the start token left out": (with_ipca(), with_ipca(range(1, 8)), TEXT),
    "CSA: one token too many": (with_csa(), with_csa([one_more(SUBSETS[0]), *SUBSETS[1:]]), PICTURE),
    "CSA: another draw for one image": (with_csa(), with_csa([sample_tokens(1, 1, 0, 24, 0.5), *SUBSETS[1:]]), PICTURE),
    "CSA: an anchor": (with_csa(), with_csa(anchors=2), PICTURE),
    "SVR: beta 0.99 for 1": (with_svr(), with_svr(enhance_beta=0.99), ((77, 768),)),
    "SVR: alpha 0.0101 for 0.01": (with_svr(), with_svr(weaken_alpha=0.0101), ((77, 768),)),
    "SVR: the other order": (with_svr(), with_svr(order="enhance_first"), ((77, 768),)),
    "PPR: one row of a face for another": (with_ppr(), with_ppr(1), FEATURES),
    "PPR: a face at 0.99": (with_ppr(), with_ppr(face_strength=0.99), FEATURES),
    "StoryMaker: strength 0.79 for 0.8": (
        with_pictures(),
        with_pictures(0.79),
        ((3, 10, 32),) * 2 + ((3, 40, 32),) * 2,
    ),
    "FreeU: 0.41 for 0.4": (
        lambda x: scale_low_frequencies(x, 0.4),
        lambda x: scale_low_frequencies(x, 0.41),
        ((2, 4, 12, 9),),
    ),
}


@pytest.mark.parametrize("right, wrong, shapes", FAULTS.values(), ids=FAULTS)
def test_a_fault_is_far_outside_the_bound(right, wrong, shapes):
    given = numbers(*shapes)
    assert (right(*given) - wrong(*given)).abs().max() > FAR * rounding(right, *given)
