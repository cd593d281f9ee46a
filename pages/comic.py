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
from .geometry import Place, Sheet, arrange
from .layout import Layout, pages_of
from .text import MAX_LINES, band, clean, fitting_lines, line_height, padding, wrap

log = logging.getLogger(__name__)

Panel = np.ndarray | Image.Image
Colour = tuple[int, int, int]
Edges = tuple[int, int, int, int]
"""Left, upper, right and lower edge of a picture in pixels, the latter two just outside it."""
CaptionPlace = Literal["below", "over"]
CAPTION_PLACES: tuple[str, ...] = get_args(CaptionPlace)
Direction = Literal["left_to_right", "right_to_left"]
DIRECTIONS: tuple[str, ...] = get_args(Direction)

PAPER = (252, 251, 248)
INK = (38, 36, 40)
VEIL = 200
"""Opacity of the box behind a caption over its picture, of 255; as published."""
MIN_CAPTION_SIZE = 10
TITLE_LINES = 2
MAX_CHARACTERS = 20_000
"""Of a caption, more than its lines hold on the widest page."""
MAX_PIXELS = 1 << 29
"""Of all pages together: 6 GB as ComfyUI holds images."""


@dataclass(frozen=True)
class PageStyle:
    """How pages look.

    layout, columns, rows, panels_per_page, seed  see `pages_of`
    gap, margin    pixels between panels and around the page; margin None = 2 * gap
    page_width     pixels; 0 = as wide as the panels at their own size need, see `arrange`
    caption_place  below the panel, or over its lower edge in a box of translucent paper
    caption_size   letter height in pixels; 0 = automatic, see `auto_caption_size`
    title          printed on the first page, in letters twice as high
    direction      which side a row begins at
    font, fonts    of captions and title, see `Typeface`
    paper, ink     colours, red, green, blue 0..255
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
    """Lay panels out on pages, in reading order. Returns RGB images of equal size.

    panels    [H, W], [H, W, 1], [H, W, 3] or [H, W, 4] arrays (float 0..1 or 8-bit) or Pillow images; transparency
              shows white. Each is centred in a cell as wide as the widest and as high as the highest of them.
    captions  one per panel; missing ones are empty, surplus ones are ignored. See `wrap`. Below a panel they have at
              most MAX_LINES lines; over a panel, and below a stacked one, as many as half of its place holds.

    `arrange` tells the sizes: the room of a caption below is `band` high, and so is that of a title, which has at most
    TITLE_LINES lines. What no font has is named in one warning in the log.
    Raises ValueError when there is no panel, a panel's shape is none of the above, the rows or the font cannot be read,
    the page has no room for its panels, or the pages have more than MAX_PIXELS.
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

    widths = [place.width for places in bare for place in places]
    size = style.caption_size or auto_caption_size(sum(widths) / len(widths))
    texts = [clean(text[:MAX_CHARACTERS]) for text in captions[: len(panels)]]
    title = clean(style.title[:MAX_CHARACTERS])
    typeface = Typeface(texts, size, style.font, style.fonts)
    title_face = Typeface([title], 2 * size, style.font, style.fonts)
    texts = [typeface.printable(text) for text in texts] + [""] * (len(panels) - len(texts))
    heading = wrap(title_face.printable(title), title_face, max(1, page_width - 2 * margin), TITLE_LINES)
    _warn_of({**typeface.missing, **title_face.missing})

    @cache
    def room(panel: int, width: int, most: int | None) -> int:
        lines = MAX_LINES if most is None else fitting_lines(most, size)
        return band(len(wrap(texts[panel], typeface, width, lines)), size)

    below = style.caption_place == "below"
    whole, placed = arrange(
        pages,
        sheet,
        room if below else lambda *_: 0,
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
    for page, places in zip(drawn, placed, strict=True):
        for place in places:
            picture = _draw_picture(page, to_rgb(panels[place.panel]), place, cell)
            text = texts[place.panel]
            if below:
                lines = wrap(text, typeface, place.width, fitting_lines(place.band, size))
                write(page, lines, typeface, place.left + place.width / 2, place.top + place.height, style.ink)
            else:
                _write_over(page, text, typeface, picture, style)
            _draw_border(page, picture, style.ink)
    return drawn


def auto_caption_size(panel_width: float) -> int:
    """Caption size in pixels for panels that are so wide on average: a twentieth of it, at least MIN_CAPTION_SIZE."""
    return max(MIN_CAPTION_SIZE, round(panel_width / 20))


def parse_colour(text: str) -> Colour:
    """A colour from "#rrggbb" or "#rgb", the # may be missing. Raises ValueError that shows the text."""
    digits = text.strip().removeprefix("#")
    if not re.fullmatch(r"[0-9a-fA-F]{3}|[0-9a-fA-F]{6}", digits):
        raise ValueError(
            f'The colour "{short(text)}" cannot be read: write # and six hexadecimal digits, for example "#fcfbf8".'
        )
    if len(digits) == 3:
        digits = "".join(digit * 2 for digit in digits)
    return tuple(bytes.fromhex(digits))


def _warn_of(missing: dict[str, None]) -> None:
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
    """A panel as 8-bit RGB. What is transparent shows white."""
    image = panel if isinstance(panel, Image.Image) else from_array(np.asarray(panel))
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def from_array(array: np.ndarray) -> Image.Image:
    """An 8-bit picture of [H, W] or [H, W, 1, 3 or 4]. Values are clipped to 0..1; what is not a number is black."""
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.dtype != np.uint8:
        array = np.fmax(array, np.float32(0), dtype=np.float32)
        np.fmin(array, np.float32(1), out=array)
        array *= 255
        array += 0.5
        array = array.astype(np.uint8)
    return Image.fromarray(array)


def _draw_picture(page: Image.Image, image: Image.Image, place: Place, cell: tuple[int, int]) -> Edges:
    """Draw a picture in the middle of its place. Returns where it is."""
    width = max(1, round(image.width * place.width / cell[0]))
    height = max(1, round(image.height * place.height / cell[1]))
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    left, top = place.left + (place.width - width) // 2, place.top + (place.height - height) // 2
    page.paste(image, (left, top))
    return left, top, left + width, top + height


def _draw_border(page: Image.Image, picture: Edges, ink: Colour) -> None:
    left, top, right, bottom = picture
    border = max(1, round((right - left) / 384))
    ImageDraw.Draw(page).rectangle((left, top, right - 1, bottom - 1), outline=ink, width=border)


def write(page: Image.Image, lines: Sequence[str], typeface: Typeface, centre: float, top: float, ink: Colour) -> None:
    """Write lines into a room that begins at `top`, each with its middle at `centre`."""
    for i, line in enumerate(lines):
        typeface.draw(page, centre, top + padding(typeface.size) + i * line_height(typeface.size), line, ink)


def _write_over(page: Image.Image, text: str, typeface: Typeface, picture: Edges, style: PageStyle) -> None:
    """Write a caption on the lower edge of a picture: at most half its height, in a box as wide as the text."""
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
