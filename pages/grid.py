"""The plain comic page: panels on a grid, each with its caption below it."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from .comic import PageStyle, Panel, comic_pages


def comic_page(
    panels: Sequence[Panel],
    captions: Sequence[str] = (),
    columns: int = 0,
    gap: int = 12,
    margin: int | None = None,
    caption_size: int = 0,
) -> Image.Image:
    """Arrange panels in a grid, row by row, each caption centred below its panel. Returns an RGB image.

    panels, captions  see `comic_pages`
    columns           panels per row, at most the number of panels; 0 = automatic, see `auto_columns`
    gap, margin       pixels between panels and around the page; margin None = 2 * gap
    caption_size      font size in pixels; 0 = automatic, see `auto_caption_size`

    With cells of w x h pixels, the greatest width and height among the panels:
        page width  = columns * w + (columns - 1) * gap + 2 * margin
        page height = rows * h + (rows - 1) * gap + 2 * margin + the caption bands of all rows
        band        = 0 in a row without captions, else lines * ceil(1.25 * size) + 2 * ceil(0.5 * size),
                      where lines is that of the row's longest caption, so that panels stay aligned
    Raises ValueError without any panel and for an invalid shape of a panel.
    """
    style = PageStyle(columns=columns, gap=gap, margin=margin, caption_size=caption_size)
    return comic_pages(panels, captions, style)[0]
