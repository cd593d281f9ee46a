"""Similarity of the demo model's images to each other and to their texts, read exactly and without a network.

It has the interface of a CLIP encoder, but its features come from the story world's reader:

* `images`: for each species and each value of a look (fur, shirt, trousers, hat), the number of figures that have it.
  The cosine of two images with one figure each is the share of these five attributes in which they agree.
* `texts`: one-hot of everything that a text specifies: place, action and prop (by default standing, none), and the
  species and the named looks of each figure.
* `images_for`: one-hot of the same attributes as shown in an image; figures are matched by `world.measures.match`, and
  a missing figure shows none of them. The cosine with `texts` is the share of specified attributes that are shown;
  looks that the text leaves open are not counted.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ...world.captions import FigureCaption, FrameCaption
from ...world.measures import match
from ...world.parsing import parse_frame, parse_identity
from ...world.reader import Reader
from ...world.scene import ACTIONS, LOOKS, PLACES, PROPS, SPECIES, Figure, Scene

log = logging.getLogger(__name__)

FIGURES = 2
"""Most figures in an image."""
NOT_SHOWN = "not shown"
SEEN = {"place": PLACES, "action": ACTIONS, "prop": PROPS}
WORN = {"species": SPECIES, **LOOKS}

Caption = tuple[FrameCaption, tuple[FigureCaption, ...]]


class DemoReader:
    """An Encoder for the demo model's images, squares of a multiple of 24 pixels, and for its vocabulary."""

    name = "demo reader"
    image_label = "Same figures (demo reader)"
    text_label = "Shown as told (demo reader)"
    conventions = ("cosine",)

    def __init__(self) -> None:
        self._reader = Reader()

    def images(self, pictures: Tensor) -> Tensor:
        """Features [N, 28] of images [N, S, S, 3] in 0..1: how many figures have each value of WORN."""
        rows = []
        for scene in self._scenes(pictures):
            rows.append(
                [
                    sum(getattr(figure, name) == value for figure in scene.figures)
                    for name, values in WORN.items()
                    for value in values
                ]
            )
        return torch.tensor(rows, dtype=torch.float32)

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Features [N, D] of the texts; nan for a text that is not understood, which is logged as a warning."""
        captions = [parsed(text) for text in texts]
        unknown = [text for text, caption in zip(texts, captions, strict=True) if caption is None]
        if unknown:
            log.warning("Demo similarity does not understand: %s. These frames are not counted.", "; ".join(unknown))
        return torch.stack([_features(_attributes(caption)) for caption in captions])

    def images_for(self, pictures: Tensor, texts: Sequence[str]) -> Tensor:
        """Features [N, D] of each image, restricted to the attributes in its text; nan if that is not understood."""
        rows = []
        for scene, text in zip(self._scenes(pictures), texts, strict=True):
            caption = parsed(text)
            rows.append(_features({} if caption is None else _shown(scene, caption)))
        return torch.stack(rows)

    def _scenes(self, pictures: Tensor) -> list[Scene]:
        try:
            return [
                reading.scene for reading in self._reader.read_all(pictures[..., :3].float().cpu().numpy().clip(0, 1))
            ]
        except ValueError as error:
            raise ValueError(
                f"Demo similarity reads only images from the Demo model ({error}) For other images, connect Load "
                "OpenCLIP or a CLIP_VISION."
            ) from error


def parsed(text: str) -> Caption | None:
    """The frame and the figures that a whole prompt describes, or None if it is not understood.

    Characters are joined by "and", as in a story script.
    """
    frame = parse_frame(text)
    people: list[str] = []
    for piece in re.split(r"\band\b", text):
        if people and None in (parse_identity(piece), parse_identity(people[-1])):
            people[-1] += f" and {piece}"
        else:
            people.append(piece)
    figures = tuple(parse_identity(words) for words in people)
    if frame is None or None in figures or not 1 <= len(figures) <= FIGURES:
        return None
    return frame, figures


def _attributes(caption: Caption | None) -> dict[str, str]:
    """The attributes in a caption by slot: "place" -> "snow", "species 0" -> "fox"."""
    if caption is None:
        return {}
    frame, figures = caption
    attributes = {name: getattr(frame, name) for name in SEEN}
    for number, who in enumerate(figures):
        attributes |= {f"{name} {number}": value for name, value in {"species": who.species, **who.looks}.items()}
    return attributes


def _shown(scene: Scene, caption: Caption) -> dict[str, str]:
    """The attributes of a scene in the slots of a caption."""
    figures: tuple[Figure | None, ...] = match(caption[1], scene.figures)
    shown = {}
    for slot in _attributes(caption):
        name, _, number = slot.partition(" ")
        if not number:
            shown[slot] = getattr(scene, name)
        else:
            figure = figures[int(number)]
            shown[slot] = NOT_SHOWN if figure is None else getattr(figure, name)
    return shown


def _features(attributes: dict[str, str]) -> Tensor:
    """One-hot of attributes by slot; zeros for other slots; nan if there are no attributes."""
    slots = dict(SEEN) | {f"{name} {number}": values for number in range(FIGURES) for name, values in WORN.items()}
    row = [attributes.get(slot) == value for slot, values in slots.items() for value in (*values, NOT_SHOWN)]
    return torch.from_numpy(np.array(row, np.float32) if attributes else np.full(len(row), np.nan, np.float32))
