"""How far rounding alone may carry a result: bounds that are measured, for any processor.

Two ways to compute the same differ by rounding, and by how much depends on the processor: the width of its vectors
orders the sums. In double precision that is far below 1e-9. Where the code under test works in single or half
precision by nature, a test takes its bound from the computation itself: the same reference, with every input moved by
one unit in the last place.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

LAST_PLACES = 4
"""A bound is at least this many units in the last place of the largest result: moved inputs can round to the same."""


def moved(tensor: Tensor, seed: int = 0) -> Tensor:
    """Every element of a floating-point tensor, moved by one unit in the last place, up or down by a seeded sign."""
    up = torch.rand(tensor.shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    far = torch.full_like(tensor, torch.inf)
    return torch.nextafter(tensor, torch.where(up.to(tensor.device), far, -far))


def rounding(reference: Callable, *inputs, factor: float = 16) -> float:
    """How far a result may be from `reference(*inputs)` if nothing but rounding is between them.

    `reference` gives a tensor or a sequence of tensors. The floating-point tensors among the inputs are moved, each
    with signs of its own; everything else is handed on. Returns the largest absolute difference that this makes in any
    element of any result, times `factor`; at least a few units in the last place of the largest result.
    Raises ValueError where nothing could be measured: no tensor among the inputs, a result that is zero or no number.
    """
    others = [moved(x, seed) if _floats(x) else x for seed, x in enumerate(inputs)]
    if not any(_floats(x) for x in inputs):
        raise ValueError("None of the inputs is a floating-point tensor: there is nothing to move.")
    pairs = list(zip(_tensors(reference(*inputs)), _tensors(reference(*others)), strict=True))
    largest = max(float(each.detach().double().abs().max()) for pair in pairs for each in pair)
    if not 0 < largest < float("inf"):
        raise ValueError(f"The largest result is {largest}: rounding cannot be measured on it.")
    difference = max(float((a.detach().double() - b.detach().double()).abs().max()) for a, b in pairs)
    last_place = max(torch.finfo(a.dtype).eps for a, _ in pairs)
    return max(factor * difference, LAST_PLACES * last_place * largest)


def _floats(value) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _tensors(result: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)
