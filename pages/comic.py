"""Comic pages: a story's panels in a layout, with captions and a title on paper. Pillow and numpy only."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

import numpy as np
from PIL import Image, ImageDraw

from ..prompts.script import short
from .fonts import REPLACEMENT, Typeface
from .geometry import Placement, Sheet, arrange
from .layout import Layout, pages_of
from .text import MAX_LINES, band, clean, fitting_lines, line_height, padding, wrap

log = logging.getLogger(__name__)

Panel = np.ndarray | Image.Image
Colour = tuple[int, int, int]
Edges = tuple[int, int, int, int]
"""Left, top, right and bottom edge of a picture in pixels; right and bottom are exclusive."""
CaptionPlace = Literal["below", "over"]
CAPTION_PLACES: tuple[str, ...] = get_args(CaptionPlace)
Direction = Literal["left_to_right", "right_to_left"]
DIRECTIONS: tuple[str, ...] = get_args(Direction)

PAPER = (252, 251, 248)
INK = (38, 36, 40)
VEIL = 200
"""Opacity of the box behind a caption over its picture, 0..255; as published."""
MIN_CAPTION_SIZE = 10
TITLE_LINES = 2
MAX_CHARACTERS = 20_000
"""Maximum length of a caption; more than fits on the widest page."""
MAX_PIXELS = 1 << 29
"""Maximum of all pages together: 6 GB in ComfyUI's image format."""


@dataclass(frozen=True)
class PageStyle:
    """The appearance of pages.

    layout, columns, rows, panels_per_page, seed  see `pages_of`
    gap, margin    pixels between panels and around the page; margin None = 2 * gap
    page_width     pixels; 0 = automatic, with panels at their original size, see `arrange`
    caption_place  below the panel, or over its lower edge in a translucent box
    caption_size   font size in pixels; 0 = automatic, see `auto_caption_size`
    title          printed on the first page, at twice the caption size
    direction      reading direction
    font, fonts    for captions and title, see `Typeface`
    paper, ink     background and text colours, (red, green, blue) 0..255
    """

    layout: Layout = "grid"
    columns: int = 0
    rows: str = ""
    panels_per_page: int = 0
    seed: int = 0
    gap: int = 12
    margin: int | None = None
    page_width: int = 0
    caption_place: CaptionPlace = "below"
    caption_size: int = 0
    title: str = ""
    direction: Direction = "left_to_right"
    font: str | None = None
    fonts: tuple[str, ...] = ()
    paper: Colour = PAPER
    ink: Colour = INK


def comic_pages(
    panels: Sequence[Panel], captions: Sequence[str] = (), style: PageStyle | None = None
) -> list[Image.Image]:
    """Arrange panels on pages, in reading order. Returns RGB images of equal size.

    panels    [H, W], [H, W, 1], [H, W, 3] or [H, W, 4] arrays (float 0..1 or 8-bit) or Pillow images; transparent
              areas become white. Each is centred in a cell of the greatest width and height among them.
    captions  one per panel; missing ones are empty, extra ones are ignored. See `wrap`. Below a panel they have at
              most MAX_LINES lines; over a panel, and below a stacked one, as many as fit into half of its height.

    Sizes: see `arrange`; captions below panels are `band` high, and so is the title, which has at most TITLE_LINES
    lines. Characters that no font has are listed in one warning in the log.
    Raises ValueError without any panel, for other shapes of panels, for rows or a font that cannot be read, for a page
    too small for its panels, and for more than MAX_PIXELS.
    """
    style = style or PageStyle()
    if not panels:
        raise ValueError("A comic page needs at least 1 panel, got 0: connect a batch of images.")
    sizes = [_size(panel) for panel in panels]
    cell = max(width for width, _ in sizes), max(height for _, height in sizes)
    margin = 2 * style.gap if style.margin is None else style.margin
    pages = pages_of(style.layout, len(panels), style.columns, style.rows, style.panels_per_page, style.seed)
    sheet = Sheet(cell, style.gap, margin, style.page_width)
    (page_width, _), bare = arrange(pages, sheet, lambda *_: 0)

    widths = [placement.width for page in bare for placement in page]
    size = style.caption_size or auto_caption_size(sum(widths) / len(widths))
    texts = [clean(text[:MAX_CHARACTERS]) for text in captions[: len(panels)]]
    title = clean(style.title[:MAX_CHARACTERS])
    typeface = Typeface(texts, size, style.font, style.fonts)
    title_face = Typeface([title], 2 * size, style.font, style.fonts)
    texts = [typeface.printable(text) for text in texts] + [""] * (len(panels) - len(texts))
    heading = wrap(title_face.printable(title), title_face, max(1, page_width - 2 * margin), TITLE_LINES)
    _warn_about({**typeface.missing, **title_face.missing})

    @cache
    def caption_height(panel: int, width: int, limit: int | None) -> int:
        lines = MAX_LINES if limit is None else fitting_lines(limit, size)
        return band(len(wrap(texts[panel], typeface, width, lines)), size)

    below = style.caption_place == "below"
    whole, placed = arrange(
        pages,
        sheet,
        caption_height if below else lambda *_: 0,
        band(len(heading), 2 * size),
        right_to_left=style.direction == "right_to_left",
    )
    if len(placed) * whole[0] * whole[1] > MAX_PIXELS:
        raise ValueError(
            f"The story would fill {len(placed)} page{'s' * (len(placed) > 1)} of {whole[0]} x {whole[1]} pixels, "
            f"together more than {MAX_PIXELS // 10**6} million: lower page_width, or lay out fewer images at once."
        )
    drawn = [Image.new("RGB", whole, style.paper) for _ in placed]
    write(drawn[0], heading, title_face, page_width / 2, margin, style.ink)
    for page, placements in zip(drawn, placed, strict=True):
        for at in placements:
            picture = _draw_picture(page, to_rgb(panels[at.panel]), at, cell)
            text = texts[at.panel]
            if below:
                lines = wrap(text, typeface, at.width, fitting_lines(at.band, size))
                write(page, lines, typeface, at.left + at.width / 2, at.top + at.height, style.ink)
            else:
                _write_over(page, text, typeface, picture, style)
            _draw_border(page, picture, style.ink)
    return drawn


def auto_caption_size(panel_width: float) -> int:
    """Caption size in pixels for this mean panel width: a twentieth of it, at least MIN_CAPTION_SIZE."""
    return max(MIN_CAPTION_SIZE, round(panel_width / 20))


def parse_colour(text: str) -> Colour:
    """A colour from "#rrggbb" or "#rgb"; the # is optional. Raises ValueError for any other text."""
    digits = text.strip().removeprefix("#")
    if not re.fullmatch(r"[0-9a-fA-F]{3}|[0-9a-fA-F]{6}", digits):
        raise ValueError(
            f'The colour "{short(text)}" cannot be read: write # and six hexadecimal digits, for example "#fcfbf8".'
        )
    if len(digits) == 3:
        digits = "".join(digit * 2 for digit in digits)
    return tuple(int(digits[i : i + 2], 16) for i in (0, 2, 4))


def _warn_about(missing: dict[str, None]) -> None:
    if missing:
        log.warning(
            'No font has %s: printed as "%s". Install a font with these characters, for example Noto Sans CJK or Noto '
            "Emoji.",
            short(" ".join(missing), 200),
            REPLACEMENT,
        )


def _size(panel: Panel) -> tuple[int, int]:
    """Width and height of a panel in pixels."""
    if isinstance(panel, Image.Image):
        return panel.size
    shape = np.shape(panel)
    if 0 in shape or not (len(shape) == 2 or (len(shape) == 3 and shape[2] in (1, 3, 4))):
        raise ValueError(f"A comic panel must be [height, width] with 1, 3 or 4 channels, got {list(shape)}.")
    return shape[1], shape[0]


def to_rgb(panel: Panel) -> Image.Image:
    """A panel as 8-bit RGB. Transparent areas become white."""
    image = panel if isinstance(panel, Image.Image) else from_array(np.asarray(panel))
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def from_array(array: np.ndarray) -> Image.Image:
    """An 8-bit picture from [H, W] or [H, W, 1, 3 or 4]. Values are clipped to 0..1; NaN becomes black."""
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.dtype != np.uint8:
        array = np.fmax(array, np.float32(0), dtype=np.float32)
        np.fmin(array, np.float32(1), out=array)
        array *= 255
        array += 0.5
        array = array.astype(np.uint8)
    return Image.fromarray(array)


def _draw_picture(page: Image.Image, image: Image.Image, at: Placement, cell: tuple[int, int]) -> Edges:
    """Draw a picture centred in its placement. Returns its edges."""
    width = max(1, round(image.width * at.width / cell[0]))
    height = max(1, round(image.height * at.height / cell[1]))
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    left, top = at.left + (at.width - width) // 2, at.top + (at.height - height) // 2
    page.paste(image, (left, top))
    return left, top, left + width, top + height


def _draw_border(page: Image.Image, picture: Edges, ink: Colour) -> None:
    left, top, right, bottom = picture
    border = max(1, round((right - left) / 384))
    ImageDraw.Draw(page).rectangle((left, top, right - 1, bottom - 1), outline=ink, width=border)


def write(page: Image.Image, lines: Sequence[str], typeface: Typeface, centre: float, top: float, ink: Colour) -> None:
    """Write lines into a band that begins at `top`, each centred at `centre`."""
    for i, line in enumerate(lines):
        typeface.draw(page, centre, top + padding(typeface.size) + i * line_height(typeface.size), line, ink)


def _write_over(page: Image.Image, text: str, typeface: Typeface, picture: Edges, style: PageStyle) -> None:
    """Write a caption at the bottom of a picture: at most half of its height, in a box as wide as the text."""
    left, top, right, bottom = picture
    edge = 2 * padding(typeface.size)
    lines = wrap(text, typeface, max(1, right - left - edge), fitting_lines((bottom - top) // 2, typeface.size))
    if not lines:
        return
    width = min(right - left, round(max(map(typeface.length, lines))) + edge)
    height = min(bottom - top, band(len(lines), typeface.size))
    start = left + (right - left - width) // 2
    box = (start, bottom - height, start + width, bottom)
    veiled = page.crop(box)
    veiled = Image.blend(veiled, Image.new("RGB", veiled.size, style.paper), VEIL / 255)
    write(veiled, lines, typeface, width / 2, 0, style.ink)
    page.paste(veiled, box)
