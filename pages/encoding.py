"""Pages as the bytes of a file: PNG, WebP, JPEG, and PDF with all pages in one. Pillow does the encoding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Literal, get_args

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from .comic import to_rgb

Format = Literal["png", "webp", "jpg", "pdf"]
FORMATS: tuple[str, ...] = get_args(Format)
LONGEST_SIDE = {"webp": 16_383, "jpg": 65_500, "pdf": 65_500}
"""Pixels. A PDF holds JPEGs."""
QUALITY = 90
LOSSLESS = 100
"""The quality at which a WebP has every pixel as it was."""
COMPRESSION = 4
"""Of PNG, as Save Image has it."""
MODEL, MAKE = 0x0110, 0x010F
"""EXIF tags in which ComfyUI keeps a WebP's prompt, and its workflow and whatever else is told."""
DOTS_PER_INCH = 150
"""Of a PDF: 1240 x 1754 pixels are A4."""
LONGEST_PDF = 200
"""Inches of a page that readers of PDF promise to show."""


def check_size(width: int, height: int, kind: Format) -> None:
    """Raise ValueError when a page has more pixels on a side than the format allows."""
    most = LONGEST_SIDE.get(kind)
    if most and max(width, height) > most:
        raise ValueError(
            f"The page has {width} x {height} pixels, but {kind} allows at most {most} per side: choose png, or lower "
            "page_width or panels_per_page."
        )


def encoded(
    pages: Sequence[Image.Image], kind: Format, quality: int = QUALITY, texts: Mapping[str, str] | None = None
) -> bytes:
    """A file's content with these pages: one page, or with pdf any number from 1 on.

    quality  1..100, of webp (LOSSLESS: without loss), jpg and pdf; png has no loss
    texts    what png and webp carry beside the picture, by name, as ComfyUI's own nodes write "prompt" and "workflow"

    png and webp keep transparency; in jpg and pdf it shows white. See `check_size`.
    """
    file = BytesIO()
    if kind == "png":
        pages[0].save(file, "PNG", pnginfo=_text_chunks(texts or {}), compress_level=COMPRESSION)
    elif kind == "webp":
        pages[0].save(file, "WEBP", quality=quality, lossless=quality == LOSSLESS, exif=_exif(texts or {}))
    else:
        first, *others = (to_rgb(page) for page in pages)
        settings = {"quality": quality, "subsampling": 0}  # 4:4:4, in which coloured letters keep their edges
        if kind == "pdf":
            dots = max(DOTS_PER_INCH, *(side / LONGEST_PDF for page in pages for side in page.size))
            settings |= {"save_all": True, "append_images": others, "resolution": dots}
        first.save(file, "PDF" if kind == "pdf" else "JPEG", **settings)
    return file.getvalue()


def _text_chunks(texts: Mapping[str, str]) -> PngInfo:
    chunks = PngInfo()
    for name, text in texts.items():
        chunks.add_text(name, text)
    return chunks


def _exif(texts: Mapping[str, str]) -> Image.Exif:
    exif = Image.Exif()
    others = iter(range(MAKE, 0, -1))
    for name, text in texts.items():
        exif[MODEL if name == "prompt" else next(others)] = f"{name}:{text}"
    return exif
