"""Shared by the benchmarks: importing ComfyUI, memory of a process, and a plain table."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from ..scripts.comfyui import find_comfyui, require_comfyui, version_text


def enter_comfyui(folder: Path | None = None, cpu: bool = True) -> str:
    """Make ComfyUI's modules importable in this process and return its version.

    folder: ComfyUI's, None to find it as the demo does; cpu: force the CPU. Call it before `comfy` is imported.
    Raises ComfyUIError if there is no ComfyUI.
    """
    folder = find_comfyui() if folder is None else require_comfyui(folder, "--comfyui")
    sys.path.insert(0, str(folder))
    from comfy.cli_args import args

    args.cpu = cpu
    return version_text(folder)


@contextmanager
def fused_attention() -> Iterator[None]:
    """Make ComfyUI use PyTorch's fused attention kernel, as on graphics cards, on any machine."""
    from comfy.ldm.modules import attention

    fused = attention.attention_pytorch
    with mock.patch.multiple(attention, optimized_attention=fused, optimized_attention_masked=fused):
        yield


def resident_mib(pid: int, field: str = "VmRSS") -> float:
    """Resident memory of a process in MiB. field: VmRSS for now, VmHWM for the peak since `reset_peak`."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise SystemExit("This benchmark needs /proc; run it on Linux.")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A plain-text table: the first column left-aligned, the others right-aligned."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )
