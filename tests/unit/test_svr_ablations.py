"""The paper's ablations: joint suppression, the identity enhanced, end-of-text rows kept, and the halves of NPR."""

import itertools
from dataclasses import replace

import pytest
import torch
from rounding import rounding

from storyloom.prompts.svr import NPRSettings, SVRSettings, express_frame, express_frame_naively, reweight_rows
from storyloom.prompts.tokens import StoryTokens

TOKENS = StoryTokens(range(1, 8), (range(8, 12), range(12, 17), range(17, 18), range(18, 24)), 24, 77)
IDENTITY, EOT = list(TOKENS.identity), list(range(24, 77))
ORDERS, ENDS, WAYS = ("weaken_first", "enhance_first"), ("svr", "scale", "keep"), ("one_by_one", "jointly")
ABLATIONS = {
    "joint": {"suppress": "jointly"},
    "identity": {"enhance_identity": True},
    "end kept": {"eot": "keep"},
}


def hidden_states(width=768, dtype=torch.float64):
    """Rows of norm 28 that share a direction, as the hidden states of CLIP do."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(77, width, generator=generator, dtype=torch.float64)
    hidden += 1.5 * torch.randn(width, generator=generator, dtype=torch.float64)
    return (28 * hidden / hidden.norm(dim=1, keepdim=True)).to(dtype)


def by_svd(hidden, frame, order, eot, suppress, enhance_identity):
    """The definition by thin SVDs, tokens as columns, each result stored before the next decomposition reads it."""
    text = hidden.clone()

    def decompose(rows, alpha, beta):
        rows = [*rows, *EOT] if eot == "svr" else [*rows]
        u, s, vh = torch.linalg.svd(text[rows].T.double(), full_matrices=False)
        text[rows] = (u @ torch.diag(beta * s * torch.exp(-alpha * s)) @ vh).T.to(text.dtype)
        if eot == "scale":
            text[EOT] *= 0.9

    def weaken():
        others = [rows for k, rows in enumerate(TOKENS.frames) if k != frame]
        for rows in [itertools.chain(*others)] if suppress == "jointly" else others:
            decompose(rows, 0.01, 0.05)

    def enhance():
        decompose([*(IDENTITY if enhance_identity else []), *TOKENS.frames[frame]], -0.01, 1.0)

    for part in (weaken, enhance) if order == "weaken_first" else (enhance, weaken):
        part()
    return text


@pytest.mark.parametrize("order, eot, suppress", list(itertools.product(ORDERS, ENDS, WAYS)))
@pytest.mark.parametrize("enhance_identity", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_every_combination_equals_its_definition_by_svd(order, eot, suppress, enhance_identity, dtype):
    hidden, settings = hidden_states(dtype=dtype), (order, eot, suppress, enhance_identity)
    out = express_frame(
        hidden, TOKENS, 1, SVRSettings(order=order, eot=eot, suppress=suppress, enhance_identity=enhance_identity)
    )
    for rows in (IDENTITY, *map(list, TOKENS.frames), EOT):

        def reference(hidden, rows=rows):
            return by_svd(hidden, 1, *settings)[rows]

        bound = 1e-9 if dtype == torch.float64 else rounding(reference, hidden, factor=2)
        assert (out[rows].double() - reference(hidden).double()).abs().max() < bound, rows
    untouched = [0] if enhance_identity else [0, *IDENTITY]
    assert torch.equal(out[untouched], hidden[untouched])
    assert out.dtype == dtype and torch.equal(hidden, hidden_states(dtype=dtype)), "the input is not changed"


def test_each_ablation_acts_and_no_two_are_the_same():
    hidden = hidden_states()
    changes = [{}, {"eot": "scale"}, *ABLATIONS.values(), {"suppress": "jointly", "enhance_identity": True}]
    results = [express_frame(hidden, TOKENS, 1, SVRSettings(**change)) for change in changes]
    for a, b in itertools.combinations(results, 2):
        assert (a - b).abs().max() > 1e-2


@pytest.mark.parametrize("order, eot", list(itertools.product(ORDERS, ENDS[:2])))
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_off_is_bit_identical_to_the_published_calls_one_by_one(order, eot, dtype):
    expected = hidden_states(dtype=dtype)
    calls = [(0, 0.01, 0.05), (1, 0.01, 0.05), (3, 0.01, 0.05)]
    calls.insert(3 if order == "weaken_first" else 0, (2, -0.01, 1.0))
    for frame, alpha, beta in calls:
        rows = [*TOKENS.frames[frame], *(EOT if eot == "svr" else [])]
        expected = reweight_rows(expected, rows, alpha, beta)
        if eot == "scale":
            expected[EOT] *= 0.9
    out = express_frame(hidden_states(dtype=dtype), TOKENS, 2, SVRSettings(order=order, eot=eot))
    assert torch.equal(out, expected)


@pytest.mark.parametrize("suppress, enhance_identity", list(itertools.product(WAYS, [False, True])))
@pytest.mark.parametrize("order", ORDERS)
def test_kept_end_rows_are_bit_identical(order, suppress, enhance_identity):
    hidden = hidden_states(dtype=torch.float16)
    settings = SVRSettings(order=order, eot="keep", suppress=suppress, enhance_identity=enhance_identity)
    out = express_frame(hidden, TOKENS, 1, settings)
    assert torch.equal(out[EOT], hidden[EOT])
    assert not torch.equal(out[list(TOKENS.frames[0])], hidden[list(TOKENS.frames[0])])


def test_scaled_end_rows_are_scaled_once_for_all_frames_that_are_suppressed_jointly():
    hidden = hidden_states()
    out = express_frame(hidden, TOKENS, 1, SVRSettings(eot="scale", suppress="jointly"))
    assert torch.allclose(out[EOT], hidden[EOT] * 0.9**2, rtol=0, atol=1e-9)


def test_an_enhanced_identity_grows_and_differs_from_frame_to_frame():
    hidden = hidden_states()
    results = [express_frame(hidden, TOKENS, k, SVRSettings(enhance_identity=True)) for k in range(4)]
    for out in results:
        assert out[IDENTITY].norm() > 1.05 * hidden[IDENTITY].norm()
    for a, b in itertools.combinations(results, 2):
        assert (a - b)[IDENTITY].abs().max() > 1e-2


@pytest.mark.parametrize("eot", ENDS)
def test_two_frames_leave_nothing_to_join(eot):
    """With one suppressed frame, joint suppression is the published one, bit for bit."""
    tokens = replace(TOKENS, frames=TOKENS.frames[:2])
    results = [express_frame(hidden_states(), tokens, 0, SVRSettings(eot=eot, suppress=way)) for way in WAYS]
    assert torch.equal(*results)


@pytest.mark.parametrize("eot", ENDS)
def test_a_single_frame_has_nothing_to_suppress_jointly(eot):
    tokens = replace(TOKENS, frames=TOKENS.frames[:1])
    results = [express_frame(hidden_states(), tokens, 0, SVRSettings(eot=eot, suppress=way)) for way in WAYS]
    assert torch.equal(*results) and results[0].isfinite().all()


@pytest.mark.parametrize("change", list(ABLATIONS.values()))
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("spoil", ["all zero", "a frame zero", "all equal", "identity equal", "end rows equal"])
def test_degenerate_rows_stay_finite(change, dtype, spoil):
    hidden = hidden_states(dtype=dtype)
    if spoil == "all zero":
        hidden.zero_()
    elif spoil == "a frame zero":
        hidden[8:12] = 0
    elif spoil == "all equal":
        hidden[:] = hidden[0]
    else:
        rows = IDENTITY if spoil == "identity equal" else EOT
        hidden[rows] = hidden[rows[0]].clone()
    for order in ORDERS:
        assert express_frame(hidden, TOKENS, 0, SVRSettings(order=order, **change)).isfinite().all()


@pytest.mark.parametrize(
    "settings, of_frame, of_others",
    [
        (NPRSettings(), 2.0, 0.5),
        (NPRSettings(suppress=1.0), 2.0, 1.0),
        (NPRSettings(express=1.0), 1.0, 0.5),
        (NPRSettings(3.0, 0.25), 3.0, 0.25),
    ],
)
def test_the_halves_of_naive_reweighting(settings, of_frame, of_others):
    hidden = hidden_states()
    factors = torch.ones(77, 1, dtype=torch.float64)
    factors[8:24] = of_others
    factors[12:17] = of_frame
    assert torch.equal(express_frame_naively(hidden, TOKENS, 1, settings), hidden * factors)
    if settings == NPRSettings():
        assert torch.equal(express_frame_naively(hidden, TOKENS, 1), hidden * factors)
