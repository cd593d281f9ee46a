"""What settings of threads cost small models on a CPU, on a quiet machine and beside one process of low priority.

    python -m storyloom.benchmarks.threads [--rounds 5] [--steps 3]

The operations are as many and as small as those of the demo model's UNet with four frames and a negative. Each setting
has a process of its own, and all of them wait while one works. They take turns in every round, first with nothing
beside them and then beside one busy process at the lowest priority; medians are shown. Run it on a quiet machine: what
else runs is in the first column.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

if __package__:
    from .common import table
else:  # a process that only works needs nothing of the pack
    table = None

LEVELS = ((32, 32, 0), (64, 16, 2), (128, 8, 10))
"""Channels, side of the latent, transformer layers: the demo model's levels at 256 x 256."""
IMAGES, WORDS, WIDTH = 8, 77, 2048
OURS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
SETTINGS: dict[str, dict[str, str]] = {
    "default": {},
    "1 thread": {"OMP_NUM_THREADS": "1"},
    "2 threads": {"OMP_NUM_THREADS": "2"},
    "spin 100": {"GOMP_SPINCOUNT": "100"},
    "spin 1000": {"GOMP_SPINCOUNT": "1000"},
    "spin 10000": {"GOMP_SPINCOUNT": "10000"},
    "passive": {"OMP_WAIT_POLICY": "passive"},
}


def make_step():
    """A function that computes the operations of one UNet call."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    torch.manual_seed(0)
    words = torch.randn(IMAGES, WORDS, WIDTH)

    def attend(q, k, v):
        heads = [x.unflatten(2, (2, -1)).transpose(1, 2) for x in (q, k, v)]
        return F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)

    def layer(width):
        sizes = [(width, 3 * width), (width, width), (width, width), (WIDTH, 2 * width), (width, width)]
        inner = nn.ModuleList(nn.Linear(*size) for size in [*sizes, (width, 4 * width), (4 * width, width)])

        def run(x):
            normed = F.layer_norm(x, x.shape[-1:])
            x = x + inner[1](attend(*inner[0](normed).chunk(3, 2)))
            normed = F.layer_norm(x, x.shape[-1:])
            x = x + inner[4](attend(inner[2](normed), *inner[3](words).chunk(2, 2)))
            return x + inner[6](F.gelu(inner[5](F.layer_norm(x, x.shape[-1:]))))

        return run

    def level(width, side, depth):
        convolutions = [nn.Conv2d(width, width, 3, padding=1) for _ in range(6)]
        layers, start = [layer(width) for _ in range(3 * depth)], torch.randn(IMAGES, width, side, side)

        def run():
            x = start
            for convolution in convolutions:
                x = x + convolution(F.silu(F.group_norm(x, 8)))
            x = x.flatten(2).transpose(1, 2)
            for one in layers:
                x = one(x)

        return run

    levels = [level(*sizes) for sizes in LEVELS]

    def step():
        with torch.inference_mode():
            for run in levels:
                run()

    return step


def work() -> None:
    """Compute as many steps as each line says, and answer with their seconds."""
    step = make_step()
    step()
    print("ready", flush=True)
    for line in sys.stdin:
        began = time.perf_counter()
        for _ in range(int(line)):
            step()
        print(time.perf_counter() - began, flush=True)


class Worker:
    """A process with a setting."""

    def __init__(self, setting: dict[str, str]):
        environment = {name: value for name, value in os.environ.items() if name not in OURS} | setting
        command = [sys.executable, str(Path(__file__).resolve()), "--work"]
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        self.process.stdout.readline()

    def seconds(self, steps: int) -> float:
        self.process.stdin.write(f"{steps}\n")
        return float(self.process.stdout.readline())

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


@contextmanager
def busy(count: int, niceness: int) -> Iterator[None]:
    """So many processes beside this one that never rest."""
    command = [sys.executable, "-c", f"import os\nos.nice({niceness})\nwhile True: pass"]
    processes = [subprocess.Popen(command) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def measured(settings: Sequence[str], rounds: int, steps: int) -> dict[str, tuple[list[float], list[float]]]:
    """Setting -> seconds of a step in each round, quiet and beside a busy process."""
    found = {name: ([], []) for name in settings}
    with ExitStack() as stack:
        workers = {}
        for name in settings:
            workers[name] = Worker(SETTINGS[name])
            stack.callback(workers[name].end)
        for _ in range(rounds):
            for place, others in enumerate((0, 1)):
                with busy(others, 19):
                    for name, worker in workers.items():
                        found[name][place].append(worker.seconds(steps) / steps)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="turns of each setting (default 5)")
    parser.add_argument("--steps", type=int, default=3, help="UNet calls of a turn (default 3)")
    parser.add_argument("--setting", action="append", choices=SETTINGS, help="one of them, again for more (all)")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        return work()
    names = options.setting or list(SETTINGS)
    medians = {
        name: [statistics.median(times) for times in both]
        for name, both in measured(names, options.rounds, options.steps).items()
    }
    best = min(quiet for quiet, _ in medians.values())
    rows = [
        [name, f"{1000 * quiet:.0f}", f"{quiet / best:.2f}", f"{1000 * beside:.0f}", f"{beside / quiet:.2f}"]
        for name, (quiet, beside) in medians.items()
    ]
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the end, ms a step")
    print(table(["setting", "quiet", "to the best", "beside one", "ratio"], rows))


if __name__ == "__main__":
    main()
