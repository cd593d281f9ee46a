"""How much a pickle is, before anything reads it.

A tuple of two tuples of two tuples and so on, each kept once, is a few bytes in a file and endless for whoever computes
its hash or writes it out, and readers of weights do both with names. Weights use nothing often but small things.
"""

from __future__ import annotations

import math
import pickletools
from collections.abc import Sequence
from typing import IO

MOST = 300_000
"""Steps of a pickle that are looked at. StoryMaker's file has 60 thousand."""

_GET, _PUT = ("BINGET", "LONG_BINGET", "GET"), ("BINPUT", "LONG_BINPUT", "PUT", "MEMOIZE")
_FILL = ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD")


def things_in(file: IO[bytes]) -> float:
    """How many things the largest object of a pickle is: those in it count as often as they are in it.

    file: at the pickle's first byte; read to its last one, or to where it is damaged. Nothing in it is executed.
    Infinite for an object that is in itself, and for a pickle of more than MOST steps.
    """
    inside: list[list[int]] = []
    try:
        _read(file, inside)
    except (ValueError, LookupError):  # a damaged pickle, whose reader will say so: it is measured up to here
        pass
    return math.inf if len(inside) > MOST else _largest(inside)


def _read(file: IO[bytes], inside: list[list[int]]) -> None:
    """Note the parts of every object of a pickle, by number in the order of their making, in `inside`."""
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
    """How many things the largest of these is. inside: numbers of the parts of each."""
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
