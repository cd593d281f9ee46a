"""Whole pages beside the pictures kept of them in `pages/`, and what a hundred panels cost.

`python tests/unit/test_page_pictures.py` keeps the pages of today: look at them before they are committed.
"""

import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from storyloom.pages.comic import PageStyle, comic_pages

FOLDER = Path(__file__).parent / "pages"
COUNTS = (1, 2, 5, 8, 20, 100)
STYLES = {
    "grid": PageStyle(gap=4, title="Story"),
    "four_panel": PageStyle("four_panel", gap=4, caption_place="over", paper=(20, 20, 30), ink=(240, 240, 220)),
    "classic": PageStyle("classic", gap=4, seed=1),
    "strip": PageStyle("strip", gap=4, panels_per_page=10, direction="right_to_left"),
    "column": PageStyle("column", gap=4, panels_per_page=10, caption_place="over"),
    "rows": PageStyle("rows", rows="2,1,3", gap=4, page_width=160),
}
SHOWN = 3
"""Pages of each that are kept, side by side: the first ones and the last."""


def panels(count):
    """Pictures of 80 x 60 pixels, each of its own colour with a white corner at the left and above."""
    made = []
    for number in range(count):
        picture = np.empty((60, 80, 3), np.uint8)
        picture[:] = (60 + number * 67 % 160, 60 + number * 41 % 160, 60 + number * 97 % 160)
        picture[6:14, 6:14] = 255
        made.append(picture)
    return made


def drawn(layout, count):
    pages = comic_pages(panels(count), [str(number) for number in range(1, count + 1)], STYLES[layout])
    shown = pages[: SHOWN - 1] + pages[SHOWN - 1 :][-1:]
    width, height = pages[0].size
    sheet = Image.new("RGB", (len(shown) * (width + 2), height), "red")
    for i, page in enumerate(shown):
        sheet.paste(page, (i * (width + 2), 0))
    return sheet


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("layout", STYLES)
def test_a_page_looks_as_it_did(layout, count):
    """Letters may differ by their rasteriser: they are small and never as dark over a whole square of 5 pixels."""
    page = drawn(layout, count)
    with Image.open(FOLDER / f"{layout}_{count}.png") as image:
        kept = image.convert("RGB")
    assert page.size == kept.size
    differ = np.abs(np.asarray(page, int) - np.asarray(kept, int)).max(-1) > 48
    assert differ.mean() < 0.02
    means = np.asarray(Image.fromarray(np.uint8(differ) * 255).reduce(5))
    assert (means > 200).mean() < 0.002


@pytest.mark.parametrize("layout", STYLES)
def test_a_hundred_panels_take_less_than_two_seconds(layout):
    random = np.random.default_rng(0).random((512, 512, 3), np.float32)
    many = [random] * 100
    captions = ["a fox walks through the woods and meets an owl"] * 100
    start = time.process_time()
    pages = comic_pages(many, captions, PageStyle(layout, rows="3,2", panels_per_page=20))
    assert time.process_time() - start < 4, "twice what is promised, for a busy machine"
    assert pages


def keep():
    FOLDER.mkdir(exist_ok=True)
    for layout in STYLES:
        for count in COUNTS:
            drawn(layout, count).quantize(64, dither=Image.Dither.NONE).save(
                FOLDER / f"{layout}_{count}.png", optimize=True
            )


if __name__ == "__main__":
    keep()
