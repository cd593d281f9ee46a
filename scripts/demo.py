"""Draws the demo story with a real ComfyUI on the CPU and prints where the finished page lies: `make demo`."""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import time
from pathlib import Path

import comfyui
import environment

ROOT = Path(__file__).absolute().parent.parent
OUT = ROOT / "out"
WORKFLOW = ROOT / "workflows" / "api" / "Demo - One Prompt One Story.json"


class DemoError(Exception):
    """The demo cannot run; the message is one sentence for the user."""


class ProgressBars:
    """A bar for each node that reports steps."""

    def __init__(self, prompt: dict):
        self.titles = {
            node: entry.get("_meta", {}).get("title") or entry["class_type"] for node, entry in prompt.items()
        }
        self.node = None
        self.bar = None

    def __call__(self, node: str, value: int, maximum: int) -> None:
        from tqdm import tqdm

        if node != self.node:
            self.close()
            self.node = node
            self.bar = tqdm(total=maximum, desc=f"  {self.titles.get(node, node)}", unit="step", ncols=90)
        self.bar.total = maximum
        self.bar.update(value - self.bar.n)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def read_workflow(path: Path) -> dict:
    """An API-format workflow. Raises DemoError when the file is missing or is something else."""
    if not path.is_file():
        raise DemoError(f"The workflow {path} does not exist.")
    try:
        prompt = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DemoError(f"The workflow {path} is no JSON: {error}") from None
    if not isinstance(prompt, dict) or not all(
        isinstance(node, dict) and "class_type" in node for node in prompt.values()
    ):
        raise DemoError(f"{path} is not in ComfyUI's API format: export it with 'Export (API)'.")
    return prompt


def draw(host: Path, prompt: dict, base: Path) -> list[Path]:
    """Run the workflow on a fresh server and return the saved images, copied to `out/`."""
    comfyui.pack_base(base, ROOT)
    environment.say(f"Starting ComfyUI {comfyui.version_text(host)} on the CPU (5 to 30 seconds)")
    with comfyui.Server(host, base, sys.executable) as server:
        environment.say("Drawing the story")
        bars = ProgressBars(prompt)
        try:
            images = server.outputs(server.wait(server.submit(prompt), on_progress=bars))
        finally:
            bars.close()
    if not images:
        raise DemoError("The workflow finished and saved no image: its last node has to be Save Image.")
    OUT.mkdir(exist_ok=True)
    return [Path(shutil.copy(image, OUT / image.name)) for image in images]


def keep_log(base: Path) -> None:
    """Keep the server's log of a failed run in `out/`, and say so."""
    log = base / "server.log"
    if log.is_file():
        OUT.mkdir(exist_ok=True)
        print(f"\nThe server's whole log: {shutil.copy(log, OUT / 'demo-server.log')}", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--comfyui", type=Path, help="ComfyUI folder to use instead of the one that is found")
    parser.add_argument("--workflow", type=Path, default=WORKFLOW, help="workflow in API format to run")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    prompt = read_workflow(options.workflow)
    host = comfyui.require_comfyui(options.comfyui, "--comfyui") if options.comfyui else comfyui.find_comfyui()
    environment.enter()
    began = time.monotonic()
    with comfyui.scratch("demo") as base:
        try:
            pages = draw(host, prompt, base)
        except Exception:
            keep_log(base)
            raise
    environment.say(f"Done in {time.monotonic() - began:.0f} seconds:")
    for page in pages:
        environment.say(f"  {page}")


if __name__ == "__main__":
    try:
        environment.require_python(sys.version_info)
        main()
    except (environment.SetupError, comfyui.ComfyUIError, comfyui.PromptRefused) as reason:
        environment.exit_with(reason)
    except (comfyui.PromptFailed, DemoError, KeyboardInterrupt) as reason:
        environment.exit_with(reason)
