"""Characters for StoryMaker from reference pictures of the story world, made as the node Character from image does."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..models.demo import vision
from ..models.storymaker.characters import CharacterReference, features_of
from ..models.storymaker.crops import character_crop, to_image
from ..models.storymaker.faces import FaceAnalysis, read_face
from ..world.references import Reference

PIXEL = 8
"""Width in pixels of a large pixel in the demo model's images."""
NOTHING = torch.zeros(1, 1, 3)
"""A character's preview; drawing does not need one."""


@dataclass(frozen=True, eq=False)
class Portraits:
    """Makes characters. analysis: finds the head in a picture; None: characters have no face."""

    analysis: FaceAnalysis | None = None

    def whole(self, reference: Reference, name: str = "") -> CharacterReference:
        """Face, if there is an analysis, and appearance."""
        return _character(self._face(reference), _crop(reference, reference.mask), name)

    def face_only(self, reference: Reference) -> CharacterReference:
        """The face alone; without one, a character without features."""
        return _character(self._face(reference), None)

    def dressed(self, reference: Reference, clothes: Reference) -> CharacterReference:
        """The face of one reference, and an image of the other's clothes: its body without the head, on white."""
        return _character(self._face(reference), _crop(clothes, clothes.below_the_head))

    def _face(self, reference: Reference) -> tuple[Tensor, Tensor] | None:
        """Identity vector and features of the face that the node would use; None if it would find none."""
        part, _ = read_face(_large(reference.picture), _mask(reference.mask), self.analysis, None, None)
        return None if part is None else (part.id_embed, _encoded(part.crop))


def _character(face: tuple[Tensor, Tensor] | None, appearance: Tensor | None, name: str = "") -> CharacterReference:
    return CharacterReference(name, ((features_of(face, appearance), 1.0),), NOTHING)


def _crop(reference: Reference, mask: np.ndarray) -> Tensor:
    """Features of a part of the picture on white. mask: bool [24, 24]."""
    return _encoded(character_crop(_large(reference.picture), _mask(mask)))


def _encoded(crop: np.ndarray) -> Tensor:
    """Features [257, 1280] of an 8-bit image [224, 224, 3]."""
    return vision.features(to_image(crop)[None])[0]


def _large(picture: np.ndarray) -> np.ndarray:
    """An array [24, 24, ...] at the size of the demo model's images."""
    return picture.repeat(PIXEL, 0).repeat(PIXEL, 1)


def _mask(mask: np.ndarray) -> np.ndarray:
    return _large(mask).astype(np.uint8) * 255
