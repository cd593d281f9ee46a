"""Consistent self-attention (CSA) of StoryDiffusion (arXiv 2405.01434): the images of a batch attend to each other.

Every image attends to all of its own tokens and to a random subset of the tokens of other images, with the model's own
weights. The published code computes attention over all tokens of all images and masks most of it out. Keys and values
are projected token by token, so projection and selection commute: here the keys and values that the host has projected
once are gathered, and the ordinary kernels attend to the selected ones only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..prompts.conditioning import StoryCond
from ..runtime.blocks import Blocks
from ..runtime.cache import RunCache
from ..runtime.call import Image, SamplerCall, UNetCall, batch_images
from ..runtime.chain import Chain
from ..runtime.memory import GATHER_LIMIT, Level, most_gathered
from .gathering import Attend, ImageGroup, attend_around, attend_in_groups, group_images
from .sampled_tokens import SampledTokens

Schedule = Literal["steady", "published"]

EARLY = 0.4
"""Fraction of the published schedule in which more layers are skipped: 20 of its 50 steps."""

SKIPPED_EARLY, SKIPPED_LATE = 0.3, 0.1
"""Published probabilities that a layer is skipped, before and after."""


def sample_tokens(
    seed: int, step: int, image: int, tokens: int, rate: float, bernoulli: bool = False
) -> torch.LongTensor:
    """Numbers of the tokens of an image that others attend to, ascending, on the CPU.

    tokens: the image's token count, which also identifies the resolution; rate: 0 to 1, the fraction to sample: exactly
    floor(rate * tokens) tokens, or with `bernoulli` (published) each token with this probability. The sample depends on
    the arguments alone, so it is the same in all layers of a resolution, in both halves of guidance and on any device.
    """
    drawn = torch.rand(tokens, generator=_generator("tokens", seed, step, tokens, image), device="cpu")
    if bernoulli:
        return (drawn < rate).nonzero().flatten()
    return drawn.argsort(stable=True)[: int(rate * tokens)].sort().values


def anchor_sources(images: int | Sequence[int], anchors: int) -> list[list[int]]:
    """Batch indices of the images that each image of a batch attends to besides itself.

    images: the batch size, or the number of each image in the whole story; anchors: with 0 every image attends to every
    other; otherwise the anchors, which are the images with a number below it, attend only to each other, and all others
    attend only to them. So anchors do not depend on the rest of the batch, and without anchors in the batch the other
    images are independent of each other. An image that occurs twice, such as the last one when it pads a batch, counts
    once.
    """
    numbers = list(range(images) if isinstance(images, int) else images)
    seen = {other: numbers.index(other) for other in numbers if not anchors or other < anchors}
    return [[place for other, place in seen.items() if other != number] for number in numbers]


def consistent_self_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    subsets: Sequence[Tensor],
    sources: Sequence[Sequence[int]],
    attend: Attend,
) -> Tensor:
    """Self-attention in which image i also attends to the tokens subsets[j] of every image j in sources[i].

    q, k, v: [B, N, C] projected, one row per image; subsets: token numbers of each image, possibly none; sources: batch
    indices, without i itself. attend(q, k, v, heads) -> [B, N, C] is called once for all images with the same number of
    keys. StoryDiffusion (arXiv 2405.01434), equation 2, with the tokens of S_i already sampled.
    """
    return attend_in_groups(q, k, v, heads, group_images(subsets, sources, k.shape[1], k.device), attend)


@dataclass(frozen=True, eq=False)
class ConsistentAttention:
    """Settings of a consistent self-attention node.

    sampling_rate     fraction of every image's tokens that the others attend to
    anchors           number of images that all others attend to; 0: every image attends to every other. The number of a
                      story that was split into batches takes precedence, since every batch has these anchors
    skip_first_steps  steps of a sampling run before the patch acts
    start_percent, end_percent, blocks   when (percent of the schedule) and in which blocks
    seed              for sampling tokens
    schedule          "steady": the same number of tokens and all layers in every step; "published": tokens by
                      Bernoulli draws, and layers skipped at random
    levels            resolutions of these blocks, for the memory estimate; empty: no estimate
    """

    sampling_rate: float
    anchors: int
    skip_first_steps: int
    start_percent: float
    end_percent: float
    blocks: Blocks
    seed: int
    schedule: Schedule = "steady"
    levels: tuple[Level, ...] = ()
    name = "Consistent self-attention"
    slot = "attn1"
    adds = False

    @property
    def neutral(self) -> bool:
        return self.sampling_rate == 0

    def combine(self, other: object) -> ConsistentAttention | None:
        """Two nodes on one layer at one time: the one nearer to the sampler takes effect."""
        return other if isinstance(other, ConsistentAttention) else None

    def no_effect_reason(self, story: StoryCond | None, images: int) -> str | None:
        """Why no image of a run can attend to another, None when one can."""
        if images < 2:
            return f"it needs at least 2 images in the batch, got {images}: raise batch_size or add frames to the story"
        if not any(self._sources(batch_images(story, range(images)), story)):
            anchors = self._anchors(story)
            others = f"one of the first {anchors} (anchors)" if anchors else "another one"
            return f"no image shares a character with {others}"
        return None

    def warning(self, story: StoryCond | None) -> str | None:
        """The conflict between these settings and the story, for its first batch only; None when they agree."""
        anchors = self._anchors(story)
        if self.anchors in (0, anchors) or [row.frame for row in story.rows] != [*range(len(story.rows))]:
            return None
        return (
            f"anchors is {self.anchors} in Consistent self-attention, but {anchors} in Split a long story. "
            f"{anchors} is used, because every batch has these. Set anchors of Consistent self-attention to 0, or to "
            "the same number"
        )

    def gathers(self, story: StoryCond | None, images: int, size: Sequence[int], itemsize: int, whole: bool) -> int:
        """Most bytes of keys and values that a layer gathers at once for one conditioning, 0 when nothing is shared.

        size: height and width of the latents; itemsize: bytes per element; whole: another node's attention gets all
        images in every call, so that the limit does not apply.
        """
        if self.neutral:
            return 0
        sources = map(len, self._sources(batch_images(story, range(images)), story))
        return most_gathered(sources, self.levels, self.sampling_rate, size, itemsize, whole)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, heads: int, call: UNetCall, inner: Chain) -> Tensor:
        """Self-attention of one layer of one UNet call, the same for all of its chunks.

        q: [rows, N, C]; k, v: [rows, M, C]. Where another node has cut the queries into tiles (HyperTile), each tile is
        a row, the host reshapes keys and values to as many rows, and a tile attends to the same tile of other images.
        """
        if self._skipped(call, inner.options):
            return inner(q, k, v, heads)
        tiles, rest = divmod(q.shape[0], call.rows)
        if rest:
            raise ValueError(
                f"Another node has changed the number of rows in self-attention from {call.rows} to {q.shape[0]}, so "
                "Consistent self-attention cannot match them to images. Remove one of the two nodes."
            )
        tokens = k.shape[0] * k.shape[1] // q.shape[0]
        groups = call.cached((self, tiles, tokens, k.device), lambda: self._groups(call, tiles, tokens, k.device))
        if all(group.keys is None for group in groups):
            return inner(q, k, v, heads)
        k, v = (part.reshape(q.shape[0], tokens, -1) for part in (k, v))
        if inner.takes_rows:
            return attend_in_groups(q, k, v, heads, groups, inner, GATHER_LIMIT)
        return attend_around(q, k, v, heads, groups, inner)

    def _skipped(self, call: UNetCall, options) -> bool:
        if self.schedule == "steady":
            return False
        layer = (*options["block"], options["block_index"])
        drawn = torch.rand((), generator=_generator("layer", self.seed, call.step, *layer), device="cpu")
        return float(drawn) <= (SKIPPED_EARLY if call.step < EARLY * call.steps else SKIPPED_LATE)

    def prepare(self, evaluation: SamplerCall) -> None:
        """Sample the tokens of an evaluation's step for all sizes and images of earlier evaluations."""
        for sampled in list(self._sampled(evaluation.cache).values()):
            sampled.renew(evaluation.step)

    def _sampled(self, cache: RunCache) -> RunCache:
        """This node's samples in a run: SampledTokens by token count and device."""
        return cache.get_or_make((self, "sampled tokens"), RunCache)

    def _groups(self, call: UNetCall, tiles: int, tokens: int, device: torch.device) -> list[ImageGroup]:
        def sample(step: int, image: int) -> Tensor:
            published = self.schedule == "published"
            return sample_tokens(self.seed, step, image, tokens, self.sampling_rate, bernoulli=published)

        if not all(chunk.whole for chunk in call.chunks):
            raise ValueError(
                "Consistent self-attention needs all images of the batch in one call of the model, but another node "
                "calls it with fewer at a time. Remove that node, or Consistent self-attention."
            )
        sampled = self._sampled(call.cache).get_or_make((tokens, device), lambda: SampledTokens(sample, device))
        shown = [call.images_of(chunk) for chunk in call.chunks]
        seen_of = sampled.of(call.step, (image.number for images in shown for image in images))
        groups = []
        for chunk, images in zip(call.chunks, shown, strict=True):
            story = chunk.conditioning.story or call.story
            subsets = [seen_of[image.number] for image in images for _ in range(tiles)]
            sources = [
                [j * tiles + tile for j in seen] for seen in self._sources(images, story) for tile in range(tiles)
            ]
            groups += group_images(subsets, sources, tokens, device, first=chunk.rows.start * tiles)
        return groups

    def _anchors(self, story: StoryCond | None) -> int:
        return self.anchors if story is None or story.anchors is None else story.anchors

    def _sources(self, images: Sequence[Image], story: StoryCond | None) -> list[list[int]]:
        sources = anchor_sources([image.number for image in images], self._anchors(story))
        return [
            [j for j in seen if image.shares_a_character(images[j])]
            for image, seen in zip(images, sources, strict=True)
        ]


def _generator(*key: int | str) -> torch.Generator:
    """A CPU generator that depends on the key alone."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator(device="cpu").manual_seed(int.from_bytes(digest, "little"))
