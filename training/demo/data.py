"""Training data: captions as rows of the encoders' embedding tables, and batches of captions with their pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from ...prompts.tokens import END, PADDING, ROOM, START
from ...standalone.text import token_ids
from ...world.draw import draw
from ...world.stereotypes import imagine
from ...world.stories import Lesson, random_lesson
from ...world.words import all_phrases

BATCH_SIZE = 32


class Vocabulary:
    """Token ids used in captions, from the BPE vocabulary that open_clip ships. One more row is the unknown word."""

    def __init__(self):
        used = {token for phrase in all_phrases() for token in token_ids(phrase)}
        self.tokens = sorted(used | {START, END, *PADDING.values()})
        self.row = {token: row for row, token in enumerate(self.tokens)}
        self.unknown = len(self.tokens)

    def rows(
        self, pieces: Sequence[str], random: np.random.Generator | None = None
    ) -> tuple[list[int], list[int], list[range], int]:
        """Rows of both embedding tables (77 each), the positions of each piece, and the first end-of-text position.

        random: inserts an unknown word into 6% of the pieces. Raises ValueError when the text is too long.
        """
        text, spans = [self.row[START]], []
        for piece in pieces:
            rows = [self.row[token] for token in token_ids(piece)]
            if random and rows and random.random() < 0.06:
                rows.insert(int(random.integers(len(rows) + 1)), self.unknown)
            spans.append(range(len(text), len(text) + len(rows)))
            text += rows
        if len(text) > ROOM + 1:
            raise ValueError(f"The text has {len(text) - 1} tokens, more than {ROOM}.")
        padded = {
            key: text + [self.row[END]] + [self.row[token]] * (ROOM + 1 - len(text)) for key, token in PADDING.items()
        }
        return padded["l"], padded["g"], spans, len(text)


@dataclass(frozen=True, eq=False)
class Batch:
    """Captions, and one picture for each.

    rows_l, rows_g: rows of the embedding tables [B, 77]; ends: first end-of-text positions [B]; spans: positions of
    each piece; strengths: factors of the text tokens [B, 77]; conditional: 0 where all text tokens are zeroed, else 1
    [B]; pictures: uint8 [B, 24, 24, 3].
    """

    lessons: tuple[Lesson, ...]
    spans: tuple[list[range], ...]
    rows_l: Tensor
    rows_g: Tensor
    ends: Tensor
    strengths: Tensor
    conditional: Tensor
    pictures: Tensor

    def to(self, device) -> Batch:
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        return Batch(**{name: x.to(device) if isinstance(x, Tensor) else x for name, x in tensors.items()})


def make_batch(vocabulary: Vocabulary, key: Sequence[int], stereotypes: bool, simple: bool) -> Batch:
    """The batch for a key; the same key always gives the same batch.

    The picture of a caption with several frames shows one of them at random. Where the text tokens are reweighted, it
    shows the frame whose tokens are strong, so that the model learns what reweighted prompts mean.
    simple: few captions with several frames.
    """
    random = np.random.default_rng(key)
    rows = []
    while len(rows) < BATCH_SIZE:
        lesson = random_lesson(random, stories=0.1 if simple else 0.42)
        try:
            rows_l, rows_g, spans, end = vocabulary.rows(lesson.pieces, random)
        except ValueError:
            continue
        strength, shown = strengths_of(lesson, spans, end, random)
        picture = draw(imagine(lesson.frames, shown, lesson.figures, random, stereotypes), random)
        silent = lesson.silent and random.random() < 0.5
        rows.append((lesson, spans, rows_l, rows_g, end, strength, 1.0 - silent, picture))
    lessons, spans, rows_l, rows_g, ends, strengths, conditional, pictures = zip(*rows, strict=True)
    return Batch(
        lessons,
        spans,
        torch.tensor(rows_l),
        torch.tensor(rows_g),
        torch.tensor(ends),
        torch.from_numpy(np.stack(strengths)),
        torch.tensor(conditional),
        torch.from_numpy(np.stack(pictures)),
    )


def strengths_of(lesson: Lesson, spans: list[range], end: int, random) -> tuple[np.ndarray, int]:
    """Factors of the caption's text tokens [77], and the index of the frame to show."""
    strength = np.ones(77, np.float32)
    shown = int(random.integers(len(lesson.frames)))
    if len(lesson.frames) > 1 and random.random() < 0.65:
        for frame, part in enumerate(lesson.parts):
            strength[list(spans[part])] = random.uniform(1, 2) if frame == shown else random.uniform(0, 0.3)
        if random.random() < 0.75:
            strength[end:] = random.uniform(0, 0.9) * random.random()
    return strength, shown
