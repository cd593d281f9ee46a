"""Dates in file names come out as the interface makes them, in graphs that are sent without it."""

from datetime import datetime
from types import SimpleNamespace

import pytest
import torch
from story_graphs import call

NOW = datetime(2026, 3, 7, 14, 5, 9)
NODES = ["StoryLoom_SavePage", "StoryLoom_Consistency"]


@pytest.fixture
def dated(host):
    return lambda prefix, now=NOW: host.pack("nodes.file_names").dated(prefix, now)


@pytest.fixture
def clock(host, monkeypatch):
    """The clock of the nodes stands."""
    for name in ("nodes.save_page", "nodes.consistency"):
        monkeypatch.setattr(host.pack(name), "datetime", SimpleNamespace(now=lambda: NOW))


@pytest.mark.parametrize(
    "form, expected",
    [
        ("yyyy-MM-dd", "2026-03-07"),
        ("yy/M/d", "26/3/7"),
        ("yyyyMMdd_hhmmss", "20260307_140509"),
        ("h-m-s", "14-5-9"),
        ("MMM ddd", "033 077"),
        ("yyy y yyyy", "yyy y 2026"),
        ("YYYY-MM-DD", "YYYY-03-DD"),
        ("yyyy.MM.dd", "2026.03.07"),
        ("mad", "5a7"),
    ],
)
def test_every_part_of_a_date_is_filled_in_as_the_interface_does(dated, form, expected):
    assert dated(f"StoryLoom/%date:{form}%/page") == f"StoryLoom/{expected}/page"


def test_the_last_and_the_first_of_everything(dated):
    form = "%date:yyyy yy M MM d dd h hh m mm s ss%"
    assert dated(form, datetime(2105, 12, 31, 23, 59, 59)) == "2105 05 12 12 31 31 23 23 59 59 59 59"
    assert dated(form, datetime(2100, 1, 1)) == "2100 00 1 01 1 01 0 00 0 00 0 00"


def test_what_is_no_date_is_left_to_comfyui_or_as_it_is(dated):
    for prefix in (
        "%year%/%KSampler.seed%-%width%",
        "100%",
        "50% yyyy 50%",
        "date:yyyy",
        "%width%x%height%",
        "%dates%",
    ):
        assert dated(prefix) == prefix
    assert dated("%date:yyyy%-%year%-%date:MM%") == "2026-%year%-03"


@pytest.mark.parametrize("node", NODES)
def test_a_prefix_from_the_api_has_its_dates_and_comfyui_s_own_placeholders(host, graph, clock, node):
    save(graph, host, node, "dates/%date:yyyy-MM-dd%/%width%x%height%_%date:hhmm%_%year%")
    host.run(graph)
    (file,) = (host.base / "output" / "dates" / "2026-03-07").glob("*x*_*")
    size = "48x48" if node == "StoryLoom_SavePage" else "0x0"
    assert file.name.startswith(f"{size}_1405_{datetime.now().year}_00001_.")
    file.unlink()


@pytest.mark.parametrize("node", NODES)
@pytest.mark.parametrize(
    "prefix, message",
    [
        (
            "a/%date:hh:mm%",
            '"%date:hh:mm%" in filename_prefix contains ":", which file names cannot contain: write one such as',
        ),
        ("a/%date:%", '"%date:%" in filename_prefix contains no date code: write one such as %date:yyyy-MM-dd%'),
        ("%date:YYYY%", '"%date:YYYY%" in filename_prefix contains no date code'),
        ("a/%date:yyyy", 'filename_prefix "a/%date:yyyy" has a date without a closing %: write one such as'),
        ("%date:yyyy/../..%/../a", 'filename_prefix "2026/../../../a" is outside the output folder'),
        ("%date:/yyyy%/a", 'filename_prefix "/2026/a" is outside the output folder'),
        ("a/%date:yyyy/%", 'filename_prefix "a/2026/" has no file name'),
        ("a%date:" + "yyyy" * 60 + "%", "is too long for a file"),
    ],
)
def test_a_date_that_is_none_or_leads_elsewhere_is_refused_before_anything_runs(
    host, graph, clock, node, prefix, message
):
    save(graph, host, node, prefix)
    with pytest.raises(Exception) as refused:
        host.validate(graph)
    assert message in refused.value.errors[node][0]["details"]


def save(graph, host, node, prefix):
    images = call(graph, host, lambda _: torch.zeros(1, 48, 48, 3), "")
    if node == "StoryLoom_Consistency":
        graph.add(node, images=images, clip=graph.add("StoryLoom_DemoSimilarity")(), filename_prefix=prefix)
    else:
        graph.add(node, images=images, filename_prefix=prefix, format="png", quality=90)
