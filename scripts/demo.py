"""Draws the demo story without and with StoryLoom, measures both and prints the path of the page: `make demo`.

A real ComfyUI runs the workflow on the CPU. If there is none and none can be cloned, the standalone host, based on
diffusers, draws the same story.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import comfyui
import environment
from comfyui.threads import thread_settings
from progress import ProgressBars, title_of

ROOT = Path(__file__).absolute().parent.parent
OUT = ROOT / "out"
WORKFLOW = ROOT / "workflows" / "api" / "Demo - With and Without.json"
METHODS = {"StoryLoom/without": "frames", "StoryLoom/with": "svr+ipca"}
"""The names under which the workflow saves its pictures -> the standalone host's method for them."""
MEANING = """Alignment: frames that show the place, action, prop and looks in the text. Same looks: how often frames
agree on a look that the text leaves open. Both are read from the pixels of this one story; docs/effect.md has many
stories."""


class DemoError(Exception):
    """The demo cannot run; the message is one sentence for the user."""


class NotMeasured(Exception):
    """The pictures cannot be measured; the message is the reason."""


@dataclass(frozen=True)
class Drawn:
    """Saved files. rows: title -> one picture per frame, floats 0..1 [H, W, 3]; pages: all other files in `out/`."""

    pages: list[Path]
    rows: Mapping[str, Sequence]


# ---- the workflow ----------------------------------------------------------------------------------------------------


def read_workflow(path: Path) -> dict:
    """Read an API-format workflow. Raises DemoError if the file is missing or has another format."""
    if not path.is_file():
        raise DemoError(f"The workflow {path} does not exist.")
    try:
        prompt = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DemoError(f"The workflow {path} is not valid JSON: {error}") from None
    if not isinstance(prompt, dict) or not all(
        isinstance(node, dict) and "class_type" in node for node in prompt.values()
    ):
        raise DemoError(f"{path} is not in ComfyUI's API format: export it with 'Export (API)'.")
    return prompt


def source_of(prompt: dict, node: dict, name: str) -> str | None:
    """Id of the node that an input is linked to."""
    link = node.get("inputs", {}).get(name)
    return str(link[0]) if isinstance(link, list) and str(link[0]) in prompt else None


def nodes_of(prompt: dict, kind: str) -> dict[str, dict]:
    """Nodes whose class name starts with `kind`, by id."""
    return {number: node for number, node in prompt.items() if node["class_type"].startswith(kind)}


def rows_of(prompt: dict) -> dict[str, str]:
    """Node id -> title of the nodes that save or preview frames straight from VAE Decode, one node per batch."""
    rows = {}
    for number, node in prompt.items():
        source = source_of(prompt, node, "images")
        if source in nodes_of(prompt, "VAEDecode") and node["class_type"] in ("SaveImage", "PreviewImage"):
            rows.setdefault(source, (number, title_of(node)))
    return dict(rows.values())


def texts_of(prompt: dict) -> tuple[str, list[str]]:
    """Identity and frames of the encode nodes. Raises NotMeasured if they do not come from one Story script's texts."""
    sources = {source_of(prompt, node, "story") for node in nodes_of(prompt, "StoryLoom_Encode").values()}
    if len(sources) != 1 or not sources <= set(nodes_of(prompt, "StoryLoom_Script")):
        raise NotMeasured("the workflow does not draw the story of one Story script.")
    script = prompt[sources.pop()].get("inputs", {})
    identity, frames = script.get("identity"), script.get("frames")
    if not isinstance(identity, str) or not isinstance(frames, str):
        raise NotMeasured("the story's texts come from other nodes.")
    return identity, frames.splitlines()


# ---- drawing ---------------------------------------------------------------------------------------------------------


def choose_host(options: argparse.Namespace) -> tuple[Path | None, str]:
    """The ComfyUI to use, or None for the standalone host, and a line about the choice. Raises ComfyUIError."""
    if options.host == "standalone":
        return None, "Host: StoryLoom's own on diffusers (--host standalone)"
    try:
        host = comfyui.require_comfyui(options.comfyui, "--comfyui") if options.comfyui else comfyui.find_comfyui()
    except comfyui.NoComfyUIError as error:
        if options.host == "comfyui" or is_another(options.workflow):
            raise
        return None, f"Host: StoryLoom's own on diffusers (no ComfyUI was found, and cloning it failed: {error.reason})"
    return host, f"Host: ComfyUI {comfyui.version_text(host)} in {host}"


def is_another(workflow: Path) -> bool:
    """Whether this is not the demo's own workflow."""
    return workflow.resolve() != WORKFLOW.resolve()


def draw(host: Path, prompt: dict, base: Path) -> Drawn:
    """Run the workflow on a new server and copy the files that it saves to `out/`."""
    comfyui.pack_base(base, ROOT)
    environment.say("Starting ComfyUI on the CPU (5 to 30 seconds)")
    with comfyui.Server(host, base, sys.executable) as server:
        environment.say("Drawing the story")
        bars = ProgressBars(prompt)
        try:
            history = server.wait(server.submit(prompt), on_progress=bars)
        finally:
            bars.close()
        images = server.images(history)
        saved = server.outputs(history)
    if not saved:
        raise DemoError(
            "The workflow finished but saved no image: its last node must be Save Image or Save story page."
        )
    OUT.mkdir(exist_ok=True)
    copies = {path: Path(shutil.copy(path, OUT / path.name)) for path in saved}
    titles = rows_of(prompt)
    frames = {path for node in titles for path in images.get(node, ())}
    return Drawn(
        [copy for path, copy in copies.items() if path not in frames],
        {title: [pixels(path) for path in images[node]] for node, title in titles.items() if node in images},
    )


def draw_standalone(prompt: dict) -> Drawn:
    """Draw the story of the demo's own workflow, with its settings, without ComfyUI."""
    import numpy as np
    import torch

    from storyloom.measures.measuring import measure
    from storyloom.models.demo.model import DemoFileError
    from storyloom.models.demo.similarity import DemoReader
    from storyloom.models.files import write_whole
    from storyloom.pages.comic import PageStyle
    from storyloom.pages.comparison import comparison_page, differences
    from storyloom.pages.encoding import encoded
    from storyloom.prompts.script import parse_story
    from storyloom.standalone import StoryPipeline, demo_model

    identity, frames = texts_of(prompt)
    settings = next(iter(nodes_of(prompt, "KSampler").values()))["inputs"]
    (compare,) = nodes_of(prompt, "StoryLoom_Compare").values()
    environment.say("Loading the demo model (a few seconds)")
    try:
        pipeline = StoryPipeline(demo_model())
    except DemoFileError as error:
        raise DemoError(str(error)) from None
    OUT.mkdir(exist_ok=True)
    rows = {}
    for node, title in rows_of(prompt).items():
        name = prompt[node]["inputs"]["filename_prefix"]
        environment.say(f"Drawing the story: {title}")
        chosen = {key: settings[key] for key in ("seed", "steps", "cfg")}
        drawn = pipeline(identity, frames, method=METHODS[name], **chosen)
        for number, picture in enumerate(drawn.frames, start=1):
            write_whole(OUT / f"{Path(name).name}_{number:05}_.png", encoded([picture], "png"))
        rows[title] = [np.asarray(picture, np.float32) / 255 for picture in drawn.frames]
    story, reader = parse_story(identity, "\n".join(frames)), DemoReader()
    results = [measure(torch.from_numpy(np.stack(row)), story.prompts, reader, reader) for row in rows.values()]
    page = comparison_page(
        *rows.values(),
        [frame.caption for frame in story.frames],
        (compare["inputs"]["label_a"], compare["inputs"]["label_b"]),
        differences(*results),
        style=PageStyle(caption_size=compare["inputs"]["caption_size"]),
    )
    write_whole(OUT / "page_00001_.png", encoded([page], "png"))
    return Drawn([OUT / "page_00001_.png"], rows)


def pixels(path: Path):
    """An image file as floats 0..1 [H, W, 3]."""
    import numpy as np
    from PIL import Image

    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"), np.float32) / 255


def keep_log(base: Path) -> None:
    """Copy the server's log of a failed run to `out/`, and print its path."""
    log = base / "server.log"
    if log.is_file():
        OUT.mkdir(exist_ok=True)
        print(f"\nThe server's complete log: {shutil.copy(log, OUT / 'demo-server.log')}", file=sys.stderr)


# ---- measuring -------------------------------------------------------------------------------------------------------


def measured(prompt: dict, rows: Mapping[str, Sequence]) -> list[str]:
    """The table of measurements with an explanation, or one line with the reason why there is none."""
    try:
        return ["", *table(world_story(prompt), rows), MEANING, ""]
    except NotMeasured as reason:
        return [f"Not measured: {reason}"]


def world_story(prompt: dict):
    """The workflow's story as a WorldStory. Raises NotMeasured."""
    from storyloom.prompts.script import StoryScriptError
    from storyloom.world.parsing import parse_error, parse_world_story

    if not nodes_of(prompt, "StoryLoom_DemoModel"):
        raise NotMeasured("only the demo model's pictures can be read.")
    texts = texts_of(prompt)
    try:
        story = parse_world_story(*texts)
    except StoryScriptError as error:
        raise NotMeasured(str(error)) from None
    if story is None:
        raise NotMeasured(parse_error(*texts))
    return story


def table(story, rows: Mapping[str, Sequence]) -> list[str]:
    """One line per row. Raises NotMeasured for pictures that cannot be read."""
    import math

    from storyloom.world.measures import StoryPictures, per_story
    from storyloom.world.reader import Reader

    if not rows:
        raise NotMeasured("the workflow saves or previews no frames straight from VAE Decode.")
    reader, frames, lines = Reader(), len(story.frames), []
    width = max(map(len, rows)) + 1
    for title, pictures in rows.items():
        try:
            scenes = tuple(reading.scene for reading in reader.read_all(pictures))
            values = per_story([StoryPictures(story, scenes)])
        except ValueError as error:
            raise NotMeasured(str(error)) from None
        aligned, alike = round(float(values["alignment"][0]) * frames), float(values["consistency"][0])
        looks = "no look left open in two frames" if math.isnan(alike) else f"same looks {alike:4.0%}"
        lines.append(f"  {title + ':':<{width}}  alignment {aligned}/{frames} frames, {looks}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", choices=("comfyui", "standalone"), help="host (default: ComfyUI if there is one)")
    parser.add_argument("--comfyui", type=Path, help="ComfyUI folder to use (default: found automatically)")
    parser.add_argument("--workflow", type=Path, default=WORKFLOW, help="workflow to run, in API format")
    options = parser.parse_args()
    if options.host == "standalone" and (options.comfyui or is_another(options.workflow)):
        parser.error("--comfyui and --workflow need ComfyUI, but --host standalone draws without it")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    prompt = read_workflow(options.workflow)
    if options.host != "standalone" and not options.comfyui:
        comfyui.present_comfyuis()  # reports a wrong COMFYUI_PATH before anything is installed
    os.environ.update(thread_settings(os.environ))  # before anything imports PyTorch
    environment.enter()
    host, line = choose_host(options)
    environment.say(line)
    began = time.monotonic()
    if host is None:
        drawn = draw_standalone(prompt)
    else:
        with comfyui.scratch("demo") as base:
            try:
                drawn = draw(host, prompt, base)
            except Exception:
                keep_log(base)
                raise
    seconds = time.monotonic() - began
    for line in measured(prompt, drawn.rows):
        environment.say(line)
    environment.say(f"Done in {seconds:.0f} seconds:")
    for page in drawn.pages:
        environment.say(f"  {page}")


if __name__ == "__main__":
    try:
        environment.require_python(sys.version_info)
        main()
    except (environment.SetupError, comfyui.ComfyUIError, comfyui.PromptRefused) as reason:
        environment.exit_with(reason)
    except (comfyui.PromptFailed, DemoError, KeyboardInterrupt) as reason:
        environment.exit_with(reason)
