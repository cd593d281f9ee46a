"""Files in ComfyUI's folders."""

import os
import unicodedata
from collections.abc import Iterable
from pathlib import Path

import folder_paths

from ..prompts.script import short

LONGEST_NAME, LONGEST_PREFIX = 200, 1000
"""Bytes of a file's or folder's name (number and ending come behind it, and disks hold 255), and of all together."""


def register(kind: str, suffixes: Iterable[str], *places: str) -> None:
    """Append places to where ComfyUI looks for a kind's files. places: absolute, or below models/."""
    for place in places:
        folder_paths.add_model_folder_path(kind, os.path.join(folder_paths.models_dir, place))
    folder_paths.folder_names_and_paths[kind][1].update(suffixes)


def files_in(kind: str) -> list[str]:
    """A kind's files, sorted. ComfyUI's own list fails when a folder was deleted that it has seen before."""
    try:
        return folder_paths.get_filename_list(kind)
    except FileNotFoundError:
        return folder_paths.get_filename_list_(kind)[0]


def checked_prefix(prefix: str) -> str:
    """A prefix as Save Image takes it. Raises ValueError when it names no file or would leave the output folder."""
    parts = prefix.replace("\\", "/").split("/")
    example = "write one such as StoryLoom/page."
    if not parts[-1].strip(". ") or any(unicodedata.category(c) in ("Cc", "Cs") for c in prefix):
        raise ValueError(f'filename_prefix "{short(prefix)}" has no file name: {example}')
    if ".." in parts or os.path.isabs(prefix) or parts[0] == "" or ":" in prefix:
        raise ValueError(f'filename_prefix "{short(prefix)}" leaves the output folder: {example}')
    if max(len(part.encode()) for part in parts) > LONGEST_NAME or len(prefix.encode()) > LONGEST_PREFIX:
        raise ValueError(f'filename_prefix "{short(prefix)}" is too long for a file: {example}')
    return "/".join(parts)


def free_file(folder: str, name: str, counter: int, ending: str) -> tuple[Path, int]:
    """The first place from this number on at which nothing lies, and the number behind it."""
    while os.path.lexists(path := Path(folder, f"{name}_{counter:05}_.{ending}")):
        counter += 1
    return path, counter + 1
