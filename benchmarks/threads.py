"""Time of ComfyUI on a CPU by thread settings, on an idle machine and beside one process of the lowest priority.

    python -m storyloom.benchmarks.threads [--rounds 2] [--steps 3] [--limit 150]

Runs the template "Demo - Character from a Photo" on a real server, a new one for each setting: once to warm up, then
--rounds times on the idle machine and --rounds times beside a busy process. The table has the shortest times. Runs over
--limit are stopped. Needs an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from ..scripts import comfyui
from .common import table

WORKFLOW = Path(__file__).absolute().parent.parent / "workflows" / "api" / "Demo - Character from a Photo.json"
VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
TWO = {"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"}
SETTINGS: dict[str, dict[str, str]] = {
    "2 threads": TWO,
    "2, spin 10000": TWO | {"GOMP_SPINCOUNT": "10000"},
    "2, spin 4000": TWO | {"GOMP_SPINCOUNT": "4000"},
    "2, spin 1000": TWO | {"GOMP_SPINCOUNT": "1000"},
    "2, spin 100": TWO | {"GOMP_SPINCOUNT": "100"},
    "1 thread": {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
}


def seeded(workflow: Mapping[str, dict], seed: int, steps: int) -> dict[str, dict]:
    """The workflow with this number of steps and this seed, which avoids ComfyUI's cache."""
    chosen = {"seed": seed, "noise_seed": seed, "steps": steps}
    return {
        number: {**node, "inputs": node["inputs"] | {k: v for k, v in chosen.items() if k in node["inputs"]}}
        for number, node in workflow.items()
    }


def seconds(server: comfyui.Server, workflow: dict[str, dict], limit: float) -> float:
    """Time to draw a workflow; infinite if it is stopped at the limit."""
    began = time.monotonic()
    prompt = server.submit(workflow)
    try:
        server.wait(prompt, timeout=limit)
    except comfyui.PromptFailed:
        server.drop([prompt])
        return float("inf")
    return time.monotonic() - began


@contextmanager
def busy_process() -> Iterator[None]:
    """A process of the lowest priority that keeps one core busy."""
    process = subprocess.Popen([sys.executable, "-c", "import os\nos.nice(19)\nwhile True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def measured(setting: Mapping[str, str], rounds: int, steps: int, limit: float) -> tuple[float, float]:
    """Shortest times on a server with these environment variables: idle machine, and beside a busy process."""
    workflow = json.loads(WORKFLOW.read_text(encoding="utf-8"))
    others = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    seeds = iter(range(1, 2 + 2 * rounds))

    def shortest() -> float:
        return min(seconds(server, seeded(workflow, next(seeds), steps), limit) for _ in range(rounds))

    with comfyui.scratch("threads") as base, mock.patch.dict(os.environ, others | setting, clear=True):
        with comfyui.Server(comfyui.find_comfyui(), comfyui.pack_base(base), sys.executable) as server:
            seconds(server, seeded(workflow, next(seeds), steps), limit)
            quiet = shortest()
            with busy_process():
                return quiet, shortest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2, help="measured runs of each kind (default 2)")
    parser.add_argument("--steps", type=int, default=3, help="sampling steps (default 3)")
    parser.add_argument("--limit", type=float, default=150, help="time limit of a run in seconds (default 150)")
    parser.add_argument(
        "--setting", action="append", choices=SETTINGS, help="a setting to measure; may be repeated (default: all)"
    )
    options = parser.parse_args()
    rows = []
    for name in options.setting or SETTINGS:
        quiet, beside = measured(SETTINGS[name], options.rounds, options.steps, options.limit)
        rows.append([name, f"{quiet:.1f}", f"{beside:.1f}", f"{beside / quiet:.1f}"])
        print(f"{name}: {quiet:.1f} s, {beside:.1f} s beside a busy process", flush=True)
    print(f"\n{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the end")
    print(table(["threads", "quiet, s", "beside one, s", "ratio"], rows))


if __name__ == "__main__":
    try:
        main()
    except comfyui.FAILURES as error:
        sys.exit(str(error))
