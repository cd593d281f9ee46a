"""Settings of the processor in which the tests have to pass: `make test SETTING=name`. Alone it prints their names.

Sums come out in another order with other instructions and other numbers of threads, and a busy machine answers late.
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
"""Variables with which PyTorch and oneDNN are kept from instructions that the processor has."""

RESTLESS = "import os, sys\nwhile os.getppid() == int(sys.argv[1]): pass"
"""A program that never rests while the process lives that started it, whose number is its argument."""


@dataclass(frozen=True)
class Setting:
    """environment: variables of every pass; busy: processes beside them that never rest."""

    about: str
    environment: Mapping[str, str] = field(default_factory=dict)
    busy: int = 0


SETTINGS = {
    "plain": Setting("every instruction of the processor, one thread"),
    "default-isa": Setting("PyTorch without vector instructions", {"ATEN_CPU_CAPABILITY": "default"}),
    "avx2": Setting("PyTorch with AVX2", {"ATEN_CPU_CAPABILITY": "avx2"}),
    "lowest-onednn": Setting("oneDNN with SSE4.1", {"ONEDNN_MAX_CPU_ISA": "SSE41"}),
    "two-threads": Setting("two threads", {"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"}),
    "busy": Setting("beside two busy processes", busy=2),
}


class UnknownSettingError(Exception):
    """There is no setting of this name; the message says which there are."""


def chosen(name: str) -> tuple[Setting | None, str]:
    """The setting of a name and the sentence about it; none for an empty name, or where the processor cannot do it.

    Raises UnknownSettingError.
    """
    if not name:
        return None, ""
    if name not in SETTINGS:
        raise UnknownSettingError(f"There is no SETTING={name}: choose one of {', '.join(SETTINGS)}.")
    if name == "avx2" and not has_avx2():
        return (
            None,
            "SETTING=avx2 IS LEFT OUT: this processor has no AVX2, or does not say so. The tests run without it.",
        )
    return SETTINGS[name], f"SETTING={name}: {SETTINGS[name].about}."


def has_avx2() -> bool:
    """Whether this is an x86 processor that is known to have AVX2."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    with contextlib.suppress(OSError):
        return "avx2" in CPU_FLAGS.read_text(encoding="utf-8", errors="replace").split()
    return False


def environment_in(setting: Setting | None, environment: Mapping[str, str]) -> dict[str, str]:
    """The variables of what runs in a setting: its own go before, and what it does not choose is as without it."""
    if setting is None:
        return dict(environment)
    return {name: value for name, value in environment.items() if name not in CHOICES} | dict(setting.environment)


@contextlib.contextmanager
def busy(processes: int) -> Iterator[list[subprocess.Popen]]:
    """So many processes that never rest, until the end."""
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
