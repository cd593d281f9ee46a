"""The route POST /storyloom/script: faults and token counts for the script editor."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import cache, partial
from typing import Any

from ..prompts.measure import measure_script
from ..prompts.tokens import ROOM, Tokenize, Tokens

PATH = "/storyloom/script"
BOXES = ("identity", "frames", "style")
BODY = 100_000
"""Maximum bytes of a request: a story of a thousand frames."""
ARRIVAL = 10
"""Seconds within which the whole body must be received."""
SECONDS = 10
"""Maximum computing time to measure one script, which other work on the machine does not stretch."""
CHARACTERS = 2_000_000
"""Maximum length of a script with identity and style in every frame: its tokens take up to 250 MB."""
WAITING = 8
"""Maximum number of requests being measured or waiting."""


class RequestError(Exception):
    """A rejected request, with its HTTP `status`."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


def register() -> None:
    """Add the route to ComfyUI's server, once. Does nothing without a server, as in tests."""
    server = sys.modules.get("server")
    instance = getattr(getattr(server, "PromptServer", None), "instance", None)
    if instance is not None and not any(getattr(route, "path", None) == PATH for route in instance.routes):
        instance.routes.post(PATH)(answer)


async def answer(request):
    """The measured script as JSON, or {"error": message}. request: an aiohttp request."""
    from aiohttp import web

    try:
        return web.json_response(await measurer().measure(await texts_of(request)))
    except RequestError as error:
        return web.json_response({"error": str(error)}, status=error.status)


async def texts_of(request) -> dict[str, str | None]:
    """The three texts of a request. Raises RequestError."""
    if request.content_type != "application/json":
        raise RequestError(415, f"The content type is {request.content_type}: send application/json.")
    if "Content-Encoding" in request.headers:
        raise RequestError(415, "The body is compressed: send it uncompressed.")
    try:
        body = json.loads(await asyncio.wait_for(body_of(request), ARRIVAL))
    except asyncio.TimeoutError:
        raise RequestError(408, f"The body was not received within {ARRIVAL} seconds: send it again.") from None
    except (ValueError, RecursionError):
        raise RequestError(400, "The body is not JSON.") from None
    texts = {box: body.get(box) for box in BOXES} if isinstance(body, Mapping) else {box: 0 for box in BOXES}
    if not all(text is None or isinstance(text, str) for text in texts.values()):
        raise RequestError(400, f"The body needs {', '.join(BOXES)}: each a string, or null if unknown.")
    return texts


async def body_of(request) -> bytearray:
    """The body of a request. Raises RequestError if it is too long or incomplete."""
    from aiohttp import web

    body = bytearray()
    try:
        async for chunk in request.content.iter_chunked(1 << 14):
            body += chunk
            if len(body) > BODY:
                too_long = (
                    f"The script is longer than {BODY // 1000} kB. It can be run, but its tokens are not counted."
                )
                raise RequestError(413, too_long)
    except (ConnectionError, web.RequestPayloadError):
        raise RequestError(400, "The body is incomplete: send it again.") from None
    return body


class ScriptMeasurer:
    """Measures scripts one at a time in a thread of its own, since the tokenizer must not be used concurrently."""

    def __init__(self):
        self.worker = ThreadPoolExecutor(1, "storyloom")
        self.waiting = 0

    async def measure(self, texts: Mapping[str, str | None]) -> dict[str, Any]:
        """Measure a script. Raises RequestError if it is too long, takes too long, or too many requests wait."""
        if self.waiting >= WAITING:
            raise RequestError(503, "Too many scripts are waiting to be measured: try again.")
        self.waiting += 1
        try:
            measurement = await asyncio.get_running_loop().run_in_executor(self.worker, _measure, texts)
        except TimeoutError:
            raise RequestError(
                503, f"Measuring the script took more than {SECONDS} seconds of computing. It can still be run."
            ) from None
        finally:
            self.waiting -= 1
        return {"room": ROOM, **asdict(measurement)}


@cache
def measurer() -> ScriptMeasurer:
    return ScriptMeasurer()


def _measure(texts: Mapping[str, str | None]):
    tokenize, deadline, left = _tokenizer(), time.thread_time() + SECONDS, CHARACTERS

    def limited(text: str) -> Tokens:
        nonlocal left
        left -= len(text)
        if left < 0:
            raise RequestError(
                413,
                f"With identity and style in every frame the script is longer than {CHARACTERS // 1000} kB. It can "
                "be run, but not measured.",
            )
        if time.thread_time() > deadline:
            raise TimeoutError
        try:
            return tokenize(text)
        except IndexError:
            raise ValueError(f'"{text}" has "embedding:" without a name. Write a file name after it.') from None

    return measure_script(limited, **texts)


@cache
def _tokenizer() -> Tokenize:
    """ComfyUI's own SDXL tokenizer, as used by the encode nodes with a checkpoint."""
    import folder_paths
    from comfy.sdxl_clip import SDXLTokenizer

    tokenizer = SDXLTokenizer(embedding_directory=folder_paths.get_folder_paths("embeddings"))
    return partial(tokenizer.tokenize_with_weights, return_word_ids=True)
