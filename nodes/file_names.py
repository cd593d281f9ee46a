"""Dates in file names for graphs sent through the API; the interface fills them in before it sends a graph."""

from __future__ import annotations

import re
from datetime import datetime

from ..prompts.script import short

PART = "yyy?y?|MM?|dd?|hh?|mm?|ss?"
"""The parts of a date recognised by the interface. Hours are 0..23; yyy is left as it is."""
NUMBERS = {"M": "month", "d": "day", "h": "hour", "m": "minute", "s": "second"}
EXAMPLE = "write one such as %date:yyyy-MM-dd% or %date:yyyy-MM-dd_hh-mm-ss%."


def dated(prefix: str, now: datetime) -> str:
    """The prefix with every %date:FORMAT% filled in like in ComfyUI's interface; other placeholders are kept.

    Raises ValueError for a format without a date code, with ":", or without a closing %.
    """

    def filled(placeholder: re.Match) -> str:
        kind, colon, form = placeholder[1].partition(":")
        if kind + colon != "date:":
            return placeholder[0]
        if ":" in form or not re.search(PART, form):
            fault = 'contains ":", which file names cannot contain' if ":" in form else "contains no date code"
            raise ValueError(f'"{short(placeholder[0])}" in filename_prefix {fault}: {EXAMPLE}')
        return re.sub(PART, lambda part: _number(part[0], now), form)

    whole = re.sub("%([^%]+)%", filled, prefix)
    if "%date:" in whole:
        raise ValueError(f'filename_prefix "{short(prefix)}" has a date without a closing %: {EXAMPLE}')
    return whole


def _number(part: str, now: datetime) -> str:
    """One part of a date, padded with zeros to the length of the part."""
    if part[0] == "y":
        return {"yyyy": f"{now.year:04}", "yy": f"{now.year % 100:02}"}.get(part, part)
    return str(getattr(now, NUMBERS[part[0]])).zfill(len(part))
