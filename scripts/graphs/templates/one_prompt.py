"""One Prompt One Story: SVR on the text, IPCA on the model, a zero negative."""

from __future__ import annotations

from ..model import Node, Workflow
from ..parts import (
    CHECKPOINT_LOADER,
    DEMO,
    DEMO_LOADER,
    PUBLISHED,
    SIZED_DEMO_SETTINGS,
    sampler,
    story_app,
    with_note,
    zeros,
)
from ..stories import FOX, STYLE


def one_prompt_one_story(name: str, loader: Node, script: dict, size: int, steps: int, scheduler: str) -> Workflow:
    """The graph. size: width and height of a frame."""
    nodes = {
        "script": Node("StoryLoom_Script", (0, 0), (420, 560), script),
        "loader": loader,
        "latent": Node(
            "StoryLoom_EmptyLatent", (480, 0), (380, 130), {"width": size, "height": size}, {"story": ("script", 0)}
        ),
        "encode": Node(
            "StoryLoom_EncodeOnePrompt", (480, 190), (380, 340), links={"clip": ("loader", 1), "story": ("script", 0)}
        ),
        "negative": zeros((480, 590), "encode"),
        "report": Node("PreviewAny", (980, 880), (320, 200), links={"source": ("encode", 1)}, title="Report"),
        "ipca": Node("StoryLoom_IPCA", (480, 770), (380, 130), links={"model": ("loader", 0)}),
        "sampler": sampler((980, 0), steps, scheduler, model="ipca", positive="encode", negative="negative"),
        "decode": Node("VAEDecode", (980, 330), (320, 50), links={"samples": ("sampler", 0), "vae": ("loader", 2)}),
        "frames": Node("PreviewImage", (980, 440), (320, 380), links={"images": ("decode", 0)}, title="Frames"),
        "page": Node("StoryLoom_Page", (1420, 0), (480, 440), links={"images": ("decode", 0), "story": ("script", 0)}),
        "save": Node("StoryLoom_SavePage", (1420, 500), (480, 480), links={"images": ("page", 0)}),
    }
    groups = {
        "Story": ("script", "latent", "encode", "negative"),
        "Model": ("loader", "ipca"),
        "Draw": ("sampler", "decode", "frames", "report"),
        "Page": ("page", "save"),
    }
    return Workflow(name, nodes, groups, story_app(loader))


def workflows() -> list[Workflow]:
    """The template and its demo."""
    name = "One Prompt One Story"
    real = one_prompt_one_story(name, CHECKPOINT_LOADER, STYLE, **PUBLISHED)
    demo = one_prompt_one_story(f"{DEMO}{name}", DEMO_LOADER, FOX, **SIZED_DEMO_SETTINGS)
    return [with_note(workflow, height=560) for workflow in (real, demo)]
