"""Tokens that images show to others in one step, drawn on the CPU and copied to the device once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor


class DrawnTokens:
    """The draws of one step for images of one size, on one device, which one thread works on.

    A UNet call of a later step finds them there: `renew` draws them again before it.
    """

    def __init__(self, draw: Callable[[int, int], Tensor], device: torch.device):
        """draw(step, image): token numbers [n] on the CPU, as many as it likes."""
        self._draw, self._device = draw, device
        self._step: int | None = None
        self._tokens: dict[int, Tensor] = {}

    def of(self, step: int, images: Iterable[int]) -> dict[int, Tensor]:
        """Tokens of at least these images, by their numbers; those of another step are forgotten."""
        if step != self._step:
            self._step, self._tokens = step, {}
        missing = [image for image in dict.fromkeys(images) if image not in self._tokens]
        if missing:
            drawn = copied([self._draw(step, image) for image in missing], self._device)
            self._tokens |= zip(missing, drawn, strict=True)
        return self._tokens

    def renew(self, step: int) -> None:
        """Draw for another step what was drawn for the last one."""
        self.of(step, list(self._tokens))


def copied(parts: Sequence[Tensor], device: torch.device) -> Sequence[Tensor]:
    """Tensors [n] of the CPU on a device, in a single copy; a CUDA card makes it while the program goes on."""
    together = torch.cat(list(parts))
    if device.type == "cuda":
        together = together.pin_memory().to(device, non_blocking=True)
    return together.to(device).split([len(part) for part in parts])
