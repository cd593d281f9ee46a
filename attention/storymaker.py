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
from ..runtime.chain import Below, Inner
from ..runtime.foresight import Asked, Resident
from ..runtime.rows import Rows, grouped, named_rows
from .decoupled import decoupled_cross_attention

Layer = tuple[str, int, int]
"""(part, number of the block, index in it) of a layer of attention."""


class Named(Protocol):
    """A character, who may have a name."""

    name: str


class Adapter(Protocol):
    """StoryMaker's networks. widths: by layer of a UNet for which they make keys and values."""

    widths: Mapping[Layer, int]

    def tokens(
        self, characters: Sequence[Any], face_strength: float, appearance_strength: float, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Image tokens of some characters, [1, 20 * (characters + 1), context], for the positive and the negative."""

    def keys_values(self, layer: Layer, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [1, M, C] of a layer for image tokens [1, M, context]."""


class Cast(NamedTuple):
    """Who is in a row: numbers of the characters, each one's mask, and what the row's conditioning is for."""

    characters: tuple[int, ...]
    masks: tuple[int, ...]
    positive: bool
    area: tuple[int, ...] | None


@dataclass(frozen=True, eq=False)
class Group:
    """Rows with equally many characters. casts: of each row."""

    rows: Rows
    casts: tuple[Cast, ...]


@dataclass(frozen=True, eq=False)
class ImageConditioning:
    """What a node that applies StoryMaker asks of a model.

    adapter                    StoryMaker's networks
    characters                 who may appear, 1 to 3
    regions                    for each of them None or masks [masks, H, W] in 0..1 of the whole picture, one mask or
                               one for each image of the batch or frame of the story: its tokens act only there
    strength                   factor of what is added to the attention to the text
    face_strength, appearance_strength   factors of each character's face and appearance tokens
    start_percent, end_percent, blocks   when (percent of the schedule) and in which blocks
    resident                   puts the adapter onto its device for the time of making keys and values, which then are
                               made before a run; None: they are made during it, wherever the adapter lies
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
        """Two nodes on one layer: both add what they see."""

    def hindrance(self, story: StoryCond | None, images: int) -> str | None:
        """Why nobody of these characters appears in a run, None when somebody does.

        Raises ValueError for a name that the story does not know, and for a region with too few or too many masks.
        """
        for region in self.regions:
            known = region is None or len(region) in (1, images) or (story is not None and _by_frame(region, story))
            if not known:
                raise ValueError(
                    f"A region has {len(region)} masks, but the batch has {images} images: give it one mask for all "
                    "images, or one for each."
                )
        if story is None:
            return None
        roles = self.roles(story)
        if any(_shown(row.characters, roles) for row in story.rows):
            return None
        return "none of its characters is in these frames"

    def roles(self, story: StoryCond) -> dict[str, tuple[int, ...]]:
        """Which characters play each of a story's: name in the script -> numbers.

        A story of one character without a name is played by all. Otherwise those with a name play the one of that name,
        and those without the remaining ones, in the order of their first appearance. Raises ValueError for a name that
        the story does not know.
        """
        if set(story.cast) <= {""}:
            return {"": tuple(range(len(self.characters)))}
        names = {name.casefold(): name for name in story.cast}
        wanted = [character.name.casefold() for character in self.characters]
        for character, name in zip(self.characters, wanted, strict=True):
            if name and name not in names:
                raise ValueError(
                    f'Nobody in the story is called "{character.name}". Its characters are {", ".join(story.cast)}: '
                    "give the character one of these names, or none."
                )
        free = iter([name for name in story.cast if name.casefold() not in wanted])
        played: dict[str, tuple[int, ...]] = {}
        for number, name in enumerate(wanted):
            role = names[name] if name else next(free, None)
            if role is not None:
                played[role] = (*played.get(role, ()), number)
        return played

    def attend(self, q: Tensor, k: Tensor, v: Tensor, heads: int, call: UNetCall, inner: Inner | Below) -> Tensor:
        """Attention of one layer of one UNet call to text and pictures. q: [rows, N, C]; k, v: [rows, T, C]."""
        out = inner(q, k, v, heads)
        layer = (*inner.options["block"], inner.options["block_index"])
        for group in call.once_in_a_layout(self, lambda: self._groups(call)):
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

    def _groups(self, call: UNetCall) -> list[Group]:
        members: list[tuple[int, Cast]] = []
        for chunk in call.chunks:
            story = chunk.conditioning.story or call.story
            roles = {} if story is None else self.roles(story)
            for row, image in zip(chunk.rows, call.images_of(chunk), strict=True):
                shown = tuple(range(len(self.characters)))
                if image.characters is not None:
                    shown = _shown(image.characters, roles)
                if shown:
                    masks = tuple(_mask_number(self.regions[number], image, story) for number in shown)
                    cast = Cast(shown, masks, chunk.conditioning.positive, chunk.conditioning.area)
                    members.append((row, cast))
        together = grouped(members, key=lambda member: len(member[1].characters)).values()
        groups = (zip(*each, strict=True) for each in together)
        return [Group(named_rows(rows, call.device), casts) for rows, casts in groups]

    def foreseen(
        self, asked: Sequence[Asked], device: torch.device, dtype: torch.dtype | None
    ) -> dict[Hashable, tuple[Tensor, Tensor]]:
        """Keys and values of every layer for everybody who will be seen together, by what `_keys_values` asks for."""
        everybody = tuple(range(len(self.characters)))
        kinds = {
            (shown, positive): None
            for story, positive in asked
            for shown in ([everybody] if story is None else self._casts(story))
            if shown
        }
        layers = [layer for layer in self.adapter.widths if self._acts_at(layer)]
        kept = {}
        for characters in dict.fromkeys(characters for characters, _ in kinds):
            tokens = self._tokens(characters, device)
            for positive in (each for shown, each in kinds if shown == characters):
                for layer in layers:
                    made = self.adapter.keys_values(layer, tokens[0 if positive else 1])
                    kept[self, layer, characters, positive] = tuple(part.to(dtype=dtype) for part in made)
        return kept

    def _casts(self, story: StoryCond) -> list[tuple[int, ...]]:
        roles = self.roles(story)
        return [_shown(row.characters, roles) for row in story.rows]

    def _acts_at(self, layer: Layer) -> bool:
        chosen = self.blocks.get(layer[:2], ())
        return chosen is None or layer[2] in chosen

    def _keys_values(self, layer: Layer, group: Group, q: Tensor, call: UNetCall) -> tuple[Tensor, ...]:
        """Keys and values [rows, M, C] of a group's image tokens, each cast's made once in a run.

        A cast that nobody foresaw has them made here, by an adapter that may lie elsewhere: its layers cast weights.
        """

        def make(characters: tuple[int, ...], positive: bool) -> tuple[Tensor, Tensor]:
            made = call.kept.get((self, layer, characters, positive))
            if made is None:
                tokens = call.once_in_a_run((self, characters, q.device), lambda: self._tokens(characters, q.device))
                made = self.adapter.keys_values(layer, tokens[0 if positive else 1])
            k, v = made
            return k.to(q), v.to(q)

        kinds = [(cast.characters, cast.positive) for cast in group.casts]
        made = {
            kind: call.once_in_a_run((self, layer, *kind, q.device), lambda kind=kind: make(*kind))
            for kind in dict.fromkeys(kinds)
        }
        if len(made) == 1:
            return next(iter(made.values()))
        return tuple(torch.cat([made[kind][part] for kind in kinds]) for part in (0, 1))

    def _tokens(self, characters: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
        shown = [self.characters[number] for number in characters]
        return self.adapter.tokens(shown, self.face_strength, self.appearance_strength, device)

    def _mask(self, group: Group, call: UNetCall, q: Tensor, columns: int, options: dict[str, Any]) -> Tensor | None:
        """[rows, 1, N, columns] added to the logits: a character's tokens count as much as its region covers a query.

        Made once in a run for each size of layer. columns: image tokens of the background and then of each character,
        equally many.
        """
        if all(self.regions[number] is None for cast in group.casts for number in cast.characters):
            return None
        grid = tuple(options["activations_shape"][-2:])

        def make() -> Tensor:
            covers = torch.stack([self._cover(cast, columns, call.size, grid) for cast in group.casts])
            return covers.to(torch.promote_types(q.dtype, covers.dtype)).log()[:, None].to(q)

        return call.once_in_a_run((self, group.casts, grid, q.dtype, q.device), make)

    def _cover(self, cast: Cast, columns: int, size: tuple[int, int], grid: tuple[int, ...]) -> Tensor:
        """How much each token of a cast counts for each query, [N, columns] in 0..1."""
        tokens = columns // (1 + len(cast.characters))
        cover = torch.ones(math.prod(grid), columns)
        for place, (number, mask) in enumerate(zip(cast.characters, cast.masks, strict=True), start=1):
            if self.regions[number] is not None:
                covered = region_cover(self.regions[number][mask], size, cast.area, grid)
                cover[:, place * tokens : (place + 1) * tokens] = covered.flatten()[:, None]
        return cover


def region_cover(mask: Tensor, size: tuple[int, int], area: Sequence[int] | None, grid: tuple[int, int]) -> Tensor:
    """How much of each cell of a layer's grid a region covers, [*grid] in 0..1.

    mask: [H, W] of the whole picture; size: height and width of the picture's latents; area: (height, width, top, left)
    of the part of them that the layer sees, None: all of it.
    """
    cover = interpolate(mask[None, None].float(), size, mode="area")
    if area is not None:
        height, width, top, left = area
        cover = cover[..., top : top + height, left : left + width]
    return interpolate(cover, grid, mode="area")[0, 0].clamp(0, 1)


def _by_frame(region: Tensor, story: StoryCond) -> bool:
    """Whether a region's masks are one for each frame of the whole story, and not of the batch that is drawn."""
    return len(region) > max(row.frame for row in story.rows)


def _mask_number(region: Tensor | None, image: Image, story: StoryCond | None) -> int:
    """Which mask of a region is for an image."""
    if region is None or len(region) == 1:
        return 0
    return image.number if story is None or _by_frame(region, story) else image.place


def _shown(names: Sequence[str], roles: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """Numbers of the characters that play these of a story's, ascending."""
    return tuple(sorted({number for name in names for number in roles.get(name, ())}))
