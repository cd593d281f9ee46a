"""What is made before a run: by whom, in which order, and in which form a layer then gets it."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from storyloom.attention.storymaker import ImageConditioning, RowCharacters
from storyloom.runtime.cache import RunCache
from storyloom.runtime.call import UNetCall
from storyloom.runtime.precompute import RunConditioning, precompute

CPU = torch.device("cpu")
LAYERS = {("input", 4, 0): 8, ("input", 4, 1): 8, ("middle", 0, 0): 16}


class Pictures:
    """An adapter whose tokens are the numbers of its characters; `said` has what happened, in order."""

    widths = LAYERS

    def __init__(self):
        self.events = []

    @contextmanager
    def resident(self):
        self.events.append("here")
        try:
            yield CPU
        finally:
            self.events.append("gone")

    def tokens(self, characters, face_strength, appearance_strength, device):
        self.events.append(tuple(each.number for each in characters))
        tokens = torch.full((1, 20 * (1 + len(characters)), 4), float(sum(each.number for each in characters)))
        return tokens, 0 * tokens

    def keys_values(self, layer, tokens):
        return tokens[..., :1].expand(-1, -1, LAYERS[layer]), -tokens[..., :1].expand(-1, -1, LAYERS[layer])


def people(*names):
    return tuple(SimpleNamespace(name=name, number=number) for number, name in enumerate(names, start=1))


def patch(adapter, characters, blocks=None, resident=True):
    blocks = {("input", 4): None, ("middle", 0): None} if blocks is None else blocks
    regions = (None,) * len(characters)
    known = adapter.resident if resident else None
    return ImageConditioning(adapter, characters, regions, 0.8, 1.0, 1.0, 0.0, 1.0, blocks, known)


def story(*frames):
    cast = tuple(dict.fromkeys(name for frame in frames for name in frame))
    rows = tuple(SimpleNamespace(frame=number, characters=frame) for number, frame in enumerate(frames))
    return SimpleNamespace(cast=cast, rows=rows)


def test_every_cast_of_a_story_is_made_for_what_is_asked_of_it():
    adapter = Pictures()
    tag = story(("fox",), ("bear", "fox"), (), ("fox",))
    wanted = patch(adapter, people("fox", "bear"))
    kept = precompute([wanted], [RunConditioning(tag, True), RunConditioning(tag, False)], None)
    assert adapter.events == ["here", (1,), (1, 2), "gone"]
    assert set(kept) == {
        (wanted, layer, who, positive) for layer in LAYERS for who in ((0,), (0, 1)) for positive in (True, False)
    }
    k, v = kept[wanted, ("middle", 0, 0), (0, 1), True]
    assert k.shape == v.shape == (1, 60, 16) and (k == 3).all() and (v == -3).all()
    assert not kept[wanted, ("middle", 0, 0), (0, 1), False][0].any()


def test_without_a_story_everybody_is_seen_together():
    wanted = patch(Pictures(), people("fox", "bear"))
    assert {who for _, _, who, _ in precompute([wanted], [RunConditioning(None, True)], None)} == {(0, 1)}


@pytest.mark.parametrize("blocks, layers", [({("input", 4): (1,)}, {("input", 4, 1)}), ({("output", 0): None}, set())])
def test_only_the_layers_of_the_chosen_blocks_are_made(blocks, layers):
    kept = precompute([patch(Pictures(), people(""), blocks)], [RunConditioning(None, True)], None)
    assert {layer for _, layer, *_ in kept} == layers


def test_they_are_kept_in_the_precision_that_is_asked_for():
    kept = precompute([patch(Pictures(), people(""))], [RunConditioning(None, True)], torch.float16)
    assert {part.dtype for pair in kept.values() for part in pair} == {torch.float16}


def test_networks_that_are_shared_are_loaded_once_and_others_after_each_other():
    one, other = Pictures(), Pictures()
    other.events = one.events
    patches = [patch(one, people("")), patch(other, people("")), patch(one, people("", "")), object()]
    precompute(patches, [RunConditioning(None, True)], None)
    assert one.events == ["here", (1,), (1, 2), "gone", "here", (1,), "gone"]


def test_networks_that_nobody_moves_are_not_asked_before_a_run():
    adapter = Pictures()
    assert precompute([patch(adapter, people(""), resident=False)], [RunConditioning(None, True)], None) == {}
    assert adapter.events == []


def test_networks_go_also_after_an_error():
    adapter = Pictures()
    adapter.keys_values = None
    with pytest.raises(TypeError):
        precompute([patch(adapter, people(""))], [RunConditioning(None, True)], None)
    assert adapter.events[-1] == "gone"


def test_every_device_of_a_run_has_its_own_copy():
    wanted = patch(Pictures(), people(""))
    kept = RunCache(precompute([wanted], [RunConditioning(None, True)], torch.float32))
    view = UNetCall(1.0, (), None, cache=kept)
    group = SimpleNamespace(shown=(RowCharacters((0,), (0,), True, None),))
    for device in (CPU, torch.device("meta"), CPU):
        q = torch.ones(1, 4, 16, device=device, dtype=torch.float16)
        for part in wanted._keys_values(("middle", 0, 0), group, q, view):
            assert part.device == device and part.dtype == torch.float16
