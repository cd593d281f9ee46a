"""The route by which the editor of a story script asks for its faults and tokens: POST /storyloom/script."""

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
"""Bytes of a request: a story of a thousand frames."""
ARRIVAL = 10
"""Seconds in which a whole body has to arrive."""
SECONDS = 10
"""How long one script may be measured."""
CHARACTERS = 2_000_000
"""What one script may come to with identity and style in every frame: their tokens take up to 250 MB."""
WAITING = 8
"""How many requests may be measured or wait for it."""


class RequestError(Exception):
    """A request that is not answered. `status` is HTTP's."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


def register() -> None:
    """Add the route to ComfyUI's server, once. Without a server, as in tests, there is nothing to add it to."""
    server = sys.modules.get("server")
    instance = getattr(getattr(server, "PromptServer", None), "instance", None)
    if instance is not None and not any(getattr(route, "path", None) == PATH for route in instance.routes):
        instance.routes.post(PATH)(answer)


async def answer(request):
    """The measured script as JSON, or {"error": sentence}. request: an aiohttp request."""
    from aiohttp import web

    try:
        return web.json_response(await desk().measured(await texts_of(request)))
    except RequestError as error:
        return web.json_response({"error": str(error)}, status=error.status)


async def texts_of(request) -> dict[str, str | None]:
    """The three texts of a request. Raises RequestError."""
    if request.content_type != "application/json":
        raise RequestError(415, f"The content type is {request.content_type}: send application/json.")
    if "Content-Encoding" in request.headers:
        raise RequestError(415, "The body is compressed: send it uncompressed.")
    try:
        sent = json.loads(await asyncio.wait_for(body_of(request), ARRIVAL))
    except asyncio.TimeoutError:
        raise RequestError(408, f"The body was not received within {ARRIVAL} seconds: send it again.") from None
    except (ValueError, RecursionError):
        raise RequestError(400, "The body is not JSON.") from None
    texts = {box: sent.get(box) for box in BOXES} if isinstance(sent, Mapping) else {box: 0 for box in BOXES}
    if not all(text is None or isinstance(text, str) for text in texts.values()):
        raise RequestError(400, f"The body needs {', '.join(BOXES)}: each a string, or null if unknown.")
    return texts


async def body_of(request) -> bytearray:
    """All bytes of a request. Raises RequestError when they are too many or break off."""
    from aiohttp import web

    body = bytearray()
    try:
        async for chunk in request.content.iter_chunked(1 << 14):
            body += chunk
            if len(body) > BODY:
                too_long = f"The script is longer than {BODY // 1000} kB. It can be run, but not measured."
                raise RequestError(413, too_long)
    except (ConnectionError, web.RequestPayloadError):
        raise RequestError(400, "The body is incomplete: send it again.") from None
    return body


class Desk:
    """Measures scripts one after the other in a thread of its own: a tokenizer is used by one request at a time."""

    def __init__(self):
        self.worker = ThreadPoolExecutor(1, "storyloom")
        self.waiting = 0

    async def measured(self, texts: Mapping[str, str | None]) -> dict[str, Any]:
        """A measured script. Raises RequestError when that takes too long or too much, or when too many wait."""
        if self.waiting >= WAITING:
            raise RequestError(503, "Too many scripts are waiting to be measured: try again.")
        self.waiting += 1
        try:
            found = await asyncio.get_running_loop().run_in_executor(self.worker, _measure, texts)
        except TimeoutError:
            raise RequestError(
                503, f"Measuring the script took more than {SECONDS} seconds. It can still be run."
            ) from None
        finally:
            self.waiting -= 1
        return {"room": ROOM, **asdict(found)}


@cache
def desk() -> Desk:
    return Desk()


def _measure(texts: Mapping[str, str | None]):
    tokenize, deadline, left = _tokenizer(), time.monotonic() + SECONDS, CHARACTERS

    def limited(text: str) -> Tokens:
        nonlocal left
        left -= len(text)
        if left < 0:
            raise RequestError(
                413,
                f"With identity and style in every frame the script is longer than {CHARACTERS // 1000} kB. It can "
                "be run, but not measured.",
            )
        if time.monotonic() > deadline:
            raise TimeoutError
        try:
            return tokenize(text)
        except IndexError:
            raise ValueError(f'"{text}" has "embedding:" without a name. Write a file name after it.') from None

    return measure_script(limited, **texts)


@cache
def _tokenizer() -> Tokenize:
    """ComfyUI's own tokenizer of SDXL, as the encode nodes get it with a checkpoint."""
    import folder_paths
    from comfy.sdxl_clip import SDXLTokenizer

    tokenizer = SDXLTokenizer(embedding_directory=folder_paths.get_folder_paths("embeddings"))
    return partial(tokenizer.tokenize_with_weights, return_word_ids=True)
