"""The interface of image and text encoders, and what their loaders share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

BATCH = 16
"""Images or texts per network call."""
AGAIN = "download it again, or choose another"


class SimilarityError(ValueError):
    """An encoder is not available. The message is one sentence for the user."""


class Encoder(Protocol):
    """Encodes images and texts into one feature space.

    name: for reports. May also have image_label, text_label, conventions and images_for, see
    `measures.measuring.measure`.
    """

    name: str

    def images(self, pictures: Tensor) -> Tensor:
        """Features [N, D], float32 on the CPU, of images [N, H, W, 3] in 0..1."""

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Features [N, D], float32 on the CPU, of N texts."""


def reason(error: Exception) -> str:
    """The first line of an error's message without its full stop, or the error's type."""
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
