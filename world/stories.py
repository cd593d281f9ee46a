"""Random stories of the world, as frame prompts, one prompt or a script, and training captions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .captions import FigureCaption, FrameCaption, any_figure, any_frame, figure_words, frame_words
from .scene import ACTIONS, LOOKS, PLACES, PROPS, SPECIES, TOGETHER
from .words import AFTER, BEFORE

NICKNAMES = ("Ann", "Bob")
"""Names of the two characters in a script; they never reach the text encoders."""


@dataclass(frozen=True)
class WorldStory:
    """Identities and frames. shown: for each frame, the indices into `identities` of the characters in it."""

    identities: tuple[FigureCaption, ...]
    frames: tuple[FrameCaption, ...]
    shown: tuple[tuple[int, ...], ...]

    def identity_text(self) -> str:
        """The identities box of a story script; with several characters, each has its name in brackets."""
        if len(self.identities) == 1:
            return figure_words(self.identities[0])
        named = zip(NICKNAMES, self.identities, strict=False)
        return "\n".join(f"[{name}] {figure_words(who)}" for name, who in named)

    def frames_text(self) -> str:
        """The frames box of a story script, one line per frame."""
        if len(self.identities) == 1:
            return "\n".join(frame_words(frame) for frame in self.frames)
        heads = (" and ".join(f"[{NICKNAMES[i]}]" for i in shown) for shown in self.shown)
        return "\n".join(f"{head} {frame_words(frame)}" for head, frame in zip(heads, self.frames, strict=True))

    def identities_in(self, frame: int) -> tuple[FigureCaption, ...]:
        """The identities that one frame shows."""
        return tuple(self.identities[i] for i in self.shown[frame])


def random_story(seed: int, frames: int = 4, named: float = 0.25) -> WorldStory:
    """A story of one character whose frames differ in place and in action or prop; a seed always gives the same story.

    named: probability that the identity names a look. Fits one prompt of 75 tokens up to six frames.
    """
    random = np.random.default_rng([seed, 1])
    looks = {look: str(random.choice(values)) for look, values in LOOKS.items() if random.random() < named}
    adjective = any_figure(random).adjectives
    identity = FigureCaption(str(random.choice(SPECIES)), looks, adjective)
    places = random.permutation(PLACES)[:frames]
    activities = [("action", action) for action in ACTIONS[1:]] + [("prop", prop) for prop in PROPS[1:]]
    chosen = [activities[i] for i in random.permutation(len(activities))[:frames]]
    captions = tuple(
        FrameCaption(str(place), value if kind == "action" else "standing", value if kind == "prop" else "none")
        for place, (kind, value) in zip(places, chosen, strict=True)
    )
    return WorldStory((identity,), captions, ((0,),) * frames)


def random_story_of_two(seed: int, frames: int = 4, named: float = 0.25) -> WorldStory:
    """A story of two characters: the first frame shows both, the others one of them or both."""
    random = np.random.default_rng([seed, 2])
    species = random.permutation(SPECIES)[:2]
    identities = tuple(
        FigureCaption(str(kind), {k: str(random.choice(v)) for k, v in LOOKS.items() if random.random() < named})
        for kind in species
    )
    shown = [(0, 1)] + [((0,), (1,), (0, 1))[random.integers(3)] for _ in range(frames - 1)]
    places = random.permutation(PLACES)[:frames]
    captions = []
    for place, who in zip(places, shown, strict=True):
        frame = any_frame(random) if len(who) == 1 else FrameCaption("", str(random.choice(TOGETHER)))
        captions.append(FrameCaption(str(place), frame.action, frame.prop))
    return WorldStory(identities, tuple(captions), tuple(shown))


@dataclass(frozen=True)
class Lesson:
    """A training caption and the content of its pictures.

    pieces: the text in parts that begin at word boundaries. parts[k]: index of the piece that describes frame k, None
    when no piece does. silent: the caption is empty.
    """

    pieces: tuple[str, ...]
    frames: tuple[FrameCaption, ...]
    parts: tuple[int | None, ...]
    figures: tuple[FigureCaption, ...]
    silent: bool = False


def random_lesson(random: np.random.Generator, stories: float = 0.42, longest: int = 6) -> Lesson:
    """A caption of any kind: empty, identity or frame alone, a picture of one or two characters, a whole story.

    stories: the share of captions with several frames, at most `longest`.
    """
    kind = random.random()
    if kind < 0.13:
        return _incomplete(kind, random)
    if kind < 0.28:
        pair = (any_figure(random, 0.3), any_figure(random, 0.3))
        frame = any_frame(random, together=True)
        text = f"{figure_words(pair[0], random)} and {figure_words(pair[1], random)}"
        return _styled((text, _frame_text(frame, random)), (frame,), pair, random)
    who = any_figure(random, named=0.35 if random.random() < 0.75 else 0.0)
    count = 1 if kind < 1 - stories else int(random.integers(2, longest + 1))
    frames = tuple(any_frame(random) for _ in range(count))
    return _styled((figure_words(who, random), *(_frame_text(f, random) for f in frames)), frames, (who,), random)


def _frame_text(frame: FrameCaption, random: np.random.Generator) -> str:
    return frame_words(frame, random, adverbs=True)


def _incomplete(kind: float, random: np.random.Generator) -> Lesson:
    who, frame = any_figure(random), any_frame(random)
    if kind < 0.07:
        return Lesson(("",), (frame,), (None,), (who,), silent=True)
    if kind < 0.1:
        return Lesson((figure_words(who, random),), (frame,), (None,), (who,))
    return Lesson((_frame_text(frame, random),), (frame,), (0,), (FigureCaption(who.species),))


def _styled(
    pieces: tuple[str, ...],
    frames: tuple[FrameCaption, ...],
    figures: tuple[FigureCaption, ...],
    random: np.random.Generator,
) -> Lesson:
    identity, *rest = pieces
    after = AFTER[random.integers(len(AFTER))] if random.random() < 0.15 else ""
    if random.random() < 0.25:
        identity = f"{BEFORE[random.integers(len(BEFORE))]} {identity}"
    if after and len(frames) > 1:
        identity += after
    elif after:
        rest[-1] += after
    elif len(frames) == 1 and random.random() < 0.2:
        identity += ","
    return Lesson((identity, *rest), frames, tuple(range(1, len(pieces))), figures)
