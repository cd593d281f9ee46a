"""Two Characters: every frame encoded alone, for a story with two characters."""

from __future__ import annotations

from ..model import Node, Workflow
from ..parts import CHECKPOINT_LOADER, DEMO, DEMO_LOADER, PUBLISHED, SIZED_DEMO_SETTINGS, with_note
from ..stories import FOX_AND_BEAR
from .consistent import consistent


def two_characters(name: str, loader: Node, size: int, steps: int, scheduler: str) -> Workflow:
    """The graph of Consistent Characters with another encode node and without its report."""
    whole = consistent(name, loader, FOX_AND_BEAR, size, steps, scheduler)
    changed = {
        "encode": Node(
            "StoryLoom_EncodePerFrame", (480, 190), (380, 110), links={"clip": ("loader", 1), "story": ("script", 0)}
        ),
    }
    nodes = {key: changed.get(key, node) for key, node in whole.nodes.items() if key != "report"}
    draw = tuple(key for key in whole.groups["Draw"] if key != "report")
    return Workflow(name, nodes, {**whole.groups, "Draw": draw}, whole.app)


def workflows() -> list[Workflow]:
    """The template and its demo."""
    name = "Two Characters"
    real = two_characters(name, CHECKPOINT_LOADER, **PUBLISHED)
    demo = two_characters(f"{DEMO}{name}", DEMO_LOADER, **SIZED_DEMO_SETTINGS)
    return [with_note(workflow, height=560) for workflow in (real, demo)]
