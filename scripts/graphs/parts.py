"""Nodes, settings and notes that many templates share."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from . import files
from .model import App, AppInput, Node, Workflow

NOTES = Path(__file__).absolute().parent / "notes"
DEMO = "Demo - "
"""Prefix of the names of workflows with the demo model."""
DEMO_SIZE = 192
"""Width and height of the demo model's frames, in pixels."""
CHECKPOINT_LOADER = Node(
    "CheckpointLoaderSimple",
    (0, 770),
    (420, 130),
    {"ckpt_name": files.CHECKPOINT},
    properties=files.model_property(files.CHECKPOINT, files.CHECKPOINT_URL, "checkpoints"),
)
DEMO_LOADER = Node("StoryLoom_DemoModel", (0, 770), (420, 130))
PUBLISHED = {"size": 1024, "steps": 50, "scheduler": "ddim_uniform"}
"""Published settings of One-Prompt-One-Story for SDXL."""
DEMO_SETTINGS = {"steps": 16, "scheduler": "normal"}
"""Settings that suit the demo model, for `sampler`."""
SIZED_DEMO_SETTINGS = {"size": DEMO_SIZE, **DEMO_SETTINGS}
SEED = AppInput("sampler", "seed", "Another seed, other pictures")
CHECKPOINT = AppInput("loader", "ckpt_name", "Any SDXL checkpoint")
SCRIPT = (
    AppInput("script", "identity", "Who the story is about", 90),
    AppInput("script", "frames", "One per line; # begins a caption", 200),
    AppInput("script", "style", "With {prompt} in place of a frame"),
)


def story_app(loader: Node, *photos: AppInput, seeds: tuple[AppInput, ...] = (SEED,)) -> App:
    """A story as an app: photos, its script, its seeds, its checkpoint (the demo model has none), and the page."""
    model = (CHECKPOINT,) if "ckpt_name" in loader.values else ()
    return App((*photos, *SCRIPT, *seeds, *model), ("save",))


def note(name: str) -> str:
    """Text of notes/`name`.md, which has one paragraph per line.

    `{part}` stands for the text of notes/parts/part.md, and `{NAME}` for the constant NAME of files.py.
    """
    text = (NOTES / f"{name}.md").read_text(encoding="utf-8").rstrip("\n")
    return re.sub(r"\{(\w+)\}", lambda match: getattr(files, match[1], None) or note(f"parts/{match[1]}"), text)


def with_note(workflow: Workflow, height: int = 640) -> Workflow:
    """The workflow with the note of its name as its first node."""
    read_me = Node("MarkdownNote", (-460, 0), (380, height), {"text": note(workflow.name)}, title="Read me")
    return replace(workflow, nodes={"note": read_me, **workflow.nodes})


def zeros(place: tuple[int, int], positive: str) -> Node:
    """The published negative: the conditioning of the node `positive` with all values at zero."""
    links = {"conditioning": (positive, 0)}
    return Node("ConditioningZeroOut", place, (380, 50), links=links, title="Negative: all zeros")


def sampler(
    place: tuple[int, int],
    steps: int,
    scheduler: str,
    title: str = "",
    cfg: float = 5.0,
    solver: str = "euler",
    **sources: str,
) -> Node:
    """A KSampler. sources: input -> key of the node whose first output is linked to it."""
    values = {"seed": 7, "steps": steps, "cfg": cfg, "sampler_name": solver, "scheduler": scheduler}
    links = {name: (key, 0) for name, key in {**sources, "latent_image": sources.get("latent_image", "latent")}.items()}
    return Node("KSampler", place, (320, 270), values, links, title)


def prompt_text(place: tuple[int, int], text: str, title: str) -> Node:
    """A CLIP Text Encode node with this text."""
    return Node("CLIPTextEncode", place, (420, 110), {"text": text}, {"clip": ("loader", 1)}, title)


def moved(node: Node, down: int) -> Node:
    """The node, placed lower by `down`."""
    return replace(node, place=(node.place[0], node.place[1] + down))
