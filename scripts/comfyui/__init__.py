"""ComfyUI for the demo, the tests and the benchmarks: finds or clones it, and runs its real server.

Only the progress display (`Server.wait` with `on_progress`) needs more than the standard library: aiohttp.
"""

from .client import Client
from .errors import FAILURES, ComfyUIError, PromptFailed, PromptRefused
from .find import (
    PINNED,
    NoComfyUIError,
    cached_comfyuis,
    find_all_comfyui,
    find_comfyui,
    how_to_provide,
    present_comfyuis,
    read_version,
    require_comfyui,
    version_text,
)
from .processes import scratch, storyloom_cache
from .server import Server, pack_base

__all__ = [
    "FAILURES",
    "PINNED",
    "Client",
    "ComfyUIError",
    "NoComfyUIError",
    "PromptFailed",
    "PromptRefused",
    "Server",
    "cached_comfyuis",
    "find_all_comfyui",
    "find_comfyui",
    "how_to_provide",
    "pack_base",
    "present_comfyuis",
    "read_version",
    "require_comfyui",
    "scratch",
    "storyloom_cache",
    "version_text",
]
