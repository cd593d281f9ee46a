"""The attention layers of a UNet that a patch acts on, as one string.

all                          every layer
output                       every layer of the output (up) blocks
input 4-5, middle            two input blocks and the middle block
output 0-2.0-3               the first four layers of output blocks 0, 1 and 2
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from ..prompts.script import short

Key = tuple[str, int]
Blocks = Mapping[Key, tuple[int, ...] | None]
"""Chosen blocks: (part, number) -> layers inside it, or None for the whole block."""

PARTS = ("input", "middle", "output")
GRAMMAR = 'For example "all", "output", "input 4-5, middle" or "output 0-2.0-3" (blocks 0 to 2, layers 0 to 3).'

_RANGE = r"(\d{1,4})(?:\s*-\s*(\d{1,4}))?"
_CHOICE = rf"(?ai)(input|middle|output)(?:\s+{_RANGE}(?:\s*\.\s*{_RANGE})?)?"


def check_blocks(text: str) -> None:
    """Raise ValueError, quoting the text, when a block string is malformed."""
    _choices(text)


def choose_blocks(text: str, depths: Mapping[Key, int]) -> Blocks:
    """The blocks of a UNet that a string selects.

    depths: number of attention layers of every block that has any, for example {("input", 4): 2, ("middle", 0): 10}.
    Raises ValueError, quoting the text and listing the model's blocks, when a choice is malformed or selects nothing.
    """
    chosen: dict[Key, tuple[int, ...] | None] = {}
    for choice, part, numbers, layers in _choices(text):
        there = [key for key in depths if part in (None, key[0])]
        keys = [key for key in there if numbers is None or key[1] in numbers]
        if not keys:
            raise ValueError(
                f'Blocks "{short(text)}": "{choice}" has no attention in this model, which has {_described(depths)}.'
            )
        for key in keys:
            inside = None if layers is None else tuple(j for j in layers if j < depths[key])
            if inside == ():
                has = f"{key[0]} {key[1]} has layers 0 to {depths[key] - 1}"
                raise ValueError(f'Blocks "{short(text)}": "{choice}" has no such layers: {has}.')
            chosen[key] = _union(chosen[key], inside) if key in chosen else inside
    return chosen


def _union(a: tuple[int, ...] | None, b: tuple[int, ...] | None) -> tuple[int, ...] | None:
    return None if a is None or b is None else tuple(sorted({*a, *b}))


def _choices(text: str) -> list[tuple[str, str | None, range | None, range | None]]:
    """Every choice as (its text, part, numbers, layers); None means all."""
    choices = []
    for choice in (item.strip() for item in text.split(",")):
        if choice.lower() == "all":
            choices.append((choice, None, None, None))
            continue
        match = re.fullmatch(_CHOICE, choice)
        if match is None:
            raise ValueError(f'Blocks "{short(text)}": "{short(choice)}" is not a block. {GRAMMAR}')
        part, first, last, low, high = match.groups()
        choices.append((choice, part.lower(), _range(first, last), _range(low, high)))
        for span in choices[-1][2:]:
            if span is not None and not span:
                raise ValueError(f'Blocks "{short(text)}": "{choice}" counts backwards. {GRAMMAR}')
    return choices


def _range(first: str | None, last: str | None) -> range | None:
    return None if first is None else range(int(first), int(last or first) + 1)


def _described(depths: Mapping[Key, int]) -> str:
    parts = {part: [str(number) for name, number in depths if name == part] for part in PARTS}
    return "; ".join(f"{part} {', '.join(numbers)}" for part, numbers in parts.items() if numbers)
