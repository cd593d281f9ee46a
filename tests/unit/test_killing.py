"""The test's own killer: it goes through every point of a write, and no writer that leaves half a file gets past it."""

import os

import pytest
from killing import Point, can_be_killed, killed_at_every_point

from storyloom.models.files import write_whole

pytestmark = can_be_killed
CONTENTS = [bytes([number]) * 100_000 for number in (1, 2)]
OPENED = [Point(0, "open", written) for written in (0, 1, 50_000, 99_999)]
POINTS = [Point(0, "open"), *OPENED, Point(1, "os.rename"), Point(2, "os.remove"), Point(3, "end")]
"""Of one file that is written beside its place and then put there: before it is opened, while it is written, before it
is put in its place and after."""


def test_every_point_of_a_file_written_whole_is_reached_in_order(tmp_path):
    place, left, points = tmp_path / "page.png", [], []
    for number, point in enumerate(killed_at_every_point(lambda n: write_whole(place, CONTENTS[n % 2]), tmp_path)):
        points.append(point)
        left += [path.stat().st_size for path in tmp_path.glob(".*.tmp")]
        for path in tmp_path.glob(".*.tmp"):
            path.unlink()
        replaced = point.event in ("os.remove", "end")
        assert place.read_bytes() == CONTENTS[number % 2] if replaced else place.read_bytes() in CONTENTS
    assert points == POINTS and left == [0, 1, 50_000, 99_999, 100_000]


def put_at_once(place, content):
    place.write_bytes(content)


def put_in_two_parts(place, content):
    with place.open("wb") as file:
        file.write(content[:10])
        file.flush()
        file.write(content[10:])


def removed_before(place, content):
    unfinished = place.with_suffix(".tmp")
    unfinished.write_bytes(content)
    place.unlink(missing_ok=True)
    os.rename(unfinished, place)


@pytest.mark.parametrize("put", [put_at_once, put_in_two_parts, removed_before])
def test_a_writer_that_can_leave_half_a_file_or_none_is_caught(tmp_path, put):
    place = tmp_path / "page.png"
    whole = [
        place.exists() and place.read_bytes() in CONTENTS
        for _ in killed_at_every_point(lambda n: put(place, CONTENTS[n % 2]), tmp_path)
    ]
    assert not all(whole)


def test_a_point_that_is_not_reached_is_reported(tmp_path):
    with pytest.raises(AssertionError, match="nothing is written into"):
        next(killed_at_every_point(lambda _: None, tmp_path))

    def fails(number):
        if number > 3:
            raise OSError("the disk is full")
        write_whole(tmp_path / "page.png", b"x" * 9)

    with pytest.raises(
        AssertionError, match=r"not killed at Point\(step=0, event='open', written=1\)(.|\n)*the disk is full"
    ):
        list(killed_at_every_point(fails, tmp_path))
