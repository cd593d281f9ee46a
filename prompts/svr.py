"""Singular-value reweighting (SVR) of One-Prompt-One-Story (arXiv 2501.13554): express one frame of a story.

The frame to draw is expressed and every other frame is suppressed by scaling the singular values of their token rows,
each together with the end-of-text rows, in each text encoder separately.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .tokens import StoryTokens

EOT_SCALE = 0.9


@dataclass(frozen=True)
class SVRSettings:
    """Constants of SVR, as in the published code (the paper has the two betas swapped).

    A singular value s becomes beta * s * exp(-alpha * s): `weaken` for suppressed frames, `enhance` for the expressed.
    order  "weaken_first" as in the published code, or "enhance_first" as in the paper
    eot    "svr": the end-of-text rows are part of every decomposition; "scale": they are left out and multiplied by
           0.9 in every call instead (as in the published benchmark); "keep": they are left as they are

    The paper's appendix also compares two variants, which are off by default:
    suppress          "one_by_one": one decomposition after the other for each suppressed frame; "jointly": a single
                      decomposition of the rows of all suppressed frames
    enhance_identity  whether the identity's rows are enhanced together with those of the expressed frame, in the same
                      decomposition; then they differ from frame to frame
    """

    weaken_alpha: float = 0.01
    weaken_beta: float = 0.05
    enhance_alpha: float = -0.01
    enhance_beta: float = 1.0
    order: Literal["weaken_first", "enhance_first"] = "weaken_first"
    eot: Literal["svr", "scale", "keep"] = "svr"
    suppress: Literal["one_by_one", "jointly"] = "one_by_one"
    enhance_identity: bool = False


@dataclass(frozen=True)
class NPRSettings:
    """Factors of naive prompt reweighting: for the rows of the expressed frame, and for those of each other frame.

    The paper's NPR+ only enhances (suppress 1), its NPR- only suppresses (express 1).
    """

    express: float = 2.0
    suppress: float = 0.5


NPR = NPRSettings()


def reweight_rows(hidden: Tensor, rows: Sequence[int] | Tensor, alpha: float, beta: float) -> Tensor:
    """Scale the singular values of some token rows: s -> beta * s * exp(-alpha * s).

    hidden: [T, D] one encoder's hidden states; rows: [R] indices. Returns a new [T, D]; other rows are untouched.
    Singular-value reweighting, One-Prompt-One-Story (arXiv 2501.13554), equations 2 and 3. With A = hidden[rows] and
    A A' = V diag(s²) V' this is V diag(beta exp(-alpha s)) V' A: the [R, R] Gram matrix replaces the thin SVD of
    [R, D] and agrees with it to 1e-9. Computed in float64 on the CPU, since not every device supports it.
    """
    rows = torch.as_tensor(rows, dtype=torch.long, device=hidden.device)
    selected = hidden[rows].cpu().double()
    squared, v = torch.linalg.eigh(selected @ selected.T)
    s = squared.clamp(min=0).sqrt()
    out = hidden.clone()
    out[rows] = (v * (beta * torch.exp(-alpha * s)) @ (v.T @ selected)).to(hidden)
    return out


def express_frame(hidden: Tensor, tokens: StoryTokens, frame: int, settings: SVRSettings) -> Tensor:
    """Hidden states in which frame `frame` of the story is expressed and every other frame is suppressed.

    hidden: [T, D] one encoder's hidden states of the whole story; frame: index into `tokens.frames`. Returns a new
    [T, D] of the same dtype, rounded to it after every call as published. The start token's row is not changed, nor are
    those of the identity unless `enhance_identity` is set.
    """
    eot = list(range(tokens.eot, tokens.length))

    def reweight(h: Tensor, rows: list[int], alpha: float, beta: float) -> Tensor:
        if settings.eot == "svr":
            return reweight_rows(h, rows + eot, alpha, beta)
        h = reweight_rows(h, rows, alpha, beta)
        if settings.eot == "scale":
            h[eot] *= EOT_SCALE
        return h

    suppressed = [list(rows) for k, rows in enumerate(tokens.frames) if k != frame]
    if settings.suppress == "jointly" and suppressed:
        suppressed = [[row for rows in suppressed for row in rows]]
    expressed = [*(tokens.identity if settings.enhance_identity else ()), *tokens.frames[frame]]
    weaken = [(rows, settings.weaken_alpha, settings.weaken_beta) for rows in suppressed]
    enhance = [(expressed, settings.enhance_alpha, settings.enhance_beta)]
    out = hidden.cpu()
    for rows, alpha, beta in weaken + enhance if settings.order == "weaken_first" else enhance + weaken:
        out = reweight(out, rows, alpha, beta)
    return out.to(hidden)


def express_frame_naively(hidden: Tensor, tokens: StoryTokens, frame: int, settings: NPRSettings = NPR) -> Tensor:
    """Naive prompt reweighting (NPR), the paper's baseline (appendix B.1): the frame's rows times 2, the others' 0.5.

    hidden: [T, D]. Returns a new [T, D]; end-of-text and identity rows are not changed.
    """
    out = hidden.clone()
    for k, rows in enumerate(tokens.frames):
        out[list(rows)] *= settings.express if k == frame else settings.suppress
    return out
