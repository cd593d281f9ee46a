"""Processes that are killed while they write: at every point, and by no clock, so that a busy machine changes nothing.

Python announces whatever it does to a folder by an audit event just before. A forked child counts those and kills
itself at a chosen one; in the middle of a file the system kills it, by a limit of a file's size.
"""

import itertools
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

try:
    import resource
except ImportError:  # Windows, which has no fork either
    resource = None

can_be_killed = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a process that can be killed while it writes")
STEPS = {"open", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink", "os.truncate"}
"""Audit events of what changes a folder. `os.replace` is "os.rename"; opening counts where it is for writing."""
FOR_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


@dataclass(frozen=True)
class Point:
    """Where a process dies: before a step, or with so many bytes written to the file that the step opens."""

    step: int
    event: str
    """The audit event of the step, "end" after the last one."""
    written: int | None = None


def killed_at_every_point(write: Callable[[int], object], folder: Path) -> Iterator[Point]:
    """Kill a process at every point of a write into `folder`; yields after each, when it is dead.

    write: of a number, which is another one each time. It has to take the same steps every time, and fails when it
    does not come to its point.
    """
    write(0)
    for number, point in enumerate(points_of(lambda: write(1), folder), start=2):
        ended, output = _in_a_child(lambda number=number, point=point: _die_at(point, lambda: write(number), folder))
        expected = signal.SIGKILL if point.written is None else signal.SIGXFSZ
        assert ended == -expected, f"it was not killed at {point} but ended with {ended}: {output}"
        yield point


def points_of(write: Callable[[], object], folder: Path) -> list[Point]:
    """Every point of a write, which is done once: around each step, and with 0, 1, half and all but one byte."""
    ended, output = _in_a_child(lambda: json.dumps(_steps_of(write, folder)))
    assert ended == 0, f"it cannot be written at all: {output}"
    points = []
    for step, (event, size) in enumerate(json.loads(output)):
        points.append(Point(step, event))
        points += [Point(step, event, written) for written in sorted({0, 1, size // 2, size - 1} & set(range(size)))]
    assert points, f"nothing is written into {folder}"
    return [*points, Point(step + 1, "end")]


def _steps_of(write: Callable[[], object], folder: Path) -> list[tuple[str, int]]:
    """Each step's event, and the size of the file that it opens, as the next step finds it; 0 for others."""
    steps, opened = [], []

    def measure() -> None:
        for number, path in opened:
            steps[number] = (steps[number][0], os.path.getsize(path))
        opened.clear()

    def note(event: str, path: str) -> None:
        measure()
        if event == "open":
            opened.append((len(steps), path))
        steps.append((event, 0))

    _at_each_step(note, folder)
    write()
    measure()
    return steps


def _die_at(point: Point, write: Callable[[], object], folder: Path) -> None:
    """Write and die at a point."""
    steps = itertools.count()

    def die(event: str, path: str) -> None:
        if next(steps) != point.step:
            return
        if point.written is None:
            os.kill(os.getpid(), signal.SIGKILL)
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (point.written, resource.RLIM_INFINITY))

    _at_each_step(die, folder)
    write()
    if point.event == "end":
        os.kill(os.getpid(), signal.SIGKILL)


def _at_each_step(call: Callable[[str, str], None], folder: Path) -> None:
    """Call with the event and the path just before anything changes in a folder. Cannot be undone in this process."""

    def hook(event: str, arguments: tuple) -> None:
        if event not in STEPS or not isinstance(arguments[0], (str, os.PathLike)):
            return
        path = os.path.abspath(arguments[0])
        if path.startswith(os.path.join(folder, "")) and (event != "open" or arguments[2] & FOR_WRITING):
            call(event, path)

    sys.addaudithook(hook)


def _in_a_child(work: Callable[[], str | None]) -> tuple[int, str]:
    """Do it in a forked child. Returns its exit code, negative a signal that killed it, and its result or traceback."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(1)  # the parent's other threads do not exist here: OpenMP would wait
        try:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            for stream in (1, 2):  # what is printed is no file that the limit of its size can hit
                os.dup2(nowhere, stream)
            output, code = work() or "", 0
        except BaseException:
            output, code = traceback.format_exc(), 1
        try:
            with os.fdopen(writing, "w", encoding="utf-8") as file:
                file.write(output)
        finally:
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading, encoding="utf-8") as file:
        output = file.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), output
