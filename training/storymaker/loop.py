"""The training loop: updates of the adapter, and a state that is saved and continued exactly."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .adapter import TrainedAdapter
from .batch import Batch
from .drops import drawn
from .objective import Objective
from .options import PRECISIONS, Options
from .step import Faces, TrainingStep

Batches = Callable[[int, int], Batch]
"""(step, number of the batch in the step) -> batch; always the same for the same numbers."""


class TrainingLoop:
    """A training run of an adapter on a frozen UNet. It can be saved, and continued in another process, after any step.

    A step depends on the weights, the optimisers, the settings and its number alone: `batches` is a function of step
    and batch number, and all random numbers come from (seed, step, batch number).

    optimisers: default AdamW for the whole adapter. Their learning rates are multiplied by `options.factor(step)`.
    faces: for the identity loss. accelerator: an `accelerate.Accelerator`, which then moves the networks, scales and
    averages gradients; process p of P takes the batches p, p + P and so on. settings: what else the result depends on,
    as plain values, for example of the data; a saved state is only continued with equal ones.
    """

    def __init__(
        self,
        adapter: TrainedAdapter,
        unet: nn.Module,
        objective: Objective,
        batches: Batches,
        options: Options,
        controlnet: nn.Module | None = None,
        *,
        optimisers: Sequence[torch.optim.Optimizer] | None = None,
        faces: Faces | None = None,
        accelerator: Any = None,
        settings: Mapping[str, Any] | None = None,
    ):
        self.adapter, self.objective, self.batches, self.options = adapter, objective, batches, options
        self.accelerator = accelerator
        self.model: nn.Module = TrainingStep(adapter, unet, objective, options, controlnet, faces)
        self.optimisers = list(
            optimisers or [torch.optim.AdamW(adapter.parameters(), options.rate, weight_decay=options.weight_decay)]
        )
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group.setdefault("initial_lr", group["lr"])
        if accelerator is not None:
            self.model, *self.optimisers = accelerator.prepare(self.model, *self.optimisers)
        first = next(adapter.parameters())
        self.device, self.dtype = first.device, first.dtype
        half = options.precision == "fp16" and accelerator is None
        self.scaler = (
            torch.amp.GradScaler(self.device.type, enabled=half) if accelerator is None else accelerator.scaler
        )
        self.averages = (
            {name: parameter.detach().clone() for name, parameter in adapter.named_parameters()}
            if options.average
            else {}
        )
        self.step, self.log = 0, []
        self.settings = {**asdict(options), **(settings or {})}

    def advance(self) -> dict[str, float]:
        """Train for one step; returns the mean losses of this process's batches.

        Raises FloatingPointError if a loss is not finite; the step then changes no weights.
        """
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = group["initial_lr"] * self.options.factor(self.step)
        self.adapter.zero_grad(set_to_none=True)
        sums: dict[str, float] = {}
        for micro in range(self.options.accumulation):
            for name, value in self._learn(micro).items():
                sums[name] = sums.get(name, 0.0) + value / self.options.accumulation
        self._update()
        self.step += 1
        self.log.append({"step": self.step, **sums})
        return sums

    def _learn(self, micro: int) -> dict[str, float]:
        """Add the gradients of one batch; returns its losses."""
        accelerator, last = self.accelerator, micro + 1 == self.options.accumulation
        number = micro if accelerator is None else micro * accelerator.num_processes + accelerator.process_index
        batch = self.batches(self.step, number).to(self.device, self.dtype)
        generator = self.options.generator(self.step, number)
        noisy = self.objective.noisy(batch.latents, generator)
        dropped = drawn(self.options.drops, batch.counts, generator)
        with nullcontext() if accelerator is None or last else accelerator.no_sync(self.model):
            with self._autocast():
                losses = self.model(batch, dropped, *noisy)
            values = {name: float(loss.detach()) for name, loss in losses.items()}
            if not torch.isfinite(losses["loss"].detach()):
                raise FloatingPointError(
                    f"The losses of step {self.step + 1} are {values}: continue from the last saved state with a lower "
                    "learning rate, or with bf16 in place of fp16."
                )
            loss = losses["loss"] / self.options.accumulation
            if accelerator is None:
                self.scaler.scale(loss).backward()
            else:
                accelerator.backward(loss)
        return values

    def _autocast(self):
        if self.accelerator is not None:
            return self.accelerator.autocast()
        dtype = PRECISIONS[self.options.precision]
        return torch.autocast(self.device.type, dtype=dtype) if dtype else nullcontext()

    def _update(self) -> None:
        """Change the weights by the gradients, and the moving averages by the weights."""
        clip, parameters = self.options.clip, list(self.adapter.parameters())
        if self.accelerator is not None:
            if clip is not None:
                self.accelerator.clip_grad_norm_(parameters, clip)
            for optimiser in self.optimisers:
                optimiser.step()
        else:
            if clip is not None:
                for optimiser in self.optimisers:
                    self.scaler.unscale_(optimiser)
                nn.utils.clip_grad_norm_(parameters, clip)
            for optimiser in self.optimisers:
                self.scaler.step(optimiser)
            self.scaler.update()
        if self.averages:
            decay = min(self.options.average, (1 + self.step) / (10 + self.step))
            current = [parameter.detach() for parameter in parameters]
            torch._foreach_lerp_(list(self.averages.values()), current, 1 - decay)

    def state(self, dtype: torch.dtype | None = None) -> dict[str, dict[str, Tensor]]:
        """StoryMaker's file from the moving averages, or from the weights if there are none."""
        return self.adapter.state(dtype, self.averages or None)

    def save(self, path: Path) -> None:
        """Write the state that `load` reads. The file appears complete or not at all; only the main process writes."""
        if self.accelerator is not None and not self.accelerator.is_main_process:
            return
        state = {
            "settings": self.settings,
            "step": self.step,
            "log": self.log,
            "adapter": {name: parameter.detach() for name, parameter in self.adapter.named_parameters()},
            "averages": self.averages,
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
        }
        unfinished = path.with_name(f"{path.name}.tmp")  # always the same name, so that kills leave at most one behind
        with unfinished.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)

    def load(self, path: Path) -> None:
        """Continue a saved run. Raises ValueError, which names them, if settings differ from the saved ones."""
        state = torch.load(path, weights_only=True, map_location="cpu")
        saved = state["settings"]
        different = [
            f"{name} was {saved.get(name)!r} and is {self.settings.get(name)!r}"
            for name in sorted({*saved, *self.settings})
            if saved.get(name) != self.settings.get(name)
        ]
        if different:
            raise ValueError(
                f'"{path}" belongs to a run with other settings: {"; ".join(different)}. Use those, or another folder.'
            )
        with torch.no_grad():
            for name, parameter in self.adapter.named_parameters():
                parameter.copy_(state["adapter"][name])
            for name, average in self.averages.items():
                average.copy_(state["averages"][name])
        for optimiser, values in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(values)
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])
        self.step, self.log = state["step"], state["log"]
