"""Which looks a caption makes likely where it leaves them open.

Words for places, actions, props, and adjectives and names bias the looks that the caption leaves open (a shy cat on the
beach prefers other shirts than a proud one in the snow), as the words of real captions do. All biases are centred: over
the words of a group and over the values of a look they sum to zero, so long texts do not share a preference.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np

from .captions import FigureCaption, FrameCaption
from .scene import ACTIONS, LOOKS, PLACES, PROPS, Figure, Scene
from .words import ADJECTIVES, NAMES

BIASED_BY = {"place": PLACES, "action": ACTIONS[1:], "prop": PROPS[1:], "adjective": ADJECTIVES, "name": NAMES}
UNNAMED = ("standing", "none")
"""Values that frames have without naming them; they have no bias, or long texts would drift towards their looks."""
STRENGTH = 1.7
"""Standard deviation, in logits, of the bias from all words of the frames, and of that from the identity."""


@cache
def biases() -> dict[str, dict[str, dict[str, np.ndarray]]]:
    """look -> group -> word -> logits [values]: mean 0 over the values of a look, mean 0 and variance 1 over the words.

    Computed on first use: it would slow down the start of a host that only loads the nodes.
    """
    random = np.random.default_rng(7)
    tables: dict[str, dict[str, dict[str, np.ndarray]]] = {}
    for look, values in LOOKS.items():
        tables[look] = {}
        for group, words in BIASED_BY.items():
            table = random.standard_normal((len(words), len(values)))
            for _ in range(100):
                table -= table.mean(1, keepdims=True)
                table -= table.mean(0)
                table /= table.std(0)
            tables[look][group] = dict(zip(words, table, strict=True))
    return tables


def look_probabilities(
    look: str, frames: Sequence[FrameCaption], who: FigureCaption, stereotypes: bool = True
) -> np.ndarray:
    """Probability of each value of an open look, given all frames of the text and the identity: [values].

    The spread does not depend on the number of frames and words. Without stereotypes all values are equally likely.
    """
    logits = np.zeros(len(LOOKS[look]))
    if stereotypes:
        words = biases()[look]
        by_frames = [
            words[group][word]
            for frame in frames
            for group, word in (("place", frame.place), ("action", frame.action), ("prop", frame.prop))
            if word not in UNNAMED
        ]
        by_identity = [words["adjective"][word] for word in who.adjectives] + [
            words["name"][word] for word in who.names
        ]
        for group in (by_frames, by_identity):
            if group:
                logits += STRENGTH * sum(group) / np.sqrt(len(group))
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def imagine(
    frames: Sequence[FrameCaption],
    shown: int,
    figures: Sequence[FigureCaption],
    random: np.random.Generator,
    stereotypes: bool = True,
) -> Scene:
    """A scene that shows `frames[shown]` of a text; looks that the text leaves open are sampled."""
    people = []
    for who in figures:
        looks = {
            look: who.looks[look]
            if look in who.looks
            else str(random.choice(values, p=look_probabilities(look, frames, who, stereotypes)))
            for look, values in LOOKS.items()
        }
        people.append(Figure(who.species, **looks))
    frame = frames[shown]
    return Scene(frame.place, frame.action, frame.prop, tuple(people))
