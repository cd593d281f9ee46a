"""A warm UNet call makes no card wait: nothing is copied to it, nothing is asked of it."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from storyloom.attention.consistent import ConsistentAttention
from storyloom.attention.identity import IdentityPreserving
from storyloom.attention.storymaker import ImageConditioning
from storyloom.prompts.conditioning import StoryCond, StoryRow
from storyloom.prompts.tokens import StoryTokens
from storyloom.runtime.patch import ScheduledPatch
from storyloom.runtime.run import StoryRun
from storyloom.tests.waits import PackWaits, Waits

HEADS, WIDTH, TOKENS = 2, 8, 4
SIZE = (8, 12)
GRIDS = ((4, 6), (2, 3))
"""Latents of a picture, and its tokens in the two levels of layers."""
HERE = Path(__file__).parent
CARD = torch.device("meta")
BLOCKS = {("output", 0): None, ("output", 1): None}


def story(*frames):
    """Frames of these characters, whose identities have as many tokens as their names have letters."""
    rows = []
    for number, characters in enumerate(frames):
        identity = range(1, 1 + sum(map(len, characters)))
        tokens = StoryTokens(identity, (range(identity.stop, identity.stop + 3),), identity.stop + 3, 77)
        rows.append(StoryRow(number, characters, tokens, (identity,) if characters else ()))
    cast = tuple(dict.fromkeys(name for frame in frames for name in frame))
    return StoryCond(tuple(rows), 77, cast)


FOX, BEAR, BOTH, NOBODY = ("Fox",), ("Bear",), ("Fox", "Bear"), ()
IN_TURN, TOGETHER = story(FOX, BEAR, FOX, BEAR), story(FOX, BOTH, NOBODY, BOTH)


class Pictures:
    """An adapter."""

    def tokens(self, characters, face_strength, appearance_strength, device):
        return tuple(torch.ones(1, TOKENS * (1 + len(characters)), WIDTH, device=device) for _ in range(2))

    def keys_values(self, layer, tokens):
        return tokens, 2 * tokens


def ipca(weight):
    return IdentityPreserving(weight, 0.0, 1.0, BLOCKS)


def csa(anchors=0, schedule="steady"):
    return ConsistentAttention(0.5, anchors, 0, 0.0, 1.0, BLOCKS, 4, schedule)


def storymaker():
    people = tuple(SimpleNamespace(name=name) for name in ("Fox", "Bear"))
    return ImageConditioning(Pictures(), people, (None, torch.rand(1, 16, 24)), 0.8, 1.0, 1.0, 0.0, 1.0, BLOCKS)


PATCHES = {
    "IPCA 2": lambda: [ipca(2.0)],
    "IPCA 1.5": lambda: [ipca(1.5)],
    "IPCA as a mask": lambda: [ipca(1.5625)],
    "CSA": lambda: [csa()],
    "CSA with anchors": lambda: [csa(anchors=2)],
    "CSA by the published schedule": lambda: [csa(schedule="published")],
    "StoryMaker": lambda: [storymaker()],
    "all": lambda: [ipca(1.5), csa(), storymaker()],
}


def attend(q, k, v, heads, mask=None, options=None):
    """What a kernel makes; that it waits for nothing is its own affair."""
    return torch.empty_like(q)


def somebody(q, k, v, options):
    return attend(q, k, v, options["n_heads"])


class Host:
    """Samples with some patches as ComfyUI does; keeps what each UNet call waited for, and each evaluation in all.

    split: negative and story in a call each; owner: another node's attention in every layer.
    """

    def __init__(self, patches, tag, device=CARD, split=False, owner=None):
        self.run = StoryRun(tuple(ScheduledPatch(patch, 10.0, 0.0) for patch in patches), attend, (3.0, 2.0, 1.0), tag)
        self.tag, self.device, self.owner = tag, device, owner
        self.orders = ([1], [0]) if split else ([1, 0],)
        self.calls, self.evaluations = [], []

    def sample(self, waits):
        for sigma in self.run.sigmas:
            context = {"c_crossattn": SimpleNamespace(cond=torch.zeros(1, 77, WIDTH, device=self.device))}
            positive = {"uuid": "s", "storyloom": self.tag, "storyloom_role": "positive", "model_conds": context}
            conds = [[positive], [{"uuid": "n", "storyloom_role": "negative", "model_conds": context}]]
            x = torch.zeros(len(self.tag.rows), 4, *SIZE, device=self.device)
            timestep = torch.tensor([sigma])
            with waits() as seen:
                self.run.evaluate(self.evaluated(waits), None, conds, x, timestep, self.options())
            self.evaluations.append(seen.recorded)

    def options(self):
        replacements = {} if self.owner is None else {slot: dict.fromkeys(BLOCKS, self.owner) for slot in SLOTS}
        return {"transformer_options": {"patches_replace": replacements}}

    def evaluated(self, waits):
        def executor(model, conds, x, timestep, model_options):
            for order in self.orders:
                options = {"cond_or_uncond": order, "uuids": ["sn"[number] for number in order]}
                options |= model_options["transformer_options"]
                with waits() as seen:
                    self.run.call_unet(unet, x.repeat(len(order), 1, 1, 1), None, transformer_options=options)
                self.calls.append(seen.recorded)

        return executor


SLOTS = ("attn1", "attn2")


def unet(x, t, c_concat, context, control, options):
    """Two layers in each of two blocks, a block of one level."""
    for number, grid in enumerate(GRIDS):
        for index in range(2):
            layer_options = {"n_heads": HEADS, "block": ("output", number), "block_index": index}
            layer_options["activations_shape"] = [len(x), WIDTH, *grid]
            sizes = {"attn1": math.prod(grid), "attn2": 77}
            for slot, keys in sizes.items():
                layer = options["patches_replace"].get(slot, {}).get(("output", number))
                q, k, v = (torch.ones(len(x), n, WIDTH, device=x.device) for n in (math.prod(grid), keys, keys))
                if layer is not None:
                    assert layer(q, k, v, layer_options).shape == q.shape


def check_warm_calls(host, waits):
    host.sample(waits)
    calls = len(host.orders)
    assert len(host.calls) == 3 * calls and host.calls[calls:] == [[]] * (2 * calls)


@pytest.mark.parametrize("owner", [None, somebody])
@pytest.mark.parametrize("tag", [IN_TURN, TOGETHER], ids=["in turn", "together"])
@pytest.mark.parametrize("name", PATCHES)
def test_a_warm_call_of_the_unet_copies_nothing_to_the_card(name, tag, owner):
    check_warm_calls(Host(PATCHES[name](), tag, owner=owner), lambda: Waits("meta"))


def test_calls_for_one_conditioning_each_are_warm_as_well():
    check_warm_calls(Host(PATCHES["all"](), IN_TURN, split=True), lambda: Waits("meta"))


@pytest.mark.parametrize("owner", [None, somebody])
@pytest.mark.parametrize("tag", [IN_TURN, TOGETHER], ids=["in turn", "together"])
@pytest.mark.parametrize("name", [name for name in PATCHES if "published" not in name])
def test_a_warm_call_makes_no_index_of_numbers_and_asks_for_none(name, tag, owner):
    """The published schedule of CSA reads a number of the CPU's in every layer, for which no card waits."""
    check_warm_calls(Host(PATCHES[name](), tag, owner=owner), PackWaits)


@pytest.mark.parametrize("tag", [IN_TURN, TOGETHER], ids=["in turn", "together"])
@pytest.mark.parametrize("schedule", ["steady", "published"])
def test_tokens_are_copied_once_for_a_step_and_a_level_and_before_the_unet_where_the_level_is_known(schedule, tag):
    host = Host([csa(schedule=schedule)], tag)
    host.sample(lambda: Waits("meta"))
    assert [len(waits) for waits in host.calls] == [len(GRIDS), 0, 0]
    assert [len(waits) for waits in host.evaluations] == [len(GRIDS)] * 3


def set_by_numbers(q):
    q[[0, 2]] = 1.0


@pytest.mark.parametrize(
    "wait",
    [
        lambda q: q[[0, 2]],
        set_by_numbers,
        lambda q: q[torch.tensor([0, 2])],
        lambda q: q[:, torch.arange(4) > 1],
        lambda q: q.index_select(0, torch.arange(2)),
        lambda q: q + torch.ones(3, 4).to(q),
        lambda q: q.copy_(torch.ones(3, 4)),
        lambda q: torch.tensor([1.0], device=q.device),
        lambda q: torch.as_tensor([0, 1], device=q.device),
    ],
)
def test_what_would_wait_is_seen(wait):
    with Waits("meta") as seen, PackWaits(HERE) as pack_waits:
        wait(torch.ones(3, 4, device=CARD))
    assert seen.recorded or pack_waits.recorded


@pytest.mark.parametrize("read", [lambda q: q.sum().item(), lambda q: bool((q > 0).all()), lambda q: q.nonzero()])
def test_what_asks_the_card_is_seen(read):
    with Waits("cpu") as seen, PackWaits(HERE) as pack_waits:
        read(torch.ones(3, 4, device=torch.device("cpu")))
    assert seen.recorded and pack_waits.recorded


def test_what_a_card_does_alone_is_no_wait():
    with Waits("meta") as seen, PackWaits(HERE) as pack_waits:
        q, rows = torch.ones(3, 4, device=CARD), torch.arange(2, device=CARD)
        q[rows] = 2 * q[rows] + 1.0
        q[:, 1:3].fill_(math.log(2))
        torch.cat([q, q[rows]]).log().to(torch.float16)
    assert seen.recorded == pack_waits.recorded == []
