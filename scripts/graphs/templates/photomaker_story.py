"""PhotoMaker Story: One Prompt One Story about the person in a photo, by ComfyUI's own PhotoMaker model."""

from __future__ import annotations

from dataclasses import replace

from ..files import PHOTOMAKER, PHOTOMAKER_PAGE, model_property
from ..model import AppInput, Node, Workflow
from ..parts import CHECKPOINT_LOADER, PUBLISHED, story_app, with_note
from ..stories import PHOTOGRAPHED
from ..storymaker import photo
from .one_prompt import one_prompt_one_story


def photomaker_story(loader: Node) -> Workflow:
    """The graph of One Prompt One Story with a photo."""
    whole = one_prompt_one_story("PhotoMaker Story", loader, PHOTOGRAPHED, **PUBLISHED)
    encode = whole.nodes["encode"]
    added = {
        "photomaker": Node(
            "PhotoMakerLoader",
            (0, 1030),
            (420, 60),
            {"photomaker_model_name": PHOTOMAKER},
            properties=model_property(PHOTOMAKER, f"{PHOTOMAKER_PAGE}/resolve/main/{PHOTOMAKER}", "photomaker"),
        ),
        "photo": replace(photo((0, 1150), "photo.png", "Photo of the person"), size=(420, 340)),
        "encode": replace(encode, links={**encode.links, "photomaker": ("photomaker", 0), "photo": ("photo", 0)}),
    }
    groups = {**whole.groups, "Photo": ("photomaker", "photo")}
    app = story_app(loader, AppInput("photo", "image", "Photo of the person"))
    return replace(whole, nodes={**whole.nodes, **added}, groups=groups, app=app)


def workflows() -> list[Workflow]:
    """The template."""
    return [with_note(photomaker_story(CHECKPOINT_LOADER))]
