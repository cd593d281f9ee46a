"""Draw a story page from the command line: python -m storyloom.standalone "a red fox" "asleep" "reading" -o page.png"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from ..pages.comic import CAPTION_PLACES, DIRECTIONS, PageStyle
from ..pages.encoding import check_size, encoded
from ..pages.layout import LAYOUTS
from . import check_packages

FORMATS = {".png": "png", ".jpg": "jpg", ".jpeg": "jpg", ".webp": "webp"}
"""Extension of a page's file -> its format."""


def main(arguments: list[str] | None = None) -> int:
    """Draw and save the pages of a story. Returns the exit code: 1 after an error, which is one sentence on stderr."""
    options = _parser().parse_args(arguments)
    try:
        check_output(options.output)
        check_packages()
        paths = save_pages(_draw(options), options.output)
    except (ValueError, OSError, ImportError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write("".join(f"{path}\n" for path in paths))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m storyloom.standalone", description="Draw a story page without ComfyUI."
    )
    parser.add_argument("identity", help='the character in every frame: "a red fox in a blue coat"')
    parser.add_argument("frames", nargs="+", help='one text per picture, without the identity: "asleep in the snow"')
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("page.png"),
        help="file of the first page; further pages are page_2.png and so on",
    )
    parser.add_argument(
        "--method",
        default="svr+ipca",
        help="svr or svr-eot, optionally with +ipca; ipca, csa, csa+svr+ipca, npr, none or frames (default: svr+ipca)",
    )
    parser.add_argument(
        "--checkpoint", type=Path, help="SDXL .safetensors file or diffusers folder (default: the demo)"
    )
    parser.add_argument("--style", default="", help='text around every prompt: "watercolor of {prompt}"')
    parser.add_argument("--steps", type=int, default=30, help="sampling steps (default: 30)")
    parser.add_argument("--cfg", type=float, default=5.0, help="guidance scale; 1 ignores the negative (default: 5)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise (default: 0)")
    parser.add_argument("--width", type=int, help="width of a frame in pixels (default: the model's own)")
    parser.add_argument("--height", type=int, help="height of a frame in pixels (default: the model's own)")
    parser.add_argument(
        "--identity-weight", type=float, default=2.0, help="weight of the identity in IPCA (default: 2)"
    )
    parser.add_argument(
        "--sampling-rate",
        type=float,
        default=0.5,
        help="share of a frame's tokens that the others see in CSA (default: 0.5)",
    )
    parser.add_argument(
        "--anchors",
        type=int,
        default=0,
        help="number of first frames that all others attend to in CSA (default: 0, every frame)",
    )
    parser.add_argument("--own-noise", action="store_true", help="start every frame from its own noise")
    parser.add_argument("--window", default="circular", help="window for stories over 75 tokens: circular or trailing")
    likeness = parser.add_argument_group("characters from images (StoryMaker)")
    likeness.add_argument(
        "--character", type=Path, nargs="+", default=[], help="1 to 3 files that the node Save character wrote"
    )
    likeness.add_argument("--storymaker", type=Path, help="StoryMaker's mask.bin (default: the demo's adapter)")
    likeness.add_argument("--token-strength", type=float, default=0.8, help="of the reference images (default: 0.8)")
    likeness.add_argument("--lora-strength", type=float, default=0.8, help="of StoryMaker's LoRA (default: 0.8)")
    page = parser.add_argument_group("page")
    page.add_argument("--layout", default="grid", help=f"{', '.join(LAYOUTS)} (default: grid)")
    page.add_argument("--columns", type=int, default=0, help="panels per row of the grid (default: near-square)")
    page.add_argument("--rows", default="2,1,3", help='panels in each row of the layout rows (default: "2,1,3")')
    page.add_argument("--panels-per-page", type=int, default=0, help="panels per page (default: all on one page)")
    page.add_argument(
        "--page-width", type=int, default=0, help="width of a page in pixels (default: as wide as the panels need)"
    )
    page.add_argument("--captions", default="below", help="below, over or none (default: below)")
    page.add_argument("--title", default="", help="title above the panels of the first page")
    page.add_argument("--direction", default="left_to_right", help="left_to_right or right_to_left")
    page.add_argument("--font", help="font file for captions and title (default: built in)")
    return parser


def page_style(options: argparse.Namespace) -> PageStyle:
    """The page style of the options. Raises ValueError for an unknown choice or a negative number."""
    choices = {"layout": LAYOUTS, "captions": (*CAPTION_PLACES, "none"), "direction": DIRECTIONS}
    for name, allowed in choices.items():
        if getattr(options, name) not in allowed:
            raise ValueError(f'--{name} "{getattr(options, name)}" is not one of {", ".join(allowed)}.')
    for name in ("columns", "panels_per_page", "page_width"):
        if getattr(options, name) < 0:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(options, name)}; use 0 or more.")
    return PageStyle(
        layout=options.layout,
        columns=options.columns,
        rows=options.rows,
        panels_per_page=options.panels_per_page,
        seed=options.seed,
        page_width=options.page_width,
        caption_place=options.captions if options.captions != "none" else "below",
        title=options.title,
        direction=options.direction,
        font=options.font,
    )


def _draw(options: argparse.Namespace) -> tuple[Image.Image, ...]:
    from ..prompts.script import parse_story
    from .pipeline import StoryPipeline, check_page, check_settings

    story = parse_story(options.identity, "\n".join(options.frames), options.style)
    size = (options.width or 64, options.height or 64)
    check_settings(
        options.method,
        options.steps,
        *size,
        options.identity_weight,
        0,
        1,
        options.window,
        options.sampling_rate,
        options.anchors,
    )
    captions, style = options.captions != "none", page_style(options)
    check_page(story, *size, captions, style)
    characters = _characters(options)
    drawn = StoryPipeline(_load(options.checkpoint))(
        options.identity,
        options.frames,
        options.style,
        method=options.method,
        steps=options.steps,
        cfg=options.cfg,
        seed=options.seed,
        width=options.width,
        height=options.height,
        identity_weight=options.identity_weight,
        sampling_rate=options.sampling_rate,
        anchors=options.anchors,
        shared_noise=not options.own_noise,
        window=options.window,
        characters=characters,
        captions=captions,
        page_style=style,
    )
    return drawn.pages


def _characters(options: argparse.Namespace):
    """The `Characters` of the options, None without any. Raises ValueError for files that are missing or damaged."""
    from ..models.demo.storymaker import demo_storymaker
    from ..models.storymaker.characters import load_character
    from ..models.storymaker.weights import load_storymaker, read_checkpoint
    from .storymaker import Characters, storymaker_of

    if not options.character:
        return None
    if len(options.character) > 3:
        raise ValueError(f"--character takes 1 to 3 files, got {len(options.character)}.")
    if options.checkpoint and not options.storymaker:
        raise ValueError("--character with --checkpoint also needs StoryMaker's mask.bin: name it with --storymaker.")
    references = tuple(map(load_character, options.character))
    weights = load_storymaker(read_checkpoint(options.storymaker)) if options.storymaker else demo_storymaker()
    if weights.missing:
        raise ValueError(f"{options.storymaker.name}: {weights.missing}")
    strengths = {"token_strength": options.token_strength, "lora_strength": options.lora_strength}
    return Characters(storymaker_of(weights), references, **strengths)


def _load(checkpoint: Path | None):
    if checkpoint is None:
        from .demo import demo_model

        return demo_model()
    from .checkpoint import load_checkpoint

    return load_checkpoint(checkpoint)


def save_pages(pages: Sequence[Image.Image], path: Path) -> list[Path]:
    """Save the first page at `path` and further pages beside it, numbered, each atomically. Returns their paths."""
    from ..models.files import write_whole

    kind = FORMATS[path.suffix.lower()]
    for page in pages:
        check_size(*page.size, kind)
    paths = [path, *(path.with_stem(f"{path.stem}_{number}") for number in range(2, len(pages) + 1))]
    for page, page_path in zip(pages, paths, strict=True):
        write_whole(page_path, encoded([page], kind))
    return paths


def check_output(path: Path) -> None:
    """Raise ValueError if a page cannot be saved at `path`, before time is spent on drawing."""
    folder = path.parent
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f'The page "{path}" must end in {", ".join(FORMATS)}.')
    if not folder.is_dir():
        raise ValueError(f'There is no folder "{folder}" for the page. Create it, or choose another with -o.')
    if path.is_dir() or not all(os.access(target, os.W_OK) for target in (folder, path) if target.exists()):
        raise ValueError(f'The page cannot be written to "{path}". Choose another path with -o.')


if __name__ == "__main__":
    sys.exit(main())
