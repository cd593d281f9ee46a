"""Measuring a story: runs the connected encoders over its images and collects the results.

The protocol is that of One-Prompt-One-Story (arXiv 2501.13554). Encoders are arguments; see `measures.encoders`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .backgrounds import Background, check_masks, replace_background
from .consistency import CONVENTIONS, LABELS, Consistency, alignment, pairwise, text_of

CHUNK = 8
"""Images per encoder call, so that 100 large frames fit into memory."""


def measure(
    images: Tensor,
    prompts: Sequence[str] | None = None,
    image_encoder: Any = None,
    text_encoder: Any = None,
    faces: Any = None,
    dreamsim: Any = None,
    masks: Tensor | None = None,
    background: Background = "noise",
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Consistency:
    """Measure images [N, H, W, 3] in 0..1 with the given encoders; a measure without its encoder is left out.

    prompts        one per image; without them there is no alignment
    image_encoder  `measures.encoders.Encoder` for CLIP-I: images(pictures) -> [N, D]
    text_encoder   the same for CLIP-T, with texts(list) -> [N, D] too. If it has images_for(pictures, texts) -> [N, D],
                   images are encoded together with their texts. Its `conventions` may be a subset of CONVENTIONS.
    faces          `models.storymaker.faces.FaceAnalysis`: embeddings(pictures) -> [N, D], nan without a face; name
    dreamsim       distance(pictures) -> [N, N], from `measures.dreamsim.load_dreamsim`
    masks          [N or 1, h, w] of the character: as published, CLIP-I and DreamSim get images with the background
                   replaced, see `replace_background`; CLIP-T and faces get whole images
    progress       called as progress(done, total)
    An encoder's `image_label` and `text_label` are the names of its results in tables.
    Raises ValueError for no images, wrong shapes, NaN or infinity, and a wrong number of prompts or masks.
    """
    _check(images, prompts)
    if masks is not None:
        check_masks(masks, len(images))
    count, starts = len(images), range(0, len(images), CHUNK)
    texts = list(prompts or ())
    conventions = getattr(text_encoder, "conventions", tuple(CONVENTIONS)) if texts and text_encoder else ()
    conditional = hasattr(text_encoder, "images_for")
    shared = bool(conventions) and image_encoder is text_encoder and masks is None and not conditional
    passes = [image_encoder is not None, bool(conventions) and not shared, faces is not None, dreamsim is not None]
    done, total = 0, count * sum(passes)
    encoders: dict[str, str] = {}
    labels = dict(LABELS)

    def report(pictures: int) -> None:
        nonlocal done
        done += pictures
        if progress is not None:
            progress(done, total)

    def chunks(work: Callable[[Tensor, int], Tensor]) -> Tensor:
        results = []
        for start in starts:
            part = images[start : start + CHUNK]
            results.append(work(part, start))
            report(len(part))
        return torch.cat(results)

    def character(part: Tensor, start: int) -> Tensor:
        if masks is None:
            return part
        own = masks if len(masks) == 1 else masks[start : start + len(part)]
        return replace_background(part, own, background, seed, start)

    clip_i, clip_t, identities, distances, features = None, {}, None, None, None
    if image_encoder is not None:
        features = chunks(lambda part, start: image_encoder.images(character(part, start)))
        clip_i = pairwise(features)
        encoders["clip_i"] = image_encoder.name + _background_suffix(masks, background)
        labels["clip_i"] = getattr(image_encoder, "image_label", labels["clip_i"])
    if conventions:
        if conditional:
            pictured = chunks(lambda part, start: text_encoder.images_for(part, texts[start : start + len(part)]))
        else:
            pictured = features if shared else chunks(lambda part, _: text_encoder.images(part))
        for name in conventions:
            described = text_encoder.texts([text_of(prompt, name) for prompt in texts])
            clip_t[name] = alignment(pictured, described, name)
        encoders["clip_t"] = text_encoder.name
        labels["clip_t"] = getattr(text_encoder, "text_label", labels["clip_t"])
    if faces is not None:
        identities = pairwise(chunks(lambda part, _: faces.embeddings(part)))
        encoders["face"] = getattr(faces, "name", "InsightFace")
    if dreamsim is not None:
        shown = [character(images[start : start + CHUNK], start) for start in starts] if masks is not None else [images]
        distances = dreamsim.distance(torch.cat(shown)).double()
        encoders["dreamsim"] = dreamsim.name + _background_suffix(masks, background)
        report(count)
    return Consistency(count, clip_i, clip_t, identities, distances, encoders, tuple(texts), labels)


def _background_suffix(masks: Tensor | None, background: str) -> str:
    return "" if masks is None else f", background {background}"


def _check(images: Tensor, prompts: Sequence[str] | None) -> None:
    if images.ndim != 4 or images.shape[3] not in (3, 4) or 0 in images.shape:
        raise ValueError(
            f"The images have shape {list(images.shape)} instead of [number, height, width, 3]: connect an IMAGE."
        )
    broken = [str(number) for number, image in enumerate(images, start=1) if not image.isfinite().all()]
    if broken:
        raise ValueError(
            f"Image {', '.join(broken)}: the values contain NaN or infinity. Check the node that produced them."
        )
    if prompts is not None and len(prompts) != len(images):
        raise ValueError(f"There are {len(prompts)} prompts for {len(images)} images: provide one per image.")
