"""Files in ComfyUI's folders."""

import os
import unicodedata
from collections.abc import Collection, Iterable, MutableSequence, MutableSet
from datetime import datetime
from pathlib import Path

import folder_paths

from ..prompts.script import short
from .file_names import dated

LONGEST_NAME, LONGEST_PREFIX = 200, 1000
"""Maximum bytes of a file or folder name (file systems allow 255 with number and suffix), and of the whole prefix."""


def register(kind: str, suffixes: Iterable[str], *folders: str) -> None:
    """Add folders to ComfyUI's search paths for a kind of files. folders: absolute, or relative to models/.

    If another pack or extra_model_paths.yaml has defined the kind, its suffixes are kept, in a collection of the same
    type, followed by ours. An empty collection means any file to ComfyUI and is kept too: see files_in.
    """
    known = kind in folder_paths.folder_names_and_paths
    for folder in folders:
        folder_paths.add_model_folder_path(kind, os.path.join(folder_paths.models_dir, folder))
    paths, listed = folder_paths.folder_names_and_paths[kind]
    if known and not listed:
        return
    extended = _with(listed, suffixes)
    if extended is not listed:
        folder_paths.folder_names_and_paths[kind] = (paths, extended)


def _with(listed: Collection[str], suffixes: Iterable[str]) -> Collection[str]:
    """The suffixes of another pack with ours added: the same set or list, or a new tuple or frozenset."""
    listed = (listed,) if isinstance(listed, str) else listed
    missing = [suffix for suffix in suffixes if suffix not in listed]
    if isinstance(listed, MutableSet):
        listed |= set(missing)
    elif isinstance(listed, MutableSequence):
        listed += missing
    else:
        listed = type(listed)((*listed, *missing))
    return listed


def files_in(kind: str, suffixes: Collection[str]) -> list[str]:
    """A kind's files with one of these suffixes, sorted; the kind itself may allow others.

    ComfyUI's own list fails if a folder that it has listed before was deleted.
    """
    try:
        files = folder_paths.get_filename_list(kind)
    except FileNotFoundError:
        files = folder_paths.get_filename_list_(kind)[0]
    return [file for file in files if os.path.splitext(file)[1].lower() in suffixes]


def checked_prefix(prefix: str, now: datetime) -> str:
    """A prefix as in Save Image, with dates filled in; other placeholders are left to ComfyUI.

    Raises ValueError if it has no file name, is outside the output folder, is too long, or has an invalid date.
    """
    prefix = dated(prefix, now)
    parts = prefix.replace("\\", "/").split("/")
    example = "write one such as StoryLoom/page."
    if not parts[-1].strip(". ") or any(unicodedata.category(c) in ("Cc", "Cs") for c in prefix):
        raise ValueError(f'filename_prefix "{short(prefix)}" has no file name: {example}')
    if ".." in parts or os.path.isabs(prefix) or parts[0] == "" or ":" in prefix:
        raise ValueError(f'filename_prefix "{short(prefix)}" is outside the output folder: {example}')
    if max(len(part.encode()) for part in parts) > LONGEST_NAME or len(prefix.encode()) > LONGEST_PREFIX:
        raise ValueError(f'filename_prefix "{short(prefix)}" is too long for a file name: {example}')
    return "/".join(parts)


def free_file(folder: str, name: str, counter: int, ending: str) -> tuple[Path, int]:
    """The first path from this number on that does not exist, and the next number."""
    while os.path.lexists(path := Path(folder, f"{name}_{counter:05}_.{ending}")):
        counter += 1
    return path, counter + 1
