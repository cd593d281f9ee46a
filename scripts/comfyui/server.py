"""Starts a headless ComfyUI with the pack, waits for its workflows and ends it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from .client import Client, parse_json_object
from .errors import ComfyUIError, PromptFailed
from .find import ROOT, version_text
from .processes import end_process, end_with_parent, free_port, storyloom_cache
from .threads import thread_settings

START_SECONDS = 180
PORT_TRIES = 3
NOT_LINKED = shutil.ignore_patterns(".*", "__pycache__", "out", "tests", "benchmarks", "*.egg-info")
STARTING = ("execution_start", "execution_cached")


def pack_base(base: Path, pack: Path = ROOT) -> Path:
    """Prepare a ComfyUI base directory with the pack as a custom node, linked or else copied. Returns base."""
    for name in ("models", "input", "output", "temp", "user", "front"):
        (base / name).mkdir(parents=True, exist_ok=True)
    (base / "front" / "index.html").write_text("<!doctype html><title>StoryLoom</title>\n", encoding="utf-8")
    link = base / "custom_nodes" / "storyloom"
    link.parent.mkdir(exist_ok=True)
    if link.is_symlink():
        link.unlink()
    elif link.exists():
        shutil.rmtree(link)
    try:
        link.symlink_to(pack.resolve(), target_is_directory=True)
    except OSError:
        shutil.copytree(pack, link, ignore=NOT_LINKED)
    return base


class Server(Client):
    """A headless ComfyUI server, as a context manager.

    comfyui is a ComfyUI folder, base a folder prepared by `pack_base`, python the interpreter of its environment.
    front: folder of the browser interface, by default an empty page; cpu: use no graphics card; dies_with_us: end the
    server even if this process is killed (Linux only); processes: number of such servers that share the cores, see
    `thread_settings`. Entering waits until the server responds; if it does not, it raises ComfyUIError with the tail of
    its log.
    """

    def __init__(
        self,
        comfyui: Path,
        base: Path,
        python: str,
        extra_args: Sequence[str] = (),
        port: int = 0,
        front: Path | None = None,
        cpu: bool = True,
        dies_with_us: bool = False,
        processes: int = 1,
    ):
        self.comfyui = Path(comfyui).resolve()
        self.base = Path(base).resolve()
        self.python = str(python)
        self.front = front or self.base / "front"
        self.extra_args = list(extra_args)
        self.cpu, self.dies_with_us, self.processes = cpu, dies_with_us, processes
        self._port_tries = 1 if port else PORT_TRIES
        self.log = self.base / "server.log"
        self._process: subprocess.Popen | None = None
        self._use(port or free_port())

    def _use(self, port: int) -> None:
        self.port = port
        super().__init__(f"http://127.0.0.1:{port}")

    @property
    def pid(self) -> int:
        """The server's process id, once it is started."""
        return self._process.pid

    def __enter__(self) -> Server:
        for tries_left in reversed(range(self._port_tries)):
            try:
                self._start()
                self._wait_ready()
                return self
            except BaseException as error:
                self.stop()
                taken = isinstance(error, ComfyUIError) and "already in use" in self._log_text()
                if not (taken and tries_left):
                    raise
                self._use(free_port())  # another process took the port before the server started
        return self

    def __exit__(self, *error) -> None:
        self.stop()

    def command(self) -> list[str]:
        """The command line that starts the server."""
        options = ["--cpu"] if self.cpu else []
        options += ["--listen", "127.0.0.1", "--port", str(self.port), "--disable-auto-launch"]
        options += ["--disable-api-nodes", "--base-directory", str(self.base), "--database-url", "sqlite:///:memory:"]
        options += ["--front-end-root", str(self.front)]
        return [self.python, "-u", str(self.comfyui / "main.py"), *options, *self.extra_args]

    def _start(self) -> None:
        environment = {**os.environ, **(thread_settings(os.environ, processes=self.processes) if self.cpu else {})}
        if not self.comfyui.is_relative_to(storyloom_cache().resolve()):
            environment["PYTHONDONTWRITEBYTECODE"] = "1"  # leave no files in the user's own ComfyUI
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                self.command(),
                cwd=self.base,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches this process only, which stops the server
                preexec_fn=end_with_parent if self.dies_with_us and sys.platform == "linux" else None,
            )

    def _wait_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            self._require_alive("while it started")
            with contextlib.suppress(OSError, ValueError, ComfyUIError):
                stats = self.request("/system_stats", seconds=5)
                if str(self.base) in stats["system"]["argv"]:
                    return
            time.sleep(0.2)
        raise ComfyUIError(f"ComfyUI did not answer within {START_SECONDS} seconds. {self._log_tail()}")

    def _require_alive(self, when: str) -> None:
        code = self._process.poll()
        if code is not None:
            raise ComfyUIError(f"ComfyUI {version_text(self.comfyui)} ended {when} (code {code}). {self._log_tail()}")

    def _log_tail(self, lines: int = 12) -> str:
        text = self._log_text().strip().splitlines()
        return "The end of its log:\n" + "\n".join("    " + line for line in text[-lines:])

    def _log_text(self) -> str:
        text = self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""
        return re.sub(r"\x1b\[[0-9;]*m", "", text)

    def submit(self, prompt: dict, extra_data: dict | None = None) -> str:
        """Like the client's. Raises ComfyUIError with the tail of the log if the server has ended."""
        try:
            return super().submit(prompt, extra_data)
        except OSError as error:
            self._require_alive("before it took the workflow")
            raise ComfyUIError(f"ComfyUI could not be reached at {self.url}: {error}") from None

    def wait(
        self, prompt_id: str, on_progress: Callable[[str, int, int], None] | None = None, timeout: float = 1800
    ) -> dict:
        """Wait for a prompt and return its history entry.

        on_progress(node id, value, maximum) is called for every step that a node reports. Raises PromptFailed with
        one sentence if a node fails or the time runs out, ComfyUIError if the server ends.
        """
        deadline = time.monotonic() + timeout
        if on_progress is not None:
            asyncio.run(self._listen(prompt_id, on_progress, deadline))
        while time.monotonic() < deadline:
            entry = self._finished_entry(prompt_id)
            if entry is not None:
                return entry
            time.sleep(0.1)
        raise PromptFailed(f"The workflow did not finish within {timeout:.0f} seconds.")

    def _finished_entry(self, prompt_id: str) -> dict | None:
        try:
            return self.finished(prompt_id)
        except OSError as error:
            self._require_alive("while the workflow ran")
            raise ComfyUIError(f"ComfyUI could not be reached at {self.url}: {error}") from None

    async def _listen(self, prompt_id: str, on_progress: Callable[[str, int, int], None], deadline: float) -> None:
        """Forward the progress messages of a prompt until it finishes, the server ends or the time runs out."""
        import aiohttp

        address = f"{self.url}/ws?clientId={self.client_id}"
        try:
            async with aiohttp.ClientSession() as session, session.ws_connect(address, max_msg_size=0) as socket_:
                while time.monotonic() < deadline:
                    try:
                        message = await socket_.receive(timeout=1)
                    except asyncio.TimeoutError:
                        if self._process.poll() is not None or self.history(prompt_id) is not None:
                            return
                        continue
                    if message.type in (aiohttp.WSMsgType.CLOSE, aiohttp.WSMsgType.CLOSED, aiohttp.WSMsgType.ERROR):
                        return
                    event = parse_json_object(message.data) if message.type == aiohttp.WSMsgType.TEXT else {}
                    data = event.get("data", {})
                    if data.get("prompt_id") != prompt_id:
                        continue
                    if event["type"] == "progress":
                        on_progress(str(data["node"]), int(data["value"]), int(data["max"]))
                    elif event["type"].startswith("execution_") and event["type"] not in STARTING:
                        return
        except (aiohttp.ClientError, OSError):
            return  # `wait` continues without messages and reports a server that has ended

    def outputs(self, history: dict) -> list[Path]:
        """The image files that a prompt saved, without previews, in the order of the history."""
        saved = self.base / "output"
        return [path for paths in self.images(history).values() for path in paths if path.is_relative_to(saved)]

    def images(self, history: dict) -> dict[str, list[Path]]:
        """Node id -> the image files that it saved or previewed, in the order of the history."""
        shown = {node: output["images"] for node, output in history["outputs"].items() if output.get("images")}
        return {
            node: [self.base / image["type"] / image["subfolder"] / image["filename"] for image in images]
            for node, images in shown.items()
        }

    def stop(self) -> None:
        """End the server and everything it started."""
        if self._process is not None:
            end_process(self._process)
