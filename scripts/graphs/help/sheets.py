"""Pictures side by side on white paper, with labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from textwrap import wrap

from PIL import Image, ImageDraw, ImageFont

FRAME, GAP, LABEL = 144, 4, 22
"""Pixels: side of a frame in a picture, between frames, height of the label above a row.

The demo model's pictures are 24 x 24 squares of 8 x 8 pixels, so 144 pixels lose nothing.
"""
SQUARES = 24
PAPER, INK, FAINT, ACCENT = "#fcfbf8", "#262428", "#b9b5ad", "#c8321f"

Rows = Mapping[str, Sequence[Image.Image]]
"""Label of a row -> its pictures."""

LIMIT = 60_000
"""Largest size of a file, in bytes."""


def sheet(width: int, height: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """White paper, and what draws on it."""
    image = Image.new("RGB", (width, height), PAPER)
    return image, ImageDraw.Draw(image)


def letters(size: float):
    """The default font in this size."""
    return ImageFont.load_default(size)


def rows(drawn: Rows) -> Image.Image:
    """Rows of frames, each below its label; a blank label takes no room."""
    width = max(map(len, drawn.values())) * (FRAME + GAP) + GAP
    tall = [FRAME + GAP + (LABEL if label.strip() else 0) for label in drawn]
    image, pen = sheet(width, sum(tall) + GAP)
    top = GAP
    for (label, frames), height in zip(drawn.items(), tall, strict=True):
        pen.text((GAP, top + 1), label, INK, font=letters(14))
        for column, frame in enumerate(frames):
            small = frame.resize((FRAME, FRAME), Image.NEAREST)
            image.paste(small, (GAP + column * (FRAME + GAP), top + height - FRAME - GAP))
        top += height
    return image


def tiles(drawn: Mapping[str, Image.Image], columns: int, width: int = 0, height: int = 0) -> Image.Image:
    """Pictures of one width or one height, each below its label."""
    small = []
    for picture in drawn.values():
        scale = width / picture.width if width else height / picture.height
        small.append(picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.LANCZOS))
    wide = [max(picture.width for picture in small[column::columns]) + 2 * GAP for column in range(columns)]
    lines = [small[start : start + columns] for start in range(0, len(small), columns)]
    tall = [max(picture.height for picture in line) + LABEL + 2 * GAP for line in lines]
    image, pen = sheet(sum(wide) + GAP, sum(tall) + GAP)
    for number, (label, picture) in enumerate(zip(drawn, small, strict=True)):
        row, column = divmod(number, columns)
        corner = (2 * GAP + sum(wide[:column]), GAP + sum(tall[:row]))
        pen.text(corner, label, INK, font=letters(14))
        image.paste(picture, (corner[0], corner[1] + LABEL))
    return image


def beside(text: str, page: Image.Image, width: int = 320) -> Image.Image:
    """A text, and to the right of it a page."""
    lines = [part for line in text.split("\n") for part in wrapped(line, 42)]
    small = page.resize((width, round(page.height * width / page.width)), Image.LANCZOS)
    left, height = 330, max(small.height, 18 * len(lines)) + 4 * GAP
    image, pen = sheet(left + width + 2 * GAP, height)
    for number, line in enumerate(lines):
        color = ACCENT if line in ("identity", "frames") else INK
        pen.text((2 * GAP, 2 * GAP + 18 * number), line, color, font=letters(13))
    image.paste(small, (left, 2 * GAP))
    return image


def wrapped(line: str, width: int) -> list[str]:
    return wrap(line, width, subsequent_indent="    ") or [""]


def png(picture: Image.Image) -> bytes:
    """A picture as PNG: in full colour, or with as many colours as fit into LIMIT bytes."""
    for colors in (None, 256, 128, 96, 64, 32):
        file = BytesIO()
        reduced = picture if colors is None else picture.quantize(colors, dither=Image.Dither.NONE)
        reduced.save(file, "PNG", optimize=True)
        if file.tell() <= LIMIT:
            break
    return file.getvalue()
