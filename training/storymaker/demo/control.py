"""Trains the pose ControlNet of the narrow model, which StoryMaker's training then uses frozen."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import nn

from ...demo.networks import MatmulAttention, NarrowModel
from ..losses import diffusion_loss
from ..objective import Objective
from .lessons import World
from .networks import PoseControl

RATE = 1e-3


class ControlTraining:
    """A training run of `PoseControl` on a frozen model without an adapter. It continues after any step."""

    def __init__(self, net: NarrowModel, objective: Objective, world: World, steps: int):
        torch.manual_seed(world.seed)
        net.unet.set_attn_processor(MatmulAttention())
        self.net, self.objective, self.world, self.steps = net, objective, world, steps
        self.control = PoseControl(net.unet)
        self.optimiser = torch.optim.AdamW(self.control.parameters(), RATE, (0.9, 0.99), weight_decay=1e-3)
        self.step = 0

    def advance(self) -> float:
        """Train for one step; returns the loss."""
        for group in self.optimiser.param_groups:
            group["lr"] = RATE * min(1.0, (self.step + 1) / 30) * max(0.02, 1 - self.step / self.steps)
        batch = self.world(self.step, 0)
        noisy, t, target = self.objective.noisy(batch.latents, self._generator())
        added = {"text_embeds": batch.pooled, "time_ids": batch.time_ids}
        down, middle = self.control(noisy, t, batch.context, batch.pose, added)
        predicted = self.net.unet(
            noisy,
            t,
            batch.context,
            added_cond_kwargs=added,
            down_block_additional_residuals=down,
            mid_block_additional_residual=middle,
        ).sample
        loss = diffusion_loss(predicted, target, batch.masks)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.control.parameters(), 1.0)
        self.optimiser.step()
        self.step += 1
        return float(loss.detach())

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.world.seed * 1_000_003 + self.step)

    def save(self, path: Path) -> None:
        """Write the state that `load` reads. The file appears complete or not at all."""
        state = {
            "settings": self.settings,
            "step": self.step,
            "control": self.control.state_dict(),
            "optimiser": self.optimiser.state_dict(),
        }
        torch.save(state, path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)

    def load(self, path: Path) -> None:
        """Continue a saved run. Raises ValueError if it was started with other settings."""
        state = torch.load(path, weights_only=True)
        if state["settings"] != self.settings:
            raise ValueError(f'"{path}" belongs to a run with other settings: {state["settings"]}. Remove it.')
        self.control.load_state_dict(state["control"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.step = state["step"]

    @property
    def settings(self) -> dict[str, int]:
        """What a saved run has to have in common with this one."""
        return {"seed": self.world.seed, "steps": self.steps, "size": self.world.size}
