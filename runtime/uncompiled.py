"""Keeps a function out of what torch.compile makes, without importing the compiler for those who never compile."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch


def uncompiled(function: Callable) -> Callable:
    """`function` as the decorator torch.compiler.disable gives it, once the compiler is there; until then as it is.

    The decorator itself imports torch._dynamo, which takes a second or two at the start of a host. Nobody can compile
    before somebody has imported that, so looking for it at each call is enough.
    """
    disabled: list[Callable] = []

    @wraps(function)
    def outside(*args: Any, **kwargs: Any) -> Any:
        if not disabled:
            if "torch._dynamo" not in sys.modules:
                return function(*args, **kwargs)
            disabled.append(torch.compiler.disable(function))
        return disabled[0](*args, **kwargs)

    return outside
