"""The rows of the device table: ways to draw one story on the same weights, ours and the published ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import published
from .model import Scale, Story, nothing, someone

RATE, SEED, FIRST = 0.5, 0, 1
"""CSA's sampling_rate and seed, and the step with which it begins."""

STEPS, CFG, NOISE_SEED = 4, 5.0, 7

PLAIN, CSA, ANCHORED, IPCA, TOGETHER = "unpatched", "CSA 0.5", "CSA 0.5, 2 anchors", "IPCA 2 + SVR", "all together"
MASKED, BANKED, STORED = "published CSA: dense mask", "published CSA: bank of 2", "published IPCA: stored K and V"

AtStep = Callable[[int], None]
Pass = Callable[[AtStep], Tensor]
"""Samples once, calls back when a step has been evaluated, and returns the latents."""


@dataclass(frozen=True, eq=False)
class Row:
    """One way to draw the story.

    passes   sampling runs, one after the other
    frames   of the last passes' latents, all of the story's: how many passes they come from
    forget   drops what the passes keep for each other
    like     the row that computes the same in another way
    """

    name: str
    passes: tuple[Pass, ...]
    frames: int = 1
    forget: Callable[[], None] = lambda: None
    like: str = ""

    def draw(self, at_step: AtStep = lambda step: None) -> Tensor:
        """The latents of all frames, after all passes."""
        return torch.cat([sample(at_step) for sample in self.passes][-self.frames :])


@dataclass(frozen=True, eq=False)
class Sampling:
    """ComfyUI's sampling of a story's frames, all with the same settings and each with its own noise."""

    story: Story
    noise: Tensor

    @classmethod
    def of(cls, story: Story, scale: Scale) -> Sampling:
        generator = torch.Generator().manual_seed(NOISE_SEED)
        return cls(story, torch.randn(story.frames, 4, scale.side, scale.side, generator=generator))

    def run(self, model, positive: list, images: slice = slice(None)) -> Pass:
        """A pass over some of the frames."""
        import comfy.sample

        noise, negative = self.noise[images], nothing(positive)
        latents = torch.zeros_like(noise)

        def sample(at_step: AtStep) -> Tensor:
            return comfy.sample.sample(
                model,
                noise,
                STEPS,
                CFG,
                "euler",
                "normal",
                positive,
                negative,
                latents,
                disable_pbar=True,
                seed=NOISE_SEED,
                callback=lambda step, *_: at_step(step),
            )

        return sample


def node(kind: type, **inputs) -> Any:
    """The first output of a node of the pack, with its defaults in the other inputs."""
    defaults = {given.id: getattr(given, "default", None) for given in kind.define_schema().inputs}
    return kind.execute(**{name: value for name, value in defaults.items() if value is not None} | inputs).args[0]


def rows_of(model, maker, story: Story, scale: Scale) -> list[Row]:
    """All rows, those with changed weights side by side at the end. maker: StoryMaker's adapter for the model."""
    from ...nodes.attention import IPCA as IPCANode
    from ...nodes.attention import ConsistentSelfAttention
    from ...nodes.storymaker import ApplyStoryMaker

    sampling, tagged = Sampling.of(story, scale), story.tagged()
    people = {f"character_{number}": someone(scale, number) for number in (1, 2)}

    def ipca(model, weight: float = 2.0):
        return node(IPCANode, model=model, identity_weight=weight)

    def csa(model, anchors: int = 0):
        settings = {"sampling_rate": RATE, "seed": SEED, "skip_first_steps": FIRST, "anchors": anchors}
        return node(ConsistentSelfAttention, model=model, **settings)

    pictured = node(ApplyStoryMaker, model=model, storymaker=maker, **people)

    def row(name: str, patched) -> Row:
        return Row(name, (sampling.run(patched, tagged),))

    return [
        row(PLAIN, model),
        row(IPCA, ipca(model)),
        row("IPCA 1.5", ipca(model, 1.5)),
        row(CSA, csa(model)),
        row(ANCHORED, csa(model, anchors=2)),
        masked_row(model, sampling),
        banked_row(model, sampling),
        stored_row(model, sampling),
        row("StoryMaker, 2 characters", pictured),
        row(TOGETHER, csa(ipca(pictured))),
    ]


def masked_row(model, sampling: Sampling) -> Row:
    """CSA over all tokens of all images."""
    patched, steps = published.with_dense_mask(model, RATE, SEED, FIRST)
    drawn = sampling.run(patched, sampling.story.plain(sampling.story.contexts))
    return Row(MASKED, (drawn,), forget=steps.made.clear, like=CSA)


def banked_row(model, sampling: Sampling, anchors: int = 2) -> Row:
    """CSA in which the first frames write a bank and every further frame reads it in a run of its own."""
    bank, story = published.Bank(RATE, SEED, FIRST), sampling.story

    def drawn(patched, images: slice) -> Pass:
        return sampling.run(patched, story.plain(story.contexts[images]), images)

    reader = bank.read_by(model)
    passes = [drawn(bank.written_by(model), slice(anchors))]
    passes += [drawn(reader, slice(frame, frame + 1)) for frame in range(anchors, story.frames)]
    return Row(BANKED, tuple(passes), len(passes), bank.shown.clear, like=ANCHORED)


def stored_row(model, sampling: Sampling) -> Row:
    """IPCA with a pass over the identity prompt first, whose keys and values the frames look at."""
    story = sampling.story
    stored = published.StoredIdentity(range(story.tokens.identity.stop))
    passes = (
        sampling.run(stored.stored_by(model), story.plain(story.identity), slice(1)),
        sampling.run(stored.used_by(model), story.plain(story.contexts)),
    )
    return Row(STORED, passes, forget=stored.kept.clear, like=IPCA)
