"""Pages as files: what is in them, and that they are whole also when the process is killed."""

import io
import re

import numpy as np
import pytest
from killing import can_be_killed, killed_at_every_point
from PIL import Image

from storyloom.models.files import write_whole
from storyloom.pages.comic import from_array
from storyloom.pages.encoding import FORMATS, LONGEST_SIDE, check_size, encoded

TEXTS = {"prompt": '{"1": "a fox \\ud83e\\udd8a"}', "workflow": '{"nodes": []}', "more": "[1]"}


def noise(seed=0, width=90, height=60, channels=3):
    """A page that no format makes smaller for nothing."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    smooth = Image.fromarray(pixels[: height // 4, : width // 4]).resize((width, height), Image.BICUBIC)
    return Image.fromarray(np.asarray(smooth) ^ (pixels & 15))


def opened(content):
    image = Image.open(io.BytesIO(content))
    image.load()
    return image


def pages_of(pdf):
    """The pictures of a PDF's pages, and the pages' sizes in points. Reads what Pillow writes, whole files only."""
    assert pdf.startswith(b"%PDF-") and pdf.rstrip().endswith(b"%%EOF")
    start = int(re.search(rb"startxref\s+(\d+)\s+%%EOF\s*$", pdf)[1])
    assert pdf[start:].startswith(b"xref"), "the table of contents lies where the end says"
    sizes = [tuple(map(float, box.split()[2:])) for box in re.findall(rb"/MediaBox \[([^]]*)\]", pdf)]
    assert int(re.search(rb"/Count (\d+)", pdf)[1]) == len(sizes)
    pictures = [opened(pdf[match.start() :]) for match in re.finditer(rb"\xff\xd8\xff\xe0", pdf)]
    return pictures, sizes


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("kind, quality", [("png", 1), ("webp", 100)])
def test_png_and_the_best_webp_keep_every_pixel(kind, quality, channels):
    page = noise(channels=channels)
    picture = opened(encoded([page], kind, quality))
    assert picture.format == kind.upper() and picture.mode == page.mode
    opaque = np.asarray(page.convert("RGBA"))[..., 3] > 0  # what cannot be seen has no colour in a WebP
    assert (np.asarray(picture)[opaque] == np.asarray(page)[opaque]).all()


def test_numbers_from_a_node_come_back_as_they_were():
    """What Story page gives: k / 255 in float32, for every k."""
    values = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2)
    content = encoded([from_array(np.divide(values, np.float32(255), dtype=np.float32))], "png")
    assert (np.asarray(opened(content)) == values).all()


@pytest.mark.parametrize("kind", ["jpg", "webp", "pdf"])
def test_quality_acts(kind):
    sizes = [len(encoded([noise()], kind, quality)) for quality in (10, 50, 90, 99)]
    assert sizes == sorted(sizes) and sizes[0] * 2 < sizes[-1]
    assert encoded([noise()], "png", 10) == encoded([noise()], "png", 90)


def test_coloured_letters_keep_their_edges():
    """4:4:4: with colours at half size, a red line of one pixel on white would lose half its redness."""
    line = np.full((32, 32, 3), 255, np.uint8)
    line[:, 16] = 255, 0, 0
    for picture in (
        opened(encoded([Image.fromarray(line)], "jpg", 95)),
        pages_of(encoded([Image.fromarray(line)], "pdf", 95))[0][0],
    ):
        assert np.abs(np.asarray(picture)[8:24].astype(int) - line[8:24]).max() < 40


@pytest.mark.parametrize("kind", ["jpg", "pdf"])
def test_transparency_shows_white_where_there_is_none(kind):
    content = encoded([Image.new("RGBA", (16, 16), (0, 0, 0, 0))], kind)
    picture = pages_of(content)[0][0] if kind == "pdf" else opened(content)
    assert picture.mode == "RGB" and np.asarray(picture).min() > 250


def test_a_pdf_has_all_pages_in_their_order_with_one_quality():
    pages = [Image.new("RGB", (1240, 1754), colour) for colour in ("red", "lime", "blue")]
    pictures, sizes = pages_of(encoded(pages, "pdf"))
    assert np.allclose(sizes, (595.2, 841.9), atol=0.1), "A4"
    for picture, page in zip(pictures, pages, strict=True):
        assert picture.size == page.size and np.abs(np.asarray(picture).astype(int) - np.asarray(page)).max() < 5
    both = pages_of(encoded([noise(), noise()], "pdf", 30))[0]
    assert (np.asarray(both[0]) == np.asarray(both[1])).all()


def test_a_pdf_with_a_long_page_stays_within_what_readers_show():
    _, ((width, height),) = pages_of(encoded([Image.new("L", (100, 60_000))], "pdf"))
    assert height == pytest.approx(14_400) and width == pytest.approx(24)


def test_png_and_webp_carry_texts_and_the_others_do_not():
    files = {kind: encoded([noise()], kind, texts=TEXTS) for kind in FORMATS}
    assert opened(files["png"]).text == TEXTS
    exif = dict(opened(files["webp"]).getexif())
    assert exif == {0x0110: f"prompt:{TEXTS['prompt']}", 0x010F: f"workflow:{TEXTS['workflow']}", 0x010E: "more:[1]"}
    assert not any(b"nodes" in files[kind] for kind in ("jpg", "pdf"))
    for kind in ("png", "webp"):
        image = opened(encoded([noise()], kind))
        assert not getattr(image, "text", {}) and not image.getexif()


@pytest.mark.parametrize("kind, most", LONGEST_SIDE.items())
def test_a_page_is_refused_where_its_format_ends(kind, most):
    check_size(most, 1, kind)
    assert encoded([Image.new("L", (most, 1))], kind)
    with pytest.raises(ValueError, match=f"{most + 1} x 1 pixels, but {kind} allows at most {most}"):
        check_size(most + 1, 1, kind)
    with pytest.raises((OSError, ValueError)):
        encoded([Image.new("L", (most + 1, 1))], kind)
    check_size(100_000, 100_000, "png")


@can_be_killed
@pytest.mark.parametrize("kind", FORMATS)
def test_writing_that_is_killed_leaves_whole_pages_only(tmp_path, kind):
    """Killed at every point of writing two pages one after the other, as the node does."""
    pages = [noise(seed, 600, 400) for seed in range(2)]
    contents = [encoded(pages if kind == "pdf" else [page], kind) for page in pages]

    def write(number):
        for page, content in enumerate(contents):
            write_whole(tmp_path / f"page_{number:05}_{page}_.{kind}", content)

    killed = sum(1 for _ in killed_at_every_point(write, tmp_path))
    files = list(tmp_path.glob(f"[!.]*.{kind}"))
    assert killed > 13 and len(files) > 8 and all(path.read_bytes() in contents for path in files)
    assert all(path.name.endswith((".tmp", f".{kind}")) for path in tmp_path.iterdir())
    content = files[-1].read_bytes()
    pictures = pages_of(content)[0] if kind == "pdf" else [opened(content)]
    assert [picture.size for picture in pictures] == [(600, 400)] * (2 if kind == "pdf" else 1)
