"""Photos of a story's character, by the PhotoMaker model that ComfyUI itself loads."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import comfy.clip_vision
import torch
from comfy_api.latest import io
from torch import Tensor

from ..prompts.encode import Fuse
from ..prompts.photomaker import TRIGGER, PhotoCharacter, PhotoRows, has_trigger, photo_story
from ..prompts.script import Story

log = logging.getLogger(__name__)

MAX_PHOTOS = 32
"""They are encoded together, and each takes a token of the prompt."""
TEXT_WIDTH = 2048
"""Channels of the text embeddings that PhotoMaker fuses with photos: SDXL's."""


def photo_inputs() -> list[io.Input]:
    """The optional inputs of an encode node."""
    return [
        io.Photomaker.Input(
            "photomaker",
            optional=True,
            tooltip=(
                "From ComfyUI's Load PhotoMaker Model: draws the character from photo. Write the word photomaker in "
                'the identity after the noun for what the photo shows, as in "a man photomaker in a blue coat".'
            ),
        ),
        io.Image.Input(
            "photo",
            optional=True,
            tooltip=(
                "One or several photos of one character, best cut to the face, for photomaker. Each photo after the "
                "first takes one more token."
            ),
        ),
    ]


def with_photos(story: Story, photomaker, photo: Tensor | None) -> tuple[Story, PhotoCharacter | None]:
    """The story as PhotoMaker needs it, and its character with photos; the story itself and None without photos.

    photomaker: ComfyUI's PhotoMaker model or None; photo: [P, H, W, 3] or None. Raises ValueError if only one of them
    is connected, for no image or more than MAX_PHOTOS, and as `photo_story` does.
    """
    if photomaker is None and photo is None:
        if has_trigger(story):
            log.warning(
                'The identity contains "%s", but no photo is connected, so it is read as an ordinary word.',
                TRIGGER,
            )
        return story, None
    if photo is None:
        raise ValueError("photomaker is connected, but photo is not. Connect an image of the character, or neither.")
    if photomaker is None:
        raise ValueError(
            "photo is connected, but photomaker is not. Connect ComfyUI's Load PhotoMaker Model, or neither."
        )
    if not 1 <= len(photo) <= MAX_PHOTOS:
        raise ValueError(f"photo is a batch of {len(photo)} images. Connect 1 to {MAX_PHOTOS} images of the character.")
    return photo_story(story, len(photo))


def fuse_photos(photomaker, photo: Tensor, rows: Sequence[PhotoRows]) -> Fuse:
    """How the photos enter the encoded prompt of every frame: the computation of ComfyUI's PhotoMakerEncode.

    photo: [P, H, W, 3]; rows: of all frames. Raises ValueError, when called, if the text embeddings are not SDXL's.
    """
    device = photomaker.load_device
    pixels = comfy.clip_vision.clip_preprocess(photo.to(device)).float()[None]
    mask = torch.ones(1, len(photo), dtype=torch.bool, device=device)
    known: list[tuple[Tensor, Tensor]] = []

    def fused(text: Tensor) -> Tensor:
        """text: [1, P, 2048], of the class noun. The frames of a story mostly have the same, which is computed once."""
        for before, after in known:
            if torch.equal(before, text):
                return after
        after = photomaker(id_pixel_values=pixels, prompt_embeds=text.to(device, copy=True), class_tokens_mask=mask)
        known.append((text, after.to(text)))
        return known[-1][1]

    def fuse(frame: int, context: Tensor) -> Tensor:
        if context.shape[-1] != TEXT_WIDTH:
            raise ValueError(
                f"PhotoMaker needs SDXL's text embeddings with {TEXT_WIDTH} channels, but those of this CLIP have "
                f"{context.shape[-1]}. Connect the CLIP of an SDXL checkpoint."
            )
        out = context.clone()
        for mention in rows[frame]:
            out[:, list(mention)] = fused(context[:, list(mention)])
        return out

    return fuse
