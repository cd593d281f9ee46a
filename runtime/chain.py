"""The attention below a patch at one layer: other patches, another node's replacement, the host's own attention."""

from __future__ import annotations

import dis
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from types import CodeType
from typing import Any

from torch import Tensor

HostAttend = Callable[..., Tensor]
"""attend(q, k, v, heads, mask, options): the host's attention for projected q, k, v [rows, tokens, C]."""

Replacement = Callable[[Tensor, Tensor, Tensor, dict[str, Any]], Tensor]
"""replacement(q, k, v, options): another node's attention, as the host calls it."""


@dataclass(frozen=True, eq=False)
class Chain:
    """Calls the attention below a patch.

    options  the call's transformer_options
    host     the host's attention
    owner    another node's replacement at this layer, if any
    patches  StoryLoom's patches below this one, from the innermost to the outermost
    call     the UNet call, which they need

    A replacement takes no mask and may derive its rows from the call (which conditioning is which), so it always gets
    the whole batch. The host's attention takes any rows and a mask: `takes_rows` says whether it is next.
    """

    options: dict[str, Any]
    host: HostAttend
    owner: Replacement | None
    patches: tuple[Any, ...] = ()
    call: Any = None

    @property
    def takes_rows(self) -> bool:
        return self.owner is None and not self.patches

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
        if self.patches:
            *below, patch = self.patches
            return patch.attend(q, k, v, heads, self.call, replace(self, patches=tuple(below)))
        if self.owner is None:
            return self.plain(q, k, v, heads, mask)
        return self.owner(q, k, v, self.options)

    def settle(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Call a replacement that records once more with the layer's own tokens, after calls with others.

        Self-Attention Guidance, for example, uses the map of its last call and expects as many keys as queries.
        """
        if self.owner is not None and records(self.owner):
            self.owner(q, k, v, self.options)

    def plain(self, q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
        """The host's attention, for keys and values other than the layer's own. Skips the rest of the chain."""
        return self.host(q, k, v, heads, mask, self.options)


RECORDERS = {"append", "extend", "insert", "setdefault", "update"}
"""Methods by which a replacement keeps values in a container."""

CALLS = ("__call__", "forward")
DEPTH = 3
"""Depth to which the functions that a replacement calls are looked at."""


def records(replacement: object, depth: int = DEPTH) -> bool:
    """Whether a replacement's code, or that of functions in it, stores anything outside its own variables.

    May be true for one that only looks so; then it is called once more than needed.
    """
    while isinstance(replacement, partial):
        replacement = replacement.func
    replacement = getattr(replacement, "__wrapped__", replacement)
    code = getattr(replacement, "__code__", None)
    if code is None:
        kind = type(replacement)
        methods = [getattr(kind, name, None) for name in CALLS]
        codes = [method.__code__ for method in methods if hasattr(method, "__code__")]
        called = [getattr(kind, name, None) for code in codes for name in code.co_names]
        return any(map(_stores, codes)) or _any_records(called, depth)
    return _stores(code) or _any_records(_closure(replacement), depth)


def _any_records(things: Iterable[object], depth: int) -> bool:
    return depth > 0 and any(
        records(each, depth - 1) for each in things if callable(each) and not isinstance(each, type)
    )


def _closure(function: object) -> Iterator[object]:
    for cell in getattr(function, "__closure__", None) or ():
        with suppress(ValueError):  # an empty cell
            yield cell.cell_contents


@cache
def _stores(code: CodeType) -> bool:
    stores = {"STORE_GLOBAL", "STORE_ATTR", "STORE_SUBSCR"}
    return not RECORDERS.isdisjoint(code.co_names) or any(
        each.opname in stores or (each.opname == "STORE_DEREF" and each.argval in code.co_freevars)
        for each in dis.get_instructions(code)
    )
