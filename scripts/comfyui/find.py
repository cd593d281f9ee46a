"""Finds ComfyUI on this machine, or clones it."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

from .errors import ComfyUIError
from .processes import run_limited, scratch, storyloom_cache

ROOT = Path(__file__).absolute().parents[2]
REPOSITORY = "https://github.com/Comfy-Org/ComfyUI.git"
PINNED = "0.33.0"
MINIMUM = (0, 19)
CLONE_SECONDS = 300

HOW_TO_PROVIDE = (
    "set COMFYUI_PATH to a ComfyUI folder (0.19 or newer), or put a checkout at {cache}/<version>, "
    "or clone this pack into ComfyUI's custom_nodes folder"
)


class NoComfyUIError(ComfyUIError):
    """There is no ComfyUI on this machine and it could not be cloned, for the given reason."""

    def __init__(self, reason: str):
        super().__init__(f"No ComfyUI was found, and cloning it failed ({reason}): {how_to_provide()}.")
        self.reason = reason


def comfyui_cache() -> Path:
    return storyloom_cache() / "comfyui"


def how_to_provide() -> str:
    return HOW_TO_PROVIDE.format(cache=comfyui_cache())


def read_version(folder: Path) -> tuple[int, ...] | None:
    """The version of the ComfyUI in a folder, or None if the folder holds no ComfyUI."""
    source = folder / "comfyui_version.py"
    if not source.is_file() or not (folder / "main.py").is_file():
        return None
    match = re.search(r"__version__\s*=\s*[\"'](\d+(?:\.\d+)*)", source.read_text(encoding="utf-8"))
    return tuple(int(part) for part in match[1].split(".")) if match else None


def version_text(folder: Path) -> str:
    return ".".join(map(str, read_version(folder) or ("unknown",)))


def require_comfyui(folder: Path, origin: str) -> Path:
    """The folder, resolved. Raises ComfyUIError if it holds no ComfyUI or one that is too old."""
    folder = folder.expanduser()
    version = read_version(folder)
    if version is None:
        raise ComfyUIError(
            f"{origin} is {folder}, which holds no ComfyUI (no main.py with comfyui_version.py): correct or unset it."
        )
    if version < MINIMUM:
        raise ComfyUIError(
            f"{origin} is {folder}, which holds ComfyUI {version_text(folder)}: "
            "StoryLoom needs 0.19 or newer; update it."
        )
    return folder.resolve()


def named_comfyui() -> Path | None:
    """The ComfyUI that $COMFYUI_PATH names, if it is set."""
    named = os.environ.get("COMFYUI_PATH")
    return require_comfyui(Path(named), "COMFYUI_PATH") if named else None


def surrounding_comfyui() -> Path | None:
    """The ComfyUI whose custom_nodes folder holds this pack, if any."""
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
    """Every ComfyUI on this machine in order of preference, without duplicates."""
    folders = [named_comfyui(), surrounding_comfyui(), *cached_comfyuis()]
    return list(dict.fromkeys(path for path in folders if path is not None))


def find_comfyui() -> Path:
    """The preferred ComfyUI; clones the pinned version if there is none. Raises ComfyUIError."""
    return named_comfyui() or surrounding_comfyui() or next(iter(cached_comfyuis()), None) or clone_comfyui()


def find_all_comfyui() -> list[Path]:
    """Every ComfyUI, the preferred one first; clones the pinned version if there is none."""
    return present_comfyuis() or [clone_comfyui()]


def clone_comfyui() -> Path:
    """Clone the pinned version into the cache, complete or not at all. Raises NoComfyUIError."""
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
        with contextlib.suppress(OSError):  # another run may have created it meanwhile
            fresh.rename(target)
    return require_comfyui(target, "The cloned ComfyUI")
