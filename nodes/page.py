"""Story page: the frames of a story on one comic page."""

from __future__ import annotations

import logging

import numpy as np
import torch
from comfy_api.latest import io

from ..pages.grid import comic_page
from ..prompts.script import Story
from .types import Story as StoryType

log = logging.getLogger(__name__)


class Page(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StoryLoom_Page",
            display_name="Story page",
            category="StoryLoom/page",
            description=(
                "Lays the frames of a story out on one page, each with its caption below it. "
                "Works on any batch of images; without a story the page has no captions."
            ),
            search_aliases=["comic page", "image grid", "contact sheet", "storyboard", "captions"],
            inputs=[
                io.Image.Input("images", tooltip="The frames in story order, as VAE Decode gives them."),
                StoryType.Input(
                    "story",
                    optional=True,
                    tooltip="The story whose captions are printed: the text after # in a frame, else the frame's own "
                    "words. Not connected: no captions.",
                ),
                io.Int.Input(
                    "columns",
                    default=0,
                    min=0,
                    max=20,
                    tooltip="Panels per row. 0 makes a near-square grid: 4 images 2 x 2, 6 images 3 x 2. "
                    "1 stacks all panels.",
                ),
                io.Boolean.Input(
                    "captions", default=True, tooltip="Print the story's captions. Off: a grid of pictures alone."
                ),
                io.Int.Input(
                    "gap",
                    default=12,
                    min=0,
                    max=256,
                    advanced=True,
                    tooltip="Pixels of paper between panels; the margin around the page is twice as wide. "
                    "0 puts panels edge to edge.",
                ),
                io.Int.Input(
                    "caption_size",
                    default=0,
                    min=0,
                    max=200,
                    advanced=True,
                    tooltip="Height of the caption's letters in pixels. 0 chooses a twentieth of the panel's width, "
                    "at least 10.",
                ),
            ],
            outputs=[io.Image.Output("page", display_name="page", tooltip="One image: the finished page.")],
        )

    @classmethod
    def execute(
        cls,
        images: torch.Tensor,
        columns: int,
        captions: bool,
        gap: int,
        caption_size: int,
        story: Story | None = None,
    ) -> io.NodeOutput:
        texts = [frame.caption for frame in story.frames] if story is not None and captions else []
        if texts and len(texts) != len(images):
            log.warning(
                "Story page: %d images but %d frames in the story; each image gets the caption of the frame with its "
                "number. Connect the batch and the story of the same run.",
                len(images),
                len(texts),
            )
        page = comic_page(list(images.float().cpu().numpy()), texts, columns, gap, caption_size=caption_size)
        return io.NodeOutput(torch.from_numpy(np.asarray(page, dtype=np.float32) / 255)[None])
