"""The command line: a page with a progress bar, and errors in one sentence."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from storyloom.pages.comic import PageStyle
from storyloom.standalone import __main__ as command

STORY = ["a red fox in a blue coat", "asleep in the snow", "reading on a train"]


def run(*arguments, code=None):
    start = ["-c", code] if code else ["-m", "storyloom.standalone"]
    return subprocess.run([sys.executable, *start, *map(str, arguments)], capture_output=True, text=True)


def test_a_story_becomes_a_page(tmp_path):
    page = tmp_path / "page.png"
    done = run(*STORY, "--steps", 1, "--width", 64, "--height", 96, "-o", page)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(page) and "drawing" in done.stderr
    assert Image.open(page).width > 2 * 64


def test_every_setting_reaches_the_picture(tmp_path, monkeypatch, small):
    monkeypatch.setattr("storyloom.standalone.demo.demo_model", lambda: small)
    drawn = {}
    for number, settings in enumerate(
        ["", "--method ipca", "--cfg 1", "--seed 5", "--identity-weight 4", "--own-noise"]
    ):
        page = tmp_path / f"{number}.png"
        assert command.main([*STORY, "--steps", "1", "-o", str(page), *settings.split()]) == 0
        drawn[settings] = Image.open(page).tobytes()
    assert len(set(drawn.values())) == len(drawn)


def test_every_setting_of_the_page_reaches_it(tmp_path, monkeypatch, small):
    monkeypatch.setattr("storyloom.standalone.demo.demo_model", lambda: small)
    settings = "--layout rows --rows 1,2 --columns 3 --panels-per-page 4 --page-width 300 --captions over --title A"
    settings += " --direction right_to_left --font f.ttf --seed 5"
    options = command._parser().parse_args([*STORY, *settings.split()])
    assert command.page_style(options) == PageStyle(
        "rows", 3, "1,2", 4, 5, page_width=300, caption_place="over", title="A", direction="right_to_left", font="f.ttf"
    )
    sizes = set()
    for number, settings in enumerate(["", "--captions none", "--layout column --page-width 100"]):
        page = tmp_path / f"{number}.png"
        assert command.main([*STORY, "--steps", "1", "-o", str(page), *settings.split()]) == 0
        sizes.add(Image.open(page).size)
    assert len(sizes) == 3


@pytest.mark.parametrize("ending, kind", [("png", "PNG"), ("jpg", "JPEG"), ("JPEG", "JPEG"), ("webp", "WEBP")])
def test_a_page_is_written_whole_or_not_at_all(tmp_path, monkeypatch, ending, kind):
    path = tmp_path / f"page.{ending}"
    assert command.save_pages([Image.new("RGB", (9, 6), "red")], path) == [path]
    with Image.open(path) as page:
        page.load()
        assert page.format == kind and page.size == (9, 6)
    before, write = path.read_bytes(), Path.write_bytes

    def full(path, content):
        write(path, content[: len(content) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        command.save_pages([Image.new("RGB", (9, 6), "blue")], path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_page_that_its_format_cannot_hold_is_refused(tmp_path):
    with pytest.raises(ValueError, match="16384 x 1 pixels, but webp allows at most 16383 per side"):
        command.save_pages([Image.new("L", (16_384, 1))], tmp_path / "page.webp")
    assert not list(tmp_path.iterdir())


def test_further_pages_get_a_number(tmp_path, monkeypatch, capsys, small):
    monkeypatch.setattr("storyloom.standalone.demo.demo_model", lambda: small)
    assert command.main([*STORY, "--steps", "1", "-o", str(tmp_path / "page.png"), "--panels-per-page", "1"]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "page.png"), str(tmp_path / "page_2.png")]
    assert [Image.open(tmp_path / name).size[0] < 2 * 64 + 48 for name in ("page.png", "page_2.png")] == [True, True]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([*STORY, "[Bear] eating"], "Story script, frames, line 3: "),
        (["", "asleep"], "Story script, identity: it is empty"),
        ([*STORY, "--style", "ink"], "Put {prompt} once"),
        ([*STORY, "--method", "magic"], 'There is no method "magic"'),
        ([*STORY, "--steps", "0"], "at least 1 step"),
        ([*STORY, "--window", "sliding"], 'There is no window "sliding". Choose one of circular, trailing'),
        ([*STORY, "--width", "100"], "multiple of 8, got 100"),
        ([*STORY, "--layout", "spiral"], '--layout "spiral" is not one of grid, four_panel'),
        ([*STORY, "--captions", "above"], '--captions "above" is not one of below, over, none'),
        ([*STORY, "--page-width", "-1"], "--page-width is -1; use 0 or more."),
        ([*STORY, "--layout", "rows", "--rows", "2;1"], 'Rows "2;1" cannot be read'),
        ([*STORY, "--font", "none.ttf"], "none.ttf"),
        ([*STORY, "-o", "nowhere/page.png"], 'There is no folder "nowhere"'),
        ([*STORY, "-o", "page.txt"], 'The page "page.txt" must end in .png'),
        ([*STORY, "--checkpoint", "none.safetensors"], 'There is no checkpoint at "none.safetensors"'),
        ([*STORY, "--character", "none.safetensors"], "none.safetensors cannot be read as a character"),
        ([*STORY, "--character", *"abcd"], "--character takes 1 to 3 files, got 4."),
        ([*STORY, "--character", "a", "--checkpoint", "b"], "also needs StoryMaker's mask.bin: name it with"),
    ],
)
def test_faults_are_one_sentence_and_code_1(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert command.main(arguments) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_story_too_long_for_one_prompt_is_refused(monkeypatch, capsys, tmp_path, small):
    monkeypatch.setattr("storyloom.standalone.demo.demo_model", lambda: small)
    assert command.main([*STORY, "drinking tea " * 40, "-o", str(tmp_path / "page.png")]) == 1
    assert "too long for one prompt" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_refused(tmp_path, capsys):
    import torch
    from safetensors.torch import save_file

    damaged, other, page = tmp_path / "damaged.safetensors", tmp_path / "other.safetensors", tmp_path / "page.png"
    damaged.write_bytes(b"no tensors in here")
    save_file({"model.diffusion_model.out.2.weight": torch.zeros(1)}, other)
    for path, reason in ((damaged, "cannot be read as SDXL: "), (other, "has no UNet of SDXL"), (tmp_path, "SDXL: ")):
        assert command.main([*STORY, "--checkpoint", str(path), "-o", str(page)]) == 1
        error = capsys.readouterr().err
        assert reason in error and error.count("\n") == 1


def test_without_the_packages_it_says_what_to_install(tmp_path):
    hide = "import sys; sys.modules['diffusers'] = None; sys.modules['open_clip'] = None; "
    # None in sys.modules makes find_spec and import fail as for a missing package
    done = run(
        *STORY,
        "-o",
        tmp_path / "page.png",
        code=hide + "from storyloom.standalone.__main__ import main; sys.exit(main())",
    )
    assert done.returncode == 1
    assert 'pip install "storyloom[standalone]"' in done.stderr and "diffusers, open_clip_torch" in done.stderr
    assert "Traceback" not in done.stderr
    done = run(code=hide + "from storyloom.standalone import StoryPipeline")
    assert done.stderr.strip().splitlines()[-1].startswith("ImportError: StoryLoom without ComfyUI needs diffusers")
