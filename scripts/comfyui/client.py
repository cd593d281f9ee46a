"""A client for ComfyUI's HTTP interface. Standard library only."""

from __future__ import annotations

import contextlib
import http.client
import json
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Sequence

from .errors import ComfyUIError, PromptFailed, PromptRefused, describe_failure

REQUEST_SECONDS = 30


class Client:
    """A running ComfyUI server at an address.

    Methods raise OSError if the server cannot be reached, ComfyUIError if it responds with an error, and ValueError
    if the response does not come from ComfyUI.
    """

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        self.client_id = uuid.uuid4().hex

    def fetch(self, path: str, body: dict | None = None, seconds: float = REQUEST_SECONDS) -> bytes:
        """GET, or POST with a JSON body. Raises PromptRefused for a 400 with an explanation."""
        request = urllib.request.Request(
            self.url + path,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=seconds) as response:
                return response.read()
        except urllib.error.HTTPError as error:
            text = error.read().decode(errors="replace")
            reasons = parse_json_object(text)
            if error.code == 400 and "error" in reasons:
                raise PromptRefused(reasons) from None
            raise ComfyUIError(f"ComfyUI answered {path} with {error.code}: {text.strip()[:300]}") from None
        except http.client.HTTPException as error:  # the connection ended in the middle of a response
            raise ConnectionError(f"{type(error).__name__}: {error}") from None

    def request(self, path: str, body: dict | None = None, seconds: float = REQUEST_SECONDS) -> dict:
        """Like `fetch`, for a JSON response."""
        return json.loads(self.fetch(path, body, seconds))

    def submit(self, prompt: dict, extra_data: dict | None = None) -> str:
        """Queue an API-format workflow and return its prompt id. Raises PromptRefused if it is invalid.

        extra_data: stored with the workflow in the server's queue and history.
        """
        body = {"prompt": prompt, "client_id": self.client_id, "extra_data": extra_data or {}}
        return self.request("/prompt", body)["prompt_id"]

    def queue(self) -> tuple[dict[str, dict], dict[str, dict]]:
        """Prompt id -> extra_data of the running workflows, and of the waiting ones."""
        queue = self.request("/queue")
        running, waiting = ({item[1]: item[3] for item in queue[f"queue_{kind}"]} for kind in ("running", "pending"))
        return running, waiting

    def drop(self, prompt_ids: Sequence[str]) -> None:
        """Remove workflows from the queue, and interrupt the running one if it is among them."""
        if not prompt_ids:
            return
        self.fetch("/queue", {"delete": list(prompt_ids)})
        running, _ = self.queue()
        for prompt_id in running.keys() & set(prompt_ids):
            self.fetch("/interrupt", {"prompt_id": prompt_id})

    def history(self, prompt_id: str) -> dict | None:
        """The history entry of a finished prompt, or None while it waits or runs."""
        return self.request(f"/history/{prompt_id}").get(prompt_id)

    def finished(self, prompt_id: str) -> dict | None:
        """Like `history`. Raises PromptFailed with one sentence if the prompt failed."""
        entry = self.history(prompt_id)
        if entry is not None and entry["status"]["status_str"] != "success":
            raise PromptFailed(describe_failure(entry["status"].get("messages", [])))
        return entry

    def view(self, image: dict) -> bytes:
        """The contents of an image file that a history entry names."""
        query = urllib.parse.urlencode({name: image[name] for name in ("filename", "subfolder", "type")})
        return self.fetch(f"/view?{query}")


def parse_json_object(text: str) -> dict:
    """The JSON object in a text, or an empty one if there is none."""
    with contextlib.suppress(ValueError):
        value = json.loads(text)
        return value if isinstance(value, dict) else {}
    return {}
