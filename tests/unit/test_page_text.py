"""Words on pages: where lines break, what happens to characters that a font lacks, captions over pictures, titles."""

import logging
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFont

from storyloom.pages import fonts
from storyloom.pages.comic import PageStyle, comic_pages, parse_colour
from storyloom.pages.fonts import Typeface, clusters, has
from storyloom.pages.text import MAX_LINES, band, wrap

EM = 1000
JAPANESE = "狐は雪の中で眠っていた。長い冬がやって来て、森の道は深い雪に埋もれた。「春はまだ遠い」と彼は思った。"


def toy_font(characters):
    """The bytes of a TrueType font whose `characters` are squares 1 em apart; what it lacks is a flatter box."""
    codes = sorted(set(map(ord, characters)))
    glyphs = [_box(400), *[_box(800)] * len(codes)]
    offsets = [sum(map(len, glyphs[:i])) for i in range(len(glyphs) + 1)]
    groups = b"".join(struct.pack(">III", code, code, i) for i, code in enumerate(codes, start=1))
    cmap = struct.pack(">HHHHI", 0, 1, 3, 10, 12) + struct.pack(">HHIII", 12, 0, 16 + len(groups), 0, len(codes))
    count = len(glyphs)
    lines = struct.pack(">IhhhHhhh", 0x10000, 800, -200, 0, EM, 0, 0, EM) + struct.pack(">8hH", 1, *[0] * 7, count)
    tables = {
        b"cmap": cmap + groups,
        b"glyf": b"".join(glyphs),
        b"head": struct.pack(
            ">IIIIHHqqhhhhHHhhh", 0x10000, 0x10000, 0, 0x5F0F3CF5, 0, EM, 0, 0, 0, 0, EM, EM, 0, 8, 2, 1, 0
        ),
        b"hhea": lines,
        b"hmtx": struct.pack(">Hh", EM, 100) * count,
        b"loca": b"".join(struct.pack(">I", offset) for offset in offsets),
        b"maxp": struct.pack(">IHHH", 0x10000, count, 4, 1) + struct.pack(">11H", 0, 0, 1, *[0] * 8),
    }
    start, entries, body = 12 + 16 * len(tables), b"", b""
    for name, data in tables.items():
        entries += name + struct.pack(">III", 0, start + len(body), len(data))
        body += data + b"\0" * (-len(data) % 4)
    return struct.pack(">IHHHH", 0x10000, len(tables), 0, 0, 0) + entries + body


def _box(top):
    corners = [(100, 0), (100, top), (900, top), (900, 0)]
    data = struct.pack(">hhhhh", 1, 100, 0, 900, top) + struct.pack(">HH", 3, 0) + b"\x01" * 4
    for axis in (0, 1):
        values = [corner[axis] for corner in corners]
        data += struct.pack(">4h", *(value - before for value, before in zip(values, [0, *values], strict=False)))
    return data + b"\0" * (-len(data) % 4)


@pytest.fixture
def no_system_fonts(monkeypatch):
    monkeypatch.setattr(fonts, "TEXT_FONTS", ())
    monkeypatch.setattr(fonts, "SYMBOL_FONTS", ())


@pytest.fixture
def font(tmp_path, no_system_fonts):
    """font(characters) -> path of a font that has them, on a computer that has no other."""

    def made(characters):
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.ttf"
        path.write_bytes(toy_font(characters))
        return str(path)

    return made


def pages(count=2, captions=(), size=(200, 160), **style):
    grey = [np.full((size[1], size[0], 3), 90, np.uint8)] * count
    return comic_pages(grey, captions, PageStyle(**style))


def lines_of(text, path, width, size=20, most=MAX_LINES):
    typeface = Typeface([text], size, path)
    return wrap(typeface.printable(text), typeface, width, most)


def test_japanese_breaks_between_characters_but_never_before_a_full_stop(font):
    path = font(JAPANESE)
    for width in range(60, 400, 20):
        lines = lines_of(JAPANESE, path, width, most=100)
        assert "".join(lines) == JAPANESE
        assert not [line for line in lines if line[0] in "。、」っ" or line[-1] == "「"]
        assert all(len(line) * 20 <= width for line in lines)
        assert len(lines) <= len(JAPANESE) * 20 / width * 2 + 2, "lines are filled"


def test_words_of_other_scripts_stay_whole_among_japanese(font):
    text = "狐は fox であり、hello 世界"
    lines = lines_of(text, font(text), 6 * 20, most=100)
    assert lines == ["狐は fox", "であり、", "hello", "世界"]


def test_korean_breaks_at_spaces(font):
    text = "여우가 눈 속에서 잠들었다"
    assert lines_of(text, font(text), 6 * 20) == ["여우가 눈", "속에서", "잠들었다"]


def test_an_emoji_is_never_broken(font):
    family = "👩\u200d👩\u200d👧"
    assert clusters(f"a{family}é🇫🇷🇯🇵👍🏽e\u0301") == ["a", family, "é", "🇫🇷", "🇯🇵", "👍🏽", "e\u0301"]
    for line in lines_of(family * 30, font("👩👧\u200d …"), 70):
        assert line.removesuffix("…").count("👩") == 2 * line.count("👧")


@given(st.text(max_size=80), st.integers(1, 300), st.integers(1, 4))
def test_no_text_is_too_odd_to_wrap(text, width, most):
    typeface = Typeface([text], 12)
    lines = wrap(typeface.printable(text), typeface, width, most)
    assert len(lines) <= most
    joined = "".join(clusters(text))
    assert joined == text


def test_a_stand_in_draws_what_the_chosen_font_lacks(font):
    chosen, other = font("ab"), font("狐🦊")
    typeface = Typeface([], 20, chosen, [other])
    assert typeface.printable("a狐b🦊") == "a狐b🦊" and not typeface.missing
    assert typeface.length("a狐b🦊") == 80
    drawn = Image.new("RGB", (100, 40), "white")
    typeface.draw(drawn, 50, 5, "a狐b🦊", (0, 0, 0))
    dark = (np.asarray(drawn)[..., 0] < 128).any(0)
    assert [bool(dark[10 + 20 * i + 4 : 10 + 20 * i + 16].all()) for i in range(4)] == [True] * 4
    heights = (np.asarray(drawn)[..., 0] < 128).sum(0)
    assert set(heights[dark]) <= {15, 16, 17}, "whole squares, not the flatter box of a missing character"


def test_spaces_around_a_stand_in_are_kept(font):
    typeface = Typeface([], 20, font("ab "), [font("狐🦊 ")])
    for text in ("a 狐 b", "狐 🦊", " 狐", "狐 b🦊"):
        assert typeface.length(text) == 20 * len(text)


def test_a_chosen_font_is_used_for_everything_that_it_has(font):
    chosen = font("a")
    assert Typeface(["axyz"], 20, chosen).length("a") == 20
    assert Typeface(["axyz"], 20).length("a") == ImageFont.load_default(20).getlength("a")


def test_without_a_choice_the_font_that_lacks_least_draws_everything(font):
    other = font("a狐は ")
    assert Typeface(["a狐は"], 20, None, [other]).length("a") == 20
    assert Typeface(["a"], 20, None, [other]).length("a") != 20


def test_what_no_font_has_is_replaced_and_named_once(no_system_fonts, caplog):
    with caplog.at_level(logging.WARNING):
        (odd,) = pages(2, ["a 狐 🦊 fox", "狐"], title="狐の話")
    assert [record.message for record in caplog.records] == [
        'No font has 狐 🦊 の 話: printed as "?". Install a font with these characters, for example '
        "Noto Sans CJK or Noto Emoji."
    ]
    (plain,) = pages(2, ["a ? ? fox", "?"], title="???")
    assert (np.asarray(odd) == np.asarray(plain)).all()


def test_accents_dashes_and_ligatures_that_no_font_has_become_plain(no_system_fonts):
    typeface = Typeface([], 20)
    lacking = [c for c in "éŻ—ﬁ①" if not has(fonts.BUILT_IN, c)]
    plain = {"é": "e", "Ż": "Z", "—": "-", "ﬁ": "fi", "①": "1"}
    assert lacking and [typeface.printable(c) for c in lacking] == [plain[c] for c in lacking]
    assert not typeface.missing


def test_invisible_signs_are_no_missing_characters(no_system_fonts, caplog):
    pages(1, ["a\u200bb\u200e c\ufeff d\u00ad e\ufe0f\u3000f\u00a0g"])
    assert not caplog.records


def test_a_font_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "broken.ttf").write_bytes(b"nothing")
    for name in ("broken.ttf", "gone.otf"):
        with pytest.raises(ValueError, match=f"{name}.* cannot be read"):
            pages(1, ["a"], font=str(tmp_path / name))
    assert pages(1, ["a 狐"], fonts=(str(tmp_path / "broken.ttf"),)), "a broken stand-in is passed over"


@pytest.mark.parametrize("place", ["below", "over"])
@pytest.mark.parametrize("layout", ["grid", "classic", "four_panel", "strip", "rows", "column"])
def test_a_caption_of_two_thousand_characters_leaves_the_picture_visible(layout, place):
    texts = ["word " * 400, "x" * 2000, JAPANESE * 40, "word " * 400]
    (page,) = pages(4, texts, layout=layout, rows="2,2", caption_place=place)
    grey = (np.asarray(page) == 90).all(-1).sum()
    full = (np.asarray(pages(4, layout=layout, rows="2,2")[0]) == 90).all(-1).sum()
    assert grey > 0.4 * full


def test_a_caption_over_a_picture_is_a_translucent_box_at_its_lower_edge():
    (plain,), (page,) = pages(1, gap=0), pages(1, ["a fox"], gap=0, caption_place="over", caption_size=12)
    assert page.size == plain.size == (200, 160)
    changed = (np.asarray(page) != np.asarray(plain)).any(-1)
    rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
    assert rows[0] == 160 - band(1, 12) and rows[-1] == 158
    assert columns[0] + columns[-1] in (198, 199, 200) and columns[-1] - columns[0] < 80, "centred, as wide as the text"
    expected = 90 + (np.array((252, 251, 248)) - 90) * 200 / 255
    assert abs(np.asarray(page)[rows[0] + 2, columns[0] + 2] - expected).max() <= 1


@pytest.mark.parametrize("size", [(9, 5), (40, 20), (64, 64)])
@pytest.mark.parametrize("layout", ["grid", "strip", "column"])
def test_captions_over_tiny_pictures_stay_inside_them(size, layout):
    (page,) = pages(2, ["a very long caption"] * 2, size, caption_place="over", gap=30, margin=30, layout=layout)
    (plain,) = pages(2, (), size, gap=30, margin=30, layout=layout)
    ink = (np.asarray(plain) != (252, 251, 248)).any(-1)
    assert (np.asarray(page)[~ink] == (252, 251, 248)).all()


def test_a_title_stands_on_the_first_page_only():
    first, second = pages(4, panels_per_page=2, title="The long way home", caption_size=12)
    untitled = pages(4, panels_per_page=2, caption_size=12)
    assert first.size == second.size == (untitled[0].width, untitled[0].height + band(1, 24))
    paper = np.array((252, 251, 248))
    assert (np.asarray(first)[: 24 + band(1, 24)] != paper).any()
    assert (np.asarray(second)[: untitled[0].height] == np.asarray(untitled[1])).all()
    assert (np.asarray(second)[untitled[0].height :] == paper).all(), "padded with paper"
    assert pages(4, title=" \n ")[0].size == pages(4)[0].size
    assert pages(4, title="word " * 500, caption_size=12)[0].height == pages(4)[0].height + band(2, 24)


def test_paper_and_ink_have_the_colours_asked_for():
    (page,) = pages(1, ["a fox"], paper=(10, 20, 30), ink=(255, 255, 0))
    assert page.getpixel((0, 0)) == (10, 20, 30)
    assert page.getpixel((24, 24)) == (255, 255, 0)
    colours = {colour for _, colour in page.getcolors(4096)}
    assert (38, 36, 40) not in colours and (252, 251, 248) not in colours


@pytest.mark.parametrize(
    "text, colour", [("#fcfbf8", (252, 251, 248)), ("FCFBF8", (252, 251, 248)), (" #fa0 ", (255, 170, 0))]
)
def test_colours_are_read(text, colour):
    assert parse_colour(text) == colour


@pytest.mark.parametrize("text", ["", "#", "white", "#12345", "#gggggg", "rgb(1,2,3)", "#1234567"])
def test_colours_that_are_not_understood_are_shown(text):
    with pytest.raises(ValueError) as error:
        parse_colour(text)
    assert f'"{text}"' in str(error.value)


@pytest.mark.parametrize("text", ["שלום עולם", "مرحبا بالعالم", "mixed שלום text"])
def test_text_from_right_to_left_is_drawn(text):
    assert (np.asarray(pages(1, [text])[0]) != np.asarray(pages(1, [" "])[0].resize(pages(1, [text])[0].size))).any()
