"""Long Story: batches that share their first frames, the anchors."""

from __future__ import annotations

from dataclasses import replace

from ..model import Node, Workflow
from ..parts import CHECKPOINT_LOADER, DEMO, DEMO_LOADER, PUBLISHED, SIZED_DEMO_SETTINGS, moved, with_note
from ..stories import LONG_FOX, STYLE
from .consistent import consistent


def long_story(name: str, loader: Node, script: dict, size: int, steps: int, scheduler: str) -> Workflow:
    """The graph of Consistent Characters with the story split into batches and joined again."""
    whole = consistent(name, loader, script, size, steps, scheduler)
    story = {"story": ("script", 0)}
    split = {"latent": ("latent", 0), "positive": ("encode", 0), "negative": ("negative", 0)}
    batch = {"latent_image": ("split", 0), "positive": ("split", 1), "negative": ("split", 2)}
    lower = 260
    changed = {
        "script": replace(whole.nodes["script"], size=(420, 560 + lower)),
        "report": moved(whole.nodes["report"], 140),
        "split": Node("StoryLoom_SplitBatches", (480, 710), (380, 180), {"batch_size": 4, "anchors": 2}, split),
        "loader": moved(loader, lower),
        "ipca": moved(whole.nodes["ipca"], lower),
        "attention": moved(whole.nodes["attention"], lower),
        "sampler": replace(whole.nodes["sampler"], links={"model": ("attention", 0), **batch}),
        "join": Node(
            "StoryLoom_JoinBatches", (980, 880), (320, 70), links={"plan": ("split", 5), "images": ("decode", 0)}
        ),
        "page": replace(whole.nodes["page"], links={"images": ("join", 1), **story}),
    }
    groups = {
        **whole.groups,
        "Story": (*whole.groups["Story"], "split"),
        "Draw": (*whole.groups["Draw"], "join"),
    }
    return Workflow(name, {**whole.nodes, **changed}, groups, whole.app)


def workflows() -> list[Workflow]:
    """The template and its demo."""
    name = "Long Story"
    real = long_story(name, CHECKPOINT_LOADER, {**LONG_FOX, **STYLE}, **PUBLISHED)
    demo = long_story(f"{DEMO}{name}", DEMO_LOADER, LONG_FOX, **SIZED_DEMO_SETTINGS)
    return [with_note(workflow, height=560) for workflow in (real, demo)]
