"""Excludes a function from torch.compile, without importing the compiler when nothing is compiled."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch


def uncompiled(function: Callable) -> Callable:
    """`function` under torch.compiler.disable once the compiler has been imported; unchanged until then.

    The decorator imports torch._dynamo, which takes a second or two at the start of a host. Nothing can be compiled
    before that import, so checking for it at each call is enough.
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
