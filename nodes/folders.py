"""Files in ComfyUI's folders."""

import os
from collections.abc import Iterable

import folder_paths


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
