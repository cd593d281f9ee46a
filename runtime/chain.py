"""The attention that stood at a layer before a StoryLoom patch came: another node's replacement, or the host's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

HostAttend = Callable[..., Tensor]
"""attend(q, k, v, heads, mask, options): the host's attention for projected q, k, v [rows, tokens, C]."""

Replacement = Callable[[Tensor, Tensor, Tensor, dict[str, Any]], Tensor]
"""replacement(q, k, v, options): another node's attention, as the host calls it."""


@dataclass(frozen=True, eq=False)
class Inner:
    """Calls the attention underneath.

    A replacement takes no mask, and it may tell its rows from the call (which conditioning is which), so it must always
    get the whole batch; the host's own attention takes any rows and a mask. `takes_rows` says which one it is.
    """

    options: dict[str, Any]
    host: HostAttend
    owner: Replacement | None

    @property
    def takes_rows(self) -> bool:
        return self.owner is None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
        if self.owner is None:
            return self.plain(q, k, v, heads, mask)
        return self.owner(q, k, v, self.options)

    def plain(self, q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
        """The host's own attention, whatever stands here, for other keys and values than the layer's."""
        return self.host(q, k, v, heads, mask, self.options)


@dataclass(frozen=True, eq=False)
class Below:
    """A StoryLoom patch, as the attention underneath another one that only adds to what it answers."""

    patch: Any
    call: Any
    inner: Inner | Below

    @property
    def options(self) -> dict[str, Any]:
        return self.inner.options

    def plain(self, q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
        """As of the attention underneath all of ours."""
        return self.inner.plain(q, k, v, heads, mask)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
        return self.patch.attend(q, k, v, heads, self.call, self.inner)
