"""Compare stories (A/B): the same story without and with a method, on one page, with the changes in numbers."""

from __future__ import annotations

import numpy as np
import torch
from comfy_api.latest import io

from ..pages.comic import PageStyle
from ..pages.comparison import ARRANGEMENTS, comparison_page, differences
from .page import caption_size_input
from .ranges import in_range
from .types import Measures
from .types import Story as StoryType


class Compare(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        def measures(side: str) -> Measures.Input:
            return Measures.Input(
                f"measures_{side}",
                optional=True,
                tooltip=f"MEASURES of images_{side} from Story consistency. Connect both or neither: with both, the "
                "page lists what changed.",
            )

        return io.Schema(
            node_id="StoryLoom_Compare",
            display_name="Compare stories (A/B)",
            category="StoryLoom/measure",
            description=(
                "Puts two versions of the same story on one page, for example without and with a method at the same "
                "seed, and prints the change in each measure above them: CLIP-I 0.812 -> 0.874 (+0.062)."
            ),
            search_aliases=["A/B", "side by side", "before after", "compare images", "with and without", "difference"],
            inputs=[
                io.Image.Input("images_a", tooltip="The frames without the method, in story order."),
                io.Image.Input("images_b", tooltip="The same number of frames with the method."),
                measures("a"),
                measures("b"),
                StoryType.Input(
                    "story",
                    optional=True,
                    tooltip="The story that provides the captions under both. Not connected: no captions.",
                ),
                io.String.Input("label_a", default="without", tooltip="Heading above images_a. Empty: none."),
                io.String.Input("label_b", default="with", tooltip="Heading above images_b. Empty: none."),
                io.String.Input("title", default="", tooltip="Title at the top of the page. Empty: no title."),
                io.Combo.Input(
                    "arrangement",
                    options=list(ARRANGEMENTS),
                    default="rows",
                    tooltip="rows: A above B. columns: A to the left of B.",
                ),
                io.Int.Input(
                    "columns",
                    default=0,
                    min=0,
                    max=20,
                    tooltip="Panels per row in A and in B. 0: automatic, up to six with A above B, near-square "
                    "side by side.",
                ),
                caption_size_input(),
            ],
            outputs=[
                io.Image.Output("page", display_name="page", tooltip="The finished page."),
                io.String.Output(
                    "changes", display_name="changes", tooltip="The change in each measure, one per line."
                ),
            ],
        )

    @classmethod
    @in_range
    def execute(
        cls,
        images_a,
        images_b,
        label_a,
        label_b,
        title,
        arrangement,
        columns,
        caption_size,
        measures_a=None,
        measures_b=None,
        story=None,
    ) -> io.NodeOutput:
        if (measures_a is None) != (measures_b is None):
            missing = "measures_a" if measures_a is None else "measures_b"
            raise ValueError(f"{missing} is not connected: connect the measures of both stories, or of neither.")
        for side, images, consistency in (("a", images_a, measures_a), ("b", images_b, measures_b)):
            if consistency is not None and consistency.frames != len(images):
                raise ValueError(
                    f"measures_{side} covers {consistency.frames} frames, but images_{side} has {len(images)}: connect "
                    "the measures of these images."
                )
        if story is not None and len(story.frames) != len(images_a):
            raise ValueError(
                f"The story has {len(story.frames)} frames, but images_a has {len(images_a)}: connect all images of "
                "this story."
            )
        lines = differences(measures_a, measures_b) if measures_a is not None else []
        page = comparison_page(
            *(list(images.float().cpu().numpy()) for images in (images_a, images_b)),
            [frame.caption for frame in story.frames] if story is not None else [],
            (label_a, label_b),
            lines,
            arrangement,
            PageStyle(columns=columns, caption_size=caption_size, title=title),
        )
        return io.NodeOutput(torch.from_numpy(np.array(page, np.float32)[None] / 255), "\n".join(lines))
