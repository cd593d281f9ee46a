"""The run of the device benchmark: every row measured once, then all of them timed in turns until the time is over."""

from __future__ import annotations

import gc
import platform
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import measure, table
from .model import Scale, random_story, sdxl, storymaker
from .rows import CFG, PLAIN, STEPS, Row, rows_of


def about(device: torch.device, version: str, scale: Scale, frames: int) -> dict[str, Any]:
    """What the numbers belong to."""
    from comfy.ldm.modules import attention

    known = {
        "device": platform.processor() or platform.machine(),
        "ComfyUI": version,
        "PyTorch": torch.__version__,
        "attention of ComfyUI": attention.optimized_attention.__name__,
        "pictures": f"{frames} frames of {8 * scale.side} x {8 * scale.side}, guidance {CFG:g}, {STEPS} steps of euler",
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        known["device"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
        known["driver"] = _driver()
        known["CUDA, cuDNN"] = f"{torch.version.cuda}, {torch.backends.cudnn.version()}"
    return known


def _driver() -> str:
    """The driver's version, or why it is unknown."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.SubprocessError) as problem:
        return f"unknown ({type(problem).__name__})"


class Run:
    """What is measured, and where it is written after every row."""

    def __init__(self, path: Path, known: dict[str, Any], device: torch.device, scale: Scale, frames: int):
        self.path, self.about, self.device, self.scale, self.frames = path, known, device, scale, frames
        self.dtypes: dict[str, table.Rows] = {}
        self.began = time.monotonic()

    @property
    def failed(self) -> bool:
        return any(row.error or row.finite is False for rows in self.dtypes.values() for row in rows.values())

    def write(self, complete: bool = False) -> None:
        table.write(self.path, self.about, self.dtypes, complete)

    def page(self) -> str:
        return table.as_markdown(self.about, self.dtypes, True)

    def measure(self, dtype: torch.dtype, end: float, rounds: int) -> None:
        """All rows in one dtype: once each, then in turns until `end` on the monotonic clock, one round at least."""
        self._measure(dtype, end, rounds)
        gc.collect()
        _let_go()

    def _measure(self, dtype: torch.dtype, end: float, rounds: int) -> None:
        measured = self.dtypes[str(dtype).removeprefix("torch.")] = {}
        model = sdxl(self.scale, dtype, self.device)
        maker = storymaker(model, self.scale, dtype, self.device)
        rows = rows_of(model, maker, random_story(self.frames), self.scale)
        next(row for row in rows if row.name == PLAIN).draw()
        latents: dict[str, Tensor] = {}
        for row in rows:
            measured[row.name] = table.Measured(like=row.like)
            self._tried(measured[row.name], partial(self._once, row, model, measured, latents))
            print(f"{dtype}, {row.name}: looked at after {time.monotonic() - self.began:.0f} s", flush=True)
        for turn in range(rounds):
            began = time.monotonic()
            for row in rows if turn % 2 else rows[::-1]:
                if not measured[row.name].error:
                    self._tried(measured[row.name], partial(self._time, row, measured))
            print(f"{dtype}, round {turn + 1}: {time.monotonic() - began:.1f} s", flush=True)
            if time.monotonic() + (time.monotonic() - began) > end:
                return

    def _tried(self, found: table.Measured, work: Callable[[], None]) -> None:
        """Do something for a row, which takes no further part when that fails, and write what is known."""
        try:
            work()
        except (RuntimeError, ValueError, TypeError) as problem:
            found.error = f"{type(problem).__name__}: {problem}".partition("\n")[0]
            gc.collect()
        self.write()

    def _once(self, row: Row, model, measured: table.Rows, latents: dict[str, Tensor]) -> None:
        """Memory, waits, operations and latents of a row."""
        found = measured[row.name]
        memory, drawn = measure.remembered(row, model, self.device)
        latents[row.name] = drawn
        found.finite = bool(drawn.isfinite().all())
        if self.device.type == "cuda":
            found.peak, found.left = memory.peak, memory.left
        found.change = _distance(drawn, latents[PLAIN])
        found.difference = _distance(drawn, latents[row.like]) if row.like in latents else None
        waits, found.operations = measure.counted(row, self.device)
        found.waits = waits if self.device.type == "cuda" else None
        found.kernels = measure.attention_kernels(found.operations)

    def _time(self, row: Row, measured: table.Rows) -> None:
        measured[row.name].milliseconds.append(measure.timed(row, self.device))


def _let_go() -> None:
    """Let ComfyUI forget networks that nobody holds, and give their memory back to the card."""
    import comfy.model_management

    comfy.model_management.cleanup_models()
    comfy.model_management.soft_empty_cache()


def _distance(latents: Tensor, reference: Tensor) -> float:
    """Root mean square of the difference, relative to the reference."""
    return ((latents - reference).double().norm() / reference.double().norm()).item()
