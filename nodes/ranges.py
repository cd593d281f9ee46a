"""Range checks for connected numbers, which ComfyUI does not compare with the widget's range."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from functools import wraps
from numbers import Integral, Real
from typing import Any

from comfy_api.latest import io

from ..prompts.script import short

KINDS = {"INT": int, "FLOAT": float}


def in_range(execute: Callable[..., io.NodeOutput]) -> Callable[..., io.NodeOutput]:
    """Wrap a node's `execute` so that its numbers, passed by name, are checked and converted like widget values.

    Raises ValueError, with the name of the widget, for values that are not numbers or out of the widget's range.
    """

    @wraps(execute)
    def checked(cls, *others, **inputs) -> io.NodeOutput:
        widgets = [widget for widget in cls.define_schema().inputs if widget.get_io_type() in KINDS]
        return execute(cls, *others, **inputs | {w.id: _number(inputs[w.id], w) for w in widgets if w.id in inputs})

    return checked


def _number(value: Any, widget: io.Int.Input | io.Float.Input) -> int | float:
    kind = KINDS[widget.get_io_type()]
    if isinstance(value, Real) and widget.min <= value <= widget.max and kind(value) == value:
        return kind(value)
    expected = f"{'a whole' if kind is int else 'a'} number from {_shown(widget.min)} to {_shown(widget.max)}"
    raise ValueError(f"{widget.id} is {_shown(value)}: type or connect {expected}.")


def _shown(value: Any) -> str:
    """A value as errors show it."""
    if isinstance(value, Integral):
        return short(str(Decimal(int(value))))  # Python does not format integers of more than 4,300 digits
    return f"{value:g}" if isinstance(value, Real) else f'"{short(str(value))}"'
