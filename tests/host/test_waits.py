"""No card waits inside a warm UNet call of a real run: nothing of the pack's makes a tensor of the CPU or reads one."""

from collections import Counter

import pytest
import torch
from story_graphs import build, call, csa, freeu, ipca, sample
from story_makers import apply, someone

from storyloom.tests.waits import PackWaits, Waits

SIZE = (64, 64)
IN_TURN = {
    "identity": "[Fox] a red fox\n[Owl] a grey owl in a hat",
    "frames": "[Fox] asleep\n[Owl] reading\n[Fox] at sea\n[Owl] in the snow",
}
TOGETHER = IN_TURN | {"frames": "[Fox] asleep\n[NC] an empty beach\n[Fox] and [Owl] arguing\n[Owl] in the snow"}


def storymaker(graph, host, maker, model):
    """Two characters, each with its region."""
    left = torch.tensor([1.0, 0.0]).expand(1, 2, 2)
    people = someone(host, 1, "Fox"), someone(host, 2, "Owl")
    return apply(graph, host, model, maker, *people, regions=[left, 1 - left], lora_strength=0.0)


def everything(graph, host, maker, model):
    model = ipca(graph, storymaker(graph, host, maker, csa(graph, model)), identity_weight=1.5)
    return freeu(graph, model)


PATCHES = {
    "IPCA 2": lambda graph, host, maker, model: ipca(graph, model),
    "IPCA as a mask": lambda graph, host, maker, model: ipca(graph, model, identity_weight=1.0625),
    "CSA": lambda graph, host, maker, model: csa(graph, model, anchors=2),
    "StoryMaker": storymaker,
    "all": everything,
}


def watched(graph, host, model, seen):
    """The model, with what every UNet call waited for in the list `seen`: operations, and the pack's own code.

    None for the first call, in which a run makes what it keeps.
    """

    def watch(patcher):
        patcher = patcher.clone()

        def apply_model(executor, *args, **kwargs):
            if not seen:
                seen.append(None)
                return executor(*args, **kwargs)
            with Waits("cpu") as waits, PackWaits() as pack_waits:
                out = executor(*args, **kwargs)
            seen.append((Counter(waits.recorded), pack_waits.recorded))
            return out

        patcher.add_wrapper_with_key("apply_model", "test", apply_model)
        return patcher

    return call(graph, host, watch, model)


@pytest.mark.parametrize(
    "name, cast",
    [(name, IN_TURN) for name in ("IPCA 2", "IPCA as a mask", "CSA", "all")]
    + [(name, TOGETHER) for name in ("StoryMaker", "all")],
)
def test_a_warm_call_of_the_unet_waits_for_nothing_more_than_without_the_patches(host, graph, maker, name, cast):
    parts = build(graph, "EncodePerFrame", size=SIZE, **cast)
    plain, ours = [], []
    sample(graph, parts, "plain", model=watched(graph, host, parts["model"], plain))
    model = PATCHES[name](graph, host, maker, parts["model"])
    sample(graph, parts, "ours", steps=3, model=watched(graph, host, model, ours))
    drawn = host.run(graph)
    assert drawn.plain["samples"].shape == drawn.ours["samples"].shape
    _, (usual, _) = plain
    assert len(ours) == 3 and [own for _, own in ours[1:]] == [[], []]
    assert all(not waits - usual for waits, _ in ours[1:])
