"""One sampling step of the full SDXL on a graphics card: unpatched, with StoryLoom, and in the published forms.

    python benchmarks/gpu.py --comfyui DIR --json FILE
    python -m storyloom.benchmarks.gpu --comfyui DIR --json FILE

Needs no internet and no checkpoint: weights and texts are random. Four frames of 1024 x 1024 with guidance are sampled
by the ComfyUI in DIR. Each row first runs once for memory, synchronisations and operations; then the rows are timed in
turns, forwards and backwards, and the median is taken. FILE and a Markdown page (FILE with .md) are rewritten after
every row, so a stopped run loses nothing. `--minutes` limits the rounds, never the rows; `--tiny` runs tiny networks on
the CPU. The exit code is 1 if a row failed.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from contextlib import ExitStack
from pathlib import Path

BEGAN = time.monotonic()
MINUTES = 8.0
FRAMES = 4
DTYPES, TINY_DTYPES = ("float16", "bfloat16"), ("float32",)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", type=Path, help="ComfyUI folder (default: as the demo finds it)")
    parser.add_argument("--json", type=Path, required=True, help="file for the results; the page is written beside it")
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"time for the whole run (default {MINUTES:g})")
    parser.add_argument("--rounds", type=int, default=100, help="maximum rounds per dtype (default 100)")
    parser.add_argument("--dtypes", nargs="+", help=f"default {' '.join(DTYPES)}, tiny {TINY_DTYPES[0]}")
    parser.add_argument("--tiny", action="store_true", help="tiny networks on the CPU, as a smoke test")
    options = parser.parse_args(arguments)

    from .common import enter_comfyui

    version = enter_comfyui(options.comfyui, cpu=options.tiny)
    import torch

    if not options.tiny and not torch.cuda.is_available():
        parser.error("PyTorch finds no CUDA card; use --tiny to run on the CPU.")
    return benchmark(options, version)


def benchmark(options: argparse.Namespace, version: str) -> int:
    """Measure all rows and write the results; ComfyUI must be importable. Returns the exit code."""
    import torch

    from .card.model import FULL, TINY
    from .card.run import Run, about
    from .common import fused_attention

    device = torch.device("cpu" if options.tiny else "cuda:0")
    scale = TINY if options.tiny else FULL
    dtypes = options.dtypes or (TINY_DTYPES if options.tiny else DTYPES)
    end = BEGAN + 60 * options.minutes
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        if options.tiny:
            stack.enter_context(fused_attention())
        run = Run(options.json, about(device, version, scale, FRAMES), device, scale, FRAMES)
        for number, dtype in enumerate(dtypes):
            share = (end - time.monotonic()) / (len(dtypes) - number)
            run.measure(getattr(torch, dtype), time.monotonic() + share, options.rounds)
    run.write(complete=True)
    print(run.page())
    return 1 if run.failed else 0


def as_package() -> str:
    """Make the pack importable as `storyloom` from any folder name. Returns this file's package."""
    root = Path(__file__).resolve().parents[1]
    if importlib.util.find_spec("storyloom") is None:
        spec = importlib.util.spec_from_file_location(
            "storyloom", root / "__init__.py", submodule_search_locations=[str(root)]
        )
        sys.modules["storyloom"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["storyloom"])
    return "storyloom.benchmarks"


if __name__ == "__main__":
    if not __package__:
        sys.path.pop(0)
        __package__ = as_package()
    sys.exit(main())
