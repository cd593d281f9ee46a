"""Story page: the frames of a story on comic pages."""

from __future__ import annotations

import logging

import folder_paths
import numpy as np
import torch
from comfy_api.latest import io

from ..pages.comic import CAPTION_PLACES, DIRECTIONS, PageStyle, comic_pages, parse_colour
from ..pages.layout import LAYOUTS, parse_rows
from ..prompts.script import Story, short
from .folders import files_in, register
from .ranges import in_range
from .types import Story as StoryType

log = logging.getLogger(__name__)

FONTS = "storyloom_fonts"
"""The folder in models/ for the artist's fonts."""
FONT_SUFFIXES = (".ttf", ".otf", ".ttc")
BUILT_IN = "built-in"

register(FONTS, FONT_SUFFIXES, FONTS)


def caption_size_input() -> io.Int.Input:
    return io.Int.Input(
        "caption_size",
        default=0,
        min=0,
        max=200,
        advanced=True,
        tooltip="Font size of the captions in pixels. 0: automatic, a twentieth of the mean panel width, at least 10.",
    )


class Page(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StoryLoom_Page",
            display_name="Story page",
            category="StoryLoom/page",
            description=(
                "Arranges the frames of a story on comic pages, each with its caption. Works with any batch of "
                "images; without a story the pages have no captions."
            ),
            search_aliases=["comic page", "image grid", "contact sheet", "storyboard", "captions", "webtoon", "manga"],
            inputs=[
                io.Image.Input("images", tooltip="The frames in story order, for example from VAE Decode."),
                StoryType.Input(
                    "story",
                    optional=True,
                    tooltip="The story that provides the captions: the text after # in a frame, otherwise the "
                    "frame's own words. Not connected: no captions.",
                ),
                io.Int.Input(
                    "columns",
                    default=0,
                    min=0,
                    max=20,
                    tooltip="Panels per row in the grid layout. 0: a near-square grid, such as 2 x 2 for 4 images or "
                    "3 x 2 for 6. 1 stacks all panels.",
                ),
                io.Boolean.Input(
                    "captions", default=True, tooltip="On: prints the story's captions. Off: images only."
                ),
                io.Int.Input(
                    "gap",
                    default=12,
                    min=0,
                    max=256,
                    advanced=True,
                    tooltip="Space between panels in pixels; the margin around the page is twice as wide. 0: no "
                    "space between panels.",
                ),
                caption_size_input(),
                io.Combo.Input(
                    "layout",
                    options=list(LAYOUTS),
                    default="grid",
                    optional=True,
                    tooltip="grid: equal panels in columns. four_panel: pages of 2 x 2. classic: rows that mix large "
                    "panels with stacks of two small ones. strip: side by side. column: one above the other. rows: as "
                    "set in the rows input.",
                ),
                io.String.Input(
                    "rows",
                    default="2,1,3",
                    optional=True,
                    tooltip='Panels in each row for the rows layout, from top to bottom: "2,1,3". All rows have the '
                    "same width. Further frames continue on pages with the same rows.",
                ),
                io.Combo.Input(
                    "caption_place",
                    options=list(CAPTION_PLACES),
                    default="below",
                    optional=True,
                    tooltip="below: on the page, under the panel. over: at the bottom of the image, in a translucent "
                    "box.",
                ),
                io.String.Input(
                    "title",
                    default="",
                    optional=True,
                    tooltip="Printed at the top of the first page, at twice the caption size. Empty: no title.",
                ),
                io.Int.Input(
                    "panels_per_page",
                    default=0,
                    min=0,
                    max=400,
                    optional=True,
                    tooltip="Maximum panels per page; further frames continue on more pages, output as one batch. 0: "
                    "all on one page. four_panel always has 4, and rows as many as its rows hold.",
                ),
                io.Int.Input(
                    "page_width",
                    default=0,
                    min=0,
                    max=16384,
                    optional=True,
                    tooltip="Width of the page in pixels; panels are scaled to fit. 0: automatic, so that no image "
                    "is enlarged.",
                ),
                io.Combo.Input(
                    "direction",
                    options=list(DIRECTIONS),
                    default="left_to_right",
                    optional=True,
                    tooltip="Reading direction: left_to_right as in a Western comic, right_to_left as in manga.",
                ),
                io.Combo.Input(
                    "font",
                    options=[BUILT_IN, *files_in(FONTS, FONT_SUFFIXES)],
                    default=BUILT_IN,
                    optional=True,
                    tooltip="Font for captions and title. Put .ttf, .otf or .ttc files into models/storyloom_fonts "
                    "to list them here. Missing characters are taken from the other fonts there and from system "
                    "fonts.",
                ),
                io.Int.Input(
                    "layout_seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFF,
                    optional=True,
                    advanced=True,
                    tooltip="Seed for the position of the stacks in the classic layout. The same seed gives the "
                    "same page.",
                ),
                io.String.Input(
                    "paper",
                    default="#fcfbf8",
                    optional=True,
                    advanced=True,
                    tooltip="Background colour of the page, as # and six hexadecimal digits.",
                ),
                io.String.Input(
                    "ink",
                    default="#262428",
                    optional=True,
                    advanced=True,
                    tooltip="Colour of text and borders, as # and six hexadecimal digits.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    "page", display_name="page", tooltip="The finished pages: a batch of images of the same size."
                )
            ],
        )

    @classmethod
    def validate_inputs(cls, rows=None, paper=None, ink=None):
        try:
            if rows is not None:
                parse_rows(rows)
            for colour in (paper, ink):
                if colour is not None:
                    parse_colour(colour)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    @in_range
    def execute(
        cls,
        images: torch.Tensor,
        columns: int,
        captions: bool,
        gap: int,
        caption_size: int,
        story: Story | None = None,
        layout: str = "grid",
        rows: str = "2,1,3",
        caption_place: str = "below",
        title: str = "",
        panels_per_page: int = 0,
        page_width: int = 0,
        direction: str = "left_to_right",
        font: str = BUILT_IN,
        layout_seed: int = 0,
        paper: str = "#fcfbf8",
        ink: str = "#262428",
    ) -> io.NodeOutput:
        texts = [frame.caption for frame in story.frames] if story is not None and captions else []
        if texts and len(texts) != len(images):
            log.warning(
                "Story page: %d images but %d frames in the story. Captions are assigned in order; connect images and "
                "story of the same run.",
                len(images),
                len(texts),
            )
        fonts = {name: folder_paths.get_full_path(FONTS, name) for name in files_in(FONTS, FONT_SUFFIXES)}
        if font != BUILT_IN and not fonts.get(font):
            raise ValueError(f'Font "{short(font)}" not found: put it into models/storyloom_fonts and press R.')
        style = PageStyle(
            layout=layout,
            columns=columns,
            rows=rows,
            panels_per_page=panels_per_page,
            seed=layout_seed,
            gap=gap,
            page_width=page_width,
            caption_place=caption_place,
            caption_size=caption_size,
            title=title,
            direction=direction,
            font=None if font == BUILT_IN else fonts[font],
            fonts=tuple(path for path in fonts.values() if path),
            paper=parse_colour(paper),
            ink=parse_colour(ink),
        )
        pages = comic_pages(list(images.float().cpu().numpy()), texts, style)
        batch = np.empty((len(pages), pages[0].height, pages[0].width, 3), np.float32)
        for number, page in enumerate(pages):
            np.divide(page, np.float32(255), out=batch[number], dtype=np.float32)
        return io.NodeOutput(torch.from_numpy(batch))
