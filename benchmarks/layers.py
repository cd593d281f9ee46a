"""Memory and time of single self-attention layers of the full SDXL, without and with consistent self-attention.

    python -m storyloom.benchmarks.layers [--time]

Memory is counted exactly, on the meta device: the peak of live bytes in half precision during attention, excluding
queries, keys and values, with a fused kernel that allocates only its result (no kernel with a dense mask does). Times
are for float32 on this processor: the kinds of a layer take turns, and the shortest time of each is taken, since other
work on the machine can only lengthen it.
"""

from __future__ import annotations

import argparse
import time
import weakref
from collections.abc import Callable
from functools import partial
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..attention.consistent import ConsistentAttention
from ..runtime.call import KEY
from ..runtime.memory import Level
from .common import enter_comfyui, fused_attention, table
from .cost import CHANNELS, HALVINGS, NEGATIVE, POSITIVE, Case, Size, masked_replacement, patched_options, tokens_of

BLOCK_OF = {2: ("output", 3), 10: ("output", 0)}
"""Number of layers of a level -> one of its blocks."""

BATCHES = (4, 8, 16, 32)

Layer = Callable[[Tensor, Tensor, Tensor], Tensor]


class PeakMemory(TorchDispatchMode):
    """Counts live bytes, now and peak, of tensors created in this context on a device. given: tensors to exclude."""

    def __init__(self, device: str, *given: Tensor):
        super().__init__()
        self.device, self.given = device, {_storage(tensor) for tensor in given}
        self.holders: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.device.type == self.device:
                self._hold(tensor)
        return out

    def _hold(self, tensor: Tensor) -> None:
        storage, size = _storage(tensor), tensor.untyped_storage().nbytes()
        if storage in self.given:
            return
        if not self.holders.get(storage):
            self.now += size
            self.peak = max(self.peak, self.now)
        self.holders[storage] = self.holders.get(storage, 0) + 1
        weakref.finalize(tensor, self._drop, storage, size)

    def _drop(self, storage: int, size: int) -> None:
        self.holders[storage] -= 1
        if not self.holders[storage]:
            self.now -= size


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def layers(depth: int, size: Size, rate: float) -> dict[str, Layer]:
    """A self-attention layer of the level with `depth` layers: ordinary, with CSA, and with CSA as a dense mask."""
    from ..nodes.patching import attend

    options = patched_options(Case("", rate=rate), size.frames)
    ours = options["patches_replace"]["attn1"][BLOCK_OF[depth]]
    call_options = {
        "n_heads": CHANNELS[depth] // 64,
        "block": BLOCK_OF[depth],
        "block_index": 0,
        "cond_or_uncond": [NEGATIVE, POSITIVE],
        KEY: options[KEY],
    }
    return {
        "ordinary": lambda q, k, v: attend(q, k, v, call_options["n_heads"], None, call_options),
        "CSA": partial(ours, options=call_options),
        "CSA as a dense mask": partial(masked_replacement, options=call_options),
    }


def projected(depth: int, size: Size, **kind) -> list[Tensor]:
    """Queries, keys and values [rows, N, C] of negative and story."""
    shape = (2 * size.frames, tokens_of(depth, size), CHANNELS[depth])
    return [torch.empty(shape, **kind) for _ in range(3)]


def peak_bytes(layer: Layer, depth: int, size: Size) -> int:
    """Peak bytes of a layer in half precision, excluding q, k and v."""
    from comfy.ldm.modules import attention

    tensors = projected(depth, size, dtype=torch.float16, device="meta")
    kernel = mock.patch.multiple(attention, optimized_attention=_result, optimized_attention_masked=_result)
    with torch.no_grad(), kernel, PeakMemory("meta", *tensors) as memory:
        layer(*tensors)
    return memory.peak


def _result(q: Tensor, k: Tensor, v: Tensor, heads: int, **options) -> Tensor:
    """The allocation of a fused kernel; PyTorch has none for the meta device and would allocate the logits there."""
    return torch.empty_like(q)


def gathered_bytes(depth: int, size: Size, rate: float) -> int:
    """Bytes of the keys and values gathered in one layer for negative and story, in half precision."""
    tokens = tokens_of(depth, size)
    keys = tokens + (size.frames - 1) * int(rate * tokens)
    return 2 * 2 * 2 * size.frames * keys * CHANNELS[depth]


def by_batch(size: Size, rate: float) -> list[list[str]]:
    """By number of images, MiB that the largest layer gathers for one conditioning: all at once, and in parts."""
    levels = tuple(Level(CHANNELS[depth], HALVINGS[depth]) for depth in CHANNELS)
    patch = ConsistentAttention(rate, 0, 0, 0.0, 1.0, {}, seed=0, levels=levels)
    return [
        [
            f"{images}",
            *(f"{patch.gathers(None, images, (size.side,) * 2, 2, whole) / 2**20:.0f}" for whole in (True, False)),
        ]
        for images in BATCHES
    ]


def seconds(layer: Layer, depth: int, size: Size) -> float:
    tensors = [x.normal_() for x in projected(depth, size)]
    with torch.no_grad(), fused_attention():
        start = time.perf_counter()
        layer(*tensors)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=4, help="images in the batch (default 4)")
    parser.add_argument("--pixels", type=int, default=1024, help="side of the square images (default 1024)")
    parser.add_argument("--rate", type=float, default=0.5, help="sampling_rate (default 0.5)")
    parser.add_argument("--time", type=int, default=0, metavar="TURNS", help="also measure times, in this many turns")
    parser.add_argument("--threads", type=int, default=1, help="PyTorch threads (default 1, for steadier times)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    size = Size(arguments.frames, arguments.pixels // 8)
    version = enter_comfyui()

    rows = []
    for depth in CHANNELS:
        bound, kinds = gathered_bytes(depth, size, arguments.rate), layers(depth, size, arguments.rate)
        plain = peak_bytes(kinds["ordinary"], depth, size)
        turns = [{name: seconds(layer, depth, size) for name, layer in kinds.items()} for _ in range(arguments.time)]
        taken = {name: min(turn[name] for turn in turns) for name in kinds} if turns else {}
        for name, layer in kinds.items():
            extra = f"{(peak_bytes(layer, depth, size) - plain) / 2**20:.1f}" if name != "CSA as a dense mask" else ""
            times = [f"{taken[name]:.2f}", f"{taken[name] / taken['ordinary']:.2f}"] if taken else ["", ""]
            shape = f"{name}, {tokens_of(depth, size)} x {CHANNELS[depth]}"
            rows.append([shape, extra, f"{bound / 2**20:.1f}", *times])
    print(f"SDXL, {arguments.pixels} x {arguments.pixels}, {size.frames} frames with negative, ComfyUI {version}\n")
    print(table(["one layer", "extra MiB", "gathered K and V, MiB", "s", "ratio"], rows))
    print()
    print(table(["images", "K and V all at once, MiB", "as gathered, MiB"], by_batch(size, arguments.rate)))


if __name__ == "__main__":
    main()
