"""Pictures of a trained network, a contact sheet of them, and how well they show their captions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...models.demo import model as demo
from ...world.captions import figure_words, frame_words
from ...world.measures import StoryPictures, effect
from ...world.reader import Reader
from ...world.scene import SIZE
from ...world.stories import random_story
from .data import Vocabulary
from .loop import Training, noise_levels
from .networks import NarrowModel


@torch.inference_mode()
def sample(
    net: NarrowModel, vocabulary: Vocabulary, texts: Sequence[str], seed: int, steps: int = 20, cfg: float = 5.0
) -> Tensor:
    """Pictures [B, 24, 24, 3] in 0..1, one for each text: Euler with classifier-free guidance."""
    device = next(net.parameters()).device
    rows = [vocabulary.rows([text]) for text in texts]
    context, pooled = net.encode(*(torch.tensor([row[i] for row in rows], device=device) for i in (0, 1, 3)))
    context, pooled = torch.cat([context, context * 0]), torch.cat([pooled, pooled * 0])
    signal, noise = noise_levels(device)
    times = torch.linspace(999, 0, steps + 1).round().long().tolist()
    x = torch.randn(len(texts), 4, SIZE, SIZE, generator=torch.Generator().manual_seed(seed)).to(device)
    for now, then in zip(times, times[1:], strict=False):
        at = torch.full((2 * len(texts),), now, device=device)
        v, v0 = net.predict(x.repeat(2, 1, 1, 1), at, context, pooled).chunk(2)
        v = v0 + cfg * (v - v0)
        x0, eps = signal[now] * x - noise[now] * v, noise[now] * x + signal[now] * v
        x = signal[then] * x0 + noise[then] * eps
    return demo.to_pictures(x0).cpu()


def contact_sheet(pictures: Tensor, columns: int, path: Path, scale: int = 4, gap: int = 4) -> None:
    """Save pictures [N, 24, 24, 3] as a grid."""
    from PIL import Image

    large = (pictures.numpy() * 255).round().astype(np.uint8).repeat(scale, 1).repeat(scale, 2)
    missing = -len(large) % columns
    large = np.pad(large, ((0, missing), (gap, 0), (gap, 0), (0, 0)), constant_values=255)
    rows = [np.concatenate(list(large[i : i + columns]), 1) for i in range(0, len(large), columns)]
    Image.fromarray(np.concatenate(rows)).save(path)


def check(training: Training, count: int = 8) -> tuple[Tensor, str]:
    """Pictures of `count` stories of four frames, one prompt per frame, and a sentence with their alignment."""
    stories = [random_story(10_000 + i) for i in range(count)]
    texts = [f"{figure_words(story.identities[0])} {frame_words(frame)}" for story in stories for frame in story.frames]
    pictures = sample(training.averaged(), training.vocabulary, texts, seed=training.seed)
    readings = Reader().read_all(pictures.numpy())
    shown = [
        StoryPictures(story, tuple(reading.scene for reading in readings[4 * i : 4 * i + 4]))
        for i, story in enumerate(stories)
    ]
    aligned, error = effect(shown).alignment.mean, float(np.mean([reading.error for reading in readings]))
    return pictures, f"{aligned:.0%} of {len(texts)} frames show everything in their prompts; reading error {error:.4f}"
