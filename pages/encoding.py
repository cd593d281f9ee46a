"""Pages as file contents: PNG, WebP, JPEG, and PDF with all pages in one file. Encoded by Pillow."""

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
"""Pixels. A PDF contains JPEGs."""
QUALITY = 90
LOSSLESS = 100
"""The quality at which a WebP is lossless."""
COMPRESSION = 4
"""Compression level of PNG, as in Save Image."""
MODEL, MAKE = 0x0110, 0x010F
"""EXIF tags in which ComfyUI stores the prompt of a WebP, and its workflow and other texts."""
DOTS_PER_INCH = 150
"""Resolution of a PDF: 1240 x 1754 pixels are A4."""
LONGEST_PDF = 200
"""Longest page in inches that PDF readers are required to show."""


def check_size(width: int, height: int, kind: Format) -> None:
    """Raise ValueError if a side of the page is longer than the format allows."""
    most = LONGEST_SIDE.get(kind)
    if most and max(width, height) > most:
        raise ValueError(
            f"The page has {width} x {height} pixels, but {kind} allows at most {most} per side: choose png, or lower "
            "page_width or panels_per_page."
        )


def encoded(
    pages: Sequence[Image.Image], kind: Format, quality: int = QUALITY, texts: Mapping[str, str] | None = None
) -> bytes:
    """The content of a file with these pages: one page, or for pdf at least one.

    quality  1..100, for webp (LOSSLESS: lossless), jpg and pdf; png is always lossless
    texts    metadata for png and webp, by name, written like "prompt" and "workflow" by ComfyUI's own nodes

    png and webp keep transparency; in jpg and pdf, transparent areas become white. See `check_size`.
    """
    file = BytesIO()
    if kind == "png":
        pages[0].save(file, "PNG", pnginfo=_text_chunks(texts or {}), compress_level=COMPRESSION)
    elif kind == "webp":
        pages[0].save(file, "WEBP", quality=quality, lossless=quality == LOSSLESS, exif=_exif(texts or {}))
    else:
        first, *others = (to_rgb(page) for page in pages)
        settings = {"quality": quality, "subsampling": 0}  # 4:4:4 keeps the edges of coloured letters
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
