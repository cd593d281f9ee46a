"""Checks training data before training, and reports every item that cannot be used.

The result is kept beside the training run, so that a resumed run starts at once and sees the same pictures.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from ....models.files import write_whole
from .reading import BadItem, Limits, read_example
from .sources import DataError, Item, Source

INDEX, REPORT = "data-index.json", "data-report.txt"
SHOWN = 5
"""Most faults in a message; the report has all of them."""


@dataclass(frozen=True, eq=False)
class Index:
    """The usable items of a source.

    items  in the source's order
    sizes  height and width of each one for training
    faults (file, reason) of everything else
    """

    items: tuple[Item, ...]
    sizes: tuple[tuple[int, int], ...]
    faults: tuple[tuple[str, str], ...]

    @property
    def persons(self) -> tuple[int, ...]:
        return tuple(len(item.faces) for item in self.items)


def scan(source: Source, limits: Limits, workers: int, progress: Callable[[], None] = lambda: None) -> Index:
    """Read every item completely. progress: called after each one."""
    items, sizes, faults = [], [], list(source.faults)
    for item, found in _checked(source, limits, workers):
        progress()
        if isinstance(found, BadItem):
            faults.append((found.file if found.file == item.name else f"{item.name}: {found.file}", str(found)))
        else:
            items.append(item)
            sizes.append(found)
    return Index(tuple(items), tuple(sizes), tuple(faults))


def _checked(source: Source, limits: Limits, workers: int) -> Iterator[tuple[Item, tuple[int, int] | BadItem]]:
    def check(item: Item) -> tuple[int, int] | BadItem:
        try:
            return read_example(source, item, limits).picture.shape[:2]
        except BadItem as fault:
            return fault

    with ThreadPoolExecutor(workers) as pool:
        yield from zip(source.items, pool.map(check, source.items), strict=True)


def index_of(
    source: Source, limits: Limits, folder: Path, bad: str, workers: int, progress: Callable[[], None] = lambda: None
) -> Index:
    """Scan a source, and write the index and a report of all faults into `folder`.

    bad: "skip" leaves faulty items out, "refuse" raises DataError if there are any. DataError is also raised if nothing
    is left.
    """
    index = scan(source, limits, workers, progress)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / REPORT, report(index).encode("utf-8"))
    if index.faults and bad == "refuse":
        raise DataError(
            f"{summary(index)} {listed(index.faults)} All are in {folder / REPORT}: repair or remove them, or train "
            "without them with --bad skip."
        )
    if not index.items:
        raise DataError(f"No usable picture is left. {listed(index.faults)} All faults are in {folder / REPORT}.")
    content = _key(source, limits) | {"index": asdict(index)}
    write_whole(folder / INDEX, json.dumps(content).encode("utf-8"))
    return index


def known_index(source: Source, limits: Limits, folder: Path) -> Index:
    """The index that `index_of` wrote for a run that is now resumed.

    Raises DataError if it is missing or was written for other data, because the run could not be continued exactly.
    """
    try:
        content = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        index = content.pop("index")
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"{folder / INDEX} cannot be read ({error}): begin a new run in another --out folder."
        ) from error
    if content != _key(source, limits):
        raise DataError(
            f"The data or its limits have changed since the run in {folder} began: restore them, or begin a new run in "
            "another --out folder."
        )
    items = (Item(**entry | {"faces": tuple(entry["faces"])}) for entry in index["items"])
    sizes, faults = ((tuple(pair) for pair in index[name]) for name in ("sizes", "faults"))
    return Index(tuple(items), tuple(sizes), tuple(faults))


def _key(source: Source, limits: Limits) -> dict:
    return {"data": source.fingerprint, "limits": asdict(limits)}


def summary(index: Index) -> str:
    """How many items there are, how many are used, and how many are left out."""
    left_out = len(index.faults)
    return f"{len(index.items) + left_out} pictures: {len(index.items)} are usable, {left_out} are not."


def listed(faults: Sequence[tuple[str, str]]) -> str:
    """The first faults, and how many more there are."""
    texts = [f"{file}: {reason}." for file, reason in faults[:SHOWN]]
    more = len(faults) - SHOWN
    return " ".join(texts) + (f" And {more} more." if more > 0 else "")


def report(index: Index) -> str:
    """A line for every fault, after the summary."""
    return "\n".join([summary(index), *(f"{file}\t{reason}" for file, reason in index.faults), ""])
