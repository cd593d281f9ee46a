"""Character from a Photo: a story about the person of a photo, with StoryMaker."""

from __future__ import annotations

from dataclasses import replace

from ..model import AppInput, Node, Workflow
from ..parts import (
    CHECKPOINT_LOADER,
    DEMO,
    DEMO_LOADER,
    DEMO_SETTINGS,
    DEMO_SIZE,
    prompt_text,
    sampler,
    story_app,
    with_note,
    zeros,
)
from ..stories import DEMO_IDENTITY, FOX, PERSON
from ..storymaker import (
    NO_GOOD,
    PORTRAIT,
    STORY_GROUPS,
    STORYMAKER_SETTINGS,
    applied,
    drawn_story,
    person,
    photo,
    real_models,
    seen,
)

NAME = "Character from a Photo"


def character_from_photo(loader: Node, settings: dict) -> Workflow:
    """The graph. Bypassed: face analysis, a second photo, and saving and loading the character."""
    nodes = {
        **real_models(loader),
        "photo": photo((0, 640), "photo.png", "The photo"),
        "character": person((420, 0), "photo"),
        "seen": seen((420, 300), "character"),
        "report": Node("PreviewAny", (420, 620), (400, 130), links={"source": ("character", 2)}, title="Report"),
        "photo 2": photo((0, 1100), "photo 2.png", "A second photo", bypassed=True),
        "character 2": person((420, 1100), "photo 2", bypassed=True),
        "blend": Node(
            "StoryLoom_BlendCharacters",
            (420, 1410),
            (400, 110),
            links={"first": ("character", 0), "second": ("character 2", 0)},
            bypassed=True,
        ),
        "keep": Node(
            "StoryLoom_SaveCharacter",
            (420, 1580),
            (400, 110),
            {"file_name": "person"},
            {"character": ("blend", 0)},
            bypassed=True,
        ),
        "kept": Node(
            "StoryLoom_LoadCharacter",
            (0, 1580),
            (340, 80),
            {"file": "person.safetensors"},
            title="Load character (instead of photos)",
            bypassed=True,
        ),
        "apply": applied((900, 960), "blend"),
        **drawn_story(
            PERSON,
            PORTRAIT,
            prompt_text((900, 530), NO_GOOD, "Negative"),
            settings,
        ),
    }
    groups = {
        "Model": ("loader", "storymaker", "vision", "faces"),
        "Photo": ("photo",),
        "Character": ("character", "seen", "report"),
        "More photos, saved characters (bypassed)": ("photo 2", "character 2", "blend", "keep", "kept"),
        **STORY_GROUPS,
    }
    app = story_app(loader, AppInput("photo", "image", "Photo of the person"))
    return Workflow(NAME, nodes, groups, app)


def character_from_photo_demo(demo: Node, settings: dict) -> Workflow:
    """The same for the demo model, with random weights for StoryMaker; the demo model draws the photo."""
    photo_sampler = {"positive": "photo encode", "negative": "photo negative", "latent_image": "photo latent"}
    size = (DEMO_SIZE, DEMO_SIZE)
    nodes = {
        "loader": replace(demo, place=(0, 0), size=(340, 110)),
        "storymaker": Node("StoryLoom_DemoStoryMaker", (0, 170), (340, 60)),
        "photo encode": replace(
            prompt_text((0, 380), f"{DEMO_IDENTITY} in the meadow", "Photo prompt"), size=(340, 110)
        ),
        "photo negative": replace(zeros((0, 550), "photo encode"), size=(340, 50)),
        "photo latent": Node(
            "EmptyLatentImage", (0, 660), (340, 110), dict(zip(("width", "height"), size, strict=True))
        ),
        "photo sampler": replace(
            sampler((0, 830), title="The photo", model="loader", **photo_sampler, **settings), size=(340, 270)
        ),
        "photo": Node("VAEDecode", (0, 1160), (340, 50), links={"samples": ("photo sampler", 0), "vae": ("loader", 2)}),
        "character": Node(
            "StoryLoom_Character",
            (420, 0),
            (400, 240),
            links={"clip_vision": ("storymaker", 1), "image": ("photo", 0)},
        ),
        "seen": seen((420, 300), "character"),
        "report": Node("PreviewAny", (420, 620), (400, 130), links={"source": ("character", 2)}, title="Report"),
        "apply": applied((900, 960), "character"),
        **drawn_story(
            FOX,
            size,
            replace(zeros((900, 530), "encode"), size=(420, 50)),
            settings,
        ),
    }
    groups = {
        "Model": ("loader", "storymaker"),
        "Photo": ("photo encode", "photo negative", "photo latent", "photo sampler", "photo"),
        "Character": ("character", "seen", "report"),
        **STORY_GROUPS,
    }
    pictured = AppInput("photo encode", "text", "What the photo shows", 60)
    return Workflow(f"{DEMO}{NAME}", nodes, groups, story_app(demo, pictured))


def workflows() -> list[Workflow]:
    """The template and its demo."""
    real = character_from_photo(CHECKPOINT_LOADER, STORYMAKER_SETTINGS)
    return [with_note(real), with_note(character_from_photo_demo(DEMO_LOADER, DEMO_SETTINGS))]
