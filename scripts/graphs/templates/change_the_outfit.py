"""Change the Outfit: one picture of a person in other clothes and another pose, with StoryMaker."""

from __future__ import annotations

from dataclasses import replace

from ..files import POSE_NET, POSE_NET_URL, model_property
from ..model import App, AppInput, Node, Workflow
from ..parts import CHECKPOINT, CHECKPOINT_LOADER, SEED, prompt_text, sampler, with_note
from ..storymaker import NO_GOOD, PORTRAIT, STORYMAKER_SETTINGS, applied, person, photo, real_models, seen


def change_the_outfit(loader: Node, settings: dict) -> Workflow:
    """The graph: an ordinary prompt, and a ControlNet for the pose."""
    dressed = person((420, 0), "photo")
    links = {name: source for name, source in dressed.links.items() if name != "mask"}
    width, height = PORTRAIT
    hint = {
        "positive": ("positive", 0),
        "negative": ("negative", 0),
        "control_net": ("pose net", 0),
        "image": ("pose", 0),
    }
    nodes = {
        **real_models(loader),
        "pose net": Node(
            "ControlNetLoader",
            (420, 900),
            (400, 60),
            {"control_net_name": POSE_NET},
            properties=model_property(POSE_NET, POSE_NET_URL, "controlnet"),
        ),
        "photo": photo((0, 760), "photo.png", "The person"),
        "clothing": photo((0, 1160), "clothing.png", "The clothes"),
        "pose": replace(photo((420, 1020), "pose.png", "The pose"), size=(400, 340)),
        "character": replace(dressed, links={**links, "clothing": ("clothing", 0)}),
        "seen": seen((420, 300), "character"),
        "report": Node("PreviewAny", (420, 620), (400, 130), links={"source": ("character", 2)}, title="Report"),
        "positive": prompt_text((900, 0), "a person standing in a garden, full body, natural light", "Prompt"),
        "negative": prompt_text((900, 170), NO_GOOD, "Negative"),
        "control": Node("ControlNetApplyAdvanced", (900, 340), (420, 190), {"strength": 0.8}, hint),
        "latent": Node("EmptyLatentImage", (900, 590), (420, 110), {"width": width, "height": height}),
        "apply": applied((900, 830), "character"),
        "sampler": replace(
            sampler((1400, 0), model="apply", **settings),
            links={
                "model": ("apply", 0),
                "positive": ("control", 0),
                "negative": ("control", 1),
                "latent_image": ("latent", 0),
            },
        ),
        "decode": Node("VAEDecode", (1400, 330), (320, 50), links={"samples": ("sampler", 0), "vae": ("loader", 2)}),
        "save": Node(
            "SaveImage", (1800, 0), (480, 640), {"filename_prefix": "StoryLoom/outfit"}, {"images": ("decode", 0)}
        ),
    }
    groups = {
        "Model": ("loader", "storymaker", "vision", "faces"),
        "Pictures": ("photo", "clothing"),
        "Character": ("character", "seen", "report"),
        "Pose": ("pose net", "pose"),
        "Prompt": ("positive", "negative", "control", "latent"),
        "StoryMaker": ("apply",),
        "Draw": ("sampler", "decode"),
        "Picture": ("save",),
    }
    inputs = (
        AppInput("photo", "image", "Photo of the person"),
        AppInput("clothing", "image", "Picture of the clothes"),
        AppInput("pose", "image", "Drawing of the pose (OpenPose)"),
        AppInput("positive", "text", "What the picture shows", 90),
        SEED,
        CHECKPOINT,
    )
    return Workflow("Change the Outfit", nodes, groups, App(inputs, ("save",)))


def workflows() -> list[Workflow]:
    """The template."""
    return [with_note(change_the_outfit(CHECKPOINT_LOADER, STORYMAKER_SETTINGS))]
