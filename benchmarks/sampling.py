"""Whole sampling runs of a story, with IPCA and without, side by side in one process.

    python -m storyloom.benchmarks.sampling

The demo model (SDXL's blocks and depths with few channels) samples a four-frame story with SVR through ComfyUI's own
sampling function. Unpatched and patched runs alternate, and the ratio of each pair is taken, so that other work on the
machine affects both alike; processor time is hardly affected. The networks are so small that this measures overhead
more than arithmetic: with a real SDXL the ratio is closer to that of `benchmarks.cost`. Also counted: UNet calls, and
what a run leaves behind (tensors, their bytes, and bytes of Python objects by tracemalloc, which vary by a few kB).
"""

from __future__ import annotations

import argparse
import gc
import time
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch

from ..prompts.script import parse_story
from .common import enter_comfyui, fused_attention, table

IDENTITY = "a red fox in a blue coat"
FRAMES = "asleep in the snow\nreading on a train\ndrinking tea\nlooking at the stars"


@dataclass(frozen=True)
class Alive:
    """Live objects after a garbage collection: number of tensors, bytes of their storages, bytes of Python objects."""

    tensors: int
    bytes: int
    python: int


def alive() -> Alive:
    """Count the tensors of this process; a storage that several tensors share counts once."""
    gc.collect()
    tensors = [item for item in gc.get_objects() if issubclass(type(item), torch.Tensor)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return Alive(len(tensors), sum(storages.values()), tracemalloc.get_traced_memory()[0])


def story_conditionings() -> tuple[list, list]:
    """Positive (SVR, one row per frame) and all-zero negative of the story, from the demo model's encoders."""
    from ..nodes.conditioning import EncodeOnePrompt
    from ..nodes.demo import build_clip

    settings = {"reweighting": "svr", "pooled": "full", "literal": False, "order": "weaken_first"}
    constants = {"weaken_alpha": 0.01, "weaken_beta": 0.05, "enhance_alpha": -0.01, "enhance_beta": 1.0}
    story = parse_story(IDENTITY, FRAMES)
    ((context, info),) = EncodeOnePrompt.execute(build_clip(), story, **settings, **constants).args[0]
    zero_info = {"pooled_output": torch.zeros_like(info["pooled_output"])}
    return [[context, info]], [[torch.zeros_like(context), zero_info]]


def sampler(model, steps: int, cfg: float, name: str, pixels: int) -> Callable[[], torch.Tensor]:
    """A function that samples the story once with `model` and returns the latents."""
    import comfy.sample

    positive, negative = story_conditionings()
    latents = torch.zeros(len(positive[0][0]), 4, pixels // 8, pixels // 8)
    noise = comfy.sample.prepare_noise(latents, 7)

    def sample() -> torch.Tensor:
        arguments = (steps, cfg, name, "normal", positive, negative, latents)
        return comfy.sample.sample(model, noise, *arguments, disable_pbar=True, seed=7)

    return sample


def seconds(run: Callable[[], torch.Tensor]) -> tuple[float, float]:
    """Seconds of one run: wall-clock time and processor time."""
    began = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - began[0], time.process_time() - began[1]


def interleaved(plain: Callable[[], torch.Tensor], patched: Callable[[], torch.Tensor], pairs: int) -> list[tuple]:
    """`seconds` of (plain, patched) in every pair; the order of the two alternates."""
    measured = []
    for pair in range(pairs):
        if pair % 2:
            second, first = seconds(patched), seconds(plain)
        else:
            first, second = seconds(plain), seconds(patched)
        measured.append((first, second))
    return measured


def time_row(name: str, pairs: Sequence[tuple[float, float]]) -> list[str]:
    """Median milliseconds of both sides, and the median ratio of the pairs with its range."""
    ratios = sorted(second / first for first, second in pairs)
    milliseconds = [f"{median(column) * 1000:.0f}" for column in zip(*pairs, strict=True)]
    return [name, *milliseconds, f"{median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})"]


def count_calls(unet: torch.nn.Module, run: Callable[[], torch.Tensor]) -> int:
    """Number of UNet calls in one run."""
    calls = []
    hook = unet.register_forward_pre_hook(lambda *_: calls.append(None))
    run()
    hook.remove()
    return len(calls)


def left_behind(run: Callable[[], torch.Tensor]) -> Alive:
    """Live objects that one run adds, after a first run that may fill caches."""
    tracemalloc.start()
    run()
    before = alive()
    run()
    after = alive()
    tracemalloc.stop()
    return Alive(after.tensors - before.tensors, after.bytes - before.bytes, after.python - before.python)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=8, help="alternating pairs of runs (default 8)")
    parser.add_argument("--steps", type=int, default=3, help="steps of a run (default 3)")
    parser.add_argument("--cfg", type=float, default=5.0, help="guidance scale; 1 skips the negative (default 5)")
    parser.add_argument("--sampler", default="euler", help="ComfyUI's name for the sampler (default euler)")
    parser.add_argument("--pixels", type=int, default=128, help="side of the square images (default 128)")
    parser.add_argument("--weight", type=float, default=2.0, help="IPCA's identity_weight (default 2)")
    parser.add_argument("--threads", type=int, default=1, help="PyTorch threads (default 1, for steadier times)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    version = enter_comfyui()

    from ..attention.identity import IdentityPreserving
    from ..nodes.demo import build_model
    from ..nodes.patching import attend, blocks_of
    from ..runtime.sampling import with_patch

    model = build_model()
    patch = IdentityPreserving(arguments.weight, 0.0, 1.0, blocks_of(model, "all"))
    settings = (arguments.steps, arguments.cfg, arguments.sampler, arguments.pixels)
    plain, patched = sampler(model, *settings), sampler(with_patch(model, patch, attend), *settings)

    unet = model.get_model_object("diffusion_model")
    with fused_attention():
        difference = (plain() - patched()).abs().max().item()
        calls = count_calls(unet, plain), count_calls(unet, patched)
        pairs = interleaved(plain, patched, arguments.pairs)
        left = left_behind(plain), left_behind(patched)

    print(f"Demo model, {len(FRAMES.splitlines())} frames of {arguments.pixels} x {arguments.pixels}, ", end="")
    print(f"{arguments.steps} steps of {arguments.sampler}, cfg {arguments.cfg:g}, ComfyUI {version}, ", end="")
    print(f"{torch.get_num_threads()} thread(s), {arguments.pairs} pairs of runs\n")
    rows = [
        ["calls of the UNet", *map(str, calls), f"{calls[1] / calls[0]:g}"],
        time_row("median ms by the clock", [(first[0], second[0]) for first, second in pairs]),
        time_row("median ms of processor time", [(first[1], second[1]) for first, second in pairs]),
        ["tensors left behind", *(str(each.tensors) for each in left), ""],
        ["bytes left behind in tensors", *(str(each.bytes) for each in left), ""],
        ["bytes left behind in Python objects", *(str(each.python) for each in left), ""],
    ]
    print(table(["one run", "unpatched", f"IPCA weight {arguments.weight:g}", "ratio"], rows))
    print(f"\nThe latents of the two differ by up to {difference:.3g}: the patch acts.")


if __name__ == "__main__":
    main()
