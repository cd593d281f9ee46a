"""StoryMaker's image conditioning (arXiv 2409.12576): cross-attention also looks at the characters' image tokens."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ..prompts.conditioning import StoryCond
from ..runtime.blocks import Blocks
from ..runtime.call import Image, UNetCall
from ..runtime.chain import Chain
from ..runtime.precompute import Resident, RunConditioning
from ..runtime.rows import Rows, grouped, named_rows
from .decoupled import decoupled_cross_attention

Layer = tuple[str, int, int]
"""(part, number of the block, index in it) of a layer of attention."""


class Named(Protocol):
    """A character; its name may be empty."""

    name: str


class Adapter(Protocol):
    """StoryMaker's networks. widths: channels of each UNet layer that they make keys and values for."""

    widths: Mapping[Layer, int]

    def tokens(
        self, characters: Sequence[Any], face_strength: float, appearance_strength: float, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Image tokens [1, 20 * (characters + 1), context] of some characters, for the positive and the negative."""

    def keys_values(self, layer: Layer, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [1, M, C] of a layer for image tokens [1, M, context]."""


class RowCharacters(NamedTuple):
    """The characters of a row by number, the number of each one's mask, and the sign and area of its conditioning."""

    characters: tuple[int, ...]
    masks: tuple[int, ...]
    positive: bool
    area: tuple[int, ...] | None


@dataclass(frozen=True, eq=False)
class RowGroup:
    """Rows with equally many characters. shown: the characters of each row."""

    rows: Rows
    shown: tuple[RowCharacters, ...]


@dataclass(frozen=True, eq=False)
class ImageConditioning:
    """Settings of a node that applies StoryMaker.

    adapter                    StoryMaker's networks
    characters                 the characters that may appear, 1 to 3
    regions                    for each character None, or masks [masks, H, W] in 0..1 of the whole image: one mask, or
                               one per image of the batch or frame of the story. Its tokens act only there
    strength                   factor of the image attention that is added to the text attention
    face_strength, appearance_strength   factors of each character's face and appearance tokens
    start_percent, end_percent, blocks   when (percent of the schedule) and in which blocks
    resident                   keeps the adapter on its device while keys and values are computed, before the run;
                               None: they are computed during the run, on the device where the adapter is
    """

    adapter: Adapter
    characters: tuple[Named, ...]
    regions: tuple[Tensor | None, ...]
    strength: float
    face_strength: float
    appearance_strength: float
    start_percent: float
    end_percent: float
    blocks: Blocks
    resident: Resident | None = None
    name = "Apply StoryMaker"
    slot = "attn2"
    adds = True
    skip_first_steps = 0

    @property
    def neutral(self) -> bool:
        return self.strength == 0

    def combine(self, other: object) -> None:
        """Two nodes on one layer each add their own image attention."""

    def no_effect_reason(self, story: StoryCond | None, images: int) -> str | None:
        """Why none of these characters appears in a run, None when one does.

        Raises ValueError for a name that is not in the story, and for a region with the wrong number of masks.
        """
        for region in self.regions:
            known = region is None or len(region) in (1, images) or (story is not None and _by_frame(region, story))
            if not known:
                raise ValueError(
                    f"A region has {len(region)} masks, but the batch has {images} images. Use one mask for all "
                    "images, or one per image."
                )
        if story is None:
            return None
        roles = self.roles(story)
        if any(_shown(row.characters, roles) for row in story.rows):
            return None
        return "none of its characters is in these frames"

    def roles(self, story: StoryCond) -> dict[str, tuple[int, ...]]:
        """Numbers of the reference characters for each character of a story, by its name in the script.

        In a story with one unnamed character, all of them are that character. Otherwise those with a name match the
        script's character of that name, and those without one take the remaining characters in the order of their first
        appearance. Raises ValueError for a name that is not in the story.
        """
        if set(story.cast) <= {""}:
            return {"": tuple(range(len(self.characters)))}
        names = {name.casefold(): name for name in story.cast}
        wanted = [character.name.casefold() for character in self.characters]
        for character, name in zip(self.characters, wanted, strict=True):
            if name and name not in names:
                raise ValueError(
                    f'The story has no character named "{character.name}". Its characters are '
                    f"{', '.join(story.cast)}. Give the character one of these names, or no name."
                )
        free = iter([name for name in story.cast if name.casefold() not in wanted])
        played: dict[str, tuple[int, ...]] = {}
        for number, name in enumerate(wanted):
            role = names[name] if name else next(free, None)
            if role is not None:
                played[role] = (*played.get(role, ()), number)
        return played

    def attend(self, q: Tensor, k: Tensor, v: Tensor, heads: int, call: UNetCall, inner: Chain) -> Tensor:
        """Text and image attention at one layer of one UNet call. q: [rows, N, C]; k, v: [rows, T, C]."""
        out = inner(q, k, v, heads)
        layer = (*inner.options["block"], inner.options["block_index"])
        for group in call.cached_by_layout(self, lambda: self._groups(call)):
            k_image, v_image = self._keys_values(layer, group, q, call)
            mask = self._mask(group, call, q, k_image.shape[1], inner.options)
            look = partial(inner.plain, mask=mask)
            seen = decoupled_cross_attention(
                out[group.rows], q[group.rows], k_image, v_image, heads, self.strength, look
            )
            if len(seen) == len(out):
                return seen
            out = out.clone()
            out[group.rows] = seen
        return out

    def _groups(self, call: UNetCall) -> list[RowGroup]:
        members: list[tuple[int, RowCharacters]] = []
        for chunk in call.chunks:
            if chunk.foreign:
                continue
            if not chunk.located and any(region is not None for region in self.regions):
                raise ValueError(
                    "Apply StoryMaker cannot place its regions: another node calls the model with a part of the image "
                    "that is not a part of these latents (a different size?). Disconnect the regions, or remove that "
                    "node."
                )
            story = chunk.conditioning.story or call.story
            roles = {} if story is None else self.roles(story)
            for row, image in zip(chunk.rows, call.images_of(chunk), strict=True):
                shown = tuple(range(len(self.characters)))
                if image.characters is not None:
                    shown = _shown(image.characters, roles)
                if shown:
                    masks = tuple(_mask_number(self.regions[number], image, story) for number in shown)
                    members.append((row, RowCharacters(shown, masks, chunk.conditioning.positive, chunk.area)))
        together = grouped(members, key=lambda member: len(member[1].characters)).values()
        groups = (zip(*each, strict=True) for each in together)
        return [RowGroup(named_rows(rows, call.device), shown) for rows, shown in groups]

    def precomputed(
        self, conditionings: Sequence[RunConditioning], device: torch.device, dtype: torch.dtype | None
    ) -> dict[Hashable, tuple[Tensor, Tensor]]:
        """Keys and values of every layer for all characters that appear together, under the keys of `_keys_values`."""
        everybody = tuple(range(len(self.characters)))
        kinds = {
            (shown, positive): None
            for story, positive in conditionings
            for shown in ([everybody] if story is None else self._shown_in(story))
            if shown
        }
        layers = [layer for layer in self.adapter.widths if self._acts_at(layer)]
        values = {}
        for characters in dict.fromkeys(characters for characters, _ in kinds):
            tokens = self._tokens(characters, device)
            for positive in (each for shown, each in kinds if shown == characters):
                for layer in layers:
                    made = self.adapter.keys_values(layer, tokens[0 if positive else 1])
                    values[self, layer, characters, positive] = tuple(part.to(dtype=dtype) for part in made)
        return values

    def _shown_in(self, story: StoryCond) -> list[tuple[int, ...]]:
        roles = self.roles(story)
        return [_shown(row.characters, roles) for row in story.rows]

    def _acts_at(self, layer: Layer) -> bool:
        chosen = self.blocks.get(layer[:2], ())
        return chosen is None or layer[2] in chosen

    def _keys_values(self, layer: Layer, group: RowGroup, q: Tensor, call: UNetCall) -> tuple[Tensor, ...]:
        """Keys and values [rows, M, C] of a group's image tokens, made once in a run for each set of characters.

        Those that were not precomputed are made here, even by an adapter on another device: its layers cast weights.
        """

        def make(characters: tuple[int, ...], positive: bool) -> tuple[Tensor, Tensor]:
            made = call.cache.get((self, layer, characters, positive))
            if made is None:
                tokens = call.cached_for_run((self, characters, q.device), lambda: self._tokens(characters, q.device))
                made = self.adapter.keys_values(layer, tokens[0 if positive else 1])
            k, v = made
            return k.to(q), v.to(q)

        kinds = [(row.characters, row.positive) for row in group.shown]
        made = {
            kind: call.cached_for_run((self, layer, *kind, q.device), lambda kind=kind: make(*kind))
            for kind in dict.fromkeys(kinds)
        }
        if len(made) == 1:
            return next(iter(made.values()))
        return tuple(torch.cat([made[kind][part] for kind in kinds]) for part in (0, 1))

    def _tokens(self, characters: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
        shown = [self.characters[number] for number in characters]
        return self.adapter.tokens(shown, self.face_strength, self.appearance_strength, device)

    def _mask(self, group: RowGroup, call: UNetCall, q: Tensor, columns: int, options: dict[str, Any]) -> Tensor | None:
        """Mask [rows, 1, N, columns] for the logits: a character's tokens count as much as its region covers a query.

        Made once in a run for each layer size, for tiles in every call. columns: image tokens of the background and
        then of each character, the same number of each.
        """
        if all(self.regions[number] is None for row in group.shown for number in row.characters):
            return None
        grid = tuple(options["activations_shape"][-2:])

        def make() -> Tensor:
            covers = torch.stack([self._cover(row, columns, call.size, grid) for row in group.shown])
            return covers.to(torch.promote_types(q.dtype, covers.dtype)).log()[:, None].to(q)

        cached = call.cached if any(chunk.tile for chunk in call.chunks) else call.cached_for_run
        return cached((self, group.shown, grid, q.dtype, q.device), make)

    def _cover(self, row: RowCharacters, columns: int, size: tuple[int, int], grid: tuple[int, ...]) -> Tensor:
        """How much each image token of a row counts for each query, [N, columns] in 0..1."""
        tokens = columns // (1 + len(row.characters))
        cover = torch.ones(math.prod(grid), columns)
        for place, (number, mask) in enumerate(zip(row.characters, row.masks, strict=True), start=1):
            if self.regions[number] is not None:
                covered = region_cover(self.regions[number][mask], size, row.area, grid)
                cover[:, place * tokens : (place + 1) * tokens] = covered.flatten()[:, None]
        return cover


def region_cover(mask: Tensor, size: tuple[int, int], area: Sequence[int] | None, grid: tuple[int, int]) -> Tensor:
    """How much of each cell of a layer's grid a region covers, [*grid] in 0..1.

    mask: [H, W] of the whole image; size: height and width of its latents; area: (height, width, top, left) of the part
    of them that the layer computes, None: all of it.
    """
    cover = interpolate(mask[None, None].float(), size, mode="area")
    if area is not None:
        height, width, top, left = area
        cover = cover[..., top : top + height, left : left + width]
    return interpolate(cover, grid, mode="area")[0, 0].clamp(0, 1)


def _by_frame(region: Tensor, story: StoryCond) -> bool:
    """Whether a region has one mask per frame of the whole story, rather than per image of the batch."""
    return len(region) > max(row.frame for row in story.rows)


def _mask_number(region: Tensor | None, image: Image, story: StoryCond | None) -> int:
    """Number of the mask of a region that an image uses."""
    if region is None or len(region) == 1:
        return 0
    return image.number if story is None or _by_frame(region, story) else image.batch_index


def _shown(names: Sequence[str], roles: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """Numbers of the reference characters for these names of a story, ascending."""
    return tuple(sorted({number for name in names for number in roles.get(name, ())}))
