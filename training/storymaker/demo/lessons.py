"""Batches of the story world for StoryMaker's training: pictures, their masks and poses, and references of each figure.

A reference is another picture of the same character: other place, action and prop, so that only looks are shared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch
from torch import Tensor

from ....models.demo import faces, vision
from ....models.demo import model as demo
from ....models.storymaker.characters import IDENTITY
from ....models.storymaker.crops import aligned, character_crop
from ....models.storymaker.ppr import CHARACTERS
from ....world import references
from ....world.captions import FigureCaption, any_figure, any_frame, figure_words, frame_words
from ....world.draw import Drawing, draw_parts
from ....world.pose import pose
from ....world.references import any_look, photograph
from ....world.scene import ACTIONS, PLACES, PROPS, SIZE, Figure, Scene
from ....world.stereotypes import imagine
from ...demo.data import Vocabulary
from ...demo.networks import NarrowModel
from ..batch import Batch

PAIRS = 0.35
"""Share of pictures with two characters."""
BARE = 0.6
"""Share of captions that name nothing but the species of each character."""
OTHERS_CLOTHES = 0.2
"""Share of references whose appearance comes from another character in the same clothes, so that the face counts."""
CLOTHES_ONLY = 0.15
"""Share of references whose appearance shows the body without its head, as a picture of an outfit does."""
BLOCK = 8
"""Width of a large pixel in an image."""
QUARTERS = 2 * vision.PATCHES
"""Colours per row and column that the image encoder keeps."""


@dataclass(frozen=True, eq=False)
class Reference:
    """identity: [128] narrow, norm 1; face, character: crops uint8 [S, S, 3], S a multiple of 32."""

    face: np.ndarray
    character: np.ndarray
    identity: Tensor


@dataclass(frozen=True, eq=False)
class Lesson:
    """pieces: of the caption; scene and drawing: the picture; references: one for each of its figures."""

    pieces: tuple[str, str]
    scene: Scene
    drawing: Drawing
    references: tuple[Reference, ...]


def random_lesson(random: np.random.Generator) -> Lesson:
    """A caption, a picture of it, and references. Looks that the caption leaves open are equally likely."""
    pair = random.random() < PAIRS
    who = [any_figure(random, named=0.3) for _ in range(1 + pair)]
    if random.random() < BARE:
        who = [FigureCaption(each.species) for each in who]
    frame = any_frame(random, together=pair)
    scene = imagine((frame,), 0, tuple(who), random, stereotypes=False)
    pieces = " and ".join(figure_words(each, random) for each in who), frame_words(frame, random, adverbs=True)
    return Lesson(pieces, scene, draw_parts(scene, random), tuple(reference(each, random) for each in scene.figures))


def reference(who: Figure, random: np.random.Generator) -> Reference:
    """A reference of a character from another picture; sometimes its clothes come from a third one."""
    photo = photograph(who, random)
    worn = photo
    if random.random() < OTHERS_CLOTHES:
        worn = photograph(replace(any_look(random), shirt=who.shirt, trousers=who.trousers), random)
    mask = worn.below_the_head if random.random() < CLOTHES_ONLY else worn.mask
    return Reference(face_crop(photo), appearance_crop(worn.picture, mask), narrow_identity(who))


def plain_reference(who: Figure, random: np.random.Generator) -> Reference:
    """A reference of a character from one other picture."""
    photo = photograph(who, random)
    return Reference(face_crop(photo), appearance_crop(photo.picture, photo.mask), narrow_identity(who))


def enlarged(pixels: np.ndarray) -> np.ndarray:
    return pixels.repeat(BLOCK, 0).repeat(BLOCK, 1)


def appearance_crop(picture: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """What *Character from image* passes to the image encoder: the masked part on white, [224, 224, 3]."""
    return character_crop(enlarged(picture), enlarged(mask * np.uint8(255)))


def face_crop(photo: references.Reference, side: int = 2 * QUARTERS) -> np.ndarray:
    """The aligned crop of the head of a picture's first figure, [side, side, 3].

    The image encoder keeps the means of QUARTERS x QUARTERS squares; four pixels in each cost a twelfth of its 224.
    """
    row, column = photo.drawing.heads[0]
    return aligned(enlarged(photo.picture), faces.landmarks(row, column, BLOCK), side)


@cache
def narrow_identity(who: Figure) -> Tensor:
    """The identity vector of a character's head before it is mapped to 512 numbers: [128], norm 1."""
    drawn = faces.drawing(who, Scene(PLACES[0], ACTIONS[0], PROPS[0], (who,)))
    return (faces.identity(who, drawn / 255).float() @ demo.basis(*IDENTITY)).contiguous()


@dataclass(frozen=True, eq=False)
class World:
    """Batches for a frozen model, as `TrainingLoop` takes them. part: of the seed, so that phases differ in data."""

    net: NarrowModel
    vocabulary: Vocabulary
    seed: int
    size: int = 32
    part: int = 0
    poses: bool = True

    def __call__(self, step: int, micro: int) -> Batch:
        random = np.random.default_rng([self.seed, 20 + self.part, step, micro])
        lessons, rows = [], []
        while len(lessons) < self.size:
            lesson = random_lesson(random)
            try:
                rows.append(self.vocabulary.rows(lesson.pieces, random))
            except ValueError:
                continue
            lessons.append(lesson)
        return self.batch(lessons, rows)

    @torch.no_grad()
    def batch(self, lessons: Sequence[Lesson], rows: Sequence[tuple]) -> Batch:
        """lessons: and `rows` of the encoders' tables for each caption."""
        context, pooled = self.net.encode(*(torch.tensor([row[i] for row in rows]) for i in (0, 1, 3)))
        seen = [each for lesson in lessons for each in lesson.references]
        return Batch(
            latents=demo.to_latents(torch.from_numpy(np.stack([lesson.drawing.picture for lesson in lessons]))),
            context=context,
            pooled=pooled,
            time_ids=torch.zeros(len(lessons), 6),
            empty_context=torch.zeros_like(context[:1]),
            empty_pooled=torch.zeros_like(pooled[:1]),
            counts=tuple(len(lesson.references) for lesson in lessons),
            masks=torch.stack([_masks(lesson.drawing) for lesson in lessons]),
            id_embeds=torch.stack([each.identity for each in seen]),
            face=_features([each.face for each in seen]),
            character=_features([each.character for each in seen]),
            pose=_poses(lessons) if self.poses else None,
        )


def _masks(drawing: Drawing) -> Tensor:
    masks = torch.zeros(CHARACTERS, SIZE, SIZE)
    for number, mask in enumerate(drawing.masks):
        masks[number] = torch.from_numpy(mask)
    return masks


def _features(crops: Sequence[np.ndarray]) -> Tensor:
    quarters = np.stack([means(each) for each in crops])
    return vision.quarter_features(torch.from_numpy(quarters))


def means(crop: np.ndarray) -> np.ndarray:
    """The mean colours of a crop in QUARTERS x QUARTERS squares, float32 in 0..1."""
    side = len(crop) // QUARTERS
    return crop.reshape(QUARTERS, side, QUARTERS, side, 3).mean((1, 3), dtype=np.float32) / 255


def _poses(lessons: Sequence[Lesson]) -> Tensor:
    hints = np.stack([enlarged(pose(lesson.scene, list(lesson.drawing.shifts))) for lesson in lessons])
    return torch.from_numpy(hints).permute(0, 3, 1, 2).float() / 255
