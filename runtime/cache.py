"""Values that a sampling run computes once, also when several threads need them at the same time.

With several cards ComfyUI evaluates the conditionings of a step in one thread per card, and all of them share a run's
cache. The key of a tensor on a card contains the card.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from threading import RLock
from typing import Any


class RunCache(dict[Hashable, Any]):
    """Values by key, with a lock around the making of new ones. known: values from the start."""

    def __init__(self, known: Mapping[Hashable, Any] | None = None):
        super().__init__(known or {})
        self._lock = RLock()

    def get_or_make(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """The value of `key`, made by the first caller while others wait. `make` may read other keys.

        When `make` raises, nothing is stored, and the next caller tries again.
        """
        if key not in self:
            with self._lock:
                if key not in self:
                    self[key] = make()
        return self[key]
