"""The subgraph blueprints: the usual jobs as one box each.

They are the templates' graphs without the nodes that load, show and save. Links to these become sockets of the box.
"""

from __future__ import annotations

from dataclasses import replace

from .model import Node, Workflow
from .parts import PUBLISHED, prompt_text
from .stories import LONG_FOX, PERSON, STYLE
from .storymaker import NO_GOOD, PORTRAIT, STORY_GROUPS, STORYMAKER_SETTINGS, applied, drawn_story, person, real_models
from .subgraphs import Blueprint
from .templates.consistent import consistent
from .templates.long_story import long_story

LOADED = {"model": ("loader", 0), "clip": ("loader", 1), "vae": ("loader", 2)}
ANY_MODEL = "Connect MODEL, CLIP and VAE from Load Checkpoint, with LoRAs in between if you like."


def same_name(key: str, *names: str) -> dict[str, tuple[tuple[str, str], ...]]:
    """Widgets of a node under their own names, for `Blueprint.widgets`."""
    return {name: ((key, name),) for name in names}


STORY = {**same_name("script", "identity", "frames", "style"), **same_name("latent", "width", "height")}
DRAWING = same_name("sampler", "seed", "steps", "cfg", "sampler_name", "scheduler")
CONSISTENCY = {**same_name("ipca", "identity_weight"), **same_name("attention", "sampling_rate")}
PAGE = {**same_name("page", "captions", "layout")}


def blueprints() -> list[Blueprint]:
    """Every blueprint."""
    loader = Node("CheckpointLoaderSimple", (0, 770), (420, 130))
    story = consistent("Story from a prompt", loader, STYLE, **PUBLISHED)
    long = long_story("Long story", loader, {**LONG_FOX, **STYLE}, **PUBLISHED)
    return [
        Blueprint(
            inner(story),
            "A story as a comic page: one identity, one line per frame, and the same character in every frame "
            f"(one prompt with SVR, IPCA, consistent self-attention). {ANY_MODEL}",
            ("StoryLoom", "comic", "same character", "consistent character", "one prompt one story", "StoryDiffusion"),
            LOADED,
            {**STORY, **CONSISTENCY, **DRAWING, **PAGE},
            {"page": ("page", 0), "frames": ("decode", 0), "report": ("encode", 1)},
        ),
        Blueprint(
            from_a_photo(loader),
            "The person from a photo in every frame of a story, as a comic page (StoryMaker). Paint over the person in "
            f"the mask editor, or leave mask unconnected to use the whole image. {ANY_MODEL}",
            ("StoryLoom", "StoryMaker", "photo of a person", "face", "character from image", "comic"),
            {**LOADED, "image": ("photo", 0), "mask": ("photo", 1), "face_analysis": ("faces", 0)},
            {
                "storymaker": (("storymaker", "file"),),
                "clip_vision": (("vision", "clip_name"),),
                **STORY,
                **same_name("apply", "token_strength", "lora_strength"),
                **DRAWING,
                **PAGE,
            },
            {"page": ("page", 0), "frames": ("decode", 0), "preview": ("character", 1), "report": ("character", 2)},
        ),
        Blueprint(
            inner(long),
            "A story of any length on comic pages, drawn a few frames at a time, with the same character in every "
            f"frame: all batches begin with the same frames, the anchors. {ANY_MODEL}",
            ("StoryLoom", "many frames", "comic", "low memory", "batches", "anchors", "same character"),
            LOADED,
            {
                **STORY,
                "batch_size": (("split", "batch_size"),),
                "anchors": (("split", "anchors"),),
                **CONSISTENCY,
                **DRAWING,
                **PAGE,
                **same_name("page", "panels_per_page"),
            },
            {"page": ("page", 0), "frames": ("join", 1), "report": ("encode", 1)},
        ),
    ]


OUTSIDE = {"note", "loader", "photo", "faces", "frames", "report", "save"}
"""Keys of the nodes that load, show and save."""


def inner(workflow: Workflow) -> Workflow:
    """A workflow without the nodes that load, show and save."""
    groups = {title: tuple(key for key in keys if key not in OUTSIDE) for title, keys in workflow.groups.items()}
    nodes = {key: node for key, node in workflow.nodes.items() if key not in OUTSIDE}
    return Workflow(workflow.name, nodes, groups)


def from_a_photo(loader: Node) -> Workflow:
    """Character from a Photo without its second photo and its files."""
    negative = prompt_text((900, 530), NO_GOOD, "Negative")
    nodes = {
        **real_models(loader),
        "character": person((420, 0), "photo"),
        "apply": replace(applied((420, 340), "character"), size=(400, 340)),
        **drawn_story(PERSON, PORTRAIT, negative, STORYMAKER_SETTINGS),
    }
    groups = {"Model": ("loader", "storymaker", "vision", "faces"), "Character": ("character", "apply")}
    groups |= {title: keys for title, keys in STORY_GROUPS.items() if title != "StoryMaker"}
    return inner(Workflow("Story from a photo", nodes, groups))
