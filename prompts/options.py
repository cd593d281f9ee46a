"""The dict of a story's conditioning, which checks the number of images when a host encodes it for the UNet.

A conditioning with more rows than a batch has images is cut by ComfyUI, and one with fewer is repeated: without this
check, frames would silently be drawn as others.
"""

from __future__ import annotations

from collections import OrderedDict
from copy import deepcopy
from typing import Any

from torch import Tensor

from .conditioning import StoryCond
from .tag import story_of

NOISE = "noise"
"""Key under which ComfyUI stores the noise of the whole batch [images, ...] in a copy of every conditioning's dict.

It does so once per run, before it encodes the conditioning for the UNet (`comfy.samplers.encode_model_conds`).
"""


class StoryOptions(dict):
    """The dict of a story's conditioning; its copies check too.

    It holds only plain values and is pickled as an OrderedDict, so that `torch.load(weights_only=True)` reads it. A
    loaded conditioning therefore has an ordinary dict, and is not checked.
    """

    def __setitem__(self, key: str, value: Any) -> None:
        """Raises ValueError for noise of another number of images than the story has frames."""
        if key == NOISE and isinstance(value, Tensor) and (story := story_of(self)) is not None:
            check_batch(story, value.shape[0])
        super().__setitem__(key, value)

    def copy(self) -> StoryOptions:
        return StoryOptions(self)

    __copy__ = copy

    def __deepcopy__(self, memo: dict) -> StoryOptions:
        return StoryOptions(deepcopy(dict(self), memo))

    def __reduce_ex__(self, protocol: int) -> tuple:
        return OrderedDict, (), None, None, iter(self.items())


def check_batch(story: StoryCond, images: int) -> None:
    """Raises ValueError when a batch does not have as many images as the story has frames."""
    if len(story.rows) != images:
        raise ValueError(
            f"The story has {_counted(len(story.rows), 'frame')} but the latent batch has {_counted(images, 'image')}. "
            'Use "Empty story latent" with this story connected, or a latent batch with one image per frame.'
        )


def _counted(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"
