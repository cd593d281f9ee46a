"""Comic pages: sizes to the pixel, captions under their own panel, and nothing an artist types stops a page."""

import math
import time

import numpy as np
import pytest
from PIL import Image

from storyloom.pages.comic import INK, PAPER, auto_caption_size
from storyloom.pages.grid import comic_page
from storyloom.pages.layout import auto_columns
from storyloom.pages.text import MAX_LINES

RED, GREEN, BLUE = (200, 30, 30), (30, 160, 60), (40, 60, 190)


def panel(colour=RED, width=96, height=80):
    return np.broadcast_to(np.array(colour, np.uint8), (height, width, 3)).copy()


def band(lines, size):
    return lines * math.ceil(1.25 * size) + 2 * math.ceil(0.5 * size)


def has_ink(page, left, top, right, bottom):
    region = np.asarray(page).astype(int)[top:bottom, left:right]
    return bool((np.abs(region - PAPER).sum(-1) > 100).any())


@pytest.mark.parametrize(
    ("panels", "columns"), [(1, 1), (2, 2), (3, 3), (4, 2), (5, 3), (6, 3), (7, 3), (8, 4), (9, 3), (10, 5), (100, 10)]
)
def test_automatic_columns_make_a_near_square_grid(panels, columns):
    assert auto_columns(panels) == columns


@pytest.mark.parametrize("count", [1, 2, 5, 8, 100])
@pytest.mark.parametrize("columns", [0, 1, 3, 20])
def test_page_size_is_exact_without_captions(count, columns):
    page = comic_page([panel()] * count, columns=columns, gap=7, margin=11)
    across = min(columns or auto_columns(count), count)
    rows = math.ceil(count / across)
    assert page.size == (across * 96 + (across - 1) * 7 + 22, rows * 80 + (rows - 1) * 7 + 22)


def test_each_row_has_a_caption_band_as_high_as_its_longest_caption():
    page = comic_page([panel()] * 6, ["one", "two\nlines", "", "", "", "last"], columns=2, gap=5, margin=9)
    size = auto_caption_size(96)
    assert page.height == 3 * 80 + 2 * 5 + 2 * 9 + band(2, size) + band(1, size)


def test_margin_is_twice_the_gap_by_default():
    assert comic_page([panel()], gap=10).size == (96 + 40, 80 + 40)


def test_panels_stand_at_their_place_in_reading_order():
    page = np.asarray(comic_page([panel(RED), panel(GREEN), panel(BLUE)], columns=2, gap=6, margin=10))
    for (left, top), colour in zip([(10, 10), (10 + 102, 10), (10, 10 + 86)], (RED, GREEN, BLUE), strict=True):
        inside = page[top + 1 : top + 79, left + 1 : left + 95]
        assert (inside == colour).all()
        assert tuple(page[top, left]) == tuple(page[top + 79, left + 95]) == INK
    assert (page[96:176, 112:208] == PAPER).all()


def test_a_caption_lands_below_its_own_panel_and_nowhere_else():
    size = auto_caption_size(96)
    page = comic_page([panel()] * 4, ["", "here", "", ""], columns=2, gap=8, margin=8)
    below = 8 + 80
    assert has_ink(page, 8 + 104, below, 8 + 104 + 96, below + band(1, size))
    assert not has_ink(page, 0, below, 8 + 96, below + band(1, size))
    assert page.height == 2 * 80 + 8 + 16 + band(1, size)


def test_long_captions_wrap_inside_their_panel():
    page = comic_page(
        [panel()] * 2, ["", "a fox walked along the river until night"], gap=20, margin=20, caption_size=14
    )
    lines = (page.height - 40 - 80 - 2 * 7) / 18
    assert lines == int(lines) and lines >= 3
    assert not has_ink(page, 0, 100, 20 + 96 + 10, page.height)
    assert not has_ink(page, 20 + 96 + 20 + 96 + 1, 0, page.width, page.height)


def test_a_word_longer_than_the_panel_is_broken():
    page = comic_page([panel()], ["x" * 40], gap=0, margin=0, caption_size=12)
    assert band(2, 12) < page.height - 80 < band(MAX_LINES, 12)


def test_line_breaks_are_kept():
    page = comic_page([panel()], ["a\r\nb\n\nc"], gap=0, caption_size=10)
    assert page.height == 80 + band(4, 10)


def test_a_caption_never_exceeds_the_line_limit():
    page = comic_page([panel(width=64, height=64)], ["word " * 4000 + "x" * 4000], gap=0)
    assert page.height == 64 + band(MAX_LINES, 10)


def test_captions_may_be_missing_surplus_or_blank():
    plain = comic_page([panel()] * 3)
    assert comic_page([panel()] * 3, ["", " \n "]).size == plain.size
    assert comic_page([panel()] * 3, ["", "", "", "surplus"]).size == plain.size
    assert comic_page([panel()] * 3, ["only the first"]).height > plain.height


@pytest.mark.parametrize(
    "text",
    ["日本語の長い説明文がここに入ります。" * 5, "🦊🧥 a fox 👩‍👩‍👧", "Żółć — café", "שלום", "\x00\t\ud800", "\u200d"],
)
def test_text_beyond_the_font_does_not_stop_the_page(text):
    assert comic_page([panel()], [text], gap=0).width == 96


@pytest.mark.parametrize("size", [1, 10, 200])
def test_any_caption_size_makes_a_page(size):
    assert comic_page([panel(width=9, height=5)], ["wide letters"], gap=0, caption_size=size).width == 9


def test_transparency_shows_white():
    clear = np.zeros((20, 20, 4), np.float32)
    half = Image.new("RGBA", (20, 20), (0, 0, 0, 128))
    page = np.asarray(comic_page([clear, half], gap=0))
    assert tuple(page[10, 10]) == (255, 255, 255)
    assert tuple(page[10, 30]) == (127, 127, 127)


@pytest.mark.parametrize("shape", [(20, 30), (20, 30, 1), (20, 30, 3), (20, 30, 4)])
@pytest.mark.parametrize("kind", [np.uint8, np.float32, np.float64])
def test_arrays_of_every_kind_show_the_same_grey(shape, kind):
    array = np.full(shape, 51 if kind is np.uint8 else 0.2, kind)
    if shape[-1] == 4:
        array[..., 3] = 255 if kind is np.uint8 else 1
    assert tuple(np.asarray(comic_page([array], gap=0))[10, 15]) == (51, 51, 51)


def test_values_out_of_range_and_nan_are_drawn_clipped():
    array = np.full((9, 9, 3), 1.7, np.float32)
    array[4, 4] = (np.nan, -3, np.inf)
    page = np.asarray(comic_page([array], gap=0))
    assert tuple(page[4, 4]) == (0, 0, 255)
    assert tuple(page[5, 5]) == (255, 255, 255)


def test_panels_of_different_size_are_centred_in_equal_cells():
    page = np.asarray(comic_page([panel(RED, 50, 30), panel(GREEN, 20, 10)], gap=0))
    assert page.shape == (30, 100, 3)
    assert tuple(page[15, 75]) == GREEN
    assert tuple(page[2, 75]) == tuple(page[15, 60]) == PAPER


def test_the_panels_given_are_not_changed():
    array = panel()
    before = array.copy()
    comic_page([array], ["caption"])
    assert (array == before).all()


def test_no_panel_and_odd_shapes_are_named_in_the_error():
    with pytest.raises(ValueError, match="at least 1 panel, got 0"):
        comic_page([])
    with pytest.raises(ValueError, match=r"\[4, 5, 7\]"):
        comic_page([np.zeros((4, 5, 7))])


def test_a_hundred_panels_are_laid_out_in_seconds():
    panels = list(np.random.default_rng(0).random((100, 512, 512, 3), np.float32))
    start = time.process_time()
    page = comic_page(panels, ["a fox walks through the woods and meets an owl"] * 100)
    assert time.process_time() - start < 4
    assert page.width == 10 * 512 + 9 * 12 + 48
