"""The report: means over sets beside the published ones, and for the demo model the measures of docs/effect.md."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ...world.measures import StoryPictures, effect, interval
from ..effect import difference_table, effect_table, rates_table, scene_of, table, title
from .graph import VANILLA, Settings
from .measuring import world_story

PUBLISHED = {
    "Stable Diffusion 1.5": (0.8353, 0.7474, 0.5873),
    "SDXL": (0.9074, 0.8165, 0.5292),
    "BLIP-Diffusion": (0.7607, 0.8863, 0.2830),
    "Textual Inversion": (0.8378, 0.8229, 0.4268),
    "The Chosen One": (0.7614, 0.7831, 0.4929),
    "PhotoMaker": (0.8651, 0.8465, 0.3996),
    "IP-Adapter": (0.8458, 0.9429, 0.1462),
    "ConsiStory": (0.8769, 0.8737, 0.3188),
    "StoryDiffusion": (0.8877, 0.8755, 0.3212),
    "Naive prompt reweighting": (0.8411, 0.8916, 0.2548),
    "1Prompt1Story": (0.8942, 0.9117, 0.1993),
}
"""CLIP-T, CLIP-I, DreamSim of One-Prompt-One-Story (arXiv 2501.13554), table 1."""
COLUMNS = {"clip_t_clip_score_file_name": "CLIP-T", "clip_i": "CLIP-I", "dreamsim": "DreamSim"}
"""Measure -> column of the published table; its text for CLIP-T is "A photo depicts <prompt>.jpg"."""
SOURCE = (
    "Published: One-Prompt-One-Story (arXiv 2501.13554), table 1; 1024 x 1024, 50 steps, OpenAI's "
    "ViT-B/32 for CLIP-T and ViT-B/16 for CLIP-I, the background removed with CarveKit and filled with noise before "
    "CLIP-I and DreamSim. Here pictures are measured with their background, which changes both."
)


@dataclass(frozen=True)
class MeasuredSet:
    """texts: `set.json`; metrics: `metrics.json`, None if the set is not measured."""

    texts: Mapping
    metrics: Mapping | None


def report(results: Mapping[str, Sequence[MeasuredSet]], settings: Settings, prompts: str) -> str:
    """The whole report in Markdown. results: method -> its drawn sets; prompts: name of the prompt file."""
    measured = {method: [one for one in sets if one.metrics] for method, sets in results.items()}
    parts = ["# Prompt sets, drawn and measured", drawn_with(results, settings, prompts)]
    if not any(measured.values()):
        return "\n\n".join([*parts, "Nothing is measured."]) + "\n"
    parts += similarity_part(measured)
    parts += demo_part(measured, settings.shared_noise)
    return padded("\n\n".join(parts)) + "\n"


def drawn_with(results: Mapping[str, Sequence[MeasuredSet]], settings: Settings, prompts: str) -> str:
    sets = [one.texts for drawn in results.values() for one in drawn]
    seeds = sorted({texts["seed"] for texts in sets})
    seed = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {seeds[0]} to {seeds[-1]}" if seeds else "no seed"
    noise = "the same noise" if settings.shared_noise else "different noise"
    counts = ", ".join(f"{len(drawn)} sets with {method}" for method, drawn in results.items())
    return (
        f"`{prompts}`: {counts}. Model {settings.checkpoint}, {settings.width} x {settings.height}, {settings.steps} "
        f"steps of {settings.sampler} ({settings.scheduler}), cfg {settings.cfg:g}, zero negative, {seed}, {noise} for "
        "all frames of a set."
    )


def similarity_part(measured: Mapping[str, Sequence[MeasuredSet]]) -> list[str]:
    """The table of similarity with the published values."""
    every = [one.metrics["consistency"] for sets in measured.values() for one in sets]
    names = list(dict.fromkeys(name for consistency in every for name in consistency["means"]))
    if not names:
        return []
    encoders = {kind: sorted({c["encoders"][kind] for c in every if kind in c["encoders"]}) for kind in kinds(every)}
    ours = all(label.startswith("CLIP") for c in every for kind, label in c["labels"].items() if "clip" in kind)
    known = [name for name in COLUMNS if name in names] if ours else []
    columns = known + [name for name in names if name not in known]
    heads = [COLUMNS[name] if name in known else label_of(name, every) for name in columns]
    rows = [[method, "here", f"{len(sets)}", *(cell(sets, n) for n in columns)] for method, sets in measured.items()]
    by = "; ".join(f"{kind.replace('_', '-')}: {' and '.join(names)}" for kind, names in encoders.items())
    note = f"Mean of each set, then over sets, with 95 % bootstrap intervals over sets. Measured by {by}."
    head = ["method", "from", "sets", *heads]
    if known:
        return ["## Similarity", table(rows + published(columns), head), note, SOURCE]
    apart = "The published values below are measured with CLIP instead, so the two tables cannot be compared."
    theirs = table(published(list(COLUMNS)), [*head[:3], *COLUMNS.values()])
    return ["## Similarity", table(rows, head), note, apart, theirs, SOURCE]


def published(columns: Sequence[str]) -> list[list[str]]:
    """Rows of the published table; cells of measures that it lacks are empty."""
    by_method = {name: dict(zip(COLUMNS, values, strict=True)) for name, values in PUBLISHED.items()}
    return [
        [name, "published", "", *(f"{values[n]:.4f}" if n in values else "" for n in columns)]
        for name, values in by_method.items()
    ]


def kinds(every: Sequence[Mapping]) -> list[str]:
    return list(dict.fromkeys(kind for consistency in every for kind in consistency["encoders"]))


def label_of(name: str, every: Sequence[Mapping]) -> str:
    """The label of a measure, with its convention if there are several."""
    kind = "clip_t" if name.startswith("clip_t_") else name
    label = next((c["labels"][kind] for c in every if kind in c["labels"]), kind)
    several = sum(other.startswith("clip_t_") for other in every[0]["means"]) > 1
    return f"{label} ({name.removeprefix('clip_t_')})" if kind == "clip_t" and several else label


def cell(sets: Sequence[MeasuredSet], name: str) -> str:
    """Mean over the sets that have a value, with its 95 % interval."""
    means = (one.metrics["consistency"]["means"].get(name) for one in sets)
    values = [value for value in means if value is not None and not math.isnan(value)]
    if not values:
        return "not measured"
    low, high = interval(values)
    fewer = "" if len(values) == len(sets) else f" ({len(values)} sets)"
    return f"{sum(values) / len(values):.4f} [{low:.4f}, {high:.4f}]{fewer}"


def demo_part(measured: Mapping[str, Sequence[MeasuredSet]], shared_noise: bool) -> list[str]:
    """The tables of docs/effect.md for the sets that are stories of the demo's world."""
    stories = {
        ("frames" if method == VANILLA else method, shared_noise): pictures
        for method, sets in measured.items()
        if (pictures := [story for one in sets if (story := story_of(one)) is not None])
    }
    if not stories:
        return []
    effects = {key: effect(pictures) for key, pictures in stories.items()}
    parts = ["## What the pictures show", effect_table(effects), rates_table(effects)]
    first, *others = ([one.story for one in pictures] for pictures in stories.values())
    if all(other == first for other in others) and (differences := difference_table(stories)).count("\n") > 1:
        parts.append(differences)
    counted = ", ".join(f"{len(pictures)} with {title(method)}" for (method, _), pictures in stories.items())
    return [
        *parts,
        f"Stories in the demo's vocabulary, read from the pixels as described in docs/effect.md: {counted}.",
    ]


def story_of(one: MeasuredSet) -> StoryPictures | None:
    """A set as a story with its scenes, None if it has none."""
    scenes = one.metrics.get("shown")
    if scenes is None:
        return None
    return StoryPictures(world_story(one.texts["identity"], one.texts["settings"]), tuple(map(scene_of, scenes)))


def padded(text: str) -> str:
    """Markdown with its table columns padded, so that they read well as plain text too."""
    blocks: list[list[str]] = []
    for line in text.split("\n"):
        if line.startswith("|") and blocks and blocks[-1][0].startswith("|"):
            blocks[-1].append(line)
        else:
            blocks.append([line])
    return "\n".join("\n".join(_columns(block)) if block[0].startswith("|") else block[0] for block in blocks)


def _columns(lines: Sequence[str]) -> list[str]:
    head, rule, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    right = [mark.endswith(":") for mark in rule]
    rule = ["-" * (width - 1) + ":" if r else "-" * width for width, r in zip(widths, right, strict=True)]

    def written(cells: Sequence[str]) -> str:
        ends = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(cells, widths, right, strict=True))
        return "| " + " | ".join(ends) + " |"

    return [written(cells) for cells in (head, rule, *rows)]
