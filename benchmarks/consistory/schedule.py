"""Assigns jobs to servers: a free server takes the next job, and a lost server's job goes to another."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Protocol

from .session import Drawn, Failed, Job, Lost, Ready, Unfit, one_line

JOB_LOSSES = 3
"""Number of losses after which the job itself counts as the cause."""
LONGEST_PAUSE = 60.0


class NoServersError(Exception):
    """All servers are left out and jobs remain; the message lists the reasons."""


class Worker(Protocol):
    def call(self, name: str, *args) -> Future: ...

    def lost(self, error: BaseException) -> bool: ...


class Schedule:
    """Draws jobs on servers. workers: server -> the worker that holds its ServerSession.

    connect: arguments of ServerSession.connect after the wanted jobs. save(job, drawn): stores the pictures.
    watch(event, server, job, reason): called for "ready", "draws", "drawn", "failed", "lost" and "left out".
    retries: how often in a row a lost server is retried, after `pause` seconds, then twice as long, and so on.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        workers: Mapping[str, Worker],
        connect: tuple,
        save: Callable[[Job, Drawn], None],
        watch: Callable[[str, str, Job | None, str], None],
        retries: int = 5,
        pause: float = 1.0,
    ):
        self.waiting = list(jobs)
        self.workers = dict(workers)
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
        """Draw all jobs. Returns failed job key -> reason. Raises NoServersError."""
        for server in self.workers:
            self._connect(server)
        wait(self._calls)  # jobs held from an earlier run must be known before any is assigned
        while self.waiting or any(job for _, job in self._calls.values()):
            self._handle(wait(self._calls, self._timeout(), FIRST_COMPLETED).done if self._calls else ())
            self._reconnect()
            self._assign()
            if self.waiting and not self._calls and not self._due:
                reasons = "; ".join(f"{server}: {reason}" for server, reason in self._left_out.items())
                raise NoServersError(f"No server is left; {len(self.waiting)} sets are not drawn ({reasons}).")
        return self.failed

    def _timeout(self) -> float:
        return max(0.0, min([1.0, *(due - time.monotonic() for due in self._due.values())]))

    def _connect(self, server: str) -> None:
        wanted = frozenset(job.tag for job in self.waiting)
        self._calls[self.workers[server].call("connect", wanted, *self.connect)] = server, None

    def _reconnect(self) -> None:
        now = time.monotonic()
        if not self._calls and self._due:
            time.sleep(max(0.0, min(1.0, min(self._due.values()) - now)))
        for server in [server for server, due in self._due.items() if due <= time.monotonic()]:
            del self._due[server]
            self._connect(server)

    def _assign(self) -> None:
        for server in list(self._idle):
            job = self._next(server)
            if job is None:
                continue
            self._idle.remove(server)
            self.waiting.remove(job)
            self._held[server] -= {job.tag}
            self._calls[self.workers[server].call("draw", job)] = server, job
            self.watch("draws", server, job, "")

    def _next(self, server: str) -> Job | None:
        """A job that the server already holds, else the first that no other server holds."""
        own = self._held[server]
        elsewhere = frozenset().union(*(tags for other, tags in self._held.items() if other != server))
        mine = next((job for job in self.waiting if job.tag in own), None)
        return mine or next((job for job in self.waiting if job.tag not in elsewhere), None)

    def _handle(self, done) -> None:
        for future in done:
            server, job = self._calls.pop(future)
            error = future.exception()
            if error is None:
                outcome = future.result()
            elif self.workers[server].lost(error):
                outcome = Lost(f"its worker ended ({type(error).__name__}: {one_line(error)[:200]})")
            else:
                raise error
            if isinstance(outcome, Drawn):
                try:
                    self.save(job, outcome)
                except ValueError as fault:
                    outcome = Lost(str(fault))
            if isinstance(outcome, Lost):
                self._lose(server, job, outcome.reason)
            elif isinstance(outcome, Unfit):
                self._leave_out(server, outcome.reason)
            else:
                self._idle.append(server)
            if isinstance(outcome, Ready):
                self._held[server] = outcome.held
                self.watch("ready", server, None, "")
            elif isinstance(outcome, Failed):
                self._fail(server, job, outcome.reason)
            elif isinstance(outcome, Drawn):
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
                self._fail(
                    server, job, f"{JOB_LOSSES} times a server was lost while drawing this set; last reason: {reason}"
                )
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
