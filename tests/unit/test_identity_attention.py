"""Identity-preserving cross-attention: columns that count several times, in every form that is the same."""

import math
from fractions import Fraction

import pytest
import torch
from rounding import rounding

from storyloom.attention.identity import IdentityPreserving, duplicate_columns, identity_cross_attention
from storyloom.prompts.conditioning import StoryCond, StoryRow
from storyloom.prompts.svr import SVRSettings, express_frame
from storyloom.prompts.tokens import StoryTokens
from storyloom.runtime.call import Chunk, Conditioning, UNetCall
from storyloom.runtime.chain import Chain

HEADS = 4
COLUMNS = range(0, 1 + 7)


def attend(q, k, v, heads, mask=None):
    """Softmax attention, written out."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    logits = q @ k.mT / math.sqrt(q.shape[-1])
    if mask is not None:
        assert mask.dtype == q.dtype, "a mask comes in q's dtype"
        assert torch.broadcast_shapes(mask.shape, logits.shape) == logits.shape
        logits = logits + mask
    return (torch.softmax(logits, dim=-1) @ v).transpose(1, 2).flatten(2)


def qkv(rows=3, queries=10, columns=77, width=32, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(rows, n, width, generator=generator, dtype=torch.float64).to(dtype)
        for n in (queries, columns, columns)
    ]


def biased(q, k, v, columns_by_row, weight):
    bias = torch.zeros(q.shape[0], 1, 1, k.shape[1], dtype=q.dtype)
    for row, columns in enumerate(columns_by_row):
        bias[row, ..., list(columns)] = math.log(weight)
    return attend(q, k, v, HEADS, bias)


def off(a, b):
    return (a.double() - b.double()).abs().max().item()


@pytest.mark.parametrize("weight", [2, 2.0, 3.0])
def test_duplicated_columns_equal_a_log_bias(weight):
    q, k, v = qkv()
    out = identity_cross_attention(q, k, v, HEADS, COLUMNS, weight, attend)
    assert off(out, biased(q, k, v, [COLUMNS] * 3, weight)) < 1e-12
    assert off(out, attend(q, k, v, HEADS)) > 1e-3


def test_weight_2_is_the_published_attention_over_separately_given_identity_columns():
    """[frame's K and V | stored K and V of start token and identity], equation 5."""
    q, k, v = qkv()
    generator = torch.Generator().manual_seed(1)
    context, to_k, to_v = (
        torch.randn(*size, generator=generator, dtype=torch.float64) for size in ((8, 48), (48, 32), (48, 32))
    )
    context = context / 48**0.5
    stored_k, stored_v = ((context @ to).expand(3, -1, -1) for to in (to_k, to_v))
    k[:, :8], v[:, :8] = stored_k, stored_v
    published = attend(q, torch.cat([k, stored_k], 1), torch.cat([v, stored_v], 1), HEADS)
    assert off(identity_cross_attention(q, k, v, HEADS, COLUMNS, 2, attend), published) < 1e-12


def test_an_enhanced_identity_counts_as_it_is_in_each_row():
    """[frame's K and V | its own enhanced columns again], not the columns of the plain identity prompt."""
    generator = torch.Generator().manual_seed(2)
    plain, to_k, to_v = (
        torch.randn(*size, generator=generator, dtype=torch.float64) for size in ((77, 48), (48, 32), (48, 32))
    )
    tokens = StoryTokens(range(1, 8), (range(8, 12), range(12, 17), range(17, 20)), 20, 77)
    settings = SVRSettings(enhance_alpha=-0.1, enhance_identity=True)
    rows = torch.stack([express_frame(plain, tokens, frame, settings) for frame in range(3)]) / 48**0.5
    q, k, v = qkv()[0], rows @ to_k, rows @ to_v
    out = identity_cross_attention(q, k, v, HEADS, COLUMNS, 2, attend)
    own = [torch.cat([part, part[:, :8]], 1) for part in (k, v)]
    assert off(out, attend(q, *own, HEADS)) < 1e-12
    stored = [(plain[:8] / 48**0.5 @ to).expand(3, -1, -1) for to in (to_k, to_v)]
    both = [torch.cat(pair, 1) for pair in zip((k, v), stored, strict=True)]
    assert off(out, attend(q, *both, HEADS)) > 1e-3


def kernels(calls):
    """Attention that notes how many keys it is given, and whether a mask."""

    def noted(q, k, v, heads, mask=None):
        calls.append((k.shape[1], mask is not None))
        return attend(q, k, v, heads, mask)

    return noted


@pytest.mark.parametrize(
    "weight, keys",
    [(2.0, 77 + 8), (4.0, 77 + 3 * 8), (1.5, 2 * 77 + 8), (2.25, 4 * 77 + 5 * 8), (1.75, 4 * 77 + 3 * 8)],
)
@pytest.mark.parametrize("columns", [COLUMNS, [COLUMNS] * 3, [0, *range(5, 12)]])
def test_weights_in_quarters_need_no_mask(weight, keys, columns):
    q, k, v = qkv(dtype=torch.float64)
    out = identity_cross_attention(q, k, v, HEADS, columns, weight, kernels(calls := []))
    assert calls == [(keys, False)]
    own = columns if columns == [COLUMNS] * 3 else [columns] * 3
    assert off(out, biased(q, k, v, own, weight)) < 1e-12 and off(out, attend(q, k, v, HEADS)) > 1e-3


@pytest.mark.parametrize("weight", [1.5625, 1.3, 9 / 8, 4 / 3, 0.5])
def test_finer_weights_and_those_below_1_are_a_mask(weight):
    """Two nodes in quarters make sixteenths."""
    q, k, v = qkv(dtype=torch.float64)
    out = identity_cross_attention(q, k, v, HEADS, COLUMNS, weight, kernels(calls := []))
    assert calls == [(77, True)]
    assert off(out, biased(q, k, v, [COLUMNS] * 3, weight)) < 1e-12


@pytest.mark.parametrize("weight, calls_of_rows", [(1.25, [(316, False), (312, False), (77, False)]), (1.3, None)])
def test_rows_of_equal_columns_are_asked_for_together(weight, calls_of_rows):
    q, k, v = qkv(rows=4, dtype=torch.float64)
    columns = [range(8), [0, 5, 6, 40], range(8), ()]
    out = identity_cross_attention(q, k, v, HEADS, columns, weight, kernels(calls := []))
    assert off(out, biased(q, k, v, columns, weight)) < 1e-12
    assert calls == (calls_of_rows or [(77, True), (77, True), (77, False)])


@pytest.mark.parametrize("weight, masked", [(1.5, False), (2.25, False), (1.25 * 1.25, True)])
def test_a_cast_in_turn_is_masked_for_weights_finer_than_quarters_only(weight, masked):
    q, k, v = qkv(rows=8, dtype=torch.float64)
    chain = Chain({"n_heads": HEADS}, lambda *args: kernels(calls)(*args[:5]), None)
    calls, identities = [], (7, 3, 7, 3)
    out = IdentityPreserving(weight, 0.0, 1.0, {}).attend(
        q, k, v, HEADS, call_of(cast(identities), PLAIN, images=4), chain
    )
    assert [mask for _, mask in calls] == [False, masked, masked]
    columns = [range(1 + n) if n else [] for n in (*identities, 0, 0, 0, 0)]
    assert off(out, biased(q, k, v, columns, weight)) < 1e-12


@pytest.mark.parametrize("columns", [COLUMNS, [COLUMNS, range(3), []]])
def test_weight_1_is_ordinary_attention_bit_for_bit(columns):
    q, k, v = qkv()
    calls = []

    def counted(*args, **kwargs):
        calls.append(kwargs)
        return attend(*args, **kwargs)

    out = identity_cross_attention(q, k, v, HEADS, columns, 1.0, counted)
    assert torch.equal(out, attend(q, k, v, HEADS)) and calls == [{}]


@pytest.mark.parametrize("weight", [1.25, 2.5, 7.75])
def test_fractional_weights_equal_a_log_bias_and_whole_numbers_of_columns(weight):
    q, k, v = qkv()
    out = identity_cross_attention(q, k, v, HEADS, COLUMNS, weight, attend)
    assert off(out, biased(q, k, v, [COLUMNS] * 3, weight)) < 1e-12
    keys, values = duplicate_columns(k, v, COLUMNS, Fraction(weight))
    assert off(out, attend(q, keys, values, HEADS)) < 1e-12


def test_a_weight_lies_between_its_neighbours():
    q, k, v = qkv()
    results = [identity_cross_attention(q, k, v, HEADS, COLUMNS, w, attend) for w in (1.0, 1.75, 2.0)]
    assert off(results[1], results[2]) < off(results[0], results[2])


@pytest.mark.parametrize("weight", [2.0, 1.25])
def test_every_row_may_have_its_own_columns(weight):
    q, k, v = qkv()
    columns = [range(0, 8), [0, 5, 6, 40], (0,)]
    out = identity_cross_attention(q, k, v, HEADS, columns, weight, attend)
    assert off(out, biased(q, k, v, columns, weight)) < 1e-12
    for row, own in enumerate(columns):
        alone = [x[row : row + 1] for x in (q, k, v)]
        assert off(out[row], identity_cross_attention(*alone, HEADS, own, weight, attend)[0]) < 1e-12


def test_a_row_without_columns_is_ordinary():
    q, k, v = qkv()
    out = identity_cross_attention(q, k, v, HEADS, [range(8), [], range(8)], 2.0, attend)
    assert off(out[1], attend(q, k, v, HEADS)[1]) < 1e-12
    for nothing in ([], (), range(0)):
        out = identity_cross_attention(q, k, v, HEADS, nothing, 2.0, attend)
        assert off(out, attend(q, k, v, HEADS)) < 1e-12


@pytest.mark.parametrize("weight", [2, 1.25])
@pytest.mark.parametrize("columns", [COLUMNS, [COLUMNS, range(4), ()]])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_half_precision(weight, columns, dtype):
    q, k, v = qkv(dtype=dtype)
    out = identity_cross_attention(q, k, v, HEADS, columns, weight, attend)
    assert out.dtype == dtype
    shared = [columns] * 3 if isinstance(columns, range) else columns
    exact = biased(*(x.double() for x in (q, k, v)), shared, weight)
    bound = rounding(lambda *x: biased(*x, shared, weight), q, k, v, factor=4)
    assert off(out, exact) < bound


@pytest.mark.parametrize("weight, counts", [(Fraction(2), (2, 1)), (Fraction(5, 4), (5, 4)), (Fraction(5, 2), (5, 2))])
def test_duplication_counts_columns(weight, counts):
    k = torch.arange(6.0).view(1, 6, 1)
    keys, values = duplicate_columns(k, -k, [0, 3], weight)
    assert torch.equal(values, -keys)
    often, once = counts
    expected = sorted([0.0, 3.0] * often + [1.0, 2.0, 4.0, 5.0] * once)
    assert sorted(keys.flatten().tolist()) == expected


def test_a_weight_below_1_counts_less():
    q, k, v = qkv()
    out = identity_cross_attention(q, k, v, HEADS, COLUMNS, 0.5, attend)
    assert off(out, biased(q, k, v, [COLUMNS] * 3, 0.5)) < 1e-12


def test_duplication_of_each_row_s_own_columns():
    k = torch.arange(12.0).view(2, 6, 1)
    keys, values = duplicate_columns(k, -k, torch.tensor([[0, 3], [1, 5]]), Fraction(3, 2))
    assert torch.equal(values, -keys)
    assert sorted(keys[0].flatten().tolist()) == sorted([*range(6)] * 2 + [0, 3])
    assert sorted(keys[1].flatten().tolist()) == sorted([*range(6, 12)] * 2 + [7, 11])


def test_duplication_of_nothing_changes_nothing():
    _, k, v = qkv()
    keys, values = duplicate_columns(k, v, [], Fraction(2))
    assert torch.equal(keys, k) and torch.equal(values, v)


def story(frames, identity=8, length=77, without=()):
    tokens = StoryTokens(range(1, identity), (range(identity, identity + 3),), identity + 3, length)
    rows = (StoryRow(i, ("",), tokens, () if i in without else (tokens.identity,)) for i in range(frames))
    return StoryCond(tuple(rows), length)


def call_of(*conditionings, images=3):
    chunks = (Chunk(range(i * images, (i + 1) * images), c) for i, c in enumerate(conditionings))
    return UNetCall(1.0, tuple(chunks), tuple(range(images)))


def host(q, k, v, heads, mask, options):
    return attend(q, k, v, heads, mask)


def owner(q, k, v, options):
    return attend(q, k, v, options["n_heads"])


STORY, PLAIN = Conditioning(story(3), 77), Conditioning(None, 77)


@pytest.mark.parametrize("weight", [2.0, 1.25, 2.5])
@pytest.mark.parametrize("own", [None, owner])
@pytest.mark.parametrize("order", [(STORY, PLAIN), (PLAIN, STORY), (PLAIN, STORY, PLAIN)])
def test_only_a_storys_rows_count_the_identity(weight, own, order):
    call = call_of(*order)
    q, k, v = qkv(rows=3 * len(order))
    patch = IdentityPreserving(weight, 0.0, 1.0, {})
    out = patch.attend(q, k, v, HEADS, call, Chain({"n_heads": HEADS}, host, own))
    columns = [COLUMNS if c is STORY else [] for c in order for _ in range(3)]
    assert off(out, biased(q, k, v, columns, weight)) < 1e-12


@pytest.mark.parametrize("own", [None, owner])
@pytest.mark.parametrize("weight", [2.0, 1.25])
def test_a_repeated_context_counts_as_the_short_one(weight, own):
    long = Conditioning(None, 154)
    q, k, v = qkv(rows=6, columns=154)
    k[:3, 77:], v[:3, 77:] = k[:3, :77], v[:3, :77]
    patch = IdentityPreserving(weight, 0.0, 1.0, {})
    out = patch.attend(q, k, v, HEADS, call_of(STORY, long), Chain({"n_heads": HEADS}, host, own))
    assert off(out[:3], biased(q[:3], k[:3, :77], v[:3, :77], [COLUMNS] * 3, weight)) < 1e-12
    assert off(out[3:], attend(q, k, v, HEADS)[3:]) < 1e-12


def test_columns_appended_by_other_nodes_count_once():
    q, k, v = qkv(columns=81)
    patch = IdentityPreserving(2.0, 0.0, 1.0, {})
    out = patch.attend(q, k, v, HEADS, call_of(STORY), Chain({}, host, None))
    assert off(out, biased(q, k, v, [COLUMNS] * 3, 2.0)) < 1e-12


def test_a_frame_without_a_character_stays_ordinary():
    q, k, v = qkv()
    conditioning = Conditioning(story(3, without=(1,)), 77)
    out = IdentityPreserving(2.0, 0.0, 1.0, {}).attend(q, k, v, HEADS, call_of(conditioning), Chain({}, host, None))
    assert off(out, biased(q, k, v, [COLUMNS, [], COLUMNS], 2.0)) < 1e-12


def cast(identities, length=77):
    """A story whose rows have identities of these lengths, 0 without a character."""
    rows = []
    for number, n in enumerate(identities):
        tokens = StoryTokens(range(1, 1 + n), (range(1 + n, 4 + n),), 4 + n, length)
        rows.append(StoryRow(number, ("",), tokens, (tokens.identity,)) if n else StoryRow(number, (), tokens, ()))
    return Conditioning(StoryCond(tuple(rows), length), length)


@pytest.mark.parametrize("weight", [2.0, 1.25])
@pytest.mark.parametrize("own", [None, owner])
@pytest.mark.parametrize("identities", [(7, 0, 3), (3, 7, 3), (0, 0, 5), (0, 0, 0)])
def test_every_row_of_a_cast_counts_its_own_identity_and_a_row_of_nobody_is_left_alone(weight, own, identities):
    q, k, v = qkv(rows=6)
    inner = Chain({"n_heads": HEADS}, host, own)
    out = IdentityPreserving(weight, 0.0, 1.0, {}).attend(q, k, v, HEADS, call_of(cast(identities), PLAIN), inner)
    columns = [range(1 + n) if n else [] for n in (*identities, 0, 0, 0)]
    assert off(out, biased(q, k, v, columns, weight)) < 1e-12


def test_a_call_without_a_story_is_one_untouched_call():
    q, k, v = qkv(rows=6)
    calls = []

    def seen(*args):
        calls.append(args)
        return attend(*args[:4])

    out = IdentityPreserving(2.0, 0.0, 1.0, {}).attend(q, k, v, HEADS, call_of(PLAIN, PLAIN), Chain({}, seen, None))
    assert len(calls) == 1 and calls[0][0] is q and calls[0][1] is k
    assert torch.equal(out, attend(q, k, v, HEADS))


def test_the_input_tensors_are_left_as_they_are():
    q, k, v = qkv(rows=6)
    before = [x.clone() for x in (q, k, v)]
    for own in (None, owner):
        patch = IdentityPreserving(1.25, 0.0, 1.0, {})
        patch.attend(q, k, v, HEADS, call_of(STORY, PLAIN), Chain({"n_heads": HEADS}, host, own))
    assert all(torch.equal(a, b) for a, b in zip(before, (q, k, v), strict=True))


def test_weights_of_two_nodes_multiply():
    both = IdentityPreserving(2.0, 0.0, 1.0, {}).combine(IdentityPreserving(1.5, 0.0, 1.0, {}))
    assert both.weight == 3.0 and not both.neutral
    assert IdentityPreserving(1.0, 0.0, 1.0, {}).neutral
