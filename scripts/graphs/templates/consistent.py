"""Consistent Characters: One Prompt One Story with consistent self-attention on the same model."""

from __future__ import annotations

from dataclasses import replace

from ..model import Node, Workflow
from ..parts import CHECKPOINT_LOADER, DEMO, DEMO_LOADER, PUBLISHED, SIZED_DEMO_SETTINGS, sampler, with_note
from ..stories import FOX, STYLE
from .one_prompt import one_prompt_one_story


def consistent(
    name: str, loader: Node, script: dict, size: int, steps: int, scheduler: str, free_u: bool = False
) -> Workflow:
    """The graph. free_u: whether Story FreeU patches the model before IPCA."""
    whole = one_prompt_one_story(name, loader, script, size, steps, scheduler)
    nodes = {
        **whole.nodes,
        "attention": Node("StoryLoom_ConsistentSelfAttention", (480, 960), (380, 260), links={"model": ("ipca", 0)}),
        "sampler": sampler((980, 0), steps, scheduler, model="attention", positive="encode", negative="negative"),
    }
    model = (*whole.groups["Model"], "attention")
    if free_u:
        nodes["free_u"] = Node("StoryLoom_FreeU", (0, 960), (420, 230), links={"model": ("loader", 0)})
        nodes["ipca"] = replace(nodes["ipca"], links={"model": ("free_u", 0)})
        model = (*model, "free_u")
    return Workflow(name, nodes, {**whole.groups, "Model": model}, whole.app)


def workflows() -> list[Workflow]:
    """The template, with Story FreeU, and its demo, without."""
    name = "Consistent Characters"
    real = consistent(name, CHECKPOINT_LOADER, STYLE, **PUBLISHED, free_u=True)
    demo = consistent(f"{DEMO}{name}", DEMO_LOADER, FOX, **SIZED_DEMO_SETTINGS)
    return [with_note(workflow, height=560) for workflow in (real, demo)]
