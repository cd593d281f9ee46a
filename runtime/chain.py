"""The attention below a patch at one layer: other patches, another node's replacement, the host's own attention."""

from __future__ import annotations

import dis
from collections.abc import Callable
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
        if self.owner is not None and _records(_code_of(self.owner)):
            self.owner(q, k, v, self.options)

    def plain(self, q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
        """The host's attention, for keys and values other than the layer's own. Skips the rest of the chain."""
        return self.host(q, k, v, heads, mask, self.options)


RECORDERS = {"append", "extend", "setdefault", "update"}
"""Methods by which a replacement keeps values in a container."""


def _code_of(replacement: Replacement) -> CodeType | None:
    while isinstance(replacement, partial):
        replacement = replacement.func
    function = replacement if hasattr(replacement, "__code__") else type(replacement).__call__
    return getattr(function, "__code__", None)


@cache
def _records(code: CodeType | None) -> bool:
    """Whether a function's code stores anything outside its own variables. May be true for one that only looks so."""
    if code is None:
        return False
    stores = {"STORE_GLOBAL", "STORE_ATTR", "STORE_SUBSCR"}
    return not RECORDERS.isdisjoint(code.co_names) or any(
        each.opname in stores or (each.opname == "STORE_DEREF" and each.argval in code.co_freevars)
        for each in dis.get_instructions(code)
    )
