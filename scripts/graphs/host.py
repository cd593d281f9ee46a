"""A real ComfyUI with the pack, for the nodes' schemas and for drawing."""

from __future__ import annotations

import contextlib
import json
import sys
import urllib.request
from collections.abc import Iterator

import comfyui


@contextlib.contextmanager
def running(name: str) -> Iterator[tuple[comfyui.Server, dict]]:
    """A server with the pack in a scratch folder of this name, and its nodes' schemas."""
    with (
        comfyui.scratch(name) as base,
        comfyui.Server(comfyui.find_comfyui(), comfyui.pack_base(base), sys.executable) as server,
        urllib.request.urlopen(f"{server.url}/object_info") as answer,
    ):
        yield server, json.load(answer)
