"""What the benchmarks share: reaching ComfyUI, and a plain table."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from ..scripts.comfyui import find_comfyui, require_comfyui, version_text


def enter_comfyui(folder: Path | None = None, cpu: bool = True) -> str:
    """Make ComfyUI's modules importable in this process and return its version.

    folder: of ComfyUI, None: found as the demo finds one; cpu: whether it has to work on the CPU. Call it before
    anything imports `comfy`. Raises ComfyUIError with one sentence when there is no ComfyUI.
    """
    folder = find_comfyui() if folder is None else require_comfyui(folder, "--comfyui")
    sys.path.insert(0, str(folder))
    from comfy.cli_args import args

    args.cpu = cpu
    return version_text(folder)


@contextmanager
def fused_attention() -> Iterator[None]:
    """Let ComfyUI attend with PyTorch's fused kernel, as on graphics cards, whatever it chose for this machine."""
    from comfy.ldm.modules import attention

    fused = attention.attention_pytorch
    with mock.patch.multiple(attention, optimized_attention=fused, optimized_attention_masked=fused):
        yield


def resident_mib(pid: int, what: str = "VmRSS") -> float:
    """Resident memory of a process, MiB: VmRSS now, VmHWM the largest since `forget_peak`."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{what}:"):
            return int(line.split()[1]) / 1024
    raise SystemExit("This benchmark reads /proc, which only Linux has.")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows of text in columns: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )
