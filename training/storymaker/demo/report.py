"""Pictures of a trained adapter on the narrow model, and how far they show their references."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ....models.demo import model as demo
from ....world.captions import FigureCaption, any_frame, figure_words, frame_words
from ....world.draw import draw_parts
from ....world.reader import Reader
from ....world.references import any_look
from ....world.scene import LOOKS, SIZE, Scene
from ...demo.loop import noise_levels
from ...demo.networks import NarrowModel
from ..adapter import TrainedAdapter
from ..batch import Batch
from ..drops import Dropped
from ..processors import ImageContext
from .lessons import Lesson, World, means, plain_reference


@torch.inference_mode()
def sample(
    net: NarrowModel,
    adapter: TrainedAdapter,
    batch: Batch,
    seed: int,
    steps: int = 16,
    cfg: float = 2.0,
    strength: float = 1.0,
    lora: float = 1.0,
    face: float = 1.0,
    appearance: float = 1.0,
) -> Tensor:
    """Pictures [B, 24, 24, 3] in 0..1 of a batch's captions and references, without its poses: Euler with guidance."""
    count, characters = len(batch.counts), sum(batch.counts)
    kept = torch.zeros(count, dtype=torch.bool)
    factors = torch.full((characters,), face), torch.full((characters,), appearance)
    shown = adapter.tokens(batch, Dropped(kept, kept, *factors))
    empty = adapter.tokens(batch, Dropped(kept, ~kept, torch.ones(characters), torch.ones(characters)))
    image = ImageContext(*map(torch.cat, zip(shown, empty, strict=True)), strength=strength, lora=lora)
    context, pooled = (torch.cat([x, x * 0]) for x in (batch.context, batch.pooled))
    added = {"text_embeds": pooled, "time_ids": torch.zeros(2 * count, 6)}
    signal, noise = noise_levels("cpu")
    times = torch.linspace(999, 0, steps + 1).round().long().tolist()
    x = torch.randn(count, 4, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))
    for now, then in zip(times, times[1:], strict=False):
        at = torch.full((2 * count,), now)
        given = {"added_cond_kwargs": added, "cross_attention_kwargs": {"image": image}}
        v, v0 = net.unet(x.repeat(2, 1, 1, 1), at, context, **given).sample.chunk(2)
        v = v0 + cfg * (v - v0)
        x0, eps = signal[now] * x - noise[now] * v, noise[now] * x + signal[now] * v
        x = signal[then] * x0 + noise[then] * eps
    return demo.to_pictures(x0)


def check(world: World, adapter: TrainedAdapter, count: int = 24) -> tuple[Tensor, str]:
    """Pictures for `count` captions that name only a species, with a reference each, and a sentence on what they show.

    What the image encoder sees of a character, and then the picture with it.
    """
    lessons = [portrait(number) for number in range(count)]
    batch = world.batch(lessons, [world.vocabulary.rows(lesson.pieces) for lesson in lessons])
    pictures = sample(world.net, adapter, batch, seed=world.seed)
    same, told = [], []
    for lesson, reading in zip(lessons, Reader().read_all(pictures.numpy()), strict=True):
        wanted, drawn = lesson.scene, reading.scene
        same += [getattr(drawn.figures[0], look) == getattr(wanted.figures[0], look) for look in LOOKS]
        told.append((wanted.place, wanted.action, wanted.prop) == (drawn.place, drawn.action, drawn.prop))
    seen = np.stack([means(lesson.references[0].character) for lesson in lessons])[:, 4:-4, 4:-4]
    both = torch.stack([torch.from_numpy(seen), pictures], 1).flatten(0, 1)
    return both, f"{np.mean(same):.0%} of the looks are the reference's; {np.mean(told):.0%} of the frames are as told"


def portrait(number: int) -> Lesson:
    """A character that training has not seen: a caption of its species and a frame, and one reference."""
    random = np.random.default_rng([20_000 + number, 3])
    who, frame = any_look(random), any_frame(random)
    scene = Scene(frame.place, frame.action, frame.prop, (who,))
    pieces = figure_words(FigureCaption(who.species)), frame_words(frame)
    return Lesson(pieces, scene, draw_parts(scene, random), (plain_reference(who, random),))
