"""Drawing prompt sets on one ComfyUI server: the jobs, and their possible outcomes."""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field

from ...scripts.comfyui import Client, ComfyUIError, PromptFailed, PromptRefused
from .graph import FRAMES

TAG = "storyloom"
"""Key in the extra data of a queued workflow that names its run and its set."""
CONNECT_SECONDS = 10
POLL_SECONDS = 0.05, 1.0
"""First and longest interval between two polls for a finished set."""
UNREACHABLE = (OSError, ComfyUIError, ValueError, LookupError)
"""Errors of a request to a server that has ended, hangs, or is not ComfyUI."""


@dataclass(frozen=True)
class Job:
    """A set to draw with a method. key: "method/set"; tag: identifies this workflow; frames: number of pictures."""

    key: str
    tag: str
    graph: dict = field(repr=False)
    frames: int


@dataclass(frozen=True)
class Ready:
    """The server responds. held: tags of the jobs that it has drawn, draws or has queued from an earlier run."""

    held: frozenset[str]


@dataclass(frozen=True)
class Unfit:
    """The server responds but lacks a node or the checkpoint."""

    reason: str


@dataclass(frozen=True)
class Lost:
    """The server does not respond or does not finish; the job is queued again."""

    reason: str


@dataclass(frozen=True)
class Failed:
    """The job itself failed: it was refused, or a node raised an error."""

    reason: str


@dataclass(frozen=True)
class Drawn:
    """PNG files, one per frame."""

    pictures: tuple[bytes, ...] = field(repr=False)


class ServerSession:
    """Draws one job after the other on the server at `url`.

    run: identifies the output folder, so that workflows left on the server by a killed run are reused. patience: time
    limit for one job, in seconds.
    """

    def __init__(self, url: str, run: str, patience: float):
        self.client = Client(url)
        self.run = run
        self.patience = patience
        self._held: dict[str, str] = {}

    def connect(self, wanted: Container[str], kinds: Sequence[str], checkpoint: str | None) -> Ready | Unfit | Lost:
        """Check that the server has these kinds of nodes and this checkpoint, and find the wanted jobs that it holds.

        Other workflows of this run are removed from its queue.
        """
        try:
            self.client.request("/system_stats", seconds=CONNECT_SECONDS)
            missing = [kind for kind in kinds if kind not in self.client.request(f"/object_info/{kind}")]
            if missing:
                return Unfit(f"it has no node {', '.join(missing)}: install or update StoryLoom there")
            if checkpoint is not None:
                loader = self.client.request("/object_info/CheckpointLoaderSimple")["CheckpointLoaderSimple"]
                available = loader["input"]["required"]["ckpt_name"][0]
                if checkpoint not in available:
                    names = ", ".join(available) or "none"
                    return Unfit(f'it has no checkpoint "{checkpoint}" (found: {names}); add it, or set --checkpoint')
            self._held = self._left_behind(wanted)
            return Ready(frozenset(self._held))
        except UNREACHABLE as error:
            return Lost(one_line(error))

    def draw(self, job: Job) -> Drawn | Failed | Lost:
        """Draw a job, or fetch its pictures if the server already holds it."""
        held = self._held.pop(job.tag, None)
        outcome = None if held is None else self._outcome(job, lambda: held)
        if isinstance(outcome, Drawn):
            return outcome
        mark = {TAG: {"run": self.run, "job": job.tag}}
        return self._outcome(job, lambda: self.client.submit(job.graph, mark))

    def _outcome(self, job: Job, queued: Callable[[], str]) -> Drawn | Failed | Lost:
        """The outcome of a prompt. queued: returns its id."""
        try:
            images = self._wait(queued())["outputs"].get(FRAMES, {}).get("images", [])
            if len(images) != job.frames:
                return Failed(f"ComfyUI returned {len(images)} pictures for {job.frames} frames")
            return Drawn(tuple(self.client.view(image) for image in images))
        except (PromptRefused, PromptFailed) as error:
            return Failed(str(error))
        except UNREACHABLE as error:
            return Lost(one_line(error))

    def cancel(self) -> None:
        """Remove this run's workflows from the server's queue and interrupt the running one."""
        running, waiting = self._queue()
        self.client.drop([*running, *waiting])

    def _wait(self, prompt_id: str) -> dict:
        pause, most = POLL_SECONDS
        began = None
        while True:
            entry = self.client.finished(prompt_id)
            if entry is not None:
                return entry
            running, waiting = self.client.queue()
            if prompt_id in running:
                began = began or time.monotonic()
                if time.monotonic() - began > self.patience:
                    self.client.drop([prompt_id])
                    raise ComfyUIError(f"it has worked on one set for {self.patience:.0f} seconds (--patience)")
            elif prompt_id not in waiting and self.client.finished(prompt_id) is None:
                raise ComfyUIError("it no longer has the workflow")
            time.sleep(pause)
            pause = min(2 * pause, most)

    def _queue(self) -> tuple[dict[str, str], dict[str, str]]:
        """Prompt id -> tag of this run's workflows, running and waiting."""
        return tuple(
            {key: tag for key, data in part.items() if (tag := self._tag(data))} for part in self.client.queue()
        )

    def _tag(self, extra_data: dict) -> str | None:
        mark = extra_data.get(TAG)
        return mark["job"] if isinstance(mark, dict) and mark.get("run") == self.run else None

    def _left_behind(self, wanted: Container[str]) -> dict[str, str]:
        """Tag -> prompt id of wanted jobs; drops all other queued workflows of this run."""
        held: dict[str, str] = {}
        for prompt_id, entry in self.client.request("/history").items():
            tag = self._tag(entry["prompt"][3])
            if tag in wanted and entry["status"]["status_str"] == "success":
                held.setdefault(tag, prompt_id)
        running, waiting = self._queue()
        superfluous = []
        for prompt_id, tag in (running | waiting).items():
            if tag in wanted and tag not in held:
                held[tag] = prompt_id
            else:
                superfluous.append(prompt_id)
        self.client.drop(superfluous)
        return held


def one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
