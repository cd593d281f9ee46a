"""Pages on disk: whole, numbered on, with the graph in them as Save Image writes it."""

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from killing import can_be_killed, killed_at_every_point
from PIL import Image
from story_graphs import call

EXTRA = {"workflow": {"nodes": [{"id": 1, "title": "a fox 🦊"}]}, "more": [1, 2]}
SIZE = (40, 24)


@pytest.fixture
def folder(host):
    """A folder of its own in the output folder, by its name."""
    output = host.base / "output"
    return f"pages{sum(1 for _ in output.glob('pages*'))}" if output.is_dir() else "pages0"


def given(graph, host, images):
    return call(graph, host, lambda _: images, "")


def pages(count=2, channels=3, seed=0):
    """A batch as Story page gives it: k / 255."""
    pixels = torch.randint(0, 256, (count, SIZE[1], SIZE[0], channels), generator=torch.Generator().manual_seed(seed))
    return pixels.float() / 255


def save(graph, link, prefix, kind="png", quality=90):
    return graph.add("StoryLoom_SavePage", images=link, filename_prefix=prefix, format=kind, quality=quality)


def shown(host, graph, node):
    """Run a graph as the front end sends it. Returns what one of its nodes shows. Raises what stopped it."""
    outputs, executor = host.validate(graph), host.new_executor()
    executor.execute(dict(graph), "saved", {"extra_pnginfo": EXTRA}, outputs)
    failed = [data["exception_message"] for event, data in executor.status_messages if event == "execution_error"]
    if failed:
        raise RuntimeError(failed[0].strip())
    return executor.history_result["outputs"][node()[0]]


def names(host, folder):
    return sorted(path.name for path in (host.base / "output" / folder).glob("*"))


def test_every_page_is_a_file_that_the_node_shows_and_hands_on(host, graph, folder):
    images = pages(3)
    node = save(graph, given(graph, host, images), f"{folder}/page")
    graph.capture(pages=node())
    files = shown(host, graph, node)["images"]
    expected = [f"page_0000{number}_.png" for number in (1, 2, 3)]
    assert [dict(file) for file in files] == [
        {"filename": name, "subfolder": folder, "type": "output"} for name in expected
    ]
    assert names(host, folder) == expected
    for name, image in zip(expected, images, strict=True):
        pixels = np.asarray(Image.open(host.base / "output" / folder / name))
        assert (pixels == (image * 255).round().numpy()).all()
    assert torch.equal(host.run(graph).pages, images)


@pytest.mark.parametrize("kind", ["png", "webp", "jpg"])
def test_the_formats_are_what_they_are_called(host, graph, folder, kind):
    shown(host, graph, save(graph, given(graph, host, pages()), f"{folder}/page", kind))
    assert names(host, folder) == [f"page_0000{number}_.{kind}" for number in (1, 2)]
    for name in names(host, folder):
        with Image.open(host.base / "output" / folder / name) as image:
            image.load()
            assert image.format == {"jpg": "JPEG"}.get(kind, kind.upper()) and image.size == SIZE


def test_a_pdf_has_all_pages_and_the_node_shows_them_as_pictures(host, graph, folder):
    images = pages(3)
    output = shown(host, graph, save(graph, given(graph, host, images), f"{folder}/story", "pdf"))
    assert names(host, folder) == ["story_00001_.pdf"]
    content = (host.base / "output" / folder / "story_00001_.pdf").read_bytes()
    assert content.startswith(b"%PDF-") and content.rstrip().endswith(b"%%EOF") and content.count(b"/MediaBox") == 3
    assert list(output["text"]) == [os.path.join(folder, "story_00001_.pdf")]
    assert [file["type"] for file in output["images"]] == ["temp"] * 3
    for file, image in zip(output["images"], images, strict=True):
        pixels = np.asarray(Image.open(host.base / "temp" / file["subfolder"] / file["filename"]))
        assert np.abs(pixels - (image * 255).numpy()).max() <= 1


@pytest.mark.parametrize("disabled", [False, True])
def test_png_and_webp_carry_the_graph_as_comfyui_s_own_nodes_write_it(host, graph, folder, monkeypatch, disabled):
    from comfy.cli_args import args

    monkeypatch.setattr(args, "disable_metadata", disabled)
    link = given(graph, host, pages(1))
    nodes = [save(graph, link, f"{folder}/{kind}", kind) for kind in ("png", "webp", "jpg", "pdf")]
    graph.add("SaveImage", images=link, filename_prefix=f"{folder}/own")
    shown(host, graph, nodes[0])
    files = {path.name.split("_")[0]: path for path in (host.base / "output" / folder).iterdir()}
    own, ours = (Image.open(files[name]).text for name in ("own", "png"))
    assert ours == own and set(ours) == (set() if disabled else {"prompt", "workflow", "more"})
    assert disabled or json.loads(ours["workflow"]) == EXTRA["workflow"]
    written = host.pack("nodes.save_page").ui.ImageSaveHelper._create_webp_metadata
    hidden = type("Hidden", (), {"prompt": dict(graph), "extra_pnginfo": EXTRA})
    expected = written(Image.new("RGB", (1, 1)), type("Node", (), {"hidden": hidden}))
    assert dict(Image.open(files["webp"]).getexif()) == dict(expected) and bool(expected) != disabled
    assert not any(b"workflow" in files[name].read_bytes() for name in ("jpg", "pdf"))


def test_numbers_go_on_and_nothing_is_overwritten(host, graph, folder):
    for kind in ("png", "pdf", "webp"):
        again = type(graph)()
        shown(host, again, save(again, given(again, host, pages()), f"{folder}/page", kind))
    expected = ["page_00001_.png", "page_00002_.png", "page_00003_.pdf", "page_00004_.webp", "page_00005_.webp"]
    assert names(host, folder) == expected
    (host.base / "output" / folder / "page_00007_.png").write_text("precious")
    (host.base / "output" / folder / "page_00005_.webp").unlink()
    shown(host, graph, save(graph, given(graph, host, pages()), f"{folder}/page"))
    assert "page_00008_.png" in names(host, folder)
    assert (host.base / "output" / folder / "page_00007_.png").read_text() == "precious"


def test_a_number_in_the_batch_is_filled_in_and_what_lies_there_stays(host, graph, folder):
    """ComfyUI does not find the numbers behind %batch_num%: Save Image writes over what it has written."""
    for seed in (0, 1):
        again = type(graph)()
        shown(host, again, save(again, given(again, host, pages(seed=seed)), f"{folder}/p%batch_num%-%width%"))
    counted = ["p0-40_00001_.png", "p0-40_00002_.png", "p1-40_00002_.png", "p1-40_00003_.png"]
    assert names(host, folder) == counted
    first = np.asarray(Image.open(host.base / "output" / folder / "p0-40_00001_.png"))
    assert (first == (pages(seed=0)[0] * 255).round().numpy()).all()


@pytest.mark.parametrize("channels, mode", [(1, "L"), (3, "RGB"), (4, "RGBA")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_pages_of_any_kind_are_saved_and_what_is_no_number_is_black(host, graph, folder, channels, mode, dtype):
    images = torch.full((1, SIZE[1], SIZE[0], channels), 1.5, dtype=dtype)
    images[0, 0] = float("nan")
    for kind in ("png", "webp", "jpg", "pdf"):
        shown(host, graph, save(graph, given(graph, host, images), f"{folder}/{kind}", kind))
    image = Image.open(host.base / "output" / folder / "png_00001_.png")
    assert image.mode == mode
    pixels = np.asarray(image).reshape(SIZE[1], SIZE[0], channels)
    assert (pixels[0] == 0).all() and (pixels[1:] == 255).all()


@pytest.mark.parametrize(
    "images, inputs, message",
    [
        (pages(0), {}, r"\[0, 24, 40, 3\] instead of .* connect at least one IMAGE"),
        (pages(1, 5), {}, r"\[1, 24, 40, 5\] instead of"),
        (pages(1)[0], {}, r"\[24, 40, 3\] instead of"),
        (torch.zeros(1, 1, 16_384, 3), {"kind": "webp"}, "16384 x 1 pixels, but webp allows at most 16383 per side"),
        (torch.zeros(2, 65_501, 1, 3), {"kind": "jpg"}, "1 x 65501 pixels, but jpg allows at most 65500"),
        (torch.zeros(2, 65_501, 1, 3), {"kind": "pdf"}, "but pdf allows at most 65500"),
        (pages(1), {"kind": "/../../evil"}, "Unknown format .*: choose one of png, webp, jpg, pdf"),
        (pages(1), {"quality": float("nan")}, "quality is nan: type or connect a whole number from 1 to 100"),
    ],
)
def test_what_cannot_be_saved_says_what_to_change_and_leaves_nothing(host, graph, folder, images, inputs, message):
    inputs = {name: given(graph, host, value) for name, value in inputs.items()}
    save(graph, given(graph, host, images), f"{folder}/page", **inputs)
    with pytest.raises(Exception, match=message):
        host.run(graph)
    assert not (host.base / "output" / folder).exists()


@pytest.mark.parametrize("kind, whole", [("png", 2), ("pdf", 0)])
def test_a_full_disk_leaves_the_pages_before_whole(host, graph, folder, monkeypatch, kind, whole):
    write, written = Path.write_bytes, []

    def full(path, content):
        written.append(path)
        if len(written) > whole:
            write(path, content[: len(content) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, content)

    save(graph, given(graph, host, pages(4)), f"{folder}/page", kind)
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(Exception) as stopped:
        host.run(graph)
    message = str(stopped.value)
    assert f"File {whole + 1} of {1 if kind == 'pdf' else 4} could not be written" in message
    assert "No space left" in message
    assert names(host, folder) == [f"page_0000{number + 1}_.png" for number in range(whole)]
    for name in names(host, folder):
        Image.open(host.base / "output" / folder / name).load()


def test_a_file_where_a_folder_is_needed_is_reported(host, graph, folder):
    (host.base / "output" / folder).mkdir(parents=True)
    (host.base / "output" / folder / "file").write_text("here")
    save(graph, given(graph, host, pages(1)), f"{folder}/file/page")
    with pytest.raises(Exception, match="could not be written to .* choose another filename_prefix"):
        host.run(graph)
    assert names(host, folder) == ["file"]


@can_be_killed
@pytest.mark.parametrize("kind", ["png", "pdf"])
def test_a_server_that_is_killed_while_it_saves_leaves_whole_pages_only(host, graph, folder, kind):
    save(graph, given(graph, host, pages(2)), f"{folder}/page", kind)
    place = host.base / "output" / folder
    killed = sum(1 for _ in killed_at_every_point(lambda _: host.run(graph, fresh=True), place))
    whole = list(place.glob("page*"))
    for path in whole:
        if kind == "png":
            Image.open(path).load()
        else:
            assert path.read_bytes().rstrip().endswith(b"%%EOF")
    assert killed > 6 and len(whole) > 3 and len(list(place.iterdir())) > len(whole), "it was killed while it wrote"
