"""Consistent self-attention (CSA) of StoryDiffusion (arXiv 2405.01434): the images of a batch look at each other.

Every image attends to all of its own tokens and to a random part of those of other images, with the weights that the
model has. The published program computes the attention over all tokens of all images and masks most of it out. Keys and
values are projected token by token, so projecting and choosing can change places: here the keys and values that the
host has projected once are gathered, and the ordinary kernels attend to the chosen ones only.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..prompts.conditioning import StoryCond
from ..runtime.blocks import Blocks
from ..runtime.call import Image, SamplerCall, UNetCall, batch_images
from ..runtime.chain import Inner
from ..runtime.kept import Kept
from ..runtime.memory import GATHER_LIMIT, Level, images_within, in_slices, most_gathered
from ..runtime.rows import Rows, grouped, named_rows
from .drawn import DrawnTokens

Attend = Callable[..., Tensor]
Schedule = Literal["steady", "published"]

EARLY = 0.4
"""Part of the published schedule in which more layers are left out: 20 of its 50 steps."""

SKIPPED_EARLY, SKIPPED_LATE = 0.3, 0.1
"""Published probabilities that a layer is left out, before and after."""


def sample_tokens(
    seed: int, step: int, image: int, tokens: int, rate: float, bernoulli: bool = False
) -> torch.LongTensor:
    """Tokens of an image that others see, ascending, on the CPU.

    tokens: how many the image has, which names the resolution; rate: 0 to 1, the part that is seen: exactly
    floor(rate * tokens) of them, or with `bernoulli` (published) each with this probability. The draw depends on the
    arguments alone, so it is the same in all layers of a resolution, for both halves of guidance and on any device.
    """
    drawn = torch.rand(tokens, generator=_generator("tokens", seed, step, tokens, image), device="cpu")
    if bernoulli:
        return (drawn < rate).nonzero().flatten()
    return drawn.argsort(stable=True)[: int(rate * tokens)].sort().values


def anchor_sources(images: int | Sequence[int], anchors: int) -> list[list[int]]:
    """The images that each image of a batch looks at besides itself, by their places in the batch.

    images: how many there are, or the number of each in the whole story; anchors: 0 lets all see all, otherwise images
    with a number below it look at each other only, and the others at them only. So anchors do not depend on who else
    is there, and a batch of others without them is one of single images. An image that is there again, as the last one
    of a story that fills up its batch, is looked at once.
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
    """Self-attention in which image i also sees the tokens subsets[j] of every image j in sources[i].

    q, k, v: [B, N, C] projected, one row per image; subsets: token rows of each image, possibly none; sources: places
    in the batch, without i itself. attend(q, k, v, heads) -> [B, N, C], called once for all images that see equally
    many tokens. StoryDiffusion (arXiv 2405.01434), equation 2, with the tokens of S_i already chosen.
    """
    return attend_in_groups(q, k, v, heads, group_images(subsets, sources, k.shape[1], k.device), attend)


class Group(NamedTuple):
    """Images that see equally many tokens.

    rows  their rows
    keys  [images, n] the tokens that they see, their own first, as places in the flattened [B, N]; None: just their own
    """

    rows: Rows
    keys: Tensor | None

    def of(self, part: Tensor) -> Tensor:
        """The keys or values that these images see. part: [B, N, C] of the whole batch."""
        return part[self.rows] if self.keys is None else part.flatten(0, 1)[self.keys]

    def within(self, limit: int, k: Tensor) -> list[Group]:
        """These images some at a time, so that gathering for them takes at most `limit` bytes. k: [B, N, C]."""
        if self.keys is None and isinstance(self.rows, slice):
            return [self]
        images = images_within(limit, _count(self) or k.shape[1], k.shape[2], k.element_size())
        return [Group(*part) for part in in_slices(self.rows, self.keys, images)]


def group_images(
    subsets: Sequence[Tensor], sources: Sequence[Sequence[int]], tokens: int, device: torch.device, first: int = 0
) -> list[Group]:
    """Groups of images for consecutive rows of a batch. tokens: N; first: the row of the first image.

    Subsets that are on the device already are joined there: nothing is copied to it.
    """
    places = [torch.as_tensor(s, dtype=torch.long, device=device) + (first + j) * tokens for j, s in enumerate(subsets)]
    looking = enumerate(sources, start=first)
    groups = []
    for count, members in grouped(looking, key=lambda member: sum(len(subsets[j]) for j in member[1])).items():
        keys = None
        if count:
            each = ((torch.arange(i * tokens, (i + 1) * tokens, device=device), seen) for i, seen in members)
            keys = torch.stack([torch.cat([own, *(places[j] for j in seen)]) for own, seen in each])
        groups.append(Group(named_rows([image for image, _ in members], device), keys))
    return groups


def attend_in_groups(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    groups: Sequence[Group],
    attend: Attend,
    limit: int = sys.maxsize,
) -> Tensor:
    """Attention of every group of images, whose rows are all rows of q, to what it sees.

    limit: bytes of keys and values that are gathered at once. A group that needs more is attended to in slices, with
    the same result: no image's attention depends on another row. What one image sees is never cut.
    """
    slices = [part for group in groups for part in group.within(limit, k)]
    if len(slices) == 1:
        (group,) = slices
        return attend(q, k, v, heads) if group.keys is None else attend(q, group.of(k), group.of(v), heads)
    out = torch.empty_like(q)
    for group in slices:
        out[group.rows] = attend(q[group.rows], group.of(k), group.of(v), heads)
    return out


def attend_around(q: Tensor, k: Tensor, v: Tensor, heads: int, groups: Sequence[Group], inner: Attend) -> Tensor:
    """As attend_in_groups, with an attention that wants the whole batch every time.

    Rows of other groups see their own tokens over and over meanwhile. An attention that does not look at q answers with
    one row per value (PAG: the values themselves): it has nothing to share and is asked as it would be without us.
    Here slices would bound nothing: the whole batch has to be gathered, however few of its rows are wanted.
    """
    alone = cache(lambda: inner(q, k, v, heads))
    out = torch.empty_like(q)
    for count in dict.fromkeys(_count(group) for group in groups):
        together = [group for group in groups if _count(group) == count]
        answer = None
        if count:
            batch, tokens = k.shape[:2]
            first = torch.arange(0, batch * tokens, tokens, device=k.device)
            keys = first[:, None] + torch.arange(count, device=k.device) % tokens
            for group in together:
                keys[group.rows] = group.keys
            everyone = Group(slice(0, batch), keys)
            answer = inner(q, everyone.of(k), everyone.of(v), heads)
        if answer is None or answer.shape != q.shape:
            answer = alone()
        for group in together:
            out[group.rows] = answer[group.rows]
    return out


def _count(group: Group) -> int:
    return 0 if group.keys is None else group.keys.shape[1]


@dataclass(frozen=True, eq=False)
class ConsistentAttention:
    """What a consistent self-attention node asks of a model.

    sampling_rate     part of every image's tokens that the others see
    anchors           images that all others look at, 0: everyone looks at everyone. Of a story that was split into
                      batches its own number counts, since every batch has these
    skip_first_steps  steps of a sampling run before it begins
    start_percent, end_percent, blocks   when (percent of the schedule) and in which blocks
    seed              of the choice of tokens
    schedule          "steady": the same number of tokens and all layers in every step; "published": tokens by
                      Bernoulli draws, and layers left out at random
    levels            resolutions of these blocks, from which memory is reckoned; none: it is not told
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
        """Two nodes on one layer at one time: the one nearer to the sampler counts."""
        return other if isinstance(other, ConsistentAttention) else None

    def hindrance(self, story: StoryCond | None, images: int) -> str | None:
        """Why nothing can be shared in a run over so many images, None when something can."""
        if images < 2:
            return f"it needs at least 2 images in the batch, got {images}: raise batch_size or add frames to the story"
        if not any(self._sources(batch_images(story, range(images)), story)):
            anchors = self._anchors(story)
            others = f"one of the first {anchors} (anchors)" if anchors else "another one"
            return f"no image shares a character with {others}"
        return None

    def remark(self, story: StoryCond | None) -> str | None:
        """What these settings and the story say differently. Said of a story's first batch, not of those after it."""
        anchors = self._anchors(story)
        if self.anchors in (0, anchors) or [row.frame for row in story.rows] != [*range(len(story.rows))]:
            return None
        return (
            f"anchors is {self.anchors} in Consistent self-attention, but {anchors} in Split a long story: {anchors} "
            "counts, for these are in every batch. Set anchors of Consistent self-attention to 0, or to the same number"
        )

    def gathers(self, story: StoryCond | None, images: int, size: Sequence[int], itemsize: int, whole: bool) -> int:
        """Most bytes of keys and values that a layer gathers at once for one conditioning, 0 where nothing is shared.

        size: height and width of the latents; itemsize: bytes of a number; whole: another node's attention gets all
        images every time, with which no limit can be kept.
        """
        if self.neutral:
            return 0
        looks = map(len, self._sources(batch_images(story, range(images)), story))
        return most_gathered(looks, self.levels, self.sampling_rate, size, itemsize, whole)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, heads: int, call: UNetCall, inner: Inner) -> Tensor:
        """Self-attention of one layer of one UNet call, acting on all of its chunks alike.

        q: [rows, N, C]; k, v: [rows, M, C]. Where another node has cut the queries into tiles (HyperTile), the rows
        are those of the tiles, the host reads keys and values as equally many, and the same tile of other images is
        looked at.
        """
        if self._left_out(call, inner.options):
            return inner(q, k, v, heads)
        tiles = q.shape[0] // call.rows
        tokens = k.shape[0] * k.shape[1] // q.shape[0]
        groups = call.once((self, tiles, tokens, k.device), lambda: self._groups(call, tiles, tokens, k.device))
        if all(group.keys is None for group in groups):
            return inner(q, k, v, heads)
        k, v = (part.reshape(q.shape[0], tokens, -1) for part in (k, v))
        if inner.takes_rows:
            return attend_in_groups(q, k, v, heads, groups, inner, GATHER_LIMIT)
        return attend_around(q, k, v, heads, groups, inner)

    def _left_out(self, call: UNetCall, options) -> bool:
        if self.schedule == "steady":
            return False
        layer = (*options["block"], options["block_index"])
        drawn = torch.rand((), generator=_generator("layer", self.seed, call.step, *layer), device="cpu")
        return float(drawn) <= (SKIPPED_EARLY if call.step < EARLY * call.steps else SKIPPED_LATE)

    def prepare(self, evaluation: SamplerCall) -> None:
        """Draw the tokens of an evaluation's step for all sizes and images that earlier ones had."""
        for drawn in list(self._drawn(evaluation.kept).values()):
            drawn.renew(evaluation.step)

    def _drawn(self, kept: Kept) -> Kept:
        """The run's draws of this node, a DrawnTokens by number of tokens and device."""
        return kept.once((self, "drawn"), Kept)

    def _groups(self, call: UNetCall, tiles: int, tokens: int, device: torch.device) -> list[Group]:
        def draw(step: int, image: int) -> Tensor:
            published = self.schedule == "published"
            return sample_tokens(self.seed, step, image, tokens, self.sampling_rate, bernoulli=published)

        drawn = self._drawn(call.kept).once((tokens, device), lambda: DrawnTokens(draw, device))
        shown = [call.images_of(chunk) for chunk in call.chunks]
        seen_of = drawn.of(call.step, (image.number for images in shown for image in images))
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
    """Random numbers of the CPU that depend on nothing but the key."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator(device="cpu").manual_seed(int.from_bytes(digest, "little"))
