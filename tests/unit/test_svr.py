"""Singular-value reweighting against the published operator and loop."""

import itertools

import pytest
import torch
from rounding import rounding

from storyloom.prompts.svr import SVRSettings, express_frame, express_frame_naively, reweight_rows
from storyloom.prompts.tokens import StoryTokens

TOKENS = StoryTokens(range(1, 8), (range(8, 12), range(12, 17), range(17, 18), range(18, 24)), 24, 77)
EOT = range(24, 77)
WEAKEN, ENHANCE = (0.01, 0.05), (-0.01, 1.0)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """These matrices are too small to share: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def hidden_states(width=768, rows=77, dtype=torch.float64, seed=0):
    """Rows of norm 28 that share a direction, as the hidden states of CLIP do."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(width, generator=generator, dtype=torch.float64)
    hidden = torch.randn(rows, width, generator=generator, dtype=torch.float64) + 1.5 * shared
    return (28 * hidden / hidden.norm(dim=1, keepdim=True)).to(dtype)


def published_operator(columns, alpha, beta):
    """Token vectors as columns [D, n]: U S Vᵀ with S -> beta S exp(-alpha S), in float64."""
    u, s, vh = torch.linalg.svd(columns.to(torch.float64), full_matrices=False)
    return (u @ torch.diag(s * torch.exp(-alpha * s) * beta) @ vh).to(columns.dtype)


def published_loop(hidden, frames, express, eot, order, mode):
    """The published loop over frames, every call rewriting the tensor that the next one reads."""
    text = hidden.clone()

    def swap(span, alpha, beta):
        columns = text[span.start : span.stop].T
        if mode == "svr":
            columns = torch.cat([columns, text[eot.start : eot.stop].T], dim=-1)
        changed = published_operator(columns, alpha, beta)
        text[span.start : span.stop] = changed[:, : len(span)].T
        if mode == "svr":
            text[eot.start : eot.stop] = changed[:, len(span) :].T
        else:
            text[eot.start : eot.stop] *= 0.9

    suppress = [span for k, span in enumerate(frames) if k != express]
    if order == "enhance_first":
        swap(frames[express], *ENHANCE)
    for span in suppress:
        swap(span, *WEAKEN)
    if order == "weaken_first":
        swap(frames[express], *ENHANCE)
    return text


@pytest.mark.parametrize("n", [1, 7, 60])
@pytest.mark.parametrize("width", [768, 1280])
@pytest.mark.parametrize("alpha, beta", [WEAKEN, ENHANCE, (0.0, 1.0), (0.0, 0.0)])
def test_the_gram_form_equals_the_thin_svd(width, n, alpha, beta):
    hidden = hidden_states(width)
    rows = torch.randperm(77, generator=torch.Generator().manual_seed(n))[:n]
    out = reweight_rows(hidden, rows, alpha, beta)
    expected = hidden.clone()
    expected[rows] = published_operator(hidden[rows].T, alpha, beta).T
    assert (out - expected).abs().max() < 1e-9
    outside = [row for row in range(77) if row not in rows.tolist()]
    assert torch.equal(out[outside], hidden[outside])


def test_singular_values_are_scaled_as_the_formula_says():
    hidden = hidden_states(rows=7)
    before = torch.linalg.svdvals(hidden)
    after = torch.linalg.svdvals(reweight_rows(hidden, range(7), 0.01, 0.05))
    expected = (0.05 * before * torch.exp(-0.01 * before)).sort(descending=True)[0]
    assert torch.allclose(after, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [[3, 5], range(3, 6), torch.tensor([3, 5])])
def test_the_dtype_is_kept_and_the_input_never_changed(dtype, rows):
    hidden = hidden_states(dtype=dtype)
    before = hidden.clone()
    out = reweight_rows(hidden, rows, *WEAKEN)
    assert out.dtype == dtype and torch.equal(hidden, before)
    for mode, order in itertools.product(["svr", "scale"], ["weaken_first", "enhance_first"]):
        out = express_frame(hidden, TOKENS, 1, SVRSettings(order=order, eot=mode))
        assert out.dtype == dtype and torch.equal(hidden, before)
    assert express_frame_naively(hidden, TOKENS, 1).dtype == dtype and torch.equal(hidden, before)


def test_a_read_only_view_of_the_input_is_enough():
    """The encoder's output may be an expanded or split view."""
    whole = torch.cat([hidden_states(768), hidden_states(1280)], dim=1)
    before = whole.clone()
    left = express_frame(whole[:, :768], TOKENS, 0, SVRSettings())
    assert torch.equal(left, express_frame(whole[:, :768].clone(), TOKENS, 0, SVRSettings()))
    assert torch.equal(whole, before)


@pytest.mark.parametrize("order", ["weaken_first", "enhance_first"])
@pytest.mark.parametrize("mode", ["svr", "scale"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("express", [0, 2, 3])
def test_it_equals_the_published_loop(order, mode, dtype, express):
    hidden = hidden_states(1280 if express else 768, dtype=dtype)
    out = express_frame(hidden, TOKENS, express, SVRSettings(order=order, eot=mode))
    for rows in (*TOKENS.frames, EOT):

        def reference(hidden, rows=rows):
            return published_loop(hidden, TOKENS.frames, express, EOT, order, mode)[list(rows)]

        bound = 1e-9 if dtype == torch.float64 else rounding(reference, hidden, factor=2)
        assert (out[list(rows)].double() - reference(hidden).double()).abs().max() < bound, rows
    untouched = [0, *TOKENS.identity]
    assert torch.equal(out[untouched], hidden[untouched])


def test_half_precision_is_rounded_after_every_call():
    """Rounding once at the end would give other numbers: the published code stores every call's result."""
    hidden = hidden_states(dtype=torch.float16)
    out = express_frame(hidden, TOKENS, 0, SVRSettings()).double()
    stepwise = published_loop(hidden, TOKENS.frames, 0, EOT, "weaken_first", "svr").double()
    at_end = published_loop(hidden.double(), TOKENS.frames, 0, EOT, "weaken_first", "svr").half().double()
    rows = list(EOT)
    assert (out - stepwise)[rows].abs().sum() < 0.1 * (at_end - stepwise)[rows].abs().sum()


def test_scaled_end_rows_are_nine_tenths_per_call():
    hidden = hidden_states()
    out = express_frame(hidden, TOKENS, 1, SVRSettings(eot="scale"))
    calls = len(TOKENS.frames)
    assert torch.allclose(out[list(EOT)], hidden[list(EOT)] * 0.9**calls, rtol=0, atol=1e-9)


def test_the_two_orders_and_the_scaled_mode_are_three_different_things():
    hidden = hidden_states()
    settings = [SVRSettings(), SVRSettings(order="enhance_first"), SVRSettings(eot="scale")]
    results = [express_frame(hidden, TOKENS, 1, chosen) for chosen in settings]
    for a, b in itertools.combinations(results, 2):
        assert (a - b)[8:].abs().max() > 1e-2


def test_the_defaults_are_the_published_constants():
    assert SVRSettings() == SVRSettings(0.01, 0.05, -0.01, 1.0, "weaken_first", "svr")


@pytest.mark.parametrize("mode", ["svr", "scale"])
def test_the_expressed_frame_stands_out_and_the_others_fade(mode):
    hidden = hidden_states()
    for express in range(4):
        out = express_frame(hidden, TOKENS, express, SVRSettings(eot=mode))
        change = [(out[list(rows)].norm() / hidden[list(rows)].norm()).item() for rows in TOKENS.frames]
        assert change[express] > 1.05, change
        assert all(factor < 0.06 for k, factor in enumerate(change) if k != express), change


def test_every_frame_gets_its_own_encoding():
    hidden = hidden_states(dtype=torch.float32)
    results = [express_frame(hidden, TOKENS, k, SVRSettings()) for k in range(4)]
    for a, b in itertools.combinations(results, 2):
        assert (a - b).abs().max() > 0.5


@pytest.mark.parametrize("setting", ["weaken_alpha", "weaken_beta", "enhance_alpha", "enhance_beta"])
def test_every_constant_is_used(setting):
    hidden = hidden_states()
    changed = SVRSettings(**{setting: getattr(SVRSettings(), setting) + 0.02})
    difference = express_frame(hidden, TOKENS, 1, changed) - express_frame(hidden, TOKENS, 1, SVRSettings())
    assert difference.abs().max() > 1e-3


def test_naive_reweighting_doubles_one_and_halves_the_others():
    hidden = hidden_states()
    out = express_frame_naively(hidden, TOKENS, 2)
    factors = torch.ones(77, 1, dtype=torch.float64)
    factors[8:24] = 0.5
    factors[17] = 2
    assert torch.equal(out, hidden * factors)


@pytest.mark.parametrize("mode", ["svr", "scale"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("spoil", ["all zero", "a frame zero", "all equal", "two equal", "end rows equal"])
def test_degenerate_rows_stay_finite(mode, dtype, spoil):
    hidden = hidden_states(dtype=dtype)
    if spoil == "all zero":
        hidden.zero_()
    elif spoil == "a frame zero":
        hidden[8:12] = 0
    elif spoil == "all equal":
        hidden[:] = hidden[0]
    elif spoil == "two equal":
        hidden[9] = hidden[10]
    else:
        hidden[24:] = hidden[24]
    for order in ("weaken_first", "enhance_first"):
        out = express_frame(hidden, TOKENS, 0, SVRSettings(order=order, eot=mode))
        assert out.isfinite().all()
        assert spoil != "all zero" or not out.any()
    if spoil in ("a frame zero", "two equal"):

        def reference(hidden):
            return published_loop(hidden, TOKENS.frames, 0, EOT, "weaken_first", mode)

        out = express_frame(hidden, TOKENS, 0, SVRSettings(eot=mode))
        assert (out - reference(hidden)).abs().max() < rounding(reference, hidden, factor=2)


def test_a_single_frame_is_expressed_alone():
    tokens = StoryTokens(range(1, 8), (range(8, 12),), 12, 77)
    hidden = hidden_states()
    out = express_frame(hidden, tokens, 0, SVRSettings())
    expected = reweight_rows(hidden, [*range(8, 12), *range(12, 77)], *ENHANCE)
    assert torch.equal(out, expected) and out.isfinite().all()
    assert (out[8:12] - hidden[8:12]).abs().max() > 0.1


def test_equal_rows_stay_equal():
    hidden = hidden_states()
    hidden[9] = hidden[10]
    out = express_frame(hidden, TOKENS, 0, SVRSettings())
    assert torch.allclose(out[9], out[10], rtol=0, atol=1e-9)


def test_a_full_prompt_without_spare_end_rows_works():
    tokens = StoryTokens(range(1, 40), (range(40, 60), range(60, 76)), 76, 77)
    hidden = hidden_states()
    out = express_frame(hidden, tokens, 1, SVRSettings())
    expected = published_loop(hidden, tokens.frames, 1, range(76, 77), "weaken_first", "svr")
    assert (out - expected).abs().max() < 1e-9
