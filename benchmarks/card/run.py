"""The run of the device benchmark: every row is measured once, then all are timed in turns until the time is up."""

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
    """The machine, versions and settings of the numbers."""
    from comfy.ldm.modules import attention

    facts = {
        "device": platform.processor() or platform.machine(),
        "ComfyUI": version,
        "PyTorch": torch.__version__,
        "attention of ComfyUI": attention.optimized_attention.__name__,
        "pictures": f"{frames} frames of {8 * scale.side} x {8 * scale.side}, guidance {CFG:g}, {STEPS} steps of euler",
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts["device"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
        facts["driver"] = _driver()
        facts["CUDA, cuDNN"] = f"{torch.version.cuda}, {torch.backends.cudnn.version()}"
    return facts


def _driver() -> str:
    """The driver's version, or why it is unknown."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.SubprocessError) as problem:
        return f"unknown ({type(problem).__name__})"


class Run:
    """Measures rows and writes all results after each of them. facts: as from `about`."""

    def __init__(self, path: Path, facts: dict[str, Any], device: torch.device, scale: Scale, frames: int):
        self.path, self.about, self.device, self.scale, self.frames = path, facts, device, scale, frames
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
        """Measure all rows in one dtype, then time them in rounds, at least one, until `end` on the monotonic clock."""
        self._measure(dtype, end, rounds)
        gc.collect()
        _free_memory()

    def _measure(self, dtype: torch.dtype, end: float, rounds: int) -> None:
        measured = self.dtypes[str(dtype).removeprefix("torch.")] = {}
        model = sdxl(self.scale, dtype, self.device)
        maker = storymaker(model, self.scale, dtype, self.device)
        rows = rows_of(model, maker, random_story(self.frames), self.scale)
        next(row for row in rows if row.name == PLAIN).draw()
        latents: dict[str, Tensor] = {}
        for row in rows:
            measured[row.name] = table.Measured(like=row.like)
            self._try(measured[row.name], partial(self._once, row, model, measured, latents))
            print(f"{dtype}, {row.name}: measured after {time.monotonic() - self.began:.0f} s", flush=True)
        for turn in range(rounds):
            began = time.monotonic()
            for row in rows if turn % 2 else rows[::-1]:
                if not measured[row.name].error:
                    self._try(measured[row.name], partial(self._time, row, measured))
            print(f"{dtype}, round {turn + 1}: {time.monotonic() - began:.1f} s", flush=True)
            if time.monotonic() + (time.monotonic() - began) > end:
                return

    def _try(self, result: table.Measured, work: Callable[[], None]) -> None:
        """Do a row's work and write all results; a row that fails takes no further part."""
        try:
            work()
        except (RuntimeError, ValueError, TypeError) as problem:
            result.error = f"{type(problem).__name__}: {problem}".partition("\n")[0]
            gc.collect()
        self.write()

    def _once(self, row: Row, model, measured: table.Rows, latents: dict[str, Tensor]) -> None:
        """Measure memory, waits, operations and latents of a row."""
        result = measured[row.name]
        memory, drawn = measure.measure_memory(row, model, self.device)
        latents[row.name] = drawn
        result.finite = bool(drawn.isfinite().all())
        if self.device.type == "cuda":
            result.peak, result.left = memory.peak, memory.left
        result.change = _distance(drawn, latents[PLAIN])
        result.difference = _distance(drawn, latents[row.like]) if row.like in latents else None
        waits, result.operations = measure.count_warm_step(row, self.device)
        result.waits = waits if self.device.type == "cuda" else None
        result.kernels = measure.attention_kernels(result.operations)

    def _time(self, row: Row, measured: table.Rows) -> None:
        measured[row.name].milliseconds.append(measure.timed(row, self.device))


def _free_memory() -> None:
    """Make ComfyUI unload networks that are no longer referenced and free their memory on the card."""
    import comfy.model_management

    comfy.model_management.cleanup_models()
    comfy.model_management.soft_empty_cache()


def _distance(latents: Tensor, reference: Tensor) -> float:
    """Norm of the difference, relative to the reference."""
    return ((latents - reference).double().norm() / reference.double().norm()).item()
