"""The command-line options."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from .graph import DEMO_SETTINGS, PUBLISHED, Settings
from .prompts import DEMO_STORIES


def parse(arguments: Sequence[str] | None = None, description: str = "") -> argparse.Namespace:
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "python -m storyloom.benchmarks.consistory", description=description, formatter_class=shape
    )
    add = parser.add_argument
    add("--prompts", required=True, metavar="FILE", help="file of prompt sets in the published format, or: demo")
    add("--method", action="append", metavar="METHOD", help=f"see above; may be repeated (default {PUBLISHED})")
    add(
        "--only",
        action="append",
        default=[],
        metavar="SUPERCLASS",
        help="only sets of this superclass; may be repeated",
    )
    add("--limit", type=int, metavar="N", help=f"only the first N sets (default: all; of demo, {DEMO_STORIES})")
    add("--out", type=Path, metavar="DIR", help="output folder (default out/consistory/<prompts>-<checkpoint>)")
    add("--list", action="store_true", help="list the sets and exit")
    where = parser.add_argument_group("servers")
    add = where.add_argument
    add(
        "--server",
        action="append",
        default=[],
        metavar="URL",
        help="URL of a running ComfyUI with StoryLoom; may be repeated",
    )
    add("--local", type=int, metavar="N", help="ComfyUI servers to start here (default 1 without --server, else 0)")
    add("--comfyui", type=Path, metavar="DIR", help="ComfyUI to start (default: as make demo finds it)")
    add("--models", type=Path, metavar="DIR", help="models folder of servers started here (default: ComfyUI's own)")
    add("--ray", metavar="ADDRESS", help='Ray cluster to join, or "auto" (default: a cluster on this machine)')
    add("--no-ray", action="store_true", help="schedule several servers with threads instead of Ray")
    add("--retries", type=int, default=5, help="how often in a row a lost server is retried (default 5)")
    add("--patience", type=float, default=3600, metavar="SECONDS", help="longest time for one set (default 3600)")
    drawing = parser.add_argument_group("drawing (defaults: as published; in brackets with the demo model)")
    add = drawing.add_argument
    tiny, full = DEMO_SETTINGS, Settings()
    add("--checkpoint", metavar="NAME", help=f"checkpoint on the servers, or: demo (default {full.checkpoint})")
    add("--seed", type=int, help=f"seed for every set (default {full.seed}; stories of --prompts demo have their own)")
    add("--steps", type=int, help=f"({full.steps} [{tiny.steps}])")
    add("--width", type=int, help=f"({full.width} [{tiny.width}])")
    add("--height", type=int, help=f"({full.height} [{tiny.height}])")
    add("--cfg", type=float, help=f"({full.cfg:g})")
    add("--sampler", help=f"({full.sampler})")
    add("--scheduler", help=f"({full.scheduler} [{tiny.scheduler}])")
    add("--noise", choices=("same", "different"), help="same: all frames of a set start from the same noise (default)")
    add("--identity-weight", type=float, help=f"for IPCA ({full.identity_weight:g})")
    add("--sampling-rate", type=float, help=f"for CSA ({full.sampling_rate:g})")
    measures = parser.add_argument_group("measuring")
    add = measures.add_argument
    add("--no-metrics", action="store_true", help="draw without measuring")
    add("--metrics-only", action="store_true", help="measure the drawn sets again, without drawing")
    add("--clip-t", default="openai", metavar="FILE|TAG", help="weights of ViT-B/32 for CLIP-T (default openai)")
    add("--clip-i", default="openai", metavar="FILE|TAG", help="weights of ViT-B/16 for CLIP-I (default openai)")
    add("--dreamsim", type=Path, metavar="DIR", help="folder of DreamSim's weights")
    add("--download", action="store_true", help="download weights that are not in the cache")
    add("--device", default="cpu", help="device for measuring (default cpu)")
    options = parser.parse_args(arguments)
    if options.no_metrics and options.metrics_only:
        parser.error("use --no-metrics or --metrics-only, not both")
    if options.limit is not None and options.limit < 1:
        parser.error("--limit must be at least 1")
    options.shared_noise = None if options.noise is None else options.noise == "same"
    return options
