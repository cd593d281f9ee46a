"""Dates in file names, for graphs that come without the interface, which fills them in before it sends one."""

from __future__ import annotations

import re
from datetime import datetime

from ..prompts.script import short

PART = re.compile("yyy?y?|MM?|dd?|hh?|mm?|ss?")
"""What the interface reads as a part of a date. Hours are those of 24, and of yyy it makes nothing."""
NUMBERS = {"M": "month", "d": "day", "h": "hour", "m": "minute", "s": "second"}
EXAMPLE = "write one such as %date:yyyy-MM-dd% or %date:yyyy-MM-dd_hh-mm-ss%."


def dated(prefix: str, now: datetime) -> str:
    """The prefix with every %date:FORMAT% filled in as ComfyUI's interface does; what else stands between % stays.

    Raises ValueError for a format without any part of a date, one that no file's name can have, or one that never ends.
    """

    def filled(found: re.Match) -> str:
        kind, colon, form = found[1].partition(":")
        if kind + colon != "date:":
            return found[0]
        if ":" in form or not PART.search(form):
            fault = 'contains ":", which file names cannot contain' if ":" in form else "has no part of a date"
            raise ValueError(f'"{short(found[0])}" in filename_prefix {fault}: {EXAMPLE}')
        return PART.sub(lambda part: _number(part[0], now), form)

    whole = re.sub("%([^%]+)%", filled, prefix)
    if "%date:" in whole:
        raise ValueError(f'filename_prefix "{short(prefix)}" has a date without a closing %: {EXAMPLE}')
    return whole


def _number(part: str, now: datetime) -> str:
    """One part of a date, filled up with zeros to the length that it is written in."""
    if part[0] == "y":
        return {"yyyy": f"{now.year:04}", "yy": f"{now.year % 100:02}"}.get(part, part)
    return str(getattr(now, NUMBERS[part[0]])).zfill(len(part))
