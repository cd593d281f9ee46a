"""Settings of a training run, its learning rate, and the random numbers of each step."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch

from .drops import Drops

PRECISIONS = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
SCHEDULES = ("constant", "cosine", "stages")


@dataclass(frozen=True)
class Options:
    """Settings on which the result of a training run depends. The defaults are the paper's (arXiv 2409.12576).

    seed          of everything random
    steps         number of steps, which are updates of the weights
    accumulation  batches per step and process, whose gradients are averaged
    rate          learning rate of AdamW, if the caller brings no optimisers
    schedule      "constant", "cosine" (to 0), or "stages": half the rate in the second half of the steps, as the paper
    warmup        steps in which the rate rises from 0
    weight_decay  of AdamW
    clip          largest norm of the gradient; None for no limit
    precision     of autocast: "float32" (none), "bf16", or "fp16" with a scaled loss
    average       decay of the weights' moving average, which starts fast; 0 keeps none
    drops         what training leaves out
    attention     weight of the attention loss; 0 switches it off
    per_layer     the attention loss of the paper, otherwise that of the published program
    foreground    extra weight of the characters in the diffusion loss; the published program has 5
    identity      weight of the identity loss, if the loop has a face network; the published program has 0.1
    pose_reads_images  the ControlNet gets the image tokens in place of the text, as in the published program
    """

    seed: int = 0
    steps: int = 8000
    accumulation: int = 1
    rate: float = 1e-4
    schedule: str = "stages"
    warmup: int = 0
    weight_decay: float = 0.01
    clip: float | None = None
    precision: str = "float32"
    average: float = 0.0
    drops: Drops = field(default_factory=Drops)
    attention: float = 0.1
    per_layer: bool = True
    foreground: float = 0.0
    identity: float = 0.0
    pose_reads_images: bool = False

    def __post_init__(self):
        if self.precision not in PRECISIONS or self.schedule not in SCHEDULES:
            raise ValueError(
                f"precision is one of {', '.join(PRECISIONS)}, and schedule one of {', '.join(SCHEDULES)}; got "
                f"{self.precision!r} and {self.schedule!r}."
            )

    def factor(self, step: int) -> float:
        """Factor of the learning rate at a step, counted from 0."""
        rising = min(1.0, (step + 1) / (self.warmup + 1))
        if self.schedule == "cosine":
            return rising * 0.5 * (1 + math.cos(math.pi * min(1.0, step / self.steps)))
        return rising * (0.5 if self.schedule == "stages" and step >= self.steps / 2 else 1.0)

    def generator(self, step: int, micro: int) -> torch.Generator:
        """Random numbers of one batch of a step, on the CPU; a function of the seed and of these two alone."""
        state = np.random.SeedSequence([self.seed, step, micro]).generate_state(1, np.uint64)
        return torch.Generator().manual_seed(int(state[0]))
