"""Files in ComfyUI's folders."""

import folder_paths


def files_in(kind: str) -> list[str]:
    """A kind's files, sorted. ComfyUI's own list fails when a folder was deleted that it has seen before."""
    try:
        return folder_paths.get_filename_list(kind)
    except FileNotFoundError:
        return folder_paths.get_filename_list_(kind)[0]
