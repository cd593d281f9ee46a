"""Layouts: which panels share a page, a row and a column, independent of sizes."""

from __future__ import annotations

import math
import random
import re
from itertools import cycle, islice
from typing import Literal, NamedTuple, get_args

from ..prompts.script import short

Layout = Literal["grid", "four_panel", "classic", "strip", "column", "rows"]
LAYOUTS: tuple[str, ...] = get_args(Layout)
MAX_ROW = 20


class Column(NamedTuple):
    """The panels of a column, by number: one, or if `stacked` two of half the height, one above the other.

    With fewer panels, the end of the column is blank.
    """

    panels: tuple[int, ...]
    stacked: bool = False


Row = tuple[Column, ...]
Page = tuple[Row, ...]


def pages_of(
    layout: Layout, count: int, columns: int = 0, rows: str = "", panels_per_page: int = 0, seed: int = 0
) -> list[Page]:
    """Distribute the panels 0 .. count - 1 over pages, in reading order.

    grid        `columns` panels in a row, 0 = automatic, see `auto_columns`
    four_panel  two rows of two on every page
    classic     rows that mix panels with stacks of two panels, shuffled by `seed`, see `classic_rows`
    strip       all panels of a page side by side
    column      all panels of a page one above the other
    rows        panels per row as in `rows`, see `parse_rows`; every page has the same rows

    panels_per_page  0 = all on one page. four_panel and rows have a fixed number.
    An incomplete last row is padded with empty columns, unless it is the only row.
    Raises ValueError for an unknown layout or invalid rows.
    """
    if layout not in LAYOUTS:
        raise ValueError(f'Unknown page layout "{layout}". Choose one of {", ".join(LAYOUTS)}.')
    pattern = parse_rows(rows) if layout == "rows" else ()
    if count < sum(pattern[:1]):
        pattern = (count,)
    most = {"four_panel": 4, "rows": sum(pattern)}.get(layout, panels_per_page) or count
    pages = [range(first, min(first + most, count)) for first in range(0, count, most)]
    if layout == "classic":
        generator = random.Random(seed)
        return [tuple(classic_rows(page, generator, alone=count < 4)) for page in pages]
    if layout != "rows":
        most = min(most, count)
        across = {"grid": columns or auto_columns(most), "four_panel": 2, "strip": most, "column": 1}[layout]
        pattern = (min(across, most),)
    return [tuple(_plain_rows(page, pattern)) for page in pages]


def auto_columns(panels: int) -> int:
    """Columns of a near-square grid: the square root rounded up, or one more where that fills every row (3, 8, 15)."""
    columns = math.isqrt(max(panels - 1, 0)) + 1
    return columns + 1 if panels % columns and panels % (columns + 1) == 0 else columns


def parse_rows(text: str) -> tuple[int, ...]:
    """Panels per row, from top to bottom: "2,1,3". Raises ValueError for any other text."""
    numbers = [part for part in re.split(r"[\s,]+", text) if part]
    if not numbers or not all(re.fullmatch(r"[0-9]{1,4}", number) for number in numbers):
        raise ValueError(
            f'Rows "{short(text)}" cannot be read: write the number of panels in each row, for example "2,1,3".'
        )
    pattern = tuple(map(int, numbers))
    for number in pattern:
        if not 1 <= number <= MAX_ROW:
            raise ValueError(f'Rows "{short(text)}" has a row of {number} panels: a row has 1 to {MAX_ROW}.')
    return pattern


def classic_rows(panels: range, generator: random.Random, alone: bool = False) -> list[Row]:
    """StoryDiffusion's "Classic Comic Style": rows of four panels, alternating with six if there are more than 8.

    A row of four has two panels and a stack of two; a row of six, two panels and two stacks, in an order drawn from
    `generator`. An incomplete row is filled from its start; `alone`: without empty columns, since there are no other
    rows. Source: the published program's comic utility (arXiv 2405.01434), whose shuffle is not reproducible and whose
    stacked panels have no captions.
    """
    rows, first = [], panels.start
    sizes = cycle((4, 6))
    while first < panels.stop:
        left = panels.stop - first
        size = 4 if left <= 4 else next(sizes)
        filled = min(size, left)
        stacks = (filled - 1) // 2 if filled > 2 else 0
        kinds = [False] * (filled - 2 * stacks) + [True] * stacks
        generator.shuffle(kinds)
        numbers = iter(range(first, first + filled))
        row = [Column(tuple(islice(numbers, 2 if stacked else 1)), stacked) for stacked in kinds]
        if not alone:
            row += [Column(())] * (2 - kinds.count(False)) + [Column((), True)] * (size // 2 - 1 - stacks)
        rows.append(tuple(row))
        first += filled
    return rows


def _plain_rows(panels: range, pattern: tuple[int, ...]) -> list[Row]:
    rows, numbers = [], iter(panels)
    for size in cycle(pattern):
        filled = tuple(islice(numbers, size))
        if not filled:
            return rows
        rows.append(tuple(Column((number,)) for number in filled) + (Column(()),) * (size - len(filled)))
