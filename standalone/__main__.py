"""Draw a story page from the command line: python -m storyloom.standalone "a red fox" "asleep" "reading" -o page.png"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from PIL import Image

from . import check_packages

FORMATS = (".png", ".jpg", ".jpeg", ".webp")


def main(arguments: list[str] | None = None) -> int:
    """Draw the page that the arguments ask for. Returns the exit code; faults are one sentence on stderr and code 1."""
    asked = _parser().parse_args(arguments)
    try:
        check_output(asked.output)
        check_packages()
        _draw(asked).save(asked.output)
    except (ValueError, OSError, ImportError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write(f"{asked.output}\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m storyloom.standalone", description="Draw a story page without ComfyUI."
    )
    parser.add_argument("identity", help='who the story is about: "a red fox in a blue coat"')
    parser.add_argument("frames", nargs="+", help='one picture each, without the identity: "asleep in the snow"')
    parser.add_argument("-o", "--output", type=Path, default=Path("page.png"), help="the page (default: page.png)")
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
    return parser


def _draw(asked: argparse.Namespace) -> Image.Image:
    from ..prompts.script import parse_story
    from .pipeline import StoryPipeline, check_settings

    parse_story(asked.identity, "\n".join(asked.frames), asked.style)
    size = (asked.width or 64, asked.height or 64)
    check_settings(
        asked.method, asked.steps, *size, asked.identity_weight, 0, 1, asked.window, asked.sampling_rate, asked.anchors
    )
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
    )
    return drawn.page


def _load(checkpoint: Path | None):
    if checkpoint is None:
        from .demo import demo_model

        return demo_model()
    from .checkpoint import load_checkpoint

    return load_checkpoint(checkpoint)


def check_output(path: Path) -> None:
    """Raise ValueError when a page could not be saved there, so that nothing is drawn for nothing."""
    folder = path.parent
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f'The page "{path}" must end in {", ".join(FORMATS)}.')
    if not folder.is_dir():
        raise ValueError(f'There is no folder "{folder}" to save the page in. Create it, or choose another with -o.')
    if path.is_dir() or not os.access(path if path.exists() else folder, os.W_OK):
        raise ValueError(f'The page cannot be written to "{path}". Choose another place with -o.')


if __name__ == "__main__":
    sys.exit(main())
