"""Child processes that end, temporary folders that are removed, and a free port."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

LEFTOVER_SECONDS = 24 * 3600


def storyloom_cache() -> Path:
    return Path.home() / ".cache" / "storyloom"


@contextlib.contextmanager
def scratch(name: str) -> Iterator[Path]:
    """A temporary folder in StoryLoom's cache, removed afterwards. Day-old ones of killed runs are removed too."""
    parent = storyloom_cache() / "tmp"
    parent.mkdir(parents=True, exist_ok=True)
    for old in parent.iterdir():
        with contextlib.suppress(OSError):
            if time.time() - old.stat().st_mtime > LEFTOVER_SECONDS:
                shutil.rmtree(old, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run_limited(command: Sequence[str], seconds: float) -> str | None:
    """Run a command without input and with a time limit. Returns None on success, else the reason for the failure."""
    environment = {**os.environ, "GIT_TERMINAL_PROMPT": "0"}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, env=environment, start_new_session=True, **options
        )
    except FileNotFoundError:
        return f"{command[0]} is not installed"
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"no answer within {seconds:.0f} seconds"
    finally:
        end_process(process)
    lines = output.strip().splitlines() or [f"{command[0]} ended with code {process.returncode}"]
    return None if process.returncode == 0 else lines[-1]


def end_process(process: subprocess.Popen, seconds: float = 10) -> None:
    """End a process that was started in its own session, and its children."""
    signals = [signal.SIGTERM, getattr(signal, "SIGKILL", signal.SIGTERM)]
    for number in signals:
        if process.poll() is not None:
            return
        if os.name == "nt":
            process.kill()
        else:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)


def end_with_parent() -> None:
    """Make Linux kill this process when the thread that started it ends, for whatever reason."""
    import ctypes

    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def free_port() -> int:
    """A TCP port that is free at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
