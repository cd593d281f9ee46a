"""The training loop: its schedule, its steps, and a state that is saved and continued."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ...models.demo import model as demo
from .data import BATCH_SIZE, Batch, Vocabulary, make_batch
from .networks import AttributeHeads, NarrowModel, attributes_of
from .optimiser import Muon
from .precision import working_dtype

READ_RATE = RATE = 2e-3
REPETITIONS = ((0.0, 1), (0.8, 3), (0.93, 10))
"""(share of the drawing steps, repetitions of each transformer's block from there on); SDXL's depths are the limit."""
SIMPLE = 0.4
"""Share of the drawing steps with few captions of several frames, which are ambiguous and slow to learn from."""
SAVE_EVERY = 100
LOG_EVERY = 50


def noise_levels(device) -> tuple[Tensor, Tensor]:
    """Signal and noise levels [1000] of SDXL's schedule with zero terminal SNR (arXiv 2305.08891, algorithm 1)."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    signal = torch.cumprod(1 - betas, 0).sqrt()
    signal = (signal - signal[-1]) * signal[0] / (signal[0] - signal[-1])
    return signal.float().to(device), (1 - signal**2).sqrt().float().to(device)


def timesteps(count: int, generator: torch.Generator) -> Tensor:
    """Random timesteps [count], mostly from the noisy half of the schedule, where the text determines the picture."""
    u = torch.rand(count, generator=generator)
    low, middle, high = (
        torch.randint(a, b, (count,), generator=generator) for a, b in ((0, 300), (300, 700), (700, 1000))
    )
    return torch.where(u < 0.2, low, torch.where(u < 0.55, middle, high))


@dataclass(frozen=True)
class Steps:
    """The number of steps of each phase: the text encoders alone (reading), then the whole model (drawing)."""

    reading: int = 500
    drawing: int = 2800

    def repetitions(self, step: int) -> int:
        """Repetitions of each transformer's block at a step of the drawing phase."""
        return next(times for share, times in reversed(REPETITIONS) if step >= int(share * self.drawing))


class Training:
    """A training run. It can be saved and continued after any step of the drawing phase."""

    def __init__(self, seed: int, steps: Steps, stereotypes: bool, device: str):
        torch.manual_seed(seed)
        self.seed, self.steps = seed, steps
        self.stereotypes, self.device = stereotypes, torch.device(device)
        self.vocabulary = Vocabulary()
        self.net = NarrowModel(len(self.vocabulary.tokens) + 1).to(self.device)
        self.signal, self.noise = noise_levels(self.device)
        self.step = 0
        self.averages = {name: p.detach().clone() for name, p in self.net.named_parameters()}
        self.log: list[list[float]] = []
        self._make_optimisers()

    def _make_optimisers(self) -> None:
        """Muon for matrices and kernels; AdamW for vectors, embedding tables, and the first and last convolution."""
        edges = ("embedding", "position", "unet.conv_in", "unet.conv_out")
        matrices, others = [], []
        for name, parameter in self.net.named_parameters():
            inner = parameter.ndim >= 2 and not any(edge in name for edge in edges)
            (matrices if inner else others).append(parameter)
        self.optimisers = (Muon(matrices, RATE), torch.optim.AdamW(others, RATE, (0.9, 0.99), weight_decay=1e-3))

    def read(self, progress: Callable[[float], None]) -> None:
        """Train both text encoders to recognise attributes; calls progress(error) after each step. Saves no state."""
        heads = AttributeHeads().to(self.device)
        learners = [*self.net.l.parameters(), *self.net.g.parameters(), *heads.parameters()]
        optimiser = torch.optim.AdamW(learners, lr=READ_RATE, betas=(0.9, 0.99), weight_decay=1e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, READ_RATE, total_steps=self.steps.reading + 1)
        for step in range(self.steps.reading):
            batch = make_batch(self.vocabulary, (self.seed, 1, step), self.stereotypes, simple=True).to(self.device)
            loss = self._reading_error(heads, batch)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            schedule.step()
            progress(float(loss.detach()))
        self.averages = {name: p.detach().clone() for name, p in self.net.named_parameters()}

    def _reading_error(self, heads: AttributeHeads, batch: Batch) -> Tensor:
        """Mean of the losses for pieces at their last token, one-frame captions at their end, and their pooled text."""
        context, pooled = self.net.encode(batch.rows_l, batch.rows_g, batch.ends)
        positions, labels, whole, whole_labels = [], [], [], []
        for i, (lesson, spans) in enumerate(zip(batch.lessons, batch.spans, strict=True)):
            if lesson.silent or len(lesson.figures) > 1:
                continue
            frames = {part: frame for part, frame in zip(lesson.parts, lesson.frames, strict=True) if part is not None}
            for piece, span in enumerate(spans):
                frame = frames.get(piece)
                positions.append((i, span[-1]))
                labels.append(attributes_of(frame, None if frame else lesson.figures[0]))
            if len(lesson.frames) == 1:
                whole.append(i)
                whole_labels.append(
                    attributes_of(lesson.frames[0] if frames else None, lesson.figures[0] if 0 not in frames else None)
                )
        rows, columns = torch.tensor(positions, device=self.device).T
        whole = torch.tensor(whole, device=self.device)
        ends = batch.ends[whole]
        return (
            heads.loss(heads.of_tokens(context[rows, columns]), labels)
            + heads.loss(heads.of_tokens(context[whole, ends]), whole_labels)
            + heads.loss(heads.of_pooled(pooled[whole]), whole_labels)
        ) / 3

    def advance(self) -> float:
        """Train the whole model for one step; returns the mean squared error of v."""
        repetitions = self.steps.repetitions(self.step)
        self.net.repeat_blocks(repetitions)
        cosine = 0.5 * (1 + math.cos(math.pi * self.step / self.steps.drawing))
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = RATE * min(1.0, (self.step + 1) / 150) * (0.03 + 0.97 * cosine)
        simple = self.step < SIMPLE * self.steps.drawing
        batch = make_batch(self.vocabulary, (self.seed, 2, self.step), self.stereotypes, simple).to(self.device)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.step)
        x0 = demo.to_latents(batch.pictures)
        t = timesteps(x0.shape[0], generator).to(self.device)
        eps = torch.randn(x0.shape, generator=generator).to(self.device)
        a, b = (level[t].view(-1, 1, 1, 1) for level in (self.signal, self.noise))
        context, pooled = self.net.encode(batch.rows_l, batch.rows_g, batch.ends)
        conditional = batch.conditional[:, None]
        context = context * batch.strengths[..., None] * conditional[..., None]
        half = working_dtype(self.device)
        with torch.autocast(self.device.type, dtype=half, enabled=half is not torch.float32):
            predicted = self.net.predict(a * x0 + b * eps, t, context, pooled * conditional)
        loss = (predicted.float() - (a * eps - b * x0)).square().mean()
        self.net.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        for optimiser in self.optimisers:
            optimiser.step()
        decay = min(0.999 if repetitions == 1 else 0.99, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            current = dict(self.net.named_parameters())
            torch._foreach_lerp_(list(self.averages.values()), [current[n] for n in self.averages], 1 - decay)
        self.step += 1
        return float(loss.detach())

    def save(self, path: Path) -> None:
        """Write the state that `load` reads. The file appears complete or not at all."""
        state = {
            "settings": self.settings,
            "step": self.step,
            "net": {name: p.detach() for name, p in self.net.named_parameters()},
            "averages": self.averages,
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
            "log": self.log,
        }
        torch.save(state, path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)

    def load(self, path: Path) -> None:
        """Continue a saved run. Raises SystemExit if it was started with other settings."""
        state = torch.load(path, weights_only=True, map_location=self.device)
        if state["settings"] != self.settings:
            raise SystemExit(
                f"{path} belongs to a run with other settings: {state['settings']}. Remove it or use those settings."
            )
        with torch.no_grad():
            for name, parameter in self.net.named_parameters():
                parameter.copy_(state["net"][name])
        self.averages = {name: value.to(self.device) for name, value in state["averages"].items()}
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        self.step, self.log = state["step"], state["log"]

    @property
    def settings(self) -> dict:
        """What a saved run has to have in common with this one."""
        return {
            "seed": self.seed,
            "steps": asdict(self.steps),
            "stereotypes": self.stereotypes,
            "words": len(self.vocabulary.tokens),
        }

    def averaged(self) -> NarrowModel:
        """A copy of the network with the averaged weights and SDXL's depth."""
        twin = NarrowModel(len(self.vocabulary.tokens) + 1).to(self.device)
        twin.repeat_blocks(REPETITIONS[-1][1])
        with torch.no_grad():
            for name, parameter in twin.named_parameters():
                parameter.copy_(self.averages[name])
        return twin.eval()


def learn(training: Training, saved: Path, pause_after: int | None) -> None:
    """Train to the last step, or to step `pause_after`, with progress bars; saves the state on the way."""
    from tqdm import tqdm

    last = min(training.steps.drawing, pause_after or training.steps.drawing)
    if training.step == 0:
        with tqdm(total=training.steps.reading, desc="reading", unit="step", mininterval=5, ncols=100) as bar:

            def progress(error: float) -> None:
                bar.set_postfix(error=f"{error:.3f}", refresh=False)
                bar.update()

            training.read(progress)
    start, first, errors = time.monotonic(), training.step, []
    with tqdm(
        total=training.steps.drawing, desc="drawing", initial=training.step, unit="step", mininterval=5, ncols=100
    ) as bar:
        while training.step < last:
            errors.append(training.advance())
            bar.update()
            if training.step % LOG_EVERY == 0:
                speed = (training.step - first) * BATCH_SIZE / (time.monotonic() - start)
                training.log.append([training.step, round(sum(errors) / len(errors), 5), round(speed, 1)])
                bar.set_postfix(error=f"{training.log[-1][1]:.4f}", pictures_per_second=f"{speed:.0f}")
                errors = []
            if training.step % SAVE_EVERY == 0 or training.step == last:
                training.save(saved)
