"""Muon: momentum with orthogonal steps, for matrices and convolution kernels."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .precision import working_dtype


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalised steps (Jordan et al. 2024), scaled to AdamW's size (arXiv 2502.16982, eq. 4).

    For matrices, and for kernels [out, in, h, w] as matrices [out, in * h * w], which torch.optim.Muon does not accept.
    A tiny UNet learns in about half as many steps as with AdamW.
    """

    def __init__(self, parameters, rate: float, momentum: float = 0.95, decay: float = 1e-3):
        super().__init__(parameters, {"lr": rate, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            by_shape: dict[tuple, list[tuple[Tensor, Tensor]]] = {}
            for parameter in (p for p in group["params"] if p.grad is not None):
                state = self.state[parameter]
                if not state:
                    state["mean"] = torch.zeros_like(parameter)
                mean = state["mean"]
                mean.lerp_(parameter.grad, 1 - group["momentum"])
                ahead = parameter.grad.lerp(mean, group["momentum"]).flatten(1)
                by_shape.setdefault(tuple(ahead.shape), []).append((parameter, ahead))
            for shape, pairs in by_shape.items():
                size = 0.2 * math.sqrt(max(shape)) * group["lr"]
                turns = orthogonal(torch.stack([ahead for _, ahead in pairs]))
                for (parameter, _), turn in zip(pairs, turns, strict=True):
                    parameter.mul_(1 - group["lr"] * group["decay"]).add_(turn.view_as(parameter), alpha=-size)


def orthogonal(matrices: Tensor) -> Tensor:
    """Approximately the nearest orthogonal matrices [N, m, n]: five Newton-Schulz iterations (order 5).

    bfloat16 is enough for them, see `working_dtype`.
    """
    x = matrices.to(working_dtype(matrices.device))
    x = x.mT if (tall := x.shape[1] > x.shape[2]) else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return (x.mT if tall else x).to(matrices.dtype)
