"""Comic pages: panels on a grid, each with its caption below it on paper. Pillow and numpy only."""

from __future__ import annotations

import bisect
import math
import unicodedata
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import islice

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Panel = np.ndarray | Image.Image

PAPER = (252, 251, 248)
INK = (38, 36, 40)
MAX_LINES = 6
MIN_CAPTION_SIZE = 10
FALLBACK_FONTS = (
    "DejaVuSans.ttf",
    "NotoSans-Regular.ttf",
    "NotoSansCJK-Regular.ttc",
    "Arial Unicode.ttf",
    "Hiragino Sans GB.ttc",
    "arial.ttf",
    "msgothic.ttc",
    "msyh.ttc",
    "malgun.ttf",
)


def comic_page(
    panels: Sequence[Panel],
    captions: Sequence[str] = (),
    columns: int = 0,
    gap: int = 12,
    margin: int | None = None,
    caption_size: int = 0,
) -> Image.Image:
    """Lay panels out on a grid, row by row, each caption centred below its own panel. Returns an RGB image.

    panels        [H, W], [H, W, 1], [H, W, 3] or [H, W, 4] arrays (float 0..1 or 8-bit) or Pillow images; transparency
                  shows white. Panels smaller than the largest one are centred in their cell.
    captions      one per panel; missing ones are empty, surplus ones are ignored. Line breaks are kept, long lines wrap
                  at the panel's width, long words are broken; what exceeds MAX_LINES lines ends in an ellipsis.
    columns       panels per row, at most the number of panels; 0 = automatic, see `auto_columns`.
    gap, margin   pixels between panels and around the page; margin None = 2 * gap.
    caption_size  font size in pixels; 0 = automatic, see `auto_caption_size`.

    With cells of w x h pixels, the largest width and height among the panels:
        page width  = columns * w + (columns - 1) * gap + 2 * margin
        page height = rows * h + (rows - 1) * gap + 2 * margin + the caption bands of all rows
        band        = 0 in a row without captions, else lines * ceil(1.25 * size) + 2 * ceil(0.5 * size),
                      lines being those of the row's longest caption, so that panels stay aligned
    Raises ValueError when there is no panel or a panel's shape is none of the above.
    """
    if not panels:
        raise ValueError("A comic page needs at least 1 panel, got 0: connect a batch of images.")
    images = [_to_rgb(panel) for panel in panels]
    columns = min(columns or auto_columns(len(images)), len(images))
    margin = 2 * gap if margin is None else margin
    width, height = max(image.width for image in images), max(image.height for image in images)
    size = caption_size or auto_caption_size(width)
    texts = [_clean(text) for text in captions[: len(images)]] + [""] * (len(images) - len(captions))
    font = _font_for("".join(texts), size)
    lines = [_wrap(text, font, width) for text in texts]
    bands = [_band(max(map(len, lines[i : i + columns])), size) for i in range(0, len(lines), columns)]

    page_width = columns * width + (columns - 1) * gap + 2 * margin
    page_height = len(bands) * height + (len(bands) - 1) * gap + 2 * margin + sum(bands)
    page = Image.new("RGB", (page_width, page_height), PAPER)
    draw = ImageDraw.Draw(page)
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        left = margin + column * (width + gap)
        top = margin + row * (height + gap) + sum(bands[:row])
        _draw_panel(page, draw, image, left + (width - image.width) // 2, top + (height - image.height) // 2)
        _draw_caption(draw, lines[i], font, size, left + width / 2, top + height)
    return page


def auto_columns(panels: int) -> int:
    """Columns of a near-square grid: the square root rounded up, or one more where that fills every row (3, 8, 15)."""
    columns = math.isqrt(max(panels - 1, 0)) + 1
    return columns + 1 if panels % columns and panels % (columns + 1) == 0 else columns


def auto_caption_size(panel_width: int) -> int:
    """Caption size in pixels for panels of this width: a twentieth of it, at least MIN_CAPTION_SIZE."""
    return max(MIN_CAPTION_SIZE, round(panel_width / 20))


def _to_rgb(panel: Panel) -> Image.Image:
    image = panel if isinstance(panel, Image.Image) else _from_array(np.asarray(panel))
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _from_array(array: np.ndarray) -> Image.Image:
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if 0 in array.shape or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))):
        raise ValueError(f"A comic panel is [height, width] with 1, 3 or 4 channels, got {list(array.shape)}.")
    if array.dtype != np.uint8:
        array = np.nan_to_num(array.astype(np.float32), copy=False, posinf=1.0).clip(0, 1)
        array = (array * 255 + 0.5).astype(np.uint8)
    return Image.fromarray(array)


def _clean(text: str) -> str:
    text = "\n".join(text.splitlines()).strip()
    return "".join(" " if unicodedata.category(c) in ("Cc", "Cs") and c != "\n" else c for c in text)


def _font_for(text: str, size: int) -> ImageFont.FreeTypeFont:
    """Pillow's own font where it has all characters of `text`, else the font of this computer that lacks the fewest."""
    characters = {c for c in text if not c.isspace()}
    best, fewest = None, math.inf
    for name in ("", *FALLBACK_FONTS):
        font = _open_font(name, size)
        missing = _missing(font, characters) if font else math.inf
        if missing < fewest:
            best, fewest = font, missing
        if fewest == 0:
            break
    return best


@lru_cache(maxsize=64)
def _open_font(name: str, size: int) -> ImageFont.FreeTypeFont | None:
    try:
        return ImageFont.truetype(name, size) if name else ImageFont.load_default(size)
    except OSError:
        return None


def _missing(font: ImageFont.FreeTypeFont, characters: set[str]) -> int:
    blank = bytes(font.getmask("\U0010ffff"))
    return sum(bytes(font.getmask(c)) == blank for c in characters)


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    if not text:
        return []
    lines = list(islice(_lines(text, font, width), MAX_LINES + 1))
    if len(lines) > MAX_LINES:
        last = lines[MAX_LINES - 1]
        while last and font.getlength(last + "…") > width:
            last = last[:-1]
        lines[MAX_LINES - 1 :] = [last.rstrip() + "…"]
    return lines


def _lines(text: str, font: ImageFont.FreeTypeFont, width: int) -> Iterator[str]:
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split():
            longer = f"{line} {word}" if line else word
            if font.getlength(longer) <= width:
                line = longer
                continue
            if line:
                yield line
            while font.getlength(word) > width and len(word) > 1:
                cut = _fitting(word, font, width)
                yield word[:cut]
                word = word[cut:]
            line = word
        yield line


def _fitting(word: str, font: ImageFont.FreeTypeFont, width: int) -> int:
    counts = range(1, min(len(word), width) + 1)
    return max(1, bisect.bisect_right(counts, width, key=lambda count: font.getlength(word[:count])))


def _line_height(size: int) -> int:
    return math.ceil(1.25 * size)


def _padding(size: int) -> int:
    return math.ceil(0.5 * size)


def _band(lines: int, size: int) -> int:
    return lines * _line_height(size) + 2 * _padding(size) if lines else 0


def _draw_panel(page: Image.Image, draw: ImageDraw.ImageDraw, image: Image.Image, left: int, top: int) -> None:
    page.paste(image, (left, top))
    border = max(1, round(image.width / 384))
    draw.rectangle((left, top, left + image.width - 1, top + image.height - 1), outline=INK, width=border)


def _draw_caption(
    draw: ImageDraw.ImageDraw,
    lines: list[str],
    font: ImageFont.FreeTypeFont,
    size: int,
    centre: float,
    top: int,
) -> None:
    for i, line in enumerate(lines):
        draw.text((centre, top + _padding(size) + i * _line_height(size)), line, INK, font, anchor="ma")
