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
"""What a page's file may end in -> its format."""


def main(arguments: list[str] | None = None) -> int:
    """Draw the page that the arguments ask for. Returns the exit code; faults are one sentence on stderr and code 1."""
    asked = _parser().parse_args(arguments)
    try:
        check_output(asked.output)
        check_packages()
        paths = save_pages(_draw(asked), asked.output)
    except (ValueError, OSError, ImportError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write("".join(f"{path}\n" for path in paths))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m storyloom.standalone", description="Draw a story page without ComfyUI."
    )
    parser.add_argument("identity", help='who the story is about: "a red fox in a blue coat"')
    parser.add_argument("frames", nargs="+", help='one picture each, without the identity: "asleep in the snow"')
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("page.png"), help="the page; further ones are page_2.png and so on"
    )
    parser.add_argument(
        "--method",
        default="svr+ipca",
        help="svr or svr-eot, with or without +ipca, ipca, csa, csa+svr+ipca, npr, none, frames",
    )
    parser.add_argument(
        "--checkpoint", type=Path, help="SDXL .safetensors file or diffusers folder (default: the demo)"
    )
    parser.add_argument("--style", default="", help='words around every frame: "watercolor of {prompt}"')
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument(
        "--cfg", type=float, default=5.0, help="how strictly the text is followed; 1 is without negative"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--width", type=int, help="pixels of a frame (default: the model's own)")
    parser.add_argument("--height", type=int)
    parser.add_argument("--identity-weight", type=float, default=2.0, help="how often the identity counts in IPCA")
    parser.add_argument("--sampling-rate", type=float, default=0.5, help="part of a frame that the others see in CSA")
    parser.add_argument("--anchors", type=int, default=0, help="first frames that all others look at in CSA (0: all)")
    parser.add_argument("--own-noise", action="store_true", help="start every frame from its own noise")
    parser.add_argument("--window", default="circular", help="for stories over 75 tokens: circular or trailing")
    page = parser.add_argument_group("page")
    page.add_argument("--layout", default="grid", help=f"{', '.join(LAYOUTS)} (default: grid)")
    page.add_argument("--columns", type=int, default=0, help="panels per row of the grid (default: near-square)")
    page.add_argument("--rows", default="2,1,3", help='panels in each row of the layout rows (default: "2,1,3")')
    page.add_argument("--panels-per-page", type=int, default=0, help="further ones go on to further pages")
    page.add_argument("--page-width", type=int, default=0, help="pixels (default: as wide as the panels need)")
    page.add_argument("--captions", default="below", help="below, over or none (default: below)")
    page.add_argument("--title", default="", help="printed above the first page's panels")
    page.add_argument("--direction", default="left_to_right", help="left_to_right or right_to_left")
    page.add_argument("--font", help="font file of captions and title (default: built in)")
    return parser


def page_style(asked: argparse.Namespace) -> PageStyle:
    """How the pages look. Raises ValueError for a choice that there is not."""
    choices = {"layout": LAYOUTS, "captions": (*CAPTION_PLACES, "none"), "direction": DIRECTIONS}
    for option, allowed in choices.items():
        if getattr(asked, option) not in allowed:
            raise ValueError(f'--{option} "{getattr(asked, option)}" is not one of {", ".join(allowed)}.')
    for option in ("columns", "panels_per_page", "page_width"):
        if getattr(asked, option) < 0:
            raise ValueError(f"--{option.replace('_', '-')} is {getattr(asked, option)}: 0 or more is needed.")
    return PageStyle(
        layout=asked.layout,
        columns=asked.columns,
        rows=asked.rows,
        panels_per_page=asked.panels_per_page,
        seed=asked.seed,
        page_width=asked.page_width,
        caption_place=asked.captions if asked.captions != "none" else "below",
        title=asked.title,
        direction=asked.direction,
        font=asked.font,
    )


def _draw(asked: argparse.Namespace) -> tuple[Image.Image, ...]:
    from ..prompts.script import parse_story
    from .pipeline import StoryPipeline, check_page, check_settings

    story = parse_story(asked.identity, "\n".join(asked.frames), asked.style)
    size = (asked.width or 64, asked.height or 64)
    check_settings(
        asked.method, asked.steps, *size, asked.identity_weight, 0, 1, asked.window, asked.sampling_rate, asked.anchors
    )
    captions, style = asked.captions != "none", page_style(asked)
    check_page(story, *size, captions, style)
    drawn = StoryPipeline(_load(asked.checkpoint))(
        asked.identity,
        asked.frames,
        asked.style,
        method=asked.method,
        steps=asked.steps,
        cfg=asked.cfg,
        seed=asked.seed,
        width=asked.width,
        height=asked.height,
        identity_weight=asked.identity_weight,
        sampling_rate=asked.sampling_rate,
        anchors=asked.anchors,
        shared_noise=not asked.own_noise,
        window=asked.window,
        captions=captions,
        page_style=style,
    )
    return drawn.pages


def _load(checkpoint: Path | None):
    if checkpoint is None:
        from .demo import demo_model

        return demo_model()
    from .checkpoint import load_checkpoint

    return load_checkpoint(checkpoint)


def save_pages(pages: Sequence[Image.Image], path: Path) -> list[Path]:
    """Save the first page at `path`, further ones beside it with a number, each whole. Returns where they lie."""
    from ..models.files import write_whole

    kind = FORMATS[path.suffix.lower()]
    for page in pages:
        check_size(*page.size, kind)
    paths = [path, *(path.with_stem(f"{path.stem}_{number}") for number in range(2, len(pages) + 1))]
    for page, place in zip(pages, paths, strict=True):
        write_whole(place, encoded([page], kind))
    return paths


def check_output(path: Path) -> None:
    """Raise ValueError when a page could not be saved there, so that nothing is drawn for nothing."""
    folder = path.parent
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f'The page "{path}" must end in {", ".join(FORMATS)}.')
    if not folder.is_dir():
        raise ValueError(f'There is no folder "{folder}" to save the page in. Create it, or choose another with -o.')
    if path.is_dir() or not all(os.access(place, os.W_OK) for place in (folder, path) if place.exists()):
        raise ValueError(f'The page cannot be written to "{path}". Choose another place with -o.')


if __name__ == "__main__":
    sys.exit(main())
