"""The output folder of a run: written so that a run that is killed at any moment leaves only whole sets.

    run.json                      what the pictures are drawn with
    <method>/<set>/frame-01.png   pictures
    <method>/<set>/set.json       the texts
    <method>/<set>/metrics.json   what was measured
    table.md                      means over the sets
    .state/                       lock, log and unfinished sets; nothing of it is a result

Apart from `.state`, files depend on nothing but the settings: no time, no server, no order of work.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path

STATE = ".state"


class StoreError(Exception):
    """The folder cannot be used; the message says why and what to do."""


class Store:
    def __init__(self, folder: Path):
        self.folder = folder
        self.state = folder / STATE
        self._unfinished = self.state / "unfinished"

    @property
    def run(self) -> str:
        """Names this folder of this machine in the queues of servers."""
        import platform

        return sha256(f"{platform.node()} {self.folder.resolve()}".encode()).hexdigest()[:16]

    @contextlib.contextmanager
    def opened(self, settings: Mapping) -> Iterator[None]:
        """Hold the folder alone. Raises StoreError when another run has it, or it was drawn with other settings."""
        try:
            from filelock import FileLock, Timeout
        except ImportError:
            raise ImportError(
                'The benchmark needs filelock: pip install filelock, or "storyloom[benchmark]".'
            ) from None
        self.state.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.state / "lock", timeout=0):
                self._check(settings)
                shutil.rmtree(self._unfinished, ignore_errors=True)
                self._unfinished.mkdir()
                yield
        except Timeout:
            raise StoreError(
                f"Another run is writing into {self.folder}: wait for it, or choose another --out."
            ) from None

    def _check(self, settings: Mapping) -> None:
        file = self.folder / "run.json"
        if not file.exists():
            self._unfinished.mkdir(exist_ok=True)
            self.write(file, as_json(settings))
            return
        before = json.loads(file.read_text(encoding="utf-8"))
        now = json.loads(as_json(settings))
        other = [
            f"{key} {before.get(key)!r} there, {now.get(key)!r} now"
            for key in [*now, *(key for key in before if key not in now)]
            if before.get(key) != now.get(key)
        ]
        if other:
            raise StoreError(
                f"The pictures in {self.folder} were drawn with other settings ({'; '.join(other)}): "
                "use those, or choose another --out."
            )

    def has(self, key: str) -> bool:
        """Whether a set, "method/set", is drawn."""
        return (self.folder / key).is_dir()

    def save_set(self, key: str, files: Mapping[str, bytes]) -> None:
        """Put a whole set into its folder, which is there with all files or not at all."""
        fresh = self._unfinished / key.replace("/", "-")
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir()
        for name, content in files.items():
            write_through(fresh / name, content)
        target = self.folder / key
        target.parent.mkdir(exist_ok=True)
        os.replace(fresh, target)
        sync_folder(target.parent)

    def write(self, file: Path, content: bytes) -> None:
        """Put a file in place whole."""
        fresh = self._unfinished / "-".join(file.relative_to(self.folder).parts)
        write_through(fresh, content)
        os.replace(fresh, file)
        sync_folder(file.parent)

    def pictures(self, key: str) -> list[bytes]:
        return [file.read_bytes() for file in sorted((self.folder / key).glob("frame-*.png"))]

    def read(self, key: str, name: str) -> dict | None:
        """A JSON file of a set, None where it is not there."""
        file = self.folder / key / name
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None

    def log(self, text: str) -> None:
        with (self.state / "log.txt").open("a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")


def as_json(content: Mapping) -> bytes:
    return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()


def picture_file(content: bytes, graph: Mapping) -> bytes:
    """A picture of a server as PNG with the workflow that drew it: the same bytes for the same pixels from any server.

    Raises ValueError for what is no picture.
    """
    from PIL import Image, PngImagePlugin

    said = PngImagePlugin.PngInfo()
    said.add_text("prompt", json.dumps(graph))
    written = io.BytesIO()
    try:
        with Image.open(io.BytesIO(content)) as picture:
            picture.convert("RGB").save(written, "PNG", pnginfo=said)
    except OSError as error:
        raise ValueError(f"the server's picture cannot be read: {error}") from None
    return written.getvalue()


def set_files(pictures: Sequence[bytes], texts: Mapping) -> dict[str, bytes]:
    """File name -> content of a set."""
    frames = {f"frame-{number:02}.png": picture for number, picture in enumerate(pictures, start=1)}
    return {**frames, "set.json": as_json({**texts, "frames": list(frames)})}


def write_through(file: Path, content: bytes) -> None:
    """Write a file and have it on the disk."""
    with file.open("wb") as opened:
        opened.write(content)
        opened.flush()
        os.fsync(opened.fileno())


def sync_folder(folder: Path) -> None:
    """Have a folder's entries on the disk, where the system can."""
    if os.name != "nt":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
