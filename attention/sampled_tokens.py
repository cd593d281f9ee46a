"""The tokens that images share in one step, sampled on the CPU and copied to the device once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor


class SampledTokens:
    """The samples of one step for images of one size, on one device, used by one thread.

    `renew` samples again for a later step before its UNet call.
    """

    def __init__(self, sample: Callable[[int, int], Tensor], device: torch.device):
        """sample(step, image): token numbers [n] on the CPU, any number of them."""
        self._sample, self._device = sample, device
        self._step: int | None = None
        self._tokens: dict[int, Tensor] = {}

    def of(self, step: int, images: Iterable[int]) -> dict[int, Tensor]:
        """Tokens of at least these images, by image number; those of another step are dropped."""
        if step != self._step:
            self._step, self._tokens = step, {}
        missing = [image for image in dict.fromkeys(images) if image not in self._tokens]
        if missing:
            sampled = copied([self._sample(step, image) for image in missing], self._device)
            self._tokens |= zip(missing, sampled, strict=True)
        return self._tokens

    def renew(self, step: int) -> None:
        """Sample for another step the tokens of the same images as in the last one."""
        self.of(step, list(self._tokens))


def copied(parts: Sequence[Tensor], device: torch.device) -> Sequence[Tensor]:
    """CPU tensors [n] on a device, in a single copy; asynchronous on a CUDA card."""
    together = torch.cat(list(parts))
    if device.type == "cuda":
        together = together.pin_memory().to(device, non_blocking=True)
    return together.to(device).split([len(part) for part in parts])
