"""Two People: a story about the people of two photos, with StoryMaker."""

from __future__ import annotations

from ..model import AppInput, Node, Workflow
from ..parts import CHECKPOINT_LOADER, prompt_text, story_app, with_note
from ..stories import COUPLE
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


def two_people(loader: Node, settings: dict) -> Workflow:
    """The graph: each person appears in the frames that name them."""
    nodes = {
        **real_models(loader),
        "photo 1": photo((0, 640), "woman.png", "Photo of the woman"),
        "photo 2": photo((0, 1050), "man.png", "Photo of the man"),
        "character 1": person((420, 0), "photo 1", "Woman"),
        "seen 1": seen((420, 300), "character 1"),
        "character 2": person((420, 680), "photo 2", "Man"),
        "seen 2": seen((420, 980), "character 2"),
        "apply": applied((900, 960), "character 1", "character 2"),
        **drawn_story(
            COUPLE,
            PORTRAIT,
            prompt_text((900, 530), NO_GOOD, "Negative"),
            settings,
        ),
    }
    groups = {
        "Model": ("loader", "storymaker", "vision", "faces"),
        "Photos": ("photo 1", "photo 2"),
        "Characters": ("character 1", "seen 1", "character 2", "seen 2"),
        **STORY_GROUPS,
    }
    photos = (
        AppInput("photo 1", "image", "Photo of the woman"),
        AppInput("photo 2", "image", "Photo of the man"),
    )
    return Workflow("Two People", nodes, groups, story_app(loader, *photos))


def workflows() -> list[Workflow]:
    """The template."""
    return [with_note(two_people(CHECKPOINT_LOADER, STORYMAKER_SETTINGS))]
