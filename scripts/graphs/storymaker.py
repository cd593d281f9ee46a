"""Nodes and settings that the templates with StoryMaker share."""

from __future__ import annotations

from dataclasses import replace

from .files import ADAPTER, ADAPTER_PAGE, ENCODER, ENCODER_URL, model_property
from .model import Node
from .parts import sampler

NO_GOOD = "bad quality, NSFW, low quality, ugly, disfigured, deformed"
"""StoryMaker's published negative."""
PORTRAIT = (960, 1280)
STORYMAKER_SETTINGS = {"steps": 25, "scheduler": "normal", "cfg": 7.5, "solver": "uni_pc_bh2"}
"""Published settings, as far as ComfyUI's own nodes have them."""


def real_models(loader: Node) -> dict[str, Node]:
    """The nodes that load model files."""
    return {
        "loader": replace(loader, place=(0, 0), size=(340, 110)),
        "storymaker": Node(
            "StoryLoom_LoadStoryMaker",
            (0, 170),
            (340, 60),
            {"file": ADAPTER},
            properties=model_property(ADAPTER, f"{ADAPTER_PAGE}/resolve/main/{ADAPTER}", "storymaker"),
        ),
        "vision": Node(
            "CLIPVisionLoader",
            (0, 290),
            (340, 60),
            {"clip_name": ENCODER},
            properties=model_property(ENCODER, ENCODER_URL, "clip_vision"),
        ),
        "faces": Node(
            "StoryLoom_LoadFaceAnalysis",
            (0, 410),
            (340, 90),
            {"pack": "buffalo_l", "provider": "CPU"},
            title="Load face analysis (switch on)",
            bypassed=True,
        ),
    }


def photo(place: tuple[int, int], file: str, title: str, bypassed: bool = False) -> Node:
    """A Load Image node for this file."""
    return Node("LoadImage", place, (340, 340), {"image": file}, title=title, bypassed=bypassed)


def person(place: tuple[int, int], image: str, name: str = "", bypassed: bool = False) -> Node:
    """A character from a photo with a painted mask. image: key of its Load Image."""
    links = {
        "clip_vision": ("vision", 0),
        "image": (image, 0),
        "mask": (image, 1),
        "face_analysis": ("faces", 0),
    }
    return Node("StoryLoom_Character", place, (400, 240), {"name": name}, links, bypassed=bypassed)


def seen(place: tuple[int, int], character: str, height: int = 260) -> Node:
    """A preview of what the image encoder and the adapter receive for a character."""
    title = "What the adapter sees"
    return Node("PreviewImage", place, (400, height), links={"images": (character, 1)}, title=title)


def applied(place: tuple[int, int], *characters: str) -> Node:
    """StoryMaker on the loader's model. characters: keys of the nodes whose first output is the character."""
    people = {f"character_{number}": (key, 0) for number, key in enumerate(characters, start=1)}
    links = {"model": ("loader", 0), "storymaker": ("storymaker", 0), **people}
    return Node("StoryLoom_ApplyStoryMaker", place, (420, 340), links=links)


def drawn_story(script: dict, size: tuple[int, int], negative: Node, settings: dict) -> dict[str, Node]:
    """The nodes from the script to the page, encoded frame by frame. The model comes from the node `apply`."""
    width, height = size
    story = {"story": ("script", 0)}
    return {
        "script": Node("StoryLoom_Script", (900, 0), (420, 300), script),
        "encode": Node("StoryLoom_EncodePerFrame", (900, 360), (420, 110), links={"clip": ("loader", 1), **story}),
        "negative": negative,
        "latent": Node("StoryLoom_EmptyLatent", (900, 700), (420, 130), {"width": width, "height": height}, story),
        "sampler": sampler((1400, 0), model="apply", positive="encode", negative="negative", **settings),
        "decode": Node("VAEDecode", (1400, 330), (320, 50), links={"samples": ("sampler", 0), "vae": ("loader", 2)}),
        "frames": Node("PreviewImage", (1400, 440), (320, 380), links={"images": ("decode", 0)}, title="Frames"),
        "page": Node("StoryLoom_Page", (1800, 0), (480, 440), links={"images": ("decode", 0), **story}),
        "save": Node("StoryLoom_SavePage", (1800, 500), (480, 480), links={"images": ("page", 0)}),
    }


STORY_GROUPS = {
    "Story": ("script", "encode", "negative", "latent"),
    "StoryMaker": ("apply",),
    "Draw": ("sampler", "decode", "frames"),
    "Page": ("page", "save"),
}
