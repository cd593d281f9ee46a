"""Memory of gathered keys and values: bounded by slices of the same result, and told to the host."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from storyloom.attention import consistent
from storyloom.attention.consistent import ConsistentAttention, anchor_sources, sample_tokens
from storyloom.attention.gathering import attend_in_groups, group_images
from storyloom.attention.identity import IdentityPreserving
from storyloom.prompts.conditioning import StoryCond, StoryRow
from storyloom.prompts.tokens import StoryTokens
from storyloom.runtime.call import Chunk, Conditioning, UNetCall
from storyloom.runtime.chain import Chain
from storyloom.runtime.memory import (
    GATHER_LIMIT,
    Level,
    MemoryWrapper,
    gathered_bytes,
    images_within,
    most_gathered,
)
from storyloom.runtime.sampling import with_patch

MIB = 2**20
SDXL_OUTPUT = (Level(1280, 2), Level(640, 1))
SIZE = (128, 128)
"""Latents of 1024 x 1024."""
TOKENS, WIDTH, HEADS = 24, 32, 4


def csa(rate=0.5, anchors=0, levels=SDXL_OUTPUT):
    return ConsistentAttention(rate, anchors, 0, 0.0, 1.0, {("output", 1): None}, 4, levels=levels)


def story(*casts, anchors=None):
    tokens = StoryTokens(range(1, 3), (range(3, 5),), 5, 77)
    rows = tuple(StoryRow(n, cast, tokens, ()) for n, cast in enumerate(casts))
    return StoryCond(rows, 77, anchors=anchors)


def attend(q, k, v, heads):
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def recorded(calls):
    """The same, which notes how many rows and keys it is called with."""

    def note(q, k, v, heads):
        calls.append(tuple(k.shape[:2]))
        return attend(q, k, v, heads)

    return note


def qkv(rows, dtype=torch.float64, tokens=TOKENS):
    generator = torch.Generator().manual_seed(rows)
    return [torch.randn(rows, tokens, WIDTH, generator=generator, dtype=dtype) for _ in range(3)]


# ---- figures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("images, mebibytes", [(2, 30), (4, 100), (8, 360), (16, 1360), (32, 5280)])
def test_gathered_keys_and_values_grow_with_the_square_of_the_batch(images, mebibytes):
    most = most_gathered([images - 1] * images, SDXL_OUTPUT, 0.5, SIZE, 2, whole=True)
    assert most == mebibytes * MIB
    gathered = csa().gathers(None, images, SIZE, 2, whole=False)
    assert (
        gathered <= GATHER_LIMIT
        and gathered == min(mebibytes * MIB, gathered)
        and (gathered == most) == (most <= GATHER_LIMIT)
    )


def test_with_anchors_they_grow_with_the_batch():
    two, four, eight = (csa(anchors=2).gathers(None, images, SIZE, 2, whole=True) for images in (2, 4, 8))
    assert (two, four, eight) == (30 * MIB, 4 * 20 * MIB, 8 * 20 * MIB)
    assert csa(anchors=2).gathers(None, 8, SIZE, 2, whole=False) == 6 * 20 * MIB, "the anchors are another group"


def test_a_single_image_that_needs_more_than_the_limit_is_told_whole():
    assert images_within(GATHER_LIMIT, 300_000, 640, 2) == 1
    assert csa().gathers(None, 32, (256, 256), 2, whole=False) == 660 * MIB


def test_nobody_who_looks_at_nobody_gathers():
    assert csa(rate=0.0).gathers(None, 4, SIZE, 2, whole=False) == 0
    assert csa().gathers(None, 1, SIZE, 2, whole=False) == 0
    assert csa().gathers(story(("Fox",), ("Crow",), ()), 3, SIZE, 2, whole=True) == 0
    assert csa(levels=()).gathers(None, 4, SIZE, 2, whole=False) == 0
    of_a_cast = csa().gathers(story(("Fox",), ("Fox",), ("Crow",), ()), 4, SIZE, 2, whole=False)
    assert of_a_cast == csa().gathers(None, 2, SIZE, 2, whole=False) == 30 * MIB


def test_odd_sizes_are_rounded_up_as_the_unet_rounds_them():
    assert Level(640, 2).tokens((65, 33)) == 17 * 9


# ---- slices ----------------------------------------------------------------------------------------------------------


def groups_of(images, anchors=0, casts=None):
    """Groups of images of a batch, as places and as consecutive rows."""
    subsets = [sample_tokens(1, 2, image, TOKENS, 0.5) for image in range(images)]
    sources = anchor_sources(images, anchors)
    if casts is not None:
        sources = [[j for j in seen if casts[i] == casts[j]] for i, seen in enumerate(sources)]
    return group_images(subsets, sources, TOKENS, torch.device("cpu"))


BATCHES = {"all": (7, 0, None), "anchors": (7, 2, None), "cast": (7, 0, "abacaba"), "alone": (5, 0, "abaca")}


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("images", [1, 2, 100])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_slices_give_the_same_result_and_gather_no_more_than_the_limit(batch, images, dtype):
    tensors, groups, calls, whole = qkv(BATCHES[batch][0], dtype), groups_of(*BATCHES[batch]), [], []
    most = max(TOKENS if group.keys is None else group.keys.shape[1] for group in groups)
    limit = gathered_bytes(images, most, WIDTH, tensors[0].element_size())
    expected = attend_in_groups(*tensors, HEADS, groups, recorded(whole))
    out = attend_in_groups(*tensors, HEADS, groups, recorded(calls), limit)
    assert (out.double() - expected.double()).abs().max() < (1e-12 if dtype == torch.float64 else 0.02)
    assert sum(rows for rows, _ in calls) == BATCHES[batch][0]
    gathered = [(rows, keys) for rows, keys in calls if keys > TOKENS]
    assert gathered and max(rows * keys for rows, keys in gathered) <= images * most
    assert calls == whole if images == 100 else len(calls) > len(whole)


def test_slices_of_a_group_are_all_of_its_rows_in_order():
    for group in [g for batch in BATCHES.values() for g in groups_of(*batch)]:
        rows, k = torch.arange(10)[group.rows], torch.zeros(10, TOKENS, WIDTH)
        parts = group.within(1, k)
        together = torch.cat([torch.arange(10)[part.rows] for part in parts])
        assert torch.equal(rows, together)
        if group.keys is not None:
            assert len(parts) == len(rows) and torch.equal(torch.cat([part.keys for part in parts]), group.keys)


@pytest.mark.parametrize("images", [2, 5, 9])
def test_a_layer_of_a_large_batch_gathers_within_the_limit_and_a_small_one_as_ever(images, monkeypatch):
    calls, tensors = [], qkv(2 * images)
    chunks = tuple(Chunk(range(i * images, (i + 1) * images), Conditioning(None, 77)) for i in range(2))

    def layer():
        inner = Chain({}, lambda q, k, v, heads, mask, options: recorded(calls)(q, k, v, heads), None)
        return csa().attend(*tensors, HEADS, UNetCall(1.0, chunks, None), inner)

    out, (keys,) = layer(), {keys for _, keys in calls}
    before = calls.copy()
    calls.clear()
    monkeypatch.setattr(consistent, "GATHER_LIMIT", gathered_bytes(2, keys, WIDTH, 8))
    assert (layer() - out).abs().max() < 1e-12
    assert sum(rows for rows, _ in calls) == 2 * images and max(rows for rows, _ in calls) == 2
    assert (calls == before) == (images == 2)


class Gathered(TorchDispatchMode):
    """Bytes of what each indexing makes."""

    def __init__(self):
        super().__init__()
        self.bytes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.index.Tensor:
            self.bytes.append(out.untyped_storage().nbytes())
        return out


def test_thirty_two_full_size_images_gather_within_the_limit_and_an_owner_of_the_layer_gets_all_of_them():
    """On the meta device: nothing is computed."""
    images, (level,) = 32, SDXL_OUTPUT[1:]
    tokens = level.tokens(SIZE)
    q, k, v = (torch.empty(images, tokens, level.channels, dtype=torch.float16, device="meta") for _ in range(3))
    call = UNetCall(1.0, (Chunk(range(images), Conditioning(None, 77)),), None)

    def gathered(owner):
        inner = Chain({}, lambda q, k, v, heads, mask, options: torch.empty_like(q), owner)
        with Gathered() as counted:
            csa().attend(q, k, v, 10, call, inner)
        return [number for number in counted.bytes if number > 2 * k[0].numel()]

    each = gathered(None)
    assert len(each) == 2 * images and 2 * max(each) <= GATHER_LIMIT
    assert sum(each) == 5280 * MIB
    owned = gathered(lambda q, k, v, options: torch.empty_like(q))
    assert sum(owned) == 5280 * MIB and len(owned) == 2, "it is called with the whole batch every time"


# ---- told ------------------------------------------------------------------------------------------------------------


def host_model(dtype=torch.float16):
    """What is asked of a host's model: 100 bytes for each latent pixel of each image."""
    inner = SimpleNamespace(
        get_dtype_inference=lambda: dtype, memory_required=lambda shape: 100 * shape[0] * shape[2] * shape[3]
    )
    return SimpleNamespace(model=inner)


def extra_bytes(patches, images=4, conds=None, model_options=None, after=lambda shape: shape):
    """Bytes that the host reckons on top of the batch's own, for one conditioning. after: another node's wrapper."""
    seen = []

    def executor(model, shape, conds, **kwargs):
        seen.append((after(list(shape)), kwargs))
        return "prepared"

    model = host_model()
    given = {"model_options": model_options, "force_full_load": False}
    assert MemoryWrapper(tuple(patches))(executor, model, torch.Size([images, 4, 128, 128]), conds or {}, **given)
    ((shape, kwargs),) = seen
    assert kwargs == given
    return model.model.memory_required(shape) - model.model.memory_required(after([images, 4, 128, 128]))


def just(counted, wanted, images=4):
    """At least so many, and no more than a column of latent pixels above."""
    return wanted <= counted <= wanted + 100 * 128 * images


def test_the_host_reckons_with_what_a_layer_gathers():
    assert just(extra_bytes([csa()]), 100 * MIB)
    assert just(extra_bytes([csa(0.1), csa(), csa(0.2)]), 100 * MIB), (
        "of several nodes the largest, since layers take turns"
    )
    assert just(extra_bytes([csa()], images=16), 3 * 85 * MIB, images=16)
    assert extra_bytes([csa()], images=1) == extra_bytes([csa(rate=0.0)]) == 0


def test_the_host_reckons_with_the_story_s_cast_and_anchors():
    cast = {"positive": [{"storyloom": story(("Fox",), ("Fox",), ("Crow",), ())}], "negative": [{}]}
    assert just(extra_bytes([csa()], conds=cast), 30 * MIB)
    split = {"positive": [{"storyloom": story(*[("Fox",)] * 4, anchors=2)}]}
    assert just(extra_bytes([csa()], conds=split), 40 * MIB)
    assert just(extra_bytes([csa()], conds={"positive": [{"storyloom": story(("Fox",))}]}), 100 * MIB), (
        "another batch's"
    )


def test_where_another_node_owns_self_attention_the_host_reckons_without_a_limit():
    owned = {"transformer_options": {"patches_replace": {"attn1": {("output", 1): print}, "attn2": {}}}}
    assert just(extra_bytes([csa()], images=16, model_options=owned), 1360 * MIB, images=16)
    other = {"transformer_options": {"patches_replace": {"attn2": {("output", 1): print}}}}
    assert extra_bytes([csa()], images=16, model_options=other) == extra_bytes([csa()], images=16)


@pytest.mark.parametrize("cut", ["before", "after"])
def test_a_context_window_is_reckoned_by_its_own_length(cut):
    window = {"context_handler": SimpleNamespace(dim=0, context_length=4)}

    def after(shape):
        return [min(shape[0], 4), *shape[1:]]

    images = {"images": 4} if cut == "before" else {"images": 16, "after": after}
    assert just(extra_bytes([csa()], model_options=window, **images), 100 * MIB)


class Model:
    """The wrappers of a host's model."""

    def __init__(self, wrappers=()):
        self.wrappers = dict(wrappers)

    def clone(self):
        return Model(self.wrappers)

    def get_wrappers(self, kind, key):
        return self.wrappers.get((kind, key), [])

    def remove_wrappers_with_key(self, kind, key):
        self.wrappers.pop((kind, key), None)

    def add_wrapper_with_key(self, kind, key, wrapper):
        self.wrappers[kind, key] = [*self.get_wrappers(kind, key), wrapper]


def test_only_a_patch_by_which_images_look_at_each_other_tells_the_host():
    def prepared(model):
        return model.get_wrappers("prepare_sampling", "storyloom_memory")

    model = Model()
    one = with_patch(model, IdentityPreserving(2.0, 0.0, 1.0, {}), attend)
    first, second = csa(), csa(0.2)
    two = with_patch(with_patch(one, first, attend), second, attend)
    assert prepared(model) == prepared(one) == []
    (wrapper,) = prepared(two)
    assert wrapper.patches == (first, second)
