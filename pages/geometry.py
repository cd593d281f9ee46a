"""The placement of panels on a page in pixels: rows of equal width, undistorted panels, space for captions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from .layout import Page, Row

CaptionHeight = Callable[[int, int, int | None], int]
"""caption_height(panel, width, limit) -> pixels for a panel's caption at this width, at most `limit` unless None."""


class Placement(NamedTuple):
    """Left, top, width and height of a panel in pixels, and the height `band` of the space for its caption below.

    In a row, all single panels have the same band, and so do all stacked panels.
    """

    panel: int
    left: int
    top: int
    width: int
    height: int
    band: int


class Sheet(NamedTuple):
    """Sizes in pixels: a panel's cell, the gap between panels, the page margin, the page width (0 = natural)."""

    cell: tuple[int, int]
    gap: int
    margin: int
    width: int = 0


def arrange(
    pages: Sequence[Page], sheet: Sheet, caption_height: CaptionHeight, header: int = 0, right_to_left: bool = False
) -> tuple[tuple[int, int], list[list[Placement]]]:
    """The (width, height) of all pages, and the placements of all panels by page. `header`: height of the title.

    With a cell of w x h, gap g and margin m, and a row of n columns with s single panels and t stacks of two:
        page width    sheet.width, or the natural width of the narrowest row + 2 * m, so that no picture is enlarged
        natural width s * w + t * round(w * (h - g) / (2 * h)) + (n - 1) * g
        panel height  H for single panels and (H + band - g) / 2 - band' for stacked ones, band and band' being the
                      highest captions of the row's single and stacked panels, with H such that the row is as wide
                      as the page without its margins; without stacks H = h / w * (width + g) / n - h / w * g
        row height    round(H) + band
        page height   all rows + (rows - 1) * g + 2 * m, + header on the first page; the maximum of all pages
    Edges are rounded to whole pixels. Raises ValueError if panels would be smaller than a pixel.
    """
    natural = min(_natural_width(row, sheet) for page in pages for row in page)
    width = sheet.width or natural + 2 * sheet.margin
    height, placed = 0, []
    for number, page in enumerate(pages):
        top, placements = sheet.margin + (0 if number else header), []
        for row in page:
            in_row, row_height = _arrange_row(row, sheet, width - 2 * sheet.margin, caption_height)
            placements += [each._replace(left=each.left + sheet.margin, top=each.top + top) for each in in_row]
            top += row_height + sheet.gap
        placed.append(placements)
        height = max(height, top - sheet.gap + sheet.margin)
    if right_to_left:
        placed = [[each._replace(left=width - each.left - each.width) for each in page] for page in placed]
    return (width, height), placed


def _natural_width(row: Row, sheet: Sheet) -> int:
    w, h = sheet.cell
    stacks = sum(column.stacked for column in row)
    half = max(1, round(w * (h - sheet.gap) / (2 * h)))
    return (len(row) - stacks) * w + stacks * half + (len(row) - 1) * sheet.gap


def _arrange_row(row: Row, sheet: Sheet, width: int, caption_height: CaptionHeight) -> tuple[list[Placement], int]:
    """Placements in a row whose top left corner is (0, 0), and the height of the row."""
    (w, h), gap = sheet.cell, sheet.gap
    stacks = sum(column.stacked for column in row)
    shares = len(row) - stacks / 2
    free = width - (len(row) - 1) * gap
    single_band = stacked_band = 0
    while True:
        tall = (free * h / w - stacks * ((single_band - gap) / 2 - stacked_band)) / shares
        low = (tall + single_band - gap) / 2 - stacked_band
        smallest = low if stacks else tall
        if min(smallest, smallest * w / h) < 1:
            raise ValueError(
                f"A page {width + 2 * sheet.margin} pixels wide has no room for a row of {len(row)} panels with gaps "
                f"of {gap}: lower gap or caption_size, raise page_width, or put fewer panels in a row."
            )
        bands = [0, 0]
        for column in row:
            across, limit = (low, (low + stacked_band) / 2) if column.stacked else (tall, None)
            for panel in column.panels:
                needed = caption_height(
                    panel, max(1, int(across * w / h + 1e-6)), limit if limit is None else int(limit)
                )
                bands[column.stacked] = max(bands[column.stacked], needed)
        if bands[0] <= single_band and bands[1] <= stacked_band:
            return _edges(row, sheet, tall, low, single_band, stacked_band), round(tall) + single_band
        single_band, stacked_band = max(bands[0], single_band), max(bands[1], stacked_band)


def _edges(row: Row, sheet: Sheet, tall: float, low: float, single_band: int, stacked_band: int) -> list[Placement]:
    aspect, placements, x = sheet.cell[0] / sheet.cell[1], [], 0.0
    bottom = round(tall) + single_band
    for column in row:
        across = (low if column.stacked else tall) * aspect
        left, right = round(x), round(x + across)
        if column.stacked:
            upper = (bottom - sheet.gap) // 2
            spans = ((0, upper), (upper + sheet.gap, bottom))
        else:
            spans = ((0, bottom),)
        band = stacked_band if column.stacked else single_band
        for panel, (top, end) in zip(column.panels, spans, strict=False):
            placements.append(Placement(panel, left, top, right - left, end - top - band, band))
        x += across + sheet.gap
    return placements
