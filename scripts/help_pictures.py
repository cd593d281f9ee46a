"""Draws the pictures of the help pages, web/docs/images, and the pack's emblem, on the demo model in a real ComfyUI.

Run `python scripts/help_pictures.py` after a change of the demo model or of what a node does. It downloads nothing, and
the same machine draws the same pictures.
"""

from __future__ import annotations

import comfyui
import environment
from graphs.catalogue import ROOT
from graphs.help.comparisons import add_comparisons
from graphs.help.prompt import Graph
from graphs.host import running
from progress import ProgressBars

IMAGES, EMBLEMS = ROOT / "web" / "docs" / "images", ROOT / "docs" / "images"


def main() -> None:
    environment.enter()
    from graphs.help.pictures import emblems, pictures
    from graphs.help.sheets import png
    from PIL import Image

    with running("help") as (server, schemas):
        graph = Graph(schemas)
        add_comparisons(graph)
        bars = ProgressBars(graph)
        shown = server.images(server.wait(server.submit(graph), bars))
        bars.close()
        drawn = {name: [Image.open(path).convert("RGB") for path in shown[key]] for name, key in graph.shown.items()}
    IMAGES.mkdir(exist_ok=True)
    files = {IMAGES / f"{name}.png": picture for name, picture in pictures(drawn, schemas).items()}
    files |= {EMBLEMS / f"{name}.png": picture for name, picture in emblems(drawn).items()}
    for path, picture in files.items():
        path.write_bytes(png(picture))
        environment.say(f"Written: {path}")


if __name__ == "__main__":
    try:
        main()
    except (environment.SetupError, *comfyui.FAILURES, KeyboardInterrupt) as reason:
        environment.exit_with(reason)
