"""Did It Work, and the demo With and Without: a story drawn twice, measured and compared."""

from __future__ import annotations

from dataclasses import replace

from ..model import AppInput, Node, Workflow
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


def with_and_without(
    name: str,
    loader: Node,
    script: dict,
    encoders: dict[str, Node],
    size: int,
    steps: int,
    scheduler: str,
    caption_size: int = 0,
) -> Workflow:
    """The graph: each frame with its own prompt, and One Prompt One Story, from the same noise.

    encoders: input of Story consistency -> the node for it.
    """
    story = {"story": ("script", 0)}
    nodes = {
        "script": Node("StoryLoom_Script", (0, 0), (420, 300), script),
        "loader": replace(loader, place=(0, 440)),
        "latent": Node("StoryLoom_EmptyLatent", (0, 630), (420, 130), {"width": size, "height": size}, story),
        **encoders,
    }
    branches = {
        "without": (0, "StoryLoom_EncodePerFrame", "loader", "Without StoryLoom (each frame its own prompt)"),
        "with": (600, "StoryLoom_EncodeOnePrompt", "with ipca", "With StoryLoom (one prompt, SVR + IPCA)"),
    }
    groups = {"Story": ("script",), "Model": ("loader", "latent")}
    for key, (top, encode, model, title) in branches.items():
        pictures = {"images": (f"{key} decode", 0)}
        parts = {
            f"{key} encode": Node(encode, (540, top), (380, 340), links={"clip": ("loader", 1), **story}),
            f"{key} negative": zeros((540, top + 400), f"{key} encode"),
            f"{key} sampler": sampler(
                (980, top),
                steps,
                scheduler,
                f"KSampler, {key}",
                model=model,
                positive=f"{key} encode",
                negative=f"{key} negative",
            ),
            f"{key} decode": Node(
                "VAEDecode", (980, top + 330), (320, 50), links={"samples": (f"{key} sampler", 0), "vae": ("loader", 2)}
            ),
            f"{key} frames": Node(
                "SaveImage", (1340, top), (380, 380), {"filename_prefix": f"StoryLoom/{key}"}, pictures, title
            ),
        }
        if model == "with ipca":
            parts[model] = Node("StoryLoom_IPCA", (540, top + 510), (380, 130), links={"model": ("loader", 0)})
        nodes |= parts
        groups[title] = tuple(parts)
        nodes[f"{key} measures"] = Node(
            "StoryLoom_Consistency",
            (1860, top + 340),
            (480, 540),
            {"filename_prefix": f"StoryLoom/{key}_consistency"},
            {**pictures, **story, **{encoder: (encoder, 0) for encoder in encoders}},
            f"Story consistency, {key}",
        )
        nodes[f"{key} report"] = Node(
            "PreviewAny",
            (2400, top + 340),
            (480, 540),
            links={"source": (f"{key} measures", 0)},
            title=f"Report, {key}",
        )
    both = {
        f"{what}_{side}": (f"{key} {node}", output)
        for side, key in zip("ab", branches, strict=True)
        for what, node, output in (("images", "decode", 0), ("measures", "measures", 3))
    }
    nodes["compare"] = Node(
        "StoryLoom_Compare", (3000, 0), (480, 300), {"caption_size": caption_size}, {**both, **story}
    )
    nodes["save"] = Node("StoryLoom_SavePage", (3000, 360), (480, 640), links={"images": ("compare", 0)})
    groups["Measure"] = (*encoders, *(f"{key} {part}" for key in branches for part in ("measures", "report")))
    groups["Page"] = ("compare", "save")
    seeds = (
        AppInput("without sampler", "seed", "Without StoryLoom"),
        AppInput("with sampler", "seed", "With StoryLoom: the same number"),
    )
    return Workflow(name, nodes, groups, story_app(loader, seeds=seeds))


def workflows() -> list[Workflow]:
    """The template, which measures with OpenCLIP, and its demo, which reads the demo model's pictures."""
    clips = {
        key: Node("StoryLoom_LoadOpenCLIP", (1860, top), (480, 110), {"architecture": architecture}, title=title)
        for key, top, architecture, title in (
            ("clip", 0, "ViT-B-32-quickgelu", "Load OpenCLIP (for CLIP-T)"),
            ("clip_image", 170, "ViT-B-16-quickgelu", "Load OpenCLIP (for CLIP-I)"),
        )
    }
    similarity = {"clip": Node("StoryLoom_DemoSimilarity", (1860, 0), (480, 60))}
    real = with_and_without("Did It Work", CHECKPOINT_LOADER, STYLE, clips, **PUBLISHED)
    demo = with_and_without(
        f"{DEMO}With and Without", DEMO_LOADER, FOX, similarity, **SIZED_DEMO_SETTINGS, caption_size=12
    )
    return [with_note(real), with_note(demo)]
