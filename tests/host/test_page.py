"""The page never loses pictures, and graphs that were saved long ago make the pages they made."""

import shutil

import numpy as np
import pytest
import torch
from story_graphs import STORY

WIDE_STORY = {"frames": "asleep # one\nreading # two\nwaving # three"}


@pytest.mark.parametrize("images", [2, 3, 5])
def test_a_page_is_made_also_when_images_and_frames_differ(host, graph, caplog, images):
    story = graph.add("StoryLoom_Script", **STORY | WIDE_STORY)
    pictures = graph.add("EmptyImage", width=96, height=64, batch_size=images, color=0x3366CC)
    page = graph.add(
        "StoryLoom_Page", images=pictures(), story=story(), columns=1, captions=True, gap=4, caption_size=0
    )
    graph.capture(page=page())
    image = host.run(graph).page
    assert image.shape[0] == 1 and image.shape[3] == 3 and image.shape[1] > images * 64
    assert 0 <= image.min() and image.max() <= 1
    warned = [r.message for r in caplog.records if f"{images} images but 3 frames" in r.message]
    assert bool(warned) == (images != 3)


OLD = {"columns": 0, "captions": True, "gap": 12, "caption_size": 0}
"""All inputs that the node had when it made grids only."""


def page_of(host, graph, count=5, story=None, **inputs):
    pictures = graph.add("EmptyImage", width=96, height=64, batch_size=count, color=0x3366CC)
    links = {"story": graph.add("StoryLoom_Script", **STORY | story)()} if story else {}
    graph.capture(page=graph.add("StoryLoom_Page", images=pictures(), **links, **OLD | inputs)())
    return host.run(graph).page


def refusal(host, graph, **inputs):
    try:
        page_of(host, graph, **inputs)
    except Exception as error:
        assert type(error).__name__ == "PromptRefused"
        return error.errors["StoryLoom_Page"][0]
    return None


def test_a_graph_saved_before_there_were_layouts_gives_the_same_page(host, graph):
    inputs = [entry.id for entry in host.pack("nodes.page").Page.GET_SCHEMA().inputs]
    assert inputs[:6] == ["images", "story", "columns", "captions", "gap", "caption_size"], "in the order of old files"
    old = page_of(host, graph, story=WIDE_STORY)
    new = {entry.id: entry.default for entry in host.pack("nodes.page").Page.GET_SCHEMA().inputs[6:]}
    assert (page_of(host, type(graph)(), story=WIDE_STORY, **new) == old).all()
    grid = host.pack("pages.grid").comic_page
    panels = [np.tile(np.uint8([0x33, 0x66, 0xCC]), (64, 96, 1))] * 5
    expected = np.asarray(grid(panels, ["one", "two", "three"]), np.float32) / 255
    assert old.dtype == torch.float32 and (old[0].numpy() == expected).all()


@pytest.mark.parametrize(
    "layout, pages", [("grid", 2), ("four_panel", 2), ("classic", 2), ("strip", 2), ("column", 2), ("rows", 1)]
)
def test_every_layout_makes_a_batch_of_pages_of_one_size(host, graph, layout, pages):
    batch = page_of(host, graph, story=WIDE_STORY, layout=layout, panels_per_page=3, title="A title", page_width=700)
    assert batch.shape[0] == pages and batch.shape[2:] == (700, 3)
    assert 0 <= batch.min() and batch.max() <= 1


def test_captions_off_is_no_caption_anywhere(host, graph):
    plain = page_of(host, graph)
    for place in ("below", "over"):
        changes = {"caption_place": place, "captions": False}
        assert (page_of(host, type(graph)(), story=WIDE_STORY, **changes) == plain).all()


@pytest.mark.parametrize("name, value", [("rows", "2;1"), ("rows", ""), ("paper", "white"), ("ink", "#12")])
def test_a_text_that_is_not_understood_is_refused_before_anything_runs(host, graph, name, value):
    assert f'"{value}"' in refusal(host, graph, **{name: value})["details"]


@pytest.mark.parametrize(
    "values", [{"layout": "spiral"}, {"font": "gone.ttf"}, {"direction": "up"}, {"page_width": -1}, {"columns": 21}]
)
def test_values_that_do_not_exist_are_refused(host, graph, values):
    kinds = ("value_not_in_list", "value_smaller_than_min", "value_bigger_than_max")
    assert refusal(host, graph, **values)["type"] in kinds


def test_fonts_of_the_models_folder_can_be_chosen(host, graph, tmp_path):
    import folder_paths
    from PIL import ImageFont

    paths, extensions = folder_paths.folder_names_and_paths["storyloom_fonts"]
    assert paths[-1].endswith("storyloom_fonts") and extensions == {".ttf", ".otf", ".ttc"}
    (tmp_path / "Own.ttf").write_bytes(ImageFont.load_default(20).font_bytes)
    (tmp_path / "notes.txt").write_text("no font")
    folder_paths.add_model_folder_path("storyloom_fonts", str(tmp_path))
    try:
        options = {entry.id: entry for entry in host.pack("nodes.page").Page.GET_SCHEMA().inputs}["font"].options
        assert options[0] == "built-in" and "Own.ttf" in options and "notes.txt" not in options
        own = page_of(host, graph, story=WIDE_STORY, font="Own.ttf")
        shutil.rmtree(tmp_path)
        same = page_of(host, type(graph)(), story=WIDE_STORY)
    finally:
        paths.remove(str(tmp_path))
        folder_paths.filename_list_cache.pop("storyloom_fonts", None)
    assert own.shape == same.shape and (own - same).abs().mean() < 0.002, "it is the built-in font's own file"


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.bfloat16])
def test_grey_and_transparent_images_of_any_precision_make_a_page(host, graph, channels, kind):
    images = torch.full((2, 64, 96, channels), 0.5, dtype=kind)
    images[0, 0, 0] = float("nan")
    (page,) = host.pack("nodes.page").Page.execute(images, **OLD).args
    assert page.shape == (1, 64 + 48, 2 * 96 + 12 + 48, 3) and not page.isnan().any()
    assert page[0, 24 + 32, 24 + 48, 0] == pytest.approx(0.5 if channels < 4 else 0.75, abs=0.01)
