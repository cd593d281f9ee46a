"""The rows of the device table: ways to draw one story with the same weights, ours and the published forms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import published
from .model import Scale, Story, random_character, zero_negative

RATE, SEED, FIRST = 0.5, 0, 1
"""CSA's sampling_rate, seed and first step."""

STEPS, CFG, NOISE_SEED = 4, 5.0, 7

PLAIN, CSA, ANCHORED, IPCA, TOGETHER = "unpatched", "CSA 0.5", "CSA 0.5, 2 anchors", "IPCA 2 + SVR", "all together"
MASKED, BANKED, STORED = "published CSA: dense mask", "published CSA: bank of 2", "published IPCA: stored K and V"

AtStep = Callable[[int], None]
Pass = Callable[[AtStep], Tensor]
"""Samples once, calls back after each evaluated step, and returns the latents."""


@dataclass(frozen=True, eq=False)
class Row:
    """One way to draw the story.

    passes   sampling runs, in order
    frames   number of last passes whose latents together are the story's frames
    forget   clears data that the passes share
    like     name of the row that computes the same in another way
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
    """Samples frames of a story in ComfyUI with the same settings, each with its own noise."""

    story: Story
    noise: Tensor

    @classmethod
    def of(cls, story: Story, scale: Scale) -> Sampling:
        generator = torch.Generator().manual_seed(NOISE_SEED)
        return cls(story, torch.randn(story.frames, 4, scale.side, scale.side, generator=generator))

    def run(self, model, positive: list, images: slice = slice(None)) -> Pass:
        """A pass over some of the frames."""
        import comfy.sample

        noise, negative = self.noise[images], zero_negative(positive)
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
    """The first output of a node of the pack, with defaults for the other inputs."""
    defaults = {declared.id: getattr(declared, "default", None) for declared in kind.define_schema().inputs}
    return kind.execute(**{name: value for name, value in defaults.items() if value is not None} | inputs).args[0]


def rows_of(model, maker, story: Story, scale: Scale) -> list[Row]:
    """All rows; those with patched weights come last. maker: StoryMaker's adapter for the model."""
    from ...nodes.attention import IPCA as IPCANode
    from ...nodes.attention import ConsistentSelfAttention
    from ...nodes.storymaker import ApplyStoryMaker

    sampling, tagged = Sampling.of(story, scale), story.tagged()
    people = {f"character_{number}": random_character(scale, number) for number in (1, 2)}

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
    """CSA over all tokens of all images, with a dense mask."""
    patched, steps = published.with_dense_mask(model, RATE, SEED, FIRST)
    drawn = sampling.run(patched, sampling.story.plain(sampling.story.contexts))
    return Row(MASKED, (drawn,), forget=steps.made.clear, like=CSA)


def banked_row(model, sampling: Sampling, anchors: int = 2) -> Row:
    """CSA in which the first frames write a bank, and each further frame reads it in its own run."""
    bank, story = published.Bank(RATE, SEED, FIRST), sampling.story

    def drawn(patched, images: slice) -> Pass:
        return sampling.run(patched, story.plain(story.contexts[images]), images)

    reader = bank.read_by(model)
    passes = [drawn(bank.written_by(model), slice(anchors))]
    passes += [drawn(reader, slice(frame, frame + 1)) for frame in range(anchors, story.frames)]
    return Row(BANKED, tuple(passes), len(passes), bank.shown.clear, like=ANCHORED)


def stored_row(model, sampling: Sampling) -> Row:
    """IPCA after a pass over the identity prompt, to whose keys and values the frames attend."""
    story = sampling.story
    stored = published.StoredIdentity(range(story.tokens.identity.stop))
    passes = (
        sampling.run(stored.stored_by(model), story.plain(story.identity), slice(1)),
        sampling.run(stored.used_by(model), story.plain(story.contexts)),
    )
    return Row(STORED, passes, forget=stored.kept.clear, like=IPCA)
