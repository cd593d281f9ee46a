"""One ComfyUI server that draws prompt sets: what it is asked, and what comes of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field

from ...scripts.comfyui import Client, ComfyUIError, PromptFailed, PromptRefused
from .graph import FRAMES

TAG = "storyloom"
"""Key under which a workflow says in the server's queue and history which set of which run it draws."""
CONNECT_SECONDS = 10
POLL_SECONDS = 0.05, 1.0
"""How long between two questions whether a set is done: at first, and at most."""
GONE = (OSError, ComfyUIError, ValueError, LookupError)
"""What asking a server raises that has ended, hangs, or is no ComfyUI."""


@dataclass(frozen=True)
class Job:
    """A set to be drawn with a method. key: "method/set"; tag: names this very workflow; frames: how many pictures."""

    key: str
    tag: str
    graph: dict = field(repr=False)
    frames: int


@dataclass(frozen=True)
class Ready:
    """The server answers. held: tags of the jobs that it has drawn, draws or has queued from an earlier run."""

    held: frozenset[str]


@dataclass(frozen=True)
class Unfit:
    """The server answers and cannot do this work."""

    reason: str


@dataclass(frozen=True)
class Lost:
    """The server does not answer any more, or does not come to an end: the job goes back."""

    reason: str


@dataclass(frozen=True)
class Failed:
    """The job itself fails: refused, or an error in a node."""

    reason: str


@dataclass(frozen=True)
class Drawn:
    """PNG files, one per frame."""

    pictures: tuple[bytes, ...] = field(repr=False)


class Worker:
    """Draws one job after the other on the server at `url`.

    run: names this output folder, so that workflows which a killed run has left on the server are taken up. patience:
    seconds that the server may work on one job.
    """

    def __init__(self, url: str, run: str, patience: float):
        self.client = Client(url)
        self.run = run
        self.patience = patience
        self._held: dict[str, str] = {}

    def connect(self, wanted: Container[str], kinds: Sequence[str], checkpoint: str | None) -> Ready | Unfit | Lost:
        """Whether the server has these kinds of nodes and this checkpoint, and which wanted jobs it already holds.

        Workflows of this run that are not wanted any more are taken out of its queue.
        """
        try:
            self.client.request("/system_stats", seconds=CONNECT_SECONDS)
            missing = [kind for kind in kinds if kind not in self.client.request(f"/object_info/{kind}")]
            if missing:
                return Unfit(f"it has no node {', '.join(missing)}: install StoryLoom there, or update it")
            if checkpoint is not None:
                loader = self.client.request("/object_info/CheckpointLoaderSimple")["CheckpointLoaderSimple"]
                there = loader["input"]["required"]["ckpt_name"][0]
                if checkpoint not in there:
                    found = ", ".join(there) or "none"
                    return Unfit(f'it has no checkpoint "{checkpoint}" (found: {found}): put it there, or --checkpoint')
            self._held = self._left_behind(wanted)
            return Ready(frozenset(self._held))
        except GONE as error:
            return Lost(one_line(error))

    def draw(self, job: Job) -> Drawn | Failed | Lost:
        """Draw a job, or take it up where the server already has it."""
        held = self._held.pop(job.tag, None)
        answer = None if held is None else self._outcome(job, lambda: held)
        if isinstance(answer, Drawn):
            return answer
        mark = {TAG: {"run": self.run, "job": job.tag}}
        return self._outcome(job, lambda: self.client.submit(job.graph, mark))

    def _outcome(self, job: Job, queued: Callable[[], str]) -> Drawn | Failed | Lost:
        """What comes of a prompt whose id `queued` gives."""
        try:
            images = self._wait(queued())["outputs"].get(FRAMES, {}).get("images", [])
            if len(images) != job.frames:
                return Failed(f"ComfyUI gave {len(images)} pictures for {job.frames} frames")
            return Drawn(tuple(self.client.view(image) for image in images))
        except (PromptRefused, PromptFailed) as error:
            return Failed(str(error))
        except GONE as error:
            return Lost(one_line(error))

    def cancel(self) -> None:
        """Take this run's workflows out of the server's queue and stop the one that runs."""
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
                raise ComfyUIError("it has forgotten the workflow")
            time.sleep(pause)
            pause = min(2 * pause, most)

    def _queue(self) -> tuple[dict[str, str], dict[str, str]]:
        """Prompt id -> tag of this run's workflows that run, and of those that wait."""
        return tuple(
            {key: tag for key, data in part.items() if (tag := self._tag(data))} for part in self.client.queue()
        )

    def _tag(self, extra_data: dict) -> str | None:
        mark = extra_data.get(TAG)
        return mark["job"] if isinstance(mark, dict) and mark.get("run") == self.run else None

    def _left_behind(self, wanted: Container[str]) -> dict[str, str]:
        """Tag -> prompt id of wanted jobs; drops what else of this run is queued."""
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
