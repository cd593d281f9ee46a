"""Finds ComfyUI on this machine, or clones it, and runs its real server for the demo and the tests.

Everything but the progress display (`Server.wait` with `on_progress`, which needs aiohttp) uses the standard library.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

if __package__:
    from .cpu_threads import thread_settings
else:
    from cpu_threads import thread_settings

ROOT = Path(__file__).absolute().parent.parent
REPOSITORY = "https://github.com/Comfy-Org/ComfyUI.git"
PINNED = "0.33.0"
MINIMUM = (0, 19)
CLONE_SECONDS = 300
START_SECONDS = 180
REQUEST_SECONDS = 30
PORT_TRIES = 3
LEFTOVER_SECONDS = 24 * 3600
NOT_LINKED = shutil.ignore_patterns(".*", "__pycache__", "out", "tests", "benchmarks", "*.egg-info")

HOW_TO_PROVIDE = (
    "set COMFYUI_PATH to a ComfyUI folder (0.19 or newer), or put a checkout at {cache}/<version>, "
    "or clone this pack into ComfyUI's custom_nodes folder"
)


class ComfyUIError(Exception):
    """ComfyUI cannot be found, started or reached; the message is one sentence for the user."""


class NoComfyUIError(ComfyUIError):
    """There is no ComfyUI on this machine and it could not be cloned, for the given reason."""

    def __init__(self, reason: str):
        super().__init__(f"No ComfyUI was found, and cloning it failed ({reason}): {how_to_provide()}.")
        self.reason = reason


class PromptRefused(Exception):
    """The server refused a workflow. `errors` is its answer: {"error": {...}, "node_errors": {...}}."""

    def __init__(self, errors: dict):
        super().__init__(describe_refusal(errors))
        self.errors = errors


class PromptFailed(Exception):
    """A workflow was accepted and did not finish."""


FAILURES = (ComfyUIError, PromptRefused, PromptFailed)
"""What may go wrong between here and a drawn workflow; all of them are sentences for the user."""


# ---- finding ---------------------------------------------------------------------------------------------------------


def storyloom_cache() -> Path:
    return Path.home() / ".cache" / "storyloom"


def comfyui_cache() -> Path:
    return storyloom_cache() / "comfyui"


def how_to_provide() -> str:
    return HOW_TO_PROVIDE.format(cache=comfyui_cache())


def read_version(folder: Path) -> tuple[int, ...] | None:
    """The version of the ComfyUI in a folder, or None when there is no ComfyUI."""
    source = folder / "comfyui_version.py"
    if not source.is_file() or not (folder / "main.py").is_file():
        return None
    match = re.search(r"__version__\s*=\s*[\"'](\d+(?:\.\d+)*)", source.read_text(encoding="utf-8"))
    return tuple(int(part) for part in match[1].split(".")) if match else None


def version_text(folder: Path) -> str:
    return ".".join(map(str, read_version(folder) or ("unknown",)))


def require_comfyui(folder: Path, origin: str) -> Path:
    """The folder, resolved. Raises ComfyUIError when no ComfyUI, or one that is too old, lies there."""
    folder = folder.expanduser()
    version = read_version(folder)
    if version is None:
        raise ComfyUIError(
            f"{origin} is {folder}, which holds no ComfyUI (no main.py with comfyui_version.py): correct or unset it."
        )
    if version < MINIMUM:
        raise ComfyUIError(
            f"{origin} is {folder}, which holds ComfyUI {version_text(folder)}: "
            "StoryLoom needs 0.19 or newer, update it."
        )
    return folder.resolve()


def named_comfyui() -> Path | None:
    """The ComfyUI that $COMFYUI_PATH names."""
    named = os.environ.get("COMFYUI_PATH")
    return require_comfyui(Path(named), "COMFYUI_PATH") if named else None


def surrounding_comfyui() -> Path | None:
    """The ComfyUI in whose custom_nodes folder the pack lies."""
    host = ROOT.parent.parent
    if ROOT.parent.name != "custom_nodes" or read_version(host) is None:
        return None
    return require_comfyui(host, "The ComfyUI around this pack")


def cached_comfyuis() -> list[Path]:
    """Every ComfyUI in the cache that is new enough, newest first."""
    cache = comfyui_cache()
    folders = [path for path in cache.iterdir() if not path.name.startswith(".")] if cache.is_dir() else []
    versions = {path.resolve(): read_version(path) for path in folders}
    fitting = [path for path, version in versions.items() if version is not None and version >= MINIMUM]
    return sorted(fitting, key=lambda path: versions[path], reverse=True)


def present_comfyuis() -> list[Path]:
    """Every ComfyUI on this machine in the order of preference, without repeats."""
    found = [named_comfyui(), surrounding_comfyui(), *cached_comfyuis()]
    return list(dict.fromkeys(path for path in found if path is not None))


def find_comfyui() -> Path:
    """The ComfyUI to use; clones the pinned version when there is none. Raises ComfyUIError."""
    return named_comfyui() or surrounding_comfyui() or next(iter(cached_comfyuis()), None) or clone_comfyui()


def find_all_comfyui() -> list[Path]:
    """Every ComfyUI found, the preferred one first; clones the pinned version when there is none."""
    return present_comfyuis() or [clone_comfyui()]


def clone_comfyui() -> Path:
    """Clone the pinned version into the cache. Raises NoComfyUIError and leaves nothing half made."""
    target = comfyui_cache() / PINNED
    print(f"No ComfyUI found: cloning ComfyUI {PINNED} into {target} (about a minute)", flush=True)
    with scratch("clone") as folder:
        fresh = folder / "ComfyUI"
        command = ["git", "clone", "--quiet", "--depth", "1", "--branch", f"v{PINNED}", REPOSITORY, str(fresh)]
        failure = run_limited(command, CLONE_SECONDS)
        if failure is None and read_version(fresh) is None:
            failure = "the clone holds no ComfyUI"
        if failure:
            raise NoComfyUIError(failure)
        target.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(OSError):  # another run may have put it there meanwhile
            fresh.rename(target)
    return require_comfyui(target, "The cloned ComfyUI")


def run_limited(command: Sequence[str], seconds: float) -> str | None:
    """Run a command that must neither ask nor hang. Returns None on success, else why it failed."""
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


@contextlib.contextmanager
def scratch(name: str) -> Iterator[Path]:
    """A temporary folder in StoryLoom's cache, removed afterwards, as are forgotten ones of killed runs."""
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


# ---- running ---------------------------------------------------------------------------------------------------------


def pack_base(base: Path, pack: Path = ROOT) -> Path:
    """Prepare a ComfyUI base directory that has the pack, linked or else copied, as a custom node. Returns base."""
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


class Client:
    """A running ComfyUI server at an address, over HTTP.

    Methods raise OSError when the server cannot be reached, ComfyUIError when it answers with an error, and ValueError
    when what answers is no ComfyUI.
    """

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        self.client_id = uuid.uuid4().hex

    def fetch(self, path: str, body: dict | None = None, seconds: float = REQUEST_SECONDS) -> bytes:
        """GET, or POST of a JSON body. Raises PromptRefused for a 400 that explains itself."""
        request = urllib.request.Request(
            self.url + path,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=seconds) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            text = error.read().decode(errors="replace")
            answer = parse_json_object(text)
            if error.code == 400 and "error" in answer:
                raise PromptRefused(answer) from None
            raise ComfyUIError(f"ComfyUI answered {path} with {error.code}: {text.strip()[:300]}") from None
        except http.client.HTTPException as error:  # the connection ended in the middle of an answer
            raise ConnectionError(f"{type(error).__name__}: {error}") from None

    def request(self, path: str, body: dict | None = None, seconds: float = REQUEST_SECONDS) -> dict:
        """As `fetch`, of a JSON answer."""
        return json.loads(self.fetch(path, body, seconds))

    def submit(self, prompt: dict, extra_data: dict | None = None) -> str:
        """Queue an API-format workflow and return its prompt id. Raises PromptRefused when it is not valid.

        extra_data: said beside the workflow in the server's queue and history.
        """
        asked = {"prompt": prompt, "client_id": self.client_id, "extra_data": extra_data or {}}
        return self.request("/prompt", asked)["prompt_id"]

    def queue(self) -> tuple[dict[str, dict], dict[str, dict]]:
        """Prompt id -> extra_data of what runs, and of what waits."""
        told = self.request("/queue")
        running, waiting = ({item[1]: item[3] for item in told[f"queue_{kind}"]} for kind in ("running", "pending"))
        return running, waiting

    def drop(self, prompt_ids: Sequence[str]) -> None:
        """Take workflows out of the queue, and stop the one that runs if it is among them."""
        if not prompt_ids:
            return
        self.fetch("/queue", {"delete": list(prompt_ids)})
        running, _ = self.queue()
        for prompt_id in running.keys() & set(prompt_ids):
            self.fetch("/interrupt", {"prompt_id": prompt_id})

    def history(self, prompt_id: str) -> dict | None:
        """The history entry of a finished prompt, or None while it waits or runs."""
        return self.request(f"/history/{prompt_id}").get(prompt_id)

    def finished(self, prompt_id: str) -> dict | None:
        """As `history`. Raises PromptFailed with one sentence when the prompt did not succeed."""
        entry = self.history(prompt_id)
        if entry is not None and entry["status"]["status_str"] != "success":
            raise PromptFailed(describe_failure(entry["status"].get("messages", [])))
        return entry

    def view(self, image: dict) -> bytes:
        """The file of a picture that a history entry names."""
        asked = urllib.parse.urlencode({name: image[name] for name in ("filename", "subfolder", "type")})
        return self.fetch(f"/view?{asked}")


class Server(Client):
    """A headless ComfyUI server, as a context manager.

    comfyui is a ComfyUI folder, base a folder prepared by `pack_base`, python the interpreter of its environment.
    front: folder of the browser interface, by default an empty page; cpu: use no graphics card; dies_with_us: end it
    even when this process is killed (Linux only); processes: how many such servers share the cores, see
    `thread_settings`. Entering waits until the server answers and raises ComfyUIError, with
    the tail of its log, when it does not.
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
        """The server's process, once it is started."""
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
                self._use(free_port())  # someone took the port between the choice and the start
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
            environment["PYTHONDONTWRITEBYTECODE"] = "1"  # leave no files in a ComfyUI that is the user's own
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                self.command(),
                cwd=self.base,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C comes to us, and we stop the server
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
        """As the client's; says what the log does when the server has ended."""
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
        one sentence when a node fails or the time is over, ComfyUIError when the server dies.
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
        """Pass on the progress messages of a prompt until it is finished, the server ends or the time is over."""
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
            return  # `wait` goes on without messages and tells when the server is gone

    def outputs(self, history: dict) -> list[Path]:
        """The image files that a prompt saved (previews are not), in the order of the history."""
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


def end_with_parent() -> None:
    """Have Linux kill this process when the thread that started it ends, however it does."""
    import ctypes

    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


STARTING = ("execution_start", "execution_cached")


def free_port() -> int:
    """A port on which nothing listens right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def end_process(process: subprocess.Popen, seconds: float = 10) -> None:
    """End a process that was started in a session of its own, and its children."""
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


# ---- sentences -------------------------------------------------------------------------------------------------------


def parse_json_object(text: str) -> dict:
    """The JSON object in a text, or an empty one."""
    with contextlib.suppress(ValueError):
        value = json.loads(text)
        return value if isinstance(value, dict) else {}
    return {}


def describe_refusal(errors: dict) -> str:
    """One sentence from the server's answer to a workflow that is not valid."""
    reasons = [
        f"node {node} ({report.get('class_type', 'unknown')}): {reason_text(reason)}"
        for node, report in (errors.get("node_errors") or {}).items()
        for reason in report.get("errors", [])
    ]
    error = errors.get("error") or {}
    reasons = reasons or [reason_text(error) if isinstance(error, dict) else str(error)]
    return "ComfyUI refused the workflow: " + "; ".join(dict.fromkeys(reasons))


def reason_text(reason: dict) -> str:
    message, details = (one_line(reason.get(key)) for key in ("message", "details"))
    return f"{message}: {details}" if message and details else message or details or "no reason given"


def one_line(text: object) -> str:
    return " ".join(str(text or "").split())


def describe_failure(messages: list) -> str:
    """One sentence from the status messages of a prompt that did not succeed."""
    for kind, data in reversed(messages):
        where = f"node {data.get('node_id')} ({data.get('node_type')})"
        if kind == "execution_error":
            return f"The workflow failed at {where}: {one_line(data.get('exception_message')) or 'no message'}"
        if kind == "execution_interrupted":
            return f"The workflow was interrupted at {where}."
    return "The workflow failed and ComfyUI gave no reason."
