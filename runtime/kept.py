"""What is made once and kept for those who ask later, also when they ask at the same time.

With several cards ComfyUI evaluates the conditionings of a step in one thread for each card, and all of them share what
a sampling run keeps. What lies on a card has the card in its key.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from threading import RLock
from typing import Any


class Kept(dict[Hashable, Any]):
    """Things by their keys, with a lock around the making of new ones. known: what is there from the start."""

    def __init__(self, known: Mapping[Hashable, Any] | None = None):
        super().__init__(known or {})
        self._lock = RLock()

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What `make` gives, made for the first who asks; others wait for it. `make` may ask for other things.

        When it raises, nothing is kept, and the next who asks makes it.
        """
        if key not in self:
            with self._lock:
                if key not in self:
                    self[key] = make()
        return self[key]
