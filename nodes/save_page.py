"""Save story page: write pages to files in the output folder, each completely or not at all."""

from __future__ import annotations

import json
import os
from datetime import datetime

import comfy.utils
import folder_paths
import numpy as np
import torch
from comfy.cli_args import args
from comfy_api.latest import io, ui

from ..models.files import write_whole
from ..pages.comic import from_array, to_rgb
from ..pages.encoding import FORMATS, QUALITY, check_size, encoded
from ..prompts.script import short
from .folders import checked_prefix, free_file
from .ranges import in_range


class SavePage(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StoryLoom_SavePage",
            display_name="Save story page",
            category="StoryLoom/page",
            description=(
                "Saves pages to the output folder as png, webp or jpg, or all of them as one PDF. Files are written "
                "completely or not at all, even if the server stops while saving, and are never overwritten."
            ),
            search_aliases=["save image", "export pdf", "save pdf", "save webp", "save jpg", "write comic", "download"],
            is_output_node=True,
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
            inputs=[
                io.Image.Input("images", tooltip="Pages from Story page, or any other images."),
                io.String.Input(
                    "filename_prefix",
                    default="StoryLoom/page",
                    tooltip="Subfolder of the output folder and start of the file name, as in Save Image, with the "
                    "same placeholders such as %year% or %date:yyyy-MM-dd%, which also work in graphs sent through "
                    "the API. The next free number is appended.",
                ),
                io.Combo.Input(
                    "format",
                    options=list(FORMATS),
                    default="png",
                    tooltip="png: lossless, contains the workflow. webp: smaller files, contains the workflow. jpg: "
                    "opens everywhere, no workflow. pdf: all pages in one file, no workflow.",
                ),
                io.Int.Input(
                    "quality",
                    default=QUALITY,
                    min=1,
                    max=100,
                    advanced=True,
                    tooltip="For webp, jpg and pdf: lower values give smaller files. webp is lossless at 100, png "
                    "always.",
                ),
            ],
            outputs=[io.Image.Output("pages", display_name="pages", tooltip="The input images, unchanged.")],
        )

    @classmethod
    def validate_inputs(cls, filename_prefix=None):
        try:
            return filename_prefix is None or bool(checked_prefix(filename_prefix, datetime.now()))
        except ValueError as error:
            return str(error)

    @classmethod
    @in_range
    def execute(cls, images, filename_prefix, format, quality) -> io.NodeOutput:
        prefix = checked_prefix(filename_prefix, datetime.now())
        if images.ndim != 4 or 0 in images.shape or images.shape[3] not in (1, 3, 4):
            raise ValueError(
                f"images has the shape {list(images.shape)} instead of [pages, height, width, 3]: connect at "
                "least one IMAGE."
            )
        if format not in FORMATS:
            raise ValueError(f'Unknown format "{short(str(format))}": choose one of {", ".join(FORMATS)}.')
        size = images.shape[2], images.shape[1]
        check_size(*size, format)
        pictures = [from_array(image.float().cpu().numpy()) for image in images]
        files = [pictures] if format == "pdf" else [[picture] for picture in pictures]
        texts, bar, saved = cls.texts(), comfy.utils.ProgressBar(len(files)), []
        try:
            output = folder_paths.get_output_directory()
            folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(prefix, output, *size)
            for number, pages in enumerate(files):
                path, counter = free_file(folder, name.replace("%batch_num%", str(number)), counter, format)
                write_whole(path, encoded(pages, format, quality, texts))
                saved.append(ui.SavedResult(path.name, subfolder, io.FolderType.output))
                bar.update(1)
        except OSError as error:
            raise OSError(
                f'File {len(saved) + 1} of {len(files)} could not be written to "{short(prefix)}" in the output folder '
                f"({error.strerror or error}): free disk space, or choose another filename_prefix. The files before it "
                "are saved."
            ) from error
        if format != "pdf":
            return io.NodeOutput(images, ui={"images": saved})
        opaque = torch.from_numpy(np.stack([to_rgb(picture) for picture in pictures])).float() / 255
        previews = ui.PreviewImage(opaque, cls=cls).as_dict()["images"]
        return io.NodeOutput(images, ui={"images": previews, "text": (os.path.join(subfolder, path.name),)})

    @classmethod
    def texts(cls) -> dict[str, str]:
        """The metadata from which ComfyUI opens the graph, as written by Save Image."""
        if args.disable_metadata:
            return {}
        prompt = {} if cls.hidden.prompt is None else {"prompt": cls.hidden.prompt}
        return {name: json.dumps(value) for name, value in (prompt | (cls.hidden.extra_pnginfo or {})).items()}
