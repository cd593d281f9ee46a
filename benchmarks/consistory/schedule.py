"""Gives jobs to servers: whoever is free takes the next, and what a server loses goes to another."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Protocol

from .worker import Drawn, Failed, Job, Lost, Ready, Unfit, one_line

JOB_LOSSES = 3
"""Servers that may be lost with a job before it counts as what they die of."""
LONGEST_PAUSE = 60.0


class NoServersError(Exception):
    """Every server is left out and jobs remain; the message names the reasons."""


class Place(Protocol):
    def call(self, name: str, *args) -> Future: ...

    def lost(self, error: BaseException) -> bool: ...


class Schedule:
    """Draws jobs on workers that live at places, by the name of their server.

    connect: what Worker.connect takes beside the wanted jobs. save(job, drawn) keeps pictures; watch(what, server, job,
    reason) is told "ready", "draws", "drawn", "failed", "lost" and "left out". retries: how often in a row a lost
    server is tried again, after `pause` seconds, then twice as long, and so on.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        places: Mapping[str, Place],
        connect: tuple,
        save: Callable[[Job, Drawn], None],
        watch: Callable[[str, str, Job | None, str], None],
        retries: int = 5,
        pause: float = 1.0,
    ):
        self.waiting = list(jobs)
        self.places = dict(places)
        self.connect, self.save, self.watch = connect, save, watch
        self.retries, self.pause = retries, pause
        self.failed: dict[str, str] = {}
        self._calls: dict[Future, tuple[str, Job | None]] = {}
        self._idle: list[str] = []
        self._due: dict[str, float] = {}
        self._held: dict[str, frozenset[str]] = {}
        self._losses: Counter[str] = Counter()
        self._job_losses: Counter[str] = Counter()
        self._left_out: dict[str, str] = {}

    def run(self) -> dict[str, str]:
        """Draw everything. Returns the keys of jobs that failed with the reasons. Raises NoServersError."""
        for server in self.places:
            self._connect(server)
        wait(self._calls)  # what servers hold from an earlier run is known before anything is given out
        while self.waiting or any(job for _, job in self._calls.values()):
            self._take(wait(self._calls, self._patience(), FIRST_COMPLETED).done if self._calls else ())
            self._try_again()
            self._give()
            if self.waiting and not self._calls and not self._due:
                reasons = "; ".join(f"{server}: {reason}" for server, reason in self._left_out.items())
                raise NoServersError(f"No server is left, {len(self.waiting)} sets are not drawn ({reasons}).")
        return self.failed

    def _patience(self) -> float:
        return max(0.0, min([1.0, *(due - time.monotonic() for due in self._due.values())]))

    def _connect(self, server: str) -> None:
        wanted = frozenset(job.tag for job in self.waiting)
        self._calls[self.places[server].call("connect", wanted, *self.connect)] = server, None

    def _try_again(self) -> None:
        now = time.monotonic()
        if not self._calls and self._due:
            time.sleep(max(0.0, min(1.0, min(self._due.values()) - now)))
        for server in [server for server, due in self._due.items() if due <= time.monotonic()]:
            del self._due[server]
            self._connect(server)

    def _give(self) -> None:
        for server in list(self._idle):
            job = self._next(server)
            if job is None:
                continue
            self._idle.remove(server)
            self.waiting.remove(job)
            self._held[server] -= {job.tag}
            self._calls[self.places[server].call("draw", job)] = server, job
            self.watch("draws", server, job, "")

    def _next(self, server: str) -> Job | None:
        """What the server already holds, else the first that no other server holds."""
        own = self._held[server]
        elsewhere = frozenset().union(*(tags for other, tags in self._held.items() if other != server))
        mine = next((job for job in self.waiting if job.tag in own), None)
        return mine or next((job for job in self.waiting if job.tag not in elsewhere), None)

    def _take(self, done) -> None:
        for future in done:
            server, job = self._calls.pop(future)
            error = future.exception()
            if error is None:
                answer = future.result()
            elif self.places[server].lost(error):
                answer = Lost(f"its worker ended ({type(error).__name__}: {one_line(error)[:200]})")
            else:
                raise error
            if isinstance(answer, Drawn):
                try:
                    self.save(job, answer)
                except ValueError as fault:
                    answer = Lost(str(fault))
            if isinstance(answer, Lost):
                self._lose(server, job, answer.reason)
            elif isinstance(answer, Unfit):
                self._leave_out(server, answer.reason)
            else:
                self._idle.append(server)
            if isinstance(answer, Ready):
                self._held[server] = answer.held
                self.watch("ready", server, None, "")
            elif isinstance(answer, Failed):
                self._fail(server, job, answer.reason)
            elif isinstance(answer, Drawn):
                self._losses[server] = 0
                self.watch("drawn", server, job, "")

    def _lose(self, server: str, job: Job | None, reason: str) -> None:
        self._held.pop(server, None)
        self._losses[server] += 1
        self.watch("lost", server, job, reason)
        if job is not None:
            self._job_losses[job.key] += 1
            if self._job_losses[job.key] < JOB_LOSSES:
                self.waiting.insert(0, job)
            else:
                self._fail(server, job, f"{JOB_LOSSES} times a server was lost while it drew it, the last: {reason}")
        if self._losses[server] > self.retries:
            self._leave_out(server, reason)
        else:
            pause = self.pause * 2 ** (self._losses[server] - 1)
            self._due[server] = time.monotonic() + min(pause, LONGEST_PAUSE)

    def _leave_out(self, server: str, reason: str) -> None:
        self._left_out[server] = reason
        self.watch("left out", server, None, reason)

    def _fail(self, server: str, job: Job, reason: str) -> None:
        self.failed[job.key] = reason
        self.watch("failed", server, job, reason)
