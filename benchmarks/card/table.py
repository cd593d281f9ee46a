"""The results of the device benchmark so far, as JSON and as a Markdown page with goals."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from .rows import CSA, IPCA, MASKED, PLAIN, TOGETHER

HEADER = (
    "row",
    "ms per step",
    "ratio",
    "operations, ratio",
    "peak GiB",
    "bytes left",
    "waits per step",
    "attention",
    "runs",
)


@dataclass(eq=False)
class Measured:
    """One row in one dtype; None or empty until measured.

    milliseconds  of a step, one per run
    waits         for the card in one step, by line of code; None without a card
    operations    of one step, by kernel
    change        relative distance of its latents from the unpatched model's
    difference    relative distance from the latents of `like`, the row that computes the same in another way
    finite        whether its latents are finite
    error         why it failed
    """

    milliseconds: list[float] = field(default_factory=list)
    peak: int | None = None
    left: int | None = None
    waits: Counter | None = None
    operations: Counter = field(default_factory=Counter)
    kernels: list[str] = field(default_factory=list)
    change: float | None = None
    difference: float | None = None
    like: str = ""
    finite: bool | None = None
    error: str = ""

    @property
    def step(self) -> float | None:
        return median(self.milliseconds) if self.milliseconds else None


Rows = dict[str, Measured]


def published(name: str) -> bool:
    return name.startswith("published")


def ratio(rows: Rows, name: str, other: str = PLAIN) -> float | None:
    """Median ratio of a row's time per step to another's, over the rounds of both; None without such a round.

    The rows of a round run one after the other, so a temporary slowdown of the card affects both.
    """
    if name not in rows or other not in rows:
        return None
    pairs = zip(rows[name].milliseconds, rows[other].milliseconds, strict=False)
    ratios = [first / second for first, second in pairs]
    return median(ratios) if ratios else None


def operations_ratio(rows: Rows, name: str) -> float | None:
    plain = sum(rows[PLAIN].operations.values()) if PLAIN in rows else 0
    own = sum(rows[name].operations.values()) if name in rows else 0
    return own / plain if plain and own else None


def goals(rows: Rows) -> list[dict[str, Any]]:
    """The goals on a card: a sentence, the measured value (None: not measured), and whether it is met."""
    counted = operations_ratio(rows, CSA)
    others = [name for name in rows if name != PLAIN and not published(name)]
    left = [rows[name].left for name in others]
    most = None if not left or None in left else max(left)

    def goal(text: str, value: float | None, met: bool | None) -> dict[str, Any]:
        return {"goal": text, "value": value, "met": None if value is None else met}

    def at_most(text: str, value: float | None, bound: float | None) -> dict[str, Any]:
        value = None if bound is None else value
        return goal(text, value, value is not None and value <= bound)

    faster = ratio(rows, MASKED, CSA)
    allowed = None if counted is None else 1.1 * counted
    near = f"{CSA}: within 10 % of its operations" + ("" if allowed is None else f", so at most {allowed:.3f}")
    return [
        at_most(f"{IPCA}: at most 1.01 of unpatched", ratio(rows, IPCA), 1.01),
        at_most(near, ratio(rows, CSA), allowed),
        goal(f"{CSA}: at least 1.6 times as fast as the dense mask", faster, faster is not None and faster >= 1.6),
        at_most(f"{TOGETHER}: at most 1.13 of unpatched", ratio(rows, TOGETHER), 1.13),
        at_most("nothing left behind, in bytes", most, 0),
    ]


def as_json(about: dict[str, Any], dtypes: dict[str, Rows], complete: bool) -> dict[str, Any]:
    """All results. complete: whether all rows of all dtypes are measured."""
    return {
        "about": about,
        "complete": complete,
        "dtypes": {
            dtype: {"rows": {name: _row_json(rows, name) for name in rows}, "goals": goals(rows)}
            for dtype, rows in dtypes.items()
        },
    }


def _row_json(rows: Rows, name: str) -> dict[str, Any]:
    row = rows[name]
    return {
        "ms_per_step": row.step,
        "ratio": ratio(rows, name),
        "runs": row.milliseconds,
        "operations": sum(row.operations.values()) or None,
        "operations_ratio": operations_ratio(rows, name),
        "operations_by_kernel": dict(row.operations),
        "attention": row.kernels,
        "peak_bytes": row.peak,
        "left_bytes": row.left,
        "waits": None if row.waits is None else sum(row.waits.values()),
        "waits_by_place": None if row.waits is None else dict(row.waits),
        "change_from_unpatched": row.change,
        "like": row.like or None,
        "difference_from_like": row.difference,
        "finite": row.finite,
        "error": row.error or None,
    }


def as_markdown(about: dict[str, Any], dtypes: dict[str, Rows], complete: bool) -> str:
    """All results as a page: machine and settings, then a table and goals for each dtype."""
    lines = ["# One step of SDXL on this machine", ""]
    lines += [f"* {name}: {value}" for name, value in about.items()]
    if not complete:
        lines += ["", "**The run ended before all rows were measured.**"]
    for dtype, rows in dtypes.items():
        lines += ["", f"## {dtype}", "", *_markdown_table(HEADER, [_cells(rows, name) for name in _in_order(rows)]), ""]
        alike = [(name, row) for name, row in rows.items() if row.difference is not None]
        lines += [f"* {name} differs from {row.like} by {row.difference:.2e} of its latents" for name, row in alike]
        lines += [f"* {name} failed: {row.error}" for name, row in rows.items() if row.error]
        lines += [f"* {name} is not finite" for name, row in rows.items() if row.finite is False]
        lines += ["", *(_goal_line(goal) for goal in goals(rows))]
    return "\n".join(lines) + "\n"


def _in_order(rows: Rows) -> list[str]:
    """Names of the rows: unpatched, ours, then the published forms."""
    return sorted(rows, key=lambda name: (name != PLAIN, published(name)))


def _cells(rows: Rows, name: str) -> list[str]:
    row = rows[name]
    return [
        name,
        _text(row.step, ".2f"),
        _text(ratio(rows, name), ".3f"),
        _text(operations_ratio(rows, name), ".4f"),
        _text(None if row.peak is None else row.peak / 2**30, ".2f"),
        _text(row.left, "d"),
        _text(None if row.waits is None else sum(row.waits.values()), "d"),
        ", ".join(row.kernels),
        str(len(row.milliseconds)),
    ]


def _text(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _goal_line(goal: dict[str, Any]) -> str:
    value = "not measured" if goal["value"] is None else f"{goal['value']:.4g}"
    met = {None: "open", True: "met", False: "MISSED"}[goal["met"]]
    return f"* {met}: {goal['goal']} ({value})"


def _markdown_table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    def line(cells: Iterable[str]) -> str:
        return f"| {' | '.join(cells)} |"

    header = list(header)
    rule = ["---" if name in ("row", "attention") else "---:" for name in header]
    return [line(header), line(rule).replace(" ", ""), *map(line, rows)]


def write(path: Path, about: dict[str, Any], dtypes: dict[str, Rows], complete: bool) -> None:
    """Write JSON to `path` and the page beside it, each atomically."""
    texts = {
        path: json.dumps(as_json(about, dtypes, complete), indent=1),
        path.with_suffix(".md"): as_markdown(about, dtypes, complete),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    for target, text in texts.items():
        unfinished = target.with_name(f".{target.name}.part")
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, target)
