"""Noise levels of training, and what the UNet has to predict."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

STEPS = 1000
Timesteps = Callable[[int, torch.Generator], Tensor]
"""(count, generator) -> timesteps [count], integers in 0..999."""


def uniform(count: int, generator: torch.Generator) -> Tensor:
    """Timesteps [count] with equal probabilities."""
    return torch.randint(STEPS, (count,), generator=generator)


@dataclass(frozen=True, eq=False)
class Objective:
    """How latents are made noisy, and what the UNet predicts of them.

    signal, noise  [1000] factors of the latents and of the noise at each timestep
    kind           "epsilon" for the noise, "v" for signal * noise - noise level * latents
    noise_offset   noise that is equal in all pixels of a channel, as a factor; StoryMaker's program has 0.05
    timesteps      draws the timesteps
    """

    signal: Tensor
    noise: Tensor
    kind: str = "epsilon"
    noise_offset: float = 0.0
    timesteps: Timesteps = uniform

    def noisy(self, latents: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Noisy latents x_t [B, 4, h, w], timesteps [B] and the target [B, 4, h, w], all on the latents' device.

        The generator is on the CPU, so that each device draws the same.
        """
        t = self.timesteps(len(latents), generator)
        eps = torch.randn(latents.shape, generator=generator)
        if self.noise_offset:
            eps = eps + self.noise_offset * torch.randn(*latents.shape[:2], 1, 1, generator=generator)
        eps = eps.to(latents)
        signal, noise = self._levels(t, latents)
        target = eps if self.kind == "epsilon" else signal * eps - noise * latents
        return signal * latents + noise * eps, t.to(latents.device), target

    def clean(self, noisy: Tensor, t: Tensor, predicted: Tensor) -> Tensor:
        """The clean latents [B, 4, h, w] that a prediction for noisy latents at timesteps t [B] implies."""
        signal, noise = self._levels(t, noisy)
        if self.kind == "epsilon":
            return (noisy - noise * predicted) / signal
        return signal * noisy - noise * predicted

    def _levels(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Signal and noise [B, 1, 1, 1] at timesteps t."""
        signal, noise = (level.to(t.device)[t].view(-1, 1, 1, 1).to(like) for level in (self.signal, self.noise))
        return signal, noise


def sdxl(noise_offset: float = 0.05) -> Objective:
    """SDXL's schedule, which predicts the noise: betas from 0.00085 to 0.012, linear in their square roots."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, STEPS, dtype=torch.float64) ** 2
    signal = torch.cumprod(1 - betas, 0)
    return Objective(signal.sqrt().float(), (1 - signal).sqrt().float(), noise_offset=noise_offset)
