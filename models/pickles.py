"""The expanded size of a pickle, computed before anything loads it.

A tuple that contains the same tuple twice, and so on for many levels, takes a few bytes in a file but endless time to
hash or print, and readers of weights do both with names. Real weights share only small objects.
"""

from __future__ import annotations

import math
import pickletools
from collections.abc import Sequence
from typing import IO

MOST = 300_000
"""Most objects in a pickle, and the largest expanded size. StoryMaker's file has 60 thousand."""

_GET, _PUT = ("BINGET", "LONG_BINGET", "GET"), ("BINPUT", "LONG_BINPUT", "PUT", "MEMOIZE")
_FILL = ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD")


def expanded_size(file: IO[bytes]) -> float:
    """The number of objects in a pickle's largest object, where a shared object counts each time that it occurs.

    file: at the pickle's first byte; read up to its last byte, or up to the damage. Nothing in it is executed.
    Infinite for an object that contains itself, and for a pickle of more than MOST objects.
    """
    parts: list[list[int]] = []
    try:
        _read(file, parts)
    except (ValueError, LookupError):  # a damaged pickle: measured up to here, its reader raises later
        pass
    return math.inf if len(parts) > MOST else _largest(parts)


def _read(file: IO[bytes], inside: list[list[int]]) -> None:
    """Append the parts of every object in a pickle to `inside`, as indices in order of creation."""
    stack: list[int] = []
    memo: dict[int, int] = {}
    for code, argument, _ in pickletools.genops(file):
        if len(inside) > MOST:
            return
        if code.name in _GET:
            stack.append(memo[int(argument)])
        elif code.name in _PUT:
            memo[len(memo) if argument is None else int(argument)] = stack[-1]
        elif code.name == "MARK":
            stack.append(-1)
        else:
            parts, below = [], len(code.stack_before)
            if pickletools.markobject in code.stack_before:
                below = code.stack_before.index(pickletools.markobject)
                while (part := stack.pop()) >= 0:
                    parts.append(part)
            parts += [stack.pop() for _ in range(below)]
            if code.name in _FILL:
                inside[parts[-1]] += parts[:-1]
                stack.append(parts[-1])
            elif code.stack_after:
                inside.append(parts)
                stack += [len(inside) - 1] * len(code.stack_after)


def _largest(inside: Sequence[Sequence[int]]) -> float:
    """The size of the largest object. inside: indices of the parts of each object."""
    sizes: dict[int, float] = {}
    for start in range(len(inside)):
        path = [] if start in sizes else [(start, iter(inside[start]))]
        while path:
            number, rest = path[-1]
            part = next((part for part in rest if part not in sizes), None)
            if part is None:
                sizes[number] = 1.0 + sum(sizes[part] for part in inside[number])
                path.pop()
            elif len(path) > len(inside):
                return math.inf
            else:
                path.append((part, iter(inside[part])))
    return max(sizes.values(), default=0.0)
