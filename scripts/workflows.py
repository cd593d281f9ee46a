"""Writes the templates, in the formats of the browser interface and of POST /prompt, and the subgraph blueprints.

Run `python scripts/workflows.py` after a change in scripts/graphs/ or of a node's inputs. It reads the nodes' schemas
from a real ComfyUI. After a change of the demo model, `python scripts/workflows.py --thumbnails` draws the demos too.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import comfyui
import environment
from graphs.catalogue import WORKFLOWS, texts, workflows
from graphs.host import running
from graphs.parts import DEMO

BORROWED = {
    "Character from a Photo": ("Two People", "Change the Outfit", "PhotoMaker Story"),
    "With and Without": ("Did It Work",),
}
"""Demo -> templates without a demo of their own, which take its picture."""


def draw_thumbnails(server: comfyui.Server) -> Iterator[Path]:
    """Run the demo workflows and write their pages as thumbnails, where the browser interface looks for these.

    A workflow for a checkpoint gets the picture of its demo.
    """
    from PIL import Image

    names = {workflow.name for workflow in workflows()}
    for name in sorted(name for name in names if name.startswith(DEMO)):
        prompt = json.loads((WORKFLOWS / "api" / f"{name}.json").read_text(encoding="utf-8"))
        environment.say(f"Drawing {name}")
        saved = server.outputs(server.wait(server.submit(prompt)))
        (page,) = (path for path in saved if path.name.startswith("page"))
        real = name.removeprefix(DEMO)
        for shown in {name, real, *BORROWED.get(real, ())} & names:
            thumbnail = WORKFLOWS / f"{shown}.jpg"
            with Image.open(page) as image:
                image.convert("RGB").save(thumbnail, quality=90)
            yield thumbnail


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--thumbnails", action="store_true", help="also draw the demos and write their thumbnails")
    options = parser.parse_args()
    environment.enter()
    with running("workflows") as (server, schemas):
        for path, text in texts(schemas).items():
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
            environment.say(f"Written: {path}")
        for path in draw_thumbnails(server) if options.thumbnails else ():
            environment.say(f"Written: {path}")


if __name__ == "__main__":
    try:
        main()
    except (environment.SetupError, *comfyui.FAILURES, KeyboardInterrupt) as reason:
        environment.exit_with(reason)
