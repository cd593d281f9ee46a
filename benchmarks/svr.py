"""Time to reweight the prompt of a whole story, once per frame and text encoder.

    python -m storyloom.benchmarks.svr

Every mode edits random hidden states of both of SDXL's encoders (widths 768 and 1280) for each of the frames, as
"Encode story as one prompt" does; decompositions are in float64. The pack's own form uses the eigenvectors of a small
Gram matrix. For comparison, one thin SVD per call and one full SVD (as in the published code) run in the same process
on the same input, so that their ratio is more reliable than the times. The hidden states are as correlated as an
encoder's: all rows share a direction, and the end-of-text rows have little else. They are in float64, so that rounding
does not hide the difference between the forms. Times are medians, with the best of all runs: if other work keeps the
cores busy, prefer the best; `--threads 1` is steadier.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate, pairwise
from statistics import median
from unittest import mock

import torch
from torch import Tensor

from ..prompts import svr
from ..prompts.conditioning import ENCODER_WIDTHS, per_encoder
from ..prompts.tokens import StoryTokens
from .common import table

LENGTH = 77
NORM = 28.0
"""Norm of a token's hidden state in SDXL's encoders."""

Encode = Callable[[Tensor, StoryTokens], Tensor]


def story_tokens(frames: int, text: int) -> StoryTokens:
    """A story of `text` tokens; a fifth (or what the frames leave) is the identity."""
    identity = max(1, min(text // 5, text - frames))
    own = [(text - identity) // frames + (frame < (text - identity) % frames) for frame in range(frames)]
    starts = list(accumulate(own, initial=1 + identity))
    spans = tuple(range(a, b) for a, b in pairwise(starts))
    return StoryTokens(range(1, 1 + identity), spans, 1 + text, LENGTH)


def hidden_states(tokens: StoryTokens, seed: int = 0) -> Tensor:
    """Random rows [77, 2048] in float64 that share a direction in each encoder."""
    generator = torch.Generator().manual_seed(seed)

    def rows(width: int) -> Tensor:
        own = torch.full((LENGTH, 1), 0.7)
        own[tokens.eot :] = 0.1
        shared = torch.randn(width, generator=generator)
        mixed = (1 - own) * shared + own * torch.randn(LENGTH, width, generator=generator)
        return NORM * mixed / mixed.norm(dim=1, keepdim=True)

    return torch.cat([rows(width) for width in ENCODER_WIDTHS], dim=-1).double()


def reweight_rows_by_svd(
    hidden: Tensor, rows: Sequence[int], alpha: float, beta: float, *, full_matrices: bool
) -> Tensor:
    """`prompts.svr.reweight_rows` in its textbook form, with tokens as columns as published."""
    u, s, vh = torch.linalg.svd(hidden[rows].double().T, full_matrices=full_matrices)
    out = hidden.clone()
    out[rows] = (u[:, : len(s)] * (beta * s * torch.exp(-alpha * s)) @ vh).T.to(hidden.dtype)
    return out


def encode(hidden: Tensor, tokens: StoryTokens, mode: str) -> Tensor:
    """All frames' contexts [frames, 77, 2048] in one of the node's modes: svr, svr_eot, npr."""
    if mode == "npr":
        express = partial(svr.express_frame_naively, tokens=tokens)
    else:
        settings = svr.SVRSettings(eot="scale" if mode == "svr_eot" else "svr")
        express = partial(svr.express_frame, tokens=tokens, settings=settings)
    return torch.stack([per_encoder(hidden, partial(express, frame=frame)) for frame in range(len(tokens.frames))])


def timed(run: Callable[[], Tensor], repeats: int) -> tuple[list[float], Tensor]:
    """Seconds of each of `repeats` runs, and the last result."""
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        result = run()
        seconds.append(time.perf_counter() - began)
    return seconds, result


def measure(tokens: StoryTokens, repeats: int, slow_repeats: int) -> list[list[str]]:
    """Rows of the table: each mode with each form of the decomposition."""
    hidden = hidden_states(tokens)
    forms = (
        ("Gram matrix (StoryLoom)", svr.reweight_rows, repeats),
        ("thin SVD", partial(reweight_rows_by_svd, full_matrices=False), repeats),
        ("full SVD", partial(reweight_rows_by_svd, full_matrices=True), slow_repeats),
    )
    rows = []
    for mode in ("svr", "svr_eot"):
        encode(hidden, tokens, mode)
        own: tuple[list[float], Tensor] | None = None
        for name, form, count in forms:
            with mock.patch.object(svr, "reweight_rows", form):
                seconds, result = timed(partial(encode, hidden, tokens, mode), count)
            own = own or (seconds, result)
            difference = f"{(result - own[1]).abs().max().item():.1e}"
            rows.append([mode, name, *times(seconds, own[0]), difference])
    seconds, _ = timed(partial(encode, hidden, tokens, "npr"), repeats)
    return [*rows, ["npr", "(no decomposition)", *times(seconds, seconds), ""]]


def times(seconds: list[float], own: list[float]) -> list[str]:
    """Median and best in milliseconds, and the best relative to the best of `own`."""
    return [f"{median(seconds) * 1000:.0f}", f"{min(seconds) * 1000:.0f}", f"{min(seconds) / min(own):.1f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=10, help="frames of the story (default 10)")
    parser.add_argument("--tokens", type=int, default=75, help="tokens of the story's text, at most 75 (default 75)")
    parser.add_argument("--repeats", type=int, default=7, help="runs per form (default 7)")
    parser.add_argument("--slow-repeats", type=int, default=1, help="runs of the full SVD, 10 s each (default 1)")
    parser.add_argument("--threads", type=int, help="PyTorch threads (default: one per core)")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if not arguments.frames < arguments.tokens <= LENGTH - 2:
        parser.error(f"--tokens must be more than --frames and at most {LENGTH - 2}")

    tokens = story_tokens(arguments.frames, arguments.tokens)
    rows = measure(tokens, arguments.repeats, arguments.slow_repeats)
    end = tokens.length - tokens.eot
    print(f"{arguments.frames} frames, {arguments.tokens} tokens of text, {end} end-of-text rows, ", end="")
    print(f"{torch.get_num_threads()} thread(s)\n")
    print(table(["mode", "form", "median ms", "best ms", "ratio of best", "largest difference"], rows))


if __name__ == "__main__":
    main()
