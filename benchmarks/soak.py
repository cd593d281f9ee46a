"""Many stories on one ComfyUI server: memory, time and reproducibility.

    python -m storyloom.benchmarks.soak [--stories 200] [--unload]

Every story has its own text and seed, and the method changes from story to story: none, SVR, IPCA, CSA, FreeU,
StoryMaker, a story in batches, all of them together. At the end the first story of every method is drawn again and
compared pixel by pixel. Memory is the resident memory of the server's process after a story. Time is its processor
time, which other work on the machine does not lengthen. Both compare the last round of the methods with the first round
after the warm-up. `--unload` makes ComfyUI unload all models after every story.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ..scripts import comfyui
from ..world.stories import random_story, random_story_of_two
from .common import resident_mib, table
from .consistory.graph import TEXT_ENCODE, WHOLE

METHODS = ("frames", "svr", "ipca", "csa", "freeu", "svr+ipca", "csa+svr+ipca", "storymaker", "long", "all")
WARM_UP = 4
"""Rounds of the methods before memory and time are compared: the allocator and ComfyUI's caches fill slowly."""
FIRST_STORY = 40_000
IPCA = {"identity_weight": 2.0, "blocks": "all", **WHOLE}
CSA = {"sampling_rate": 0.5, "skip_first_steps": 1, "blocks": "output", "seed": 0, "schedule": "steady", **WHOLE}
FREEU = {"b1": 1.1, "b2": 1.2, "s1": 0.6, "s2": 0.4, **WHOLE}
STORYMAKER = {
    "token_strength": 0.8,
    "lora_strength": 0.8,
    "face_strength": 1.0,
    "appearance_strength": 1.0,
    **WHOLE,
}
SAMPLER = {"sampler_name": "euler", "scheduler": "normal", "cfg": 5.0, "denoise": 1.0}
PAGE = {"columns": 0, "captions": True, "gap": 12, "caption_size": 0}


class Graph(dict):
    """An API-format prompt, built node by node."""

    def add(self, class_type: str, **inputs):
        """Add a node; returns a function that links to its outputs."""
        number = str(len(self) + 1)
        self[number] = {"class_type": class_type, "inputs": inputs}
        return lambda output=0: [number, output]


def story_graph(number: int, size: int, steps: int) -> dict:
    """The graph of one story, which saves its frames and previews its page."""
    method = METHODS[number % len(METHODS)]
    parts = set(method.split("+")) if method != "all" else {"svr", "ipca", "csa", "freeu", "storymaker"}
    make_story = random_story_of_two if number % 3 == 2 else random_story
    world_story = make_story(FIRST_STORY + number, frames=5 if "long" in parts else 3)
    graph = Graph()
    demo = graph.add("StoryLoom_DemoModel")
    story = graph.add(
        "StoryLoom_Script", identity=world_story.identity_text(), frames=world_story.frames_text(), style=""
    )()
    if "svr" in parts:
        positive = graph.add(
            "StoryLoom_EncodeOnePrompt", clip=demo(1), story=story, reweighting="svr", literal=False, **TEXT_ENCODE
        )()
    else:
        positive = graph.add("StoryLoom_EncodePerFrame", clip=demo(1), story=story, literal=False)()
    negative = graph.add("ConditioningZeroOut", conditioning=positive)()
    latent = graph.add("StoryLoom_EmptyLatent", width=size, height=size, story=story, shared_noise=True)()
    model = demo(0)
    if "storymaker" in parts:
        model = with_storymaker(graph, demo, model, size, number)
    if "ipca" in parts:
        model = graph.add("StoryLoom_IPCA", model=model, **IPCA)()
    if parts & {"csa", "long"}:
        anchors = 2 if "long" in parts else 0
        model = graph.add("StoryLoom_ConsistentSelfAttention", model=model, anchors=anchors, **CSA)()
    if "freeu" in parts:
        model = graph.add("StoryLoom_FreeU", model=model, **FREEU)()
    if "long" in parts:
        split = graph.add(
            "StoryLoom_SplitBatches", positive=positive, negative=negative, latent=latent, batch_size=4, anchors=2
        )
        latent, positive, negative = split(0), split(1), split(2)
    settings = {"seed": number, "steps": steps, **SAMPLER}
    sampled = graph.add(
        "KSampler", model=model, positive=positive, negative=negative, latent_image=latent, **settings
    )()
    pictures = graph.add("VAEDecode", samples=sampled, vae=demo(2))()
    if "long" in parts:
        pictures = graph.add("StoryLoom_JoinBatches", plan=split(5), images=pictures)(1)
    graph.add("SaveImage", images=pictures, filename_prefix=f"soak/{number:04}")
    page = graph.add("StoryLoom_Page", images=pictures, story=story, **PAGE)()
    graph.add("PreviewImage", images=page)
    return dict(graph)


def with_storymaker(graph: Graph, demo, model, size: int, number: int):
    """The model with a character from a plain-coloured picture, a different one for every story."""
    maker = graph.add("StoryLoom_DemoStoryMaker")
    image = graph.add("EmptyImage", width=size, height=size, batch_size=1, color=number * 7919 % 0xFFFFFF)()
    settings = {"name": "", "image": image, "clip_vision": maker(1), "mode": "appearance only"}
    character = graph.add("StoryLoom_Character", **settings)()
    return graph.add(
        "StoryLoom_ApplyStoryMaker", model=model, storymaker=maker(0), character_1=character, **STORYMAKER
    )()


@dataclass(frozen=True)
class Measured:
    """One story. seconds: processor time of the server; mib: its resident memory afterwards; pixels: a hash."""

    seconds: float
    mib: float
    pixels: str


def processor_seconds(pid: int) -> float:
    """Processor time of a process, in seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(server: comfyui.Server, number: int, options: argparse.Namespace) -> Measured:
    """Draw and measure a story, and delete its pictures."""
    before = processor_seconds(server.pid)
    entry = server.wait(server.submit(story_graph(number, options.size, options.steps)))
    seconds = processor_seconds(server.pid) - before
    files = server.outputs(entry)
    if not files:
        raise SystemExit(f"Story {number} ended without pictures.")
    digest = hashlib.sha256()
    for file in files:
        digest.update(np.asarray(Image.open(file)).tobytes())
        file.unlink()
    if options.unload:
        unload(server)
    return Measured(seconds, resident_mib(server.pid), digest.hexdigest())


def unload(server: comfyui.Server) -> None:
    """Make ComfyUI unload all models and clear its cache."""
    body = json.dumps({"unload_models": True, "free_memory": True}).encode()
    urllib.request.urlopen(urllib.request.Request(f"{server.url}/free", body, {"Content-Type": "application/json"}))


def measure_all(server: comfyui.Server, options: argparse.Namespace) -> tuple[list[Measured], int]:
    """All stories in turn, and for how many methods the first story is identical when drawn again."""
    from tqdm import tqdm

    stories = [measure(server, number, options) for number in tqdm(range(options.stories), unit="story", ncols=90)]
    again = [measure(server, number, options) for number in range(len(METHODS))]
    return stories, sum(one.pixels == other.pixels for one, other in zip(stories, again, strict=False))


def rows(stories: list[Measured], same: int) -> list[list[str]]:
    """Rows of the table: the first whole round after the warm-up and the last. same: methods with equal pictures."""
    size = len(METHODS)
    rounds = [stories[begin : begin + size] for begin in range(WARM_UP * size, len(stories) - size + 1, size)]
    first, last = rounds[0], rounds[-1]
    mib = [statistics.median(story.mib for story in one) for one in (first, last)]
    seconds = [sum(story.seconds for story in one) for one in (first, last)]
    return [
        ["resident memory, MiB", f"{mib[0]:.0f}", f"{mib[1]:.0f}", f"{mib[1] / mib[0]:.3f}"],
        ["processor seconds", f"{seconds[0]:.2f}", f"{seconds[1]:.2f}", f"{seconds[1] / seconds[0]:.3f}"],
        ["the same pixels at the end", "", f"{same} of {size}", ""],
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stories", type=int, default=200, help="number of stories (default 200)")
    parser.add_argument("--size", type=int, default=96, help="side of the pictures (default 96)")
    parser.add_argument("--steps", type=int, default=4, help="steps per story (default 4)")
    parser.add_argument("--unload", action="store_true", help="unload all models after every story")
    options = parser.parse_args()
    least = (WARM_UP + 2) * len(METHODS)
    if options.stories < least:
        parser.error(f"--stories must be at least {least}: {WARM_UP} rounds of {len(METHODS)} methods are the warm-up.")
    host = comfyui.find_comfyui()
    began = time.perf_counter()
    with comfyui.scratch("soak") as folder:
        base = comfyui.pack_base(folder)
        with comfyui.Server(host, base, sys.executable) as server:
            stories, same = measure_all(server, options)
    minutes = (time.perf_counter() - began) / 60
    print(f"\nComfyUI {comfyui.version_text(host)}, {len(stories)} stories in {minutes:.0f} minutes\n")
    print(table([f"a round of {len(METHODS)} methods", "first", "last", "ratio"], rows(stories, same)))


if __name__ == "__main__":
    main()
