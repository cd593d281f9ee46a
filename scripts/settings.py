"""Processor settings in which the tests must pass: `make test SETTING=name`. Run as a script, it prints their names.

Instruction sets and thread counts change the order of sums, and a busy machine responds late.
"""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

CPU_FLAGS = Path("/proc/cpuinfo")
CHOICES = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA")
"""Variables that restrict the instruction sets that PyTorch and oneDNN use."""

RESTLESS = "import os, sys\nwhile os.getppid() == int(sys.argv[1]): pass"
"""A busy loop that ends with its parent process, whose id is its argument."""


@dataclass(frozen=True)
class Setting:
    """environment: variables for every pass; busy: number of busy processes that run at the same time."""

    about: str
    environment: Mapping[str, str] = field(default_factory=dict)
    busy: int = 0


SETTINGS = {
    "plain": Setting("every instruction of the processor, one thread"),
    "default-isa": Setting("PyTorch without vector instructions", {"ATEN_CPU_CAPABILITY": "default"}),
    "avx2": Setting("PyTorch with AVX2", {"ATEN_CPU_CAPABILITY": "avx2"}),
    "lowest-onednn": Setting("oneDNN with SSE4.1", {"ONEDNN_MAX_CPU_ISA": "SSE41"}),
    # Several passes share the cores, so a thread that waits goes to sleep almost at once.
    "two-threads": Setting("two threads", {"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2", "GOMP_SPINCOUNT": "100"}),
    "busy": Setting("beside two busy processes", busy=2),
}


class UnknownSettingError(Exception):
    """There is no setting with this name; the message lists the settings."""


def chosen(name: str) -> tuple[Setting | None, str]:
    """The setting with a name and a message about it; None for an empty name or if the processor does not support it.

    Raises UnknownSettingError.
    """
    if not name:
        return None, ""
    if name not in SETTINGS:
        raise UnknownSettingError(f"There is no SETTING={name}: choose one of {', '.join(SETTINGS)}.")
    if name == "avx2" and not has_avx2():
        return (
            None,
            "SETTING=avx2 IS LEFT OUT: no AVX2 was detected on this processor. The tests run without the setting.",
        )
    return SETTINGS[name], f"SETTING={name}: {SETTINGS[name].about}."


def has_avx2() -> bool:
    """Whether this is an x86 processor that reports AVX2."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    with contextlib.suppress(OSError):
        return "avx2" in CPU_FLAGS.read_text(encoding="utf-8", errors="replace").split()
    return False


def environment_in(setting: Setting | None, environment: Mapping[str, str]) -> dict[str, str]:
    """The environment variables in a setting: its own replace those in `environment`, and CHOICES are cleared."""
    if setting is None:
        return dict(environment)
    return {name: value for name, value in environment.items() if name not in CHOICES} | dict(setting.environment)


@contextlib.contextmanager
def busy(processes: int) -> Iterator[list[subprocess.Popen]]:
    """Keep this many processes busy while the context is active."""
    started = []
    try:
        for _ in range(processes):
            command = [sys.executable, "-c", RESTLESS, str(os.getpid())]
            started.append(subprocess.Popen(command, stdin=subprocess.DEVNULL))
        yield started
    finally:
        for process in started:
            process.kill()
            process.wait()


if __name__ == "__main__":
    print(" ".join(SETTINGS))
