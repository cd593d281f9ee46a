"""Time, memory, waits and operations of a sampling run on a card, or on the CPU.

The sampler's callback marks the end of each step. The first step, which includes one-time work, is not timed; a time is
from one callback to the next, so it includes everything that the sampler does in a step.
"""

from __future__ import annotations

import gc
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils import flop_counter

from .rows import Row

WARM = 1
"""Waits and operations are counted from the callback of this step to the next one."""

WAITS = "called a synchronizing CUDA operation"
"""PyTorch's warning when the processor waits for the card."""


class Clock:
    """Records steps as device events, which are only synchronised in `milliseconds`."""

    def __init__(self, device: torch.device):
        self.device = device
        self.passes: list[list[Any]] = []

    def mark(self, step: int) -> None:
        """Sampler callback after each evaluated step; step 0 starts a new pass."""
        if step == 0:
            self.passes.append([])
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.passes[-1].append(event)
        else:
            self.passes[-1].append(time.perf_counter())

    def milliseconds(self) -> float:
        """Time of one step: the median over the steps of each pass, summed over the passes."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return sum(median(self._between(a, b) for a, b in zip(marks, marks[1:], strict=False)) for marks in self.passes)

    def _between(self, a: Any, b: Any) -> float:
        return a.elapsed_time(b) if self.device.type == "cuda" else (b - a) * 1000


def timed(row: Row, device: torch.device) -> float:
    """Milliseconds of one step of a row."""
    clock = Clock(device)
    row.draw(clock.mark)
    row.forget()
    return clock.milliseconds()


@dataclass(frozen=True)
class Memory:
    """Bytes on the card.

    peak   most bytes allocated during a run
    left   bytes allocated after it minus those before, with everything unloaded that can be
    """

    peak: int
    left: int


def settle(model, device: torch.device) -> int:
    """Unload everything except the UNet from the card. Returns the bytes that remain allocated there."""
    import comfy.model_management as management

    unet = [entry for entry in management.current_loaded_models if entry.model is not None]
    management.free_memory(1e30, device, keep_loaded=[entry for entry in unet if entry.model.model is model.model])
    gc.collect()
    management.cleanup_models()
    management.soft_empty_cache()
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def measure_memory(row: Row, model, device: torch.device) -> tuple[Memory, Tensor]:
    """Memory of a row's second run on a card, and its latents on the CPU.

    Data that the passes of a published form share counts as left: the programs hold it until the next story.
    """
    if device.type != "cuda":
        latents = row.draw()
        row.forget()
        return Memory(0, 0), latents
    before = settle(model, device)
    row.draw()
    row.forget()
    settle(model, device)
    torch.cuda.reset_peak_memory_stats(device)
    latents = row.draw().cpu()
    peak = torch.cuda.max_memory_allocated(device)
    left = settle(model, device) - before
    row.forget()
    return Memory(peak, left), latents


@contextmanager
def _waits(device: torch.device, counts: Counter):
    """Count, by line of code, how often the processor waits for the card."""
    if device.type != "cuda":
        yield
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
            counts.update(_location(warning) for warning in caught if WAITS in str(warning.message))


def _location(warning: warnings.WarningMessage) -> str:
    """File, with its last two folders, and line of a warning."""
    return f"{'/'.join(warning.filename.replace(chr(92), '/').split('/')[-3:])}:{warning.lineno}"


def _attention(q, k, v, *args, out_shape=None, **kwargs) -> int:
    return flop_counter.sdpa_flop_count(q, k, v)


KERNELS = {
    getattr(torch.ops.aten, name): _attention
    for name in ("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_fused_attention_overrideable")
    if hasattr(torch.ops.aten, name)
}
"""Attention kernels whose operations PyTorch's counter does not count."""


@contextmanager
def _operations(counts: Counter):
    """Count floating-point operations by kernel."""
    with flop_counter.FlopCounterMode(display=False, custom_mapping=KERNELS) as counter:
        yield
    counts.update(
        {str(kernel).removeprefix("aten."): n for kernel, n in counter.get_flop_counts().get("Global", {}).items()}
    )


@dataclass(eq=False)
class WarmStep:
    """Enters the contexts made by `counters` between the callbacks of step WARM and the next, in every pass."""

    counters: Sequence[Callable[[], Any]]
    stack: ExitStack = field(default_factory=ExitStack)

    def mark(self, step: int) -> None:
        if step == WARM + 1:
            self.stack.close()
        if step == WARM:
            for counter in self.counters:
                self.stack.enter_context(counter())


def count_warm_step(row: Row, device: torch.device) -> tuple[Counter, Counter]:
    """Waits for the card by line of code, and operations by kernel, of one warm step of all passes."""
    waits, operations = Counter(), Counter()
    step = WarmStep((lambda: _waits(device, waits), lambda: _operations(operations)))
    with step.stack:
        row.draw(step.mark)
    row.forget()
    return waits, operations


def attention_kernels(operations: Counter) -> list[str]:
    """Short names of the fused attention kernels that ran: flash, cudnn, efficient."""
    prefix = "_scaled_dot_product_"
    return sorted(
        name.removeprefix(prefix).partition("_attention")[0] for name in operations if name.startswith(prefix)
    )
