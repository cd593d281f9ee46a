"""How alike the demo model's pictures are and whether they show what their text says, read exactly: no network.

As an encoder it has the form of a CLIP, but its numbers are shares of what the story world's reader sees:

* `images`: for each species and each value of a look (fur, shirt, trousers, hat) the number of figures that have it.
  The cosine of two pictures of one figure each is the share of these five attributes in which they agree.
* `texts`: one-hot of everything that a text tells: place, action and prop (what no word names: standing, none), and the
  species and the named looks of each figure.
* `images_for`: one-hot of what a picture shows of exactly that; figures are matched as `world.measures.match` does, and
  a figure that is not there shows nothing of it. The cosine with `texts` is the share of what was told that is shown:
  looks that the text leaves open have no say.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ...world.hearing import hear_frame, hear_identity
from ...world.measures import match
from ...world.reader import Reader
from ...world.scene import ACTIONS, LOOKS, PLACES, PROPS, SPECIES, Figure, Scene
from ...world.words import FigureTold, FrameTold

log = logging.getLogger(__name__)

FIGURES = 2
"""Most figures of a picture."""
NOT_SHOWN = "not shown"
SEEN = {"place": PLACES, "action": ACTIONS, "prop": PROPS}
WORN = {"species": SPECIES, **LOOKS}

Told = tuple[FrameTold, tuple[FigureTold, ...]]


class DemoReader:
    """An Encoder for the demo model's pictures, squares of a multiple of 24 pixels, and the words that it knows."""

    name = "demo reader"
    image_label = "Same figures (demo reader)"
    text_label = "Shown as told (demo reader)"
    conventions = ("cosine",)

    def __init__(self) -> None:
        self._reader = Reader()

    def images(self, pictures: Tensor) -> Tensor:
        """Features [N, 28] of pictures [N, S, S, 3] in 0..1: how many figures have each value of WORN."""
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
        """Features [N, D] of what texts tell; nan for a text that is not understood, with a warning in the log."""
        heard = [understood(text) for text in texts]
        unheard = [text for text, told in zip(texts, heard, strict=True) if told is None]
        if unheard:
            log.warning("Demo similarity does not understand: %s. These frames are not counted.", "; ".join(unheard))
        return torch.stack([_features(_attributes(told)) for told in heard])

    def images_for(self, pictures: Tensor, texts: Sequence[str]) -> Tensor:
        """Features [N, D] of what each picture shows of what its text tells; nan where that is not understood."""
        rows = []
        for scene, text in zip(self._scenes(pictures), texts, strict=True):
            told = understood(text)
            rows.append(_features({} if told is None else _shown(scene, told)))
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


def understood(text: str) -> Told | None:
    """The frame and the figures that a whole prompt tells, None when it is not understood.

    Characters are joined by "and", as a story script joins them.
    """
    frame = hear_frame(text)
    people: list[str] = []
    for piece in re.split(r"\band\b", text):
        if people and None in (hear_identity(piece), hear_identity(people[-1])):
            people[-1] += f" and {piece}"
        else:
            people.append(piece)
    figures = tuple(hear_identity(words) for words in people)
    if frame is None or None in figures or not 1 <= len(figures) <= FIGURES:
        return None
    return frame, figures


def _attributes(told: Told | None) -> dict[str, str]:
    """What is told, by slot: "place" -> "snow", "species 0" -> "fox"."""
    if told is None:
        return {}
    frame, figures = told
    attributes = {name: getattr(frame, name) for name in SEEN}
    for number, who in enumerate(figures):
        attributes |= {f"{name} {number}": value for name, value in {"species": who.species, **who.looks}.items()}
    return attributes


def _shown(scene: Scene, told: Told) -> dict[str, str]:
    """What a scene shows in the slots that are told."""
    figures: tuple[Figure | None, ...] = match(told[1], scene.figures)
    shown = {}
    for slot in _attributes(told):
        name, _, number = slot.partition(" ")
        if not number:
            shown[slot] = getattr(scene, name)
        else:
            figure = figures[int(number)]
            shown[slot] = NOT_SHOWN if figure is None else getattr(figure, name)
    return shown


def _features(attributes: dict[str, str]) -> Tensor:
    """One-hot of attributes by slot; zeros for other slots; nan where there are none at all."""
    slots = dict(SEEN) | {f"{name} {number}": values for number in range(FIGURES) for name, values in WORN.items()}
    row = [attributes.get(slot) == value for slot, values in slots.items() for value in (*values, NOT_SHOWN)]
    return torch.from_numpy(np.array(row, np.float32) if attributes else np.full(len(row), np.nan, np.float32))
