"""Where training pictures come from: a folder with a JSON list, or WebDataset shards.

JSON list, as published with StoryMaker: `{"1": [...], "2": [...], "3": [...]}` by number of persons; an item is
`[image, pose image, colour mask, caption, number of persons, faceid folder]`, with paths relative to the list's folder.
The faceid folder contains `0.bin`, `1.bin` and so on, one per person.

Shards are .tar files of members `KEY.jpg` (or .jpeg, .png, .webp), `KEY.mask.png`, `KEY.pose.png`, `KEY.txt` (caption),
`KEY.json` (`{"persons": 2}`) and `KEY.0.bin`, `KEY.1.bin`, ... They are read by position, because a resumed run has to
find any picture again; the `webdataset` package only streams them in order.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

LIST = "data.json"
PICTURES = ("jpg", "jpeg", "png", "webp")
MOST = 3
"""Most persons in a picture, as many as StoryMaker has learned embeddings."""


class DataError(ValueError):
    """Training data cannot be used. The message is one sentence for the user."""


@dataclass(frozen=True)
class Item:
    """A training picture. Paths are for `Source.read`; missing files have the path ""."""

    name: str
    image: str
    pose: str
    mask: str
    caption: str
    faces: tuple[str, ...]
    """One file of face features per person."""

    def files(self) -> dict[str, str]:
        """Every file of the item, by the end of its name in a shard."""
        suffix = PurePosixPath(self.image.replace("\\", "/")).suffix or ".jpg"
        named = {suffix: self.image, ".pose.png": self.pose, ".mask.png": self.mask}
        return named | {f".{number}.bin": path for number, path in enumerate(self.faces)}


@dataclass(frozen=True, eq=False)
class Source:
    """Training pictures and their files.

    items        in a fixed order
    faults       (name, reason) of what the list or a shard contains that is no item
    fingerprint  changes when the list or a shard does
    places       path -> (shard, first byte, number of bytes); empty if the paths are files of `folder`
    """

    folder: Path
    items: tuple[Item, ...]
    faults: tuple[tuple[str, str], ...]
    fingerprint: str
    places: Mapping[str, tuple[Path, int, int]]

    def read(self, path: str) -> bytes:
        """The content of a file of an item. Raises FileNotFoundError or another OSError."""
        if not path:
            raise FileNotFoundError("no file is given")
        if not self.places:
            return (self.folder / path).read_bytes()
        if path not in self.places:
            raise FileNotFoundError(f"{path} is not in the shards")
        shard, start, size = self.places[path]
        with shard.open("rb") as file:
            file.seek(start)
            content = file.read(size)
        if len(content) != size:
            raise OSError(f"{shard.name} ends too early")
        return content


def open_source(path: Path) -> Source:
    """Training data at a path: a JSON list, a folder with `data.json`, a shard, or a folder of shards.

    Raises DataError if there is none, or if the list cannot be read.
    """
    if path.is_file():
        return _shards(path.parent, [path]) if path.suffix == ".tar" else _listed(path)
    if (path / LIST).is_file():
        return _listed(path / LIST)
    shards = sorted(path.glob("*.tar"))
    if shards:
        return _shards(path, shards)
    fault = f"contains neither {LIST} nor .tar files" if path.is_dir() else "does not exist"
    raise DataError(f'"{path}" {fault}: make training data with the prepare command.')


def _listed(path: Path) -> Source:
    content = path.read_bytes()
    try:
        groups = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f'"{path}" is not a JSON list of training pictures ({error}): write it again.') from error
    if not isinstance(groups, dict) or not all(isinstance(group, list) for group in groups.values()):
        raise DataError(f'"{path}" is not of the form {{"1": [...], "2": [...], "3": [...]}}: write it again.')
    items, faults = [], []
    for persons, group in groups.items():
        for number, entry in enumerate(group):
            reason = _fault_of(entry, persons)
            if reason:
                shown = entry[0] if isinstance(entry, list) and entry and isinstance(entry[0], str) else ""
                faults.append((shown or f"{path.name}, item {number} of {persons}", reason))
                continue
            image, pose, mask, caption, count, folder = entry
            faces = tuple(str(PurePosixPath(folder or "faces") / f"{k}.bin") for k in range(int(count)))
            items.append(Item(image, image, pose or "", mask or "", caption or "", faces))
    return Source(path.parent, tuple(items), tuple(faults), hashlib.sha256(content).hexdigest(), {})


def _fault_of(entry: Any, persons: str) -> str:
    """What is wrong with an entry of the JSON list; "" for nothing."""
    if not isinstance(entry, list) or len(entry) != 6:
        return "the list's entry is not [image, pose image, colour mask, caption, number of persons, faceid folder]"
    *texts, count, folder = entry
    if not isinstance(entry[0], str) or not all(isinstance(t, str | None) for t in (*texts, folder)):
        return "the list's entry has something other than texts for paths and caption"
    if isinstance(count, bool) or not isinstance(count, int):
        return f"its number of persons is {count!r} instead of a whole number"
    if str(count) != persons:
        return f'it has {count} persons but is in the group "{persons}" of the list'
    return fault_of_count(count)


def fault_of_count(persons: int) -> str:
    """What is wrong with a number of persons; "" for nothing."""
    return "" if 1 <= persons <= MOST else f"it shows {persons} persons; training takes 1 to {MOST}"


def _shards(folder: Path, paths: Sequence[Path]) -> Source:
    samples: dict[str, dict[str, str]] = {}
    places, faults, digest = {}, [], hashlib.sha256()
    for path in paths:
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        try:
            for name, start, size in _members(path):
                directory, _, base = name.rpartition("/")
                key, _, kind = base.partition(".")
                full = f"{path.name}:{name}"
                places[full] = (path, start, size)
                samples.setdefault(f"{path.name}:{directory}/{key}" if directory else f"{path.name}:{key}", {})[
                    kind.lower()
                ] = full
        except (tarfile.TarError, OSError, EOFError) as error:
            faults.append((path.name, f"the shard is damaged ({error}); only what precedes the damage is read"))
    if not places:
        raise DataError(f'The shards in "{folder}" contain no pictures: write them again with the pack command.')
    source = Source(folder, (), (), "", places)
    items = []
    for name, files in samples.items():
        try:
            items.append(_sample(source, name, files))
        except DataError as error:
            faults.append((name, str(error)))
    return Source(folder, tuple(items), tuple(faults), digest.hexdigest(), places)


def _members(path: Path) -> Iterator[tuple[str, int, int]]:
    """(name, first byte, number of bytes) of every file in a shard."""
    with tarfile.open(path, "r:") as archive:
        for member in archive:
            if member.isfile():
                yield member.name, member.offset_data, member.size


def _sample(source: Source, name: str, files: Mapping[str, str]) -> Item:
    image = next((files[kind] for kind in PICTURES if kind in files), "")
    if not image:
        raise DataError(f"it has no picture (.{', .'.join(PICTURES)})")
    try:
        persons = json.loads(source.read(files.get("json", "")))["persons"]
        caption = source.read(files["txt"]).decode("utf-8") if "txt" in files else ""
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(
            f'its .json file with {{"persons": number}} or its .txt file cannot be read ({error})'
        ) from error
    reason = fault_of_count(persons) if type(persons) is int else f"its number of persons is {persons!r}"
    if reason:
        raise DataError(reason)
    pose = next((files[f"pose.{kind}"] for kind in PICTURES if f"pose.{kind}" in files), "")
    faces = tuple(files.get(f"{k}.bin", "") for k in range(persons))
    return Item(name, image, pose, files.get("mask.png", ""), caption, faces)


def pack(source: Source, folder: Path, per_shard: int) -> list[Path]:
    """Write a source as shards of `per_shard` pictures each, and return their paths. Missing files are left out."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for first in range(0, len(source.items), per_shard):
        path = folder / f"{len(written):06d}.tar"
        with tarfile.open(path, "w") as archive:
            for number, item in enumerate(source.items[first : first + per_shard], start=first):
                texts = {".txt": item.caption, ".json": json.dumps({"persons": len(item.faces)})}
                for kind, text in texts.items():
                    _add(archive, f"{number:08d}{kind}", text.encode("utf-8"))
                for kind, file in item.files().items():
                    try:
                        _add(archive, f"{number:08d}{kind}", source.read(file))
                    except OSError:
                        continue  # the scan of the shards reports it
        written.append(path)
    return written


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))
