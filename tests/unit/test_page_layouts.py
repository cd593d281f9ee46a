"""Layouts: every panel once, in reading order, undistorted, on pages whose size is the documented one."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storyloom.pages.geometry import Sheet, arrange
from storyloom.pages.layout import LAYOUTS, pages_of, parse_rows

CELLS = st.tuples(st.integers(64, 1200), st.integers(64, 1200))
PATTERNS = st.lists(st.integers(1, 6), min_size=1, max_size=5).map(tuple)
ARRANGED = {
    "count": st.integers(1, 60),
    "columns": st.integers(0, 8),
    "pattern": PATTERNS,
    "panels_per_page": st.integers(0, 20),
    "seed": st.integers(0, 5),
    "cell": CELLS,
    "gap": st.integers(0, 8),
    "margin": st.integers(0, 40),
    "lines": st.lists(st.integers(0, 3), min_size=60, max_size=60),
    "right_to_left": st.booleans(),
}


def no_room(panel, width, most):
    return 0


def bare(layout, count, cell=(120, 80), gap=7, margin=11, width=0, **options):
    """The size of the pages and the places on them, without captions."""
    return arrange(pages_of(layout, count, **options), Sheet(cell, gap, margin, width), no_room)


def text(pattern):
    return ",".join(map(str, pattern))


@pytest.mark.parametrize("layout", LAYOUTS)
@given(**ARRANGED)
def test_every_panel_is_drawn_once_undistorted_inside_the_page_and_apart_from_the_others(
    layout, count, columns, pattern, panels_per_page, seed, cell, gap, margin, lines, right_to_left
):
    bands = {}

    def room(panel, width, most):
        bands[panel] = 0 if not lines[panel] else min(14 * lines[panel] + 10, most or 1000)
        return bands[panel]

    pages = pages_of(layout, count, columns, text(pattern), panels_per_page, seed)
    (width, height), placed = arrange(pages, Sheet(cell, gap, margin), room, 33, right_to_left)
    numbers = [place.panel for places in placed for place in places]
    assert numbers == list(range(count))
    for number, places in enumerate(placed):
        for place in places:
            assert place.left >= margin and place.left + place.width <= width - margin
            assert place.top >= margin + (0 if number else 33)
            assert place.top + place.height + place.band <= height - margin
            assert abs(place.width / cell[0] - place.height / cell[1]) <= 1 / cell[0] + 1 / cell[1]
            assert place.band >= bands[place.panel]
            for other in places[place.panel - places[0].panel + 1 :]:
                beside = abs(place.left - other.left) - (place.width if place.left < other.left else other.width)
                below = other.top - place.top - place.height - place.band
                assert beside >= gap - 1 or below >= gap, "there is a gap between any two"


@given(count=st.integers(1, 60), columns=st.integers(0, 8), seed=st.integers(0, 9), layout=st.sampled_from(LAYOUTS))
def test_panels_are_read_row_by_row_and_a_stack_from_above(count, columns, seed, layout):
    for right_to_left in (False, True):
        pages = pages_of(layout, count, columns, "2,1,3", seed=seed)
        (width, _), placed = arrange(pages, Sheet((120, 80), 6, 9), no_room, 0, right_to_left)
        for places in placed:
            for one, next_one in zip(places, places[1:], strict=False):
                ahead = one.left - next_one.left if right_to_left else next_one.left - one.left
                assert next_one.top >= one.top + one.height or ahead > 0


@given(cell=CELLS, count=st.integers(1, 60), columns=st.integers(1, 8), gap=st.integers(0, 50))
def test_the_size_of_a_grid(cell, count, columns, gap):
    columns, (w, h) = min(columns, count), cell
    rows = math.ceil(count / columns)
    size, _ = bare("grid", count, cell, gap, columns=columns)
    assert size == (columns * w + (columns - 1) * gap + 22, rows * h + (rows - 1) * gap + 22)
    assert bare("strip", count, cell, gap)[0] == (count * w + (count - 1) * gap + 22, h + 22)
    assert bare("column", count, cell, gap)[0] == (w + 22, count * h + (count - 1) * gap + 22)
    across, down = min(count, 2), min(math.ceil(count / 2), 2)
    size, placed = bare("four_panel", count, cell, gap)
    assert size == (across * w + (across - 1) * gap + 22, down * h + (down - 1) * gap + 22)
    assert len(placed) == math.ceil(count / 4)


@given(cell=CELLS, count=st.integers(1, 60), pattern=PATTERNS, gap=st.integers(0, 8))
def test_the_size_of_free_rows(cell, count, pattern, gap):
    size, placed = bare("rows", count, cell, gap, rows=text(pattern))
    shown = pattern if count >= pattern[0] else (count,)
    while sum(shown[:-1]) >= count:
        shown = shown[:-1]
    (w, h), fewest = cell, min(shown)
    inner = fewest * w + (fewest - 1) * gap
    heights = [round((inner - (n - 1) * gap) * h / w / n) for n in shown]
    assert size == (inner + 22, sum(heights) + (len(heights) - 1) * gap + 22)
    assert len(placed) == math.ceil(count / sum(shown)) if count >= sum(pattern) else len(placed) == 1


@given(cell=CELLS, count=st.integers(4, 60), gap=st.integers(0, 20), seed=st.integers(0, 9))
def test_the_size_of_the_classic_layout(cell, count, gap, seed):
    (w, h) = cell
    (width, _), (places,) = bare("classic", count, cell, gap, seed=seed)
    assert width == 2 * w + round(w * (h - gap) / (2 * h)) + 2 * gap + 22
    first = places[:4]
    assert len({(place.left, place.width) for place in first}) == 3, "two of four stand one above the other"
    bottom = max(place.top + place.height for place in first)
    assert sum(place.top + place.height == bottom for place in first) == 3, "the row's columns end together"
    assert max(place.left + place.width for place in first) == width - 11


@pytest.mark.parametrize(
    "count, sizes",
    [
        (1, [1]),
        (4, [4]),
        (5, [4, 1]),
        (8, [4, 4]),
        (10, [4, 6]),
        (12, [4, 6, 2]),
        (20, [4, 6, 4, 6]),
        (19, [4, 6, 4, 5]),
    ],
)
def test_classic_rows_hold_four_and_six_panels_in_turn(count, sizes):
    (page,) = pages_of("classic", count, seed=3)
    assert [sum(len(column.panels) for column in row) for row in page] == sizes
    for row, held in zip(page, sizes, strict=True):
        assert sum(len(column.panels) == 2 for column in row) == {1: 0, 2: 0, 4: 1, 5: 2, 6: 2}[held]
        assert all(column.stacked == (len(column.panels) == 2) for column in row if column.panels)


def test_the_classic_layout_depends_on_its_seed_alone():
    pages = [pages_of("classic", 20, seed=seed) for seed in range(6)]
    assert pages == [pages_of("classic", 20, seed=seed) for seed in range(6)]
    assert len({str(page) for page in pages}) > 3


@given(width=st.integers(800, 3000), layout=st.sampled_from(LAYOUTS), count=st.integers(1, 12))
def test_a_page_is_as_wide_as_it_is_asked_to_be(width, layout, count):
    (page_width, _), placed = bare(layout, count, width=width, rows="2,1,3")
    assert page_width == width
    right = max(place.left + place.width for places in placed for place in places)
    assert right == width - 11, "the panels fill it"


def test_stacked_panels_make_room_for_their_captions():
    def room(panel, width, most):
        return 40

    page = pages_of("classic", 4, seed=0)
    (_, height), (places,) = arrange(page, Sheet((200, 200), 10, 10), room)
    assert {place.band for place in places} == {40}
    assert {place.top + place.height + place.band for place in places} >= {height - 10}
    upper, lower = (place for place in places if place.width == min(other.width for other in places))
    assert lower.top == upper.top + upper.height + 40 + 10


@pytest.mark.parametrize(
    "text, rows", [("2,1,3", (2, 1, 3)), (" 2 1\n3 ", (2, 1, 3)), ("2,,1,", (2, 1)), ("20", (20,)), ("03", (3,))]
)
def test_rows_are_read(text, rows):
    assert parse_rows(text) == rows


@pytest.mark.parametrize("text", ["", " ", "2;1", "two", "2,-1", "1.5", "²", "2,0", "21", "99999999999", "٣"])
def test_rows_that_are_not_understood_are_shown(text):
    with pytest.raises(ValueError, match="Rows") as error:
        parse_rows(text)
    assert f'"{text}"' in str(error.value)


def test_a_page_without_room_says_so():
    with pytest.raises(ValueError, match="100 pixels wide has no room for a row of 20 panels with gaps of 12"):
        bare("strip", 20, gap=12, width=100)
    with pytest.raises(ValueError, match="lower gap"):
        bare("classic", 4, gap=256)


def test_an_unknown_layout_is_refused():
    with pytest.raises(ValueError, match='Unknown page layout "spiral"'):
        pages_of("spiral", 3)
