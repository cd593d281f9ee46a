"""Reference pictures of characters, and stories that name of a character only its species.

What such a story's pictures share with the reference beyond the species cannot come from the text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .captions import FigureCaption, FrameCaption, any_frame
from .draw import Drawing, draw_parts
from .scene import LOOKS, SPECIES, Figure, Scene
from .stories import WorldStory

HEAD_ROWS = 5
"""Rows of a head without ears and hat."""


@dataclass(frozen=True, eq=False)
class Reference:
    """A picture of one character. scene: what it shows."""

    scene: Scene
    drawing: Drawing

    @property
    def figure(self) -> Figure:
        return self.scene.figures[0]

    @property
    def picture(self) -> np.ndarray:
        """uint8 [24, 24, 3]."""
        return self.drawing.picture

    @property
    def mask(self) -> np.ndarray:
        """The figure with its outline and what it holds: bool [24, 24]."""
        return self.drawing.masks[0]

    @property
    def below_the_head(self) -> np.ndarray:
        """The mask without head, ears and hat."""
        mask = self.mask.copy()
        mask[: self.drawing.heads[0][0] + HEAD_ROWS] = False
        return mask


def any_look(random: np.random.Generator) -> Figure:
    """A figure of which all values of an attribute are equally likely."""
    return Figure(*(str(random.choice(values)) for values in (SPECIES, *LOOKS.values())))


def photograph(who: Figure, random: np.random.Generator) -> Reference:
    """A picture of this character with any frame's place, action and prop."""
    frame = any_frame(random)
    scene = Scene(frame.place, frame.action, frame.prop, (who,))
    return Reference(scene, draw_parts(scene, random))


def random_reference(random: np.random.Generator, accept: Callable[[Figure], bool] = lambda figure: True) -> Reference:
    """A reference with random looks that `accept` returns True for."""
    while not accept(who := any_look(random)):
        pass
    return photograph(who, random)


def all_differ(one: Figure, other: Figure) -> bool:
    """Whether two figures have no look in common."""
    return all(getattr(one, look) != getattr(other, look) for look in LOOKS)


def story_about(
    figures: Sequence[Figure], scenes: Sequence[Scene], frames: int, random: np.random.Generator
) -> WorldStory:
    """A story whose frames show one or two figures and name only their species.

    scenes: of the references; the places, actions and, for one figure, props of the story differ from theirs. Places
    also differ between frames.
    """
    together = len(figures) > 1
    places, actions = ({getattr(scene, name) for scene in scenes} for name in ("place", "action"))
    props = set() if together else {scene.prop for scene in scenes}
    chosen: list[FrameCaption] = []
    while len(chosen) < frames:
        frame = any_frame(random, together)
        if frame.place not in places and frame.action not in actions and frame.prop not in props:
            chosen.append(frame)
            places.add(frame.place)
    identities = tuple(FigureCaption(figure.species) for figure in figures)
    return WorldStory(identities, tuple(chosen), (tuple(range(len(figures))),) * frames)
