"""The output folder of a run, written so that a run killed at any moment leaves only complete sets.

    run.json                      settings of the pictures
    <method>/<set>/frame-01.png   pictures
    <method>/<set>/set.json       the texts
    <method>/<set>/metrics.json   measures
    table.md                      means over the sets
    .state/                       lock, log and unfinished sets; not part of the results

Apart from `.state`, the files depend only on the settings: not on the time, the server or the order of work.
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
    """The folder cannot be used; the message gives the reason and the remedy."""


class Store:
    def __init__(self, folder: Path):
        self.folder = folder
        self.state = folder / STATE
        self._unfinished = self.state / "unfinished"

    @property
    def run(self) -> str:
        """Identifies this folder on this machine in the queues of servers."""
        import platform

        return sha256(f"{platform.node()} {self.folder.resolve()}".encode()).hexdigest()[:16]

    @contextlib.contextmanager
    def locked(self, settings: Mapping) -> Iterator[None]:
        """Lock the folder. Raises StoreError if another run uses it or it was drawn with other settings."""
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
                f"Another run is writing into {self.folder}; wait for it, or choose another --out."
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
                f"The pictures in {self.folder} were drawn with other settings ({'; '.join(other)}); "
                "use those, or choose another --out."
            )

    def has(self, key: str) -> bool:
        """Whether a set, "method/set", is drawn."""
        return (self.folder / key).is_dir()

    def save_set(self, key: str, files: Mapping[str, bytes]) -> None:
        """Save a set atomically: its folder has all files or does not exist."""
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
        """Write a file atomically."""
        fresh = self._unfinished / "-".join(file.relative_to(self.folder).parts)
        write_through(fresh, content)
        os.replace(fresh, file)
        sync_folder(file.parent)

    def pictures(self, key: str) -> list[bytes]:
        return [file.read_bytes() for file in sorted((self.folder / key).glob("frame-*.png"))]

    def read(self, key: str, name: str) -> dict | None:
        """A JSON file of a set, None if it does not exist."""
        file = self.folder / key / name
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None

    def log(self, text: str) -> None:
        with (self.state / "log.txt").open("a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")


def as_json(content: Mapping) -> bytes:
    return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()


def picture_file(content: bytes, graph: Mapping) -> bytes:
    """A server's picture as PNG with the workflow that drew it; the same pixels give the same bytes from any server.

    Raises ValueError if it is not a picture.
    """
    from PIL import Image, PngImagePlugin

    metadata = PngImagePlugin.PngInfo()
    metadata.add_text("prompt", json.dumps(graph))
    buffer = io.BytesIO()
    try:
        with Image.open(io.BytesIO(content)) as picture:
            picture.convert("RGB").save(buffer, "PNG", pnginfo=metadata)
    except OSError as error:
        raise ValueError(f"the server's picture cannot be read: {error}") from None
    return buffer.getvalue()


def set_files(pictures: Sequence[bytes], texts: Mapping) -> dict[str, bytes]:
    """File name -> content of all files of a set except its measures."""
    frames = {f"frame-{number:02}.png": picture for number, picture in enumerate(pictures, start=1)}
    return {**frames, "set.json": as_json({**texts, "frames": list(frames)})}


def write_through(file: Path, content: bytes) -> None:
    """Write a file and flush it to disk."""
    with file.open("wb") as handle:
        handle.write(content)
        handle.flush()
        os.fsync(handle.fileno())


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to disk, except on Windows, which cannot."""
    if os.name != "nt":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
