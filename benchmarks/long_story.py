"""A long story in batches that share their anchors, on a real ComfyUI server: memory, anchors, order.

    python -m storyloom.benchmarks.long_story [--frames 40]

Runs the template "Demo - Long Story" with a story that fits one batch, then with --frames different frames. Memory is
that of the server's process: the largest at any step of a batch, and the peak of the whole story, which includes the
texts and pictures of all frames. Anchors are compared pixel by pixel in all batches. The order of the frames is read
from the pictures: each must show the place of its own line, and everything in that line ("aligned"), which is unique.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from itertools import product
from pathlib import Path

import numpy as np
from PIL import Image

from ..prompts.batches import plan_batches
from ..scripts import comfyui
from ..world.captions import FigureCaption, FrameCaption
from ..world.measures import StoryPictures, per_story
from ..world.reader import Reader
from ..world.scene import ACTIONS, PLACES, PROPS
from ..world.stories import WorldStory
from .common import resident_mib, table

WORKFLOW = Path(__file__).absolute().parent.parent / "workflows" / "api" / "Demo - Long Story.json"


def long_story(frames: int) -> WorldStory:
    """A story about a fox in a blue coat whose frames are all different."""
    activities = [(action, "none") for action in ACTIONS] + [("standing", prop) for prop in PROPS[1:]]
    captions = [FrameCaption(place, *activity) for activity, place in product(activities, PLACES)]
    if frames > len(captions):
        raise SystemExit(f"The demo's world has {len(captions)} different frames; set --frames to at most that.")
    order = np.random.default_rng(1).permutation(len(captions))[:frames]
    return WorldStory(
        (FigureCaption("fox", {"shirt": "blue"}),), tuple(captions[number] for number in order), ((0,),) * frames
    )


def prompt_of(story: WorldStory, steps: int) -> tuple[dict, dict, str]:
    """The template with this story, with previews of every batch and of the joined frames.

    Returns the prompt, the inputs of its Split batches node and the id of its sampler.
    """
    prompt = json.loads(WORKFLOW.read_text(encoding="utf-8"))
    nodes = {node["class_type"]: (number, node["inputs"]) for number, node in prompt.items()}
    nodes["StoryLoom_Script"][1].update(identity=story.identity_text(), frames=story.frames_text())
    nodes["KSampler"][1]["steps"] = steps
    joined = {"images": [nodes["StoryLoom_JoinBatches"][0], 1]}
    prompt["joined"] = {"class_type": "PreviewImage", "inputs": joined}
    batches = {"images": [nodes["VAEDecode"][0], 0]}
    prompt["batches"] = {"class_type": "PreviewImage", "inputs": batches}
    return prompt, nodes["StoryLoom_SplitBatches"][1], nodes["KSampler"][0]


def reset_peak(pid: int) -> None:
    """Restart VmHWM, the peak of a process's resident memory."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


class Watch:
    """Progress callback that records the largest memory at the steps of each batch, in MiB."""

    def __init__(self, pid: int, sampler: str):
        self.pid, self.sampler = pid, sampler
        self.batches: list[float] = []

    def __call__(self, node: str, value: int, maximum: int) -> None:
        if node == self.sampler:
            if value == 1:
                self.batches.append(0.0)
            self.batches[-1] = max(self.batches[-1], resident_mib(self.pid))


def pictures(files: list[Path]) -> np.ndarray:
    """Pictures [images, H, W, 3] in 0..1."""
    return np.stack([np.asarray(Image.open(file).convert("RGB"), np.float32) / 255 for file in files])


def measured(server: comfyui.Server, frames: int, steps: int) -> list[str]:
    """The row of the table for one story."""
    story = long_story(frames)
    prompt, split, sampler = prompt_of(story, steps)
    plan = plan_batches(frames, split["batch_size"], split["anchors"])
    watch = Watch(server.pid, sampler)
    reset_peak(server.pid)
    began = time.perf_counter()
    images = server.images(server.wait(server.submit(prompt), on_progress=watch))
    seconds, peak = time.perf_counter() - began, resident_mib(server.pid, "VmHWM")
    batches = pictures(images["batches"]).reshape(len(plan.batches), -1, *pictures(images["joined"][:1]).shape[1:])
    alike = sum(bool((batch[: plan.anchors] == batches[0, : plan.anchors]).all()) for batch in batches)
    scenes = tuple(reading.scene for reading in Reader().read_all(pictures(images["joined"])))
    shares = per_story([StoryPictures(story, scenes)])
    return [
        f"{frames} frames",
        str(len(batches)),
        f"{seconds:.0f}",
        f"{watch.batches[0]:.0f}",
        f"{watch.batches[-1]:.0f}",
        f"{peak:.0f}",
        f"{alike} of {len(batches)}",
        *(f"{shares[name][0] * frames:.0f}" for name in ("place", "alignment")),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=40, help="frames of the long story (default 40)")
    parser.add_argument("--steps", type=int, default=10, help="steps per batch (default 10)")
    options = parser.parse_args()
    host = comfyui.find_comfyui()
    head = [
        "story",
        "batches",
        "s",
        "first batch MiB",
        "last",
        "peak",
        "batches with the same anchors",
        "frames with the right place",
        "aligned frames",
    ]
    with comfyui.scratch("long") as base, comfyui.Server(host, comfyui.pack_base(base), sys.executable) as server:
        measured(server, 3, options.steps)  # loads the model
        rows = [measured(server, frames, options.steps) for frames in (4, options.frames)]
    print(f"Demo model, {options.steps} steps, ComfyUI {comfyui.version_text(host)}\n")
    print(table(head, rows))


if __name__ == "__main__":
    main()
