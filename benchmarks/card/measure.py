"""Time, memory, waits and operations of a sampling run on a card, or on the CPU where there is none.

Steps are told apart by the sampler's callback. The first step of a run, which also makes what is made once in a run, is
left out; a time is from the callback of one step to that of the next, so it has all that the sampler does in a step.
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
"""The step after whose callback waits and operations are counted, until that of the next."""

WAITS = "called a synchronizing CUDA operation"
"""What PyTorch warns of when the processor waits for the card."""


class Clock:
    """Marks on the device's own time line, which nobody waits for until `steps` is asked."""

    def __init__(self, device: torch.device):
        self.device = device
        self.passes: list[list[Any]] = []

    def mark(self, step: int) -> None:
        """Called when a step has been evaluated; 0 begins another pass."""
        if step == 0:
            self.passes.append([])
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.passes[-1].append(event)
        else:
            self.passes[-1].append(time.perf_counter())

    def milliseconds(self) -> float:
        """Of one step: the median over the steps of each pass, summed over the passes."""
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

    peak   the most that was allocated in a run
    left   what is allocated after it beside what was before, when everything that may go is gone
    """

    peak: int
    left: int


def settle(model, device: torch.device) -> int:
    """Let go of everything but the UNet, which stays on the card. Returns the bytes that are allocated there."""
    import comfy.model_management as management

    unet = [entry for entry in management.current_loaded_models if entry.model is not None]
    management.free_memory(1e30, device, keep_loaded=[entry for entry in unet if entry.model.model is model.model])
    gc.collect()
    management.cleanup_models()
    management.soft_empty_cache()
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def remembered(row: Row, model, device: torch.device) -> tuple[Memory, Tensor]:
    """What a row takes and leaves on a card, in a run after its first, and the latents on the CPU.

    What the published forms keep for each other's passes counts as left: their programs hold it until the next story.
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
def _waits(device: torch.device, found: Counter):
    """Counts, by the line of the program, how often the processor waits for the card."""
    if device.type != "cuda":
        yield
        return
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
            found.update(_place(told) for told in heard if WAITS in str(told.message))


def _place(told: warnings.WarningMessage) -> str:
    """File and line of a warning, from the last two folders on."""
    return f"{'/'.join(told.filename.replace(chr(92), '/').split('/')[-3:])}:{told.lineno}"


def _attention(q, k, v, *args, out_shape=None, **kwargs) -> int:
    return flop_counter.sdpa_flop_count(q, k, v)


KERNELS = {
    getattr(torch.ops.aten, name): _attention
    for name in ("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_fused_attention_overrideable")
    if hasattr(torch.ops.aten, name)
}
"""Kernels of attention whose operations PyTorch's counter does not know."""


@contextmanager
def _operations(found: Counter):
    """Counts floating-point operations by kernel."""
    with flop_counter.FlopCounterMode(display=False, custom_mapping=KERNELS) as counter:
        yield
    found.update(
        {str(kernel).removeprefix("aten."): n for kernel, n in counter.get_flop_counts().get("Global", {}).items()}
    )


@dataclass(eq=False)
class WarmStep:
    """Opens what `counts` make between the callbacks of step WARM and of the next, in every pass."""

    counts: Sequence[Callable[[], Any]]
    opened: ExitStack = field(default_factory=ExitStack)

    def mark(self, step: int) -> None:
        if step == WARM + 1:
            self.opened.close()
        if step == WARM:
            for count in self.counts:
                self.opened.enter_context(count())


def counted(row: Row, device: torch.device) -> tuple[Counter, Counter]:
    """Of one warm step of all passes: waits for the card by place, and floating-point operations by kernel."""
    waits, operations = Counter(), Counter()
    step = WarmStep((lambda: _waits(device, waits), lambda: _operations(operations)))
    with step.opened:
        row.draw(step.mark)
    row.forget()
    return waits, operations


def attention_kernels(operations: Counter) -> list[str]:
    """Short names of the fused kernels of attention that ran: flash, cudnn, efficient."""
    prefix = "_scaled_dot_product_"
    return sorted(
        name.removeprefix(prefix).partition("_attention")[0] for name in operations if name.startswith(prefix)
    )
