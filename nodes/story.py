"""The story: its script, and an empty latent for every frame."""

import comfy.model_management
import torch
from comfy_api.latest import io

from ..prompts.script import parse_frames, parse_identity, parse_story, parse_style
from .ranges import in_range
from .types import Story

EXAMPLE_IDENTITY = "a red fox in a blue coat"
EXAMPLE_FRAMES = """asleep in the snow # Winter came early.
reading on a train # So he went south.
drinking tea by the sea # The sea was warm,
waving from a lighthouse # and there he stayed."""


class Script(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="StoryLoom_Script",
            display_name="Story script",
            category="StoryLoom/story",
            description=(
                "The text of a story: a description of its characters, and one line per frame. Connect it to an encode "
                "node, Empty story latent and Story page."
            ),
            search_aliases=[
                "story",
                "storyboard",
                "comic",
                "characters",
                "frames",
                "prompt list",
                "StoryDiffusion",
                "1Prompt1Story",
            ],
            inputs=[
                io.String.Input(
                    "identity",
                    multiline=True,
                    default=EXAMPLE_IDENTITY,
                    dynamic_prompts=True,
                    tooltip=(
                        "Description of the character, shared by every frame. For several characters, write one per "
                        "line with a name: [Fox] a red fox in a blue coat. # starts a comment. At each run, ComfyUI "
                        "replaces {red|grey} with one of its choices."
                    ),
                ),
                io.String.Input(
                    "frames",
                    multiline=True,
                    default=EXAMPLE_FRAMES,
                    dynamic_prompts=True,
                    tooltip=(
                        "One frame per line: what happens in it, without the identity. # starts the caption for the "
                        "page, [Name] inserts that character, [NC] marks a frame without characters. Write \\# and \\[ "
                        "for a literal # and [. At each run, ComfyUI replaces {snow|rain} with one of its choices."
                    ),
                ),
                io.String.Input(
                    "style",
                    default="",
                    tooltip='Optional text around every frame; {prompt} is replaced by the frame: "ink drawing of '
                    '{prompt}".',
                ),
            ],
            outputs=[
                Story.Output("story", display_name="STORY", tooltip="The parsed story, for the other StoryLoom nodes."),
                io.Int.Output("frame_count", display_name="frame count", tooltip="Number of frames in the story."),
            ],
        )

    @classmethod
    def validate_inputs(cls, identity=None, frames=None, style=None):
        """Check the script before the run, as far as it is typed (connected and missing texts are None here).

        Faults are raised, not returned: ComfyUI would show a returned message once per input in this signature.
        """
        characters = None if identity is None else parse_identity(identity)
        if frames is not None:
            parse_frames(frames, characters)
        if style is not None:
            parse_style(style)
        return True

    @classmethod
    def execute(cls, identity, frames, style) -> io.NodeOutput:
        story = parse_story(identity, frames, style)
        return io.NodeOutput(story, len(story.frames))


class EmptyLatent(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        size = {"min": 64, "max": 16384, "step": 8}
        return io.Schema(
            node_id="StoryLoom_EmptyLatent",
            display_name="Empty story latent",
            category="StoryLoom/story",
            description="Creates one empty latent image per frame of a story, so that one KSampler draws them all.",
            search_aliases=["empty latent", "story batch", "same noise", "batch size"],
            inputs=[
                io.Int.Input(
                    "width", default=1024, tooltip="Width of a frame in pixels. SDXL works best at 1024.", **size
                ),
                io.Int.Input("height", default=1024, tooltip="Height of a frame in pixels.", **size),
                Story.Input("story", tooltip="The story; its number of frames sets the batch size."),
                io.Boolean.Input(
                    "shared_noise",
                    default=True,
                    tooltip=(
                        "On: all frames start from the same noise, as published, which keeps composition and colours "
                        "similar. Off: every frame starts from its own noise."
                    ),
                ),
            ],
            outputs=[
                io.Latent.Output("latent", display_name="LATENT", tooltip="One empty latent per frame, for KSampler.")
            ],
        )

    @classmethod
    @in_range
    def execute(cls, width, height, story, shared_noise) -> io.NodeOutput:
        count = len(story.frames)
        where = {
            "device": comfy.model_management.intermediate_device(),
            "dtype": comfy.model_management.intermediate_dtype(),
        }
        samples = torch.zeros([count, 4, height // 8, width // 8], **where)
        # With indices, noise is drawn frame by frame, so that a frame's noise is the same in every batch at any size.
        numbers = [0] * count if shared_noise else list(range(count))
        return io.NodeOutput({"samples": samples, "batch_index": numbers})
