"""How much StoryMaker's characters look like their references, read from the pixels of the demo model's pictures.

    python -m storyloom.benchmarks.likeness [--references 50] [--first 30000] [--json FILE] [--jobs 2]

Each reference is a picture of a random character of the demo's world. A story that names only the character's species,
and other places, actions and props than the reference shows, is drawn with StoryMaker on the demo model, without
ComfyUI; the attributes of its pictures are then read back. The table has the share of looks (fur, shirt, trousers, hat)
that equal the reference's, with the same share for other references (chance), the frames that show everything in their
text (aligned), and those that show the reference's place or action instead (leak), with 95 % bootstrap intervals over
references. `--json` writes {row: {measure: [estimate, low, high]}}. Rows that need another adapter are left out unless
`--without-attention-loss` or `--without-pose` names its file.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, fields
from functools import cache
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from ..models.demo import model as demo
from ..models.files import write_whole
from ..world.likeness import Portrayal
from ..world.measures import Estimate, StoryPictures, estimate
from ..world.reader import Reader
from ..world.scene import Scene
from .effect import interval, pictures_of, table
from .likeness_rows import BLEND, NO_ATTENTION_LOSS, NO_POSE, ROWS, SHIPPED, Row
from .portraits import Portraits

Results = dict[str, dict[str, Estimate]]
"""Row -> measure -> estimate."""
COLUMNS = ("looks", "chance", "aligned", "leak", "leak by chance", "swapped")
PART_COLUMNS = ("head", "head by chance", "clothes", "clothes by chance", "aligned")
BLEND_COLUMNS = ("first", "second", "aligned")


@dataclass(frozen=True)
class Settings:
    """How pictures are drawn; every field is an option.

    frames: per reference; story_frames: in rows that are a story; seed: of the noise, plus the reference's number.
    """

    guidance: float = 2.0
    steps: int = 16
    token_strength: float = 0.8
    lora_strength: float = 0.8
    frames: int = 2
    story_frames: int = 4
    seed: int = 6000


@dataclass(frozen=True, eq=False)
class Drawn:
    """The pictures of a row for one reference, uint8 [frames, 24, 24, 3], and what they show."""

    pictures: np.ndarray
    scenes: tuple[Scene, ...]


class Studio:
    """Draws rows on the demo model. weights: of the demo model; adapters: adapter -> its file, None for the shipped.

    portraits: makes characters.
    """

    def __init__(self, weights: Path, adapters: Mapping[str, Path | None], portraits: Portraits):
        import torch

        from ..standalone import StoryPipeline
        from ..standalone.demo import demo_model
        from ..standalone.storymaker import storymaker_of

        torch.set_num_threads(1)  # several processes draw in parallel
        self.pipeline, self.portraits, self.reader = StoryPipeline(demo_model(weights)), portraits, Reader()
        self.storymakers = {name: storymaker_of(adapter_weights(path)) for name, path in adapters.items()}
        for storymaker in self.storymakers.values():
            network = storymaker.adapter.ppr
            network.unconditional = cache(network.unconditional)  # the same for all characters

    def draw(self, row: Row, number: int, settings: Settings) -> Drawn:
        """A row for reference `number`."""
        from ..standalone.storymaker import Characters

        case = row.case(number, frames_of(row, settings))
        characters = Characters(
            self.storymakers[row.adapter],
            row.characters(self.portraits, case),
            token_strength=settings.token_strength * row.tokens,
            lora_strength=settings.lora_strength * row.lora,
        )
        pictures = pictures_of(
            self.pipeline,
            case.story,
            method=row.method,
            steps=settings.steps,
            cfg=settings.guidance,
            seed=settings.seed + number,
            shared_noise=False,
            characters=characters,
        )
        scenes = tuple(reading.scene for reading in self.reader.read_all(pictures))
        return Drawn((pictures * 255).round().astype(np.uint8), scenes)


def adapter_weights(path: Path | None):
    """The demo's StoryMaker weights. path: of another adapter in the file's form, None for the shipped one."""
    from ..models.demo.storymaker import demo_storymaker

    return demo_storymaker() if path is None else demo_storymaker(path)


def frames_of(row: Row, settings: Settings) -> int:
    return settings.story_frames if row.story else settings.frames


_studio: Studio | None = None


def start(weights: Path, adapters: Mapping[str, Path | None]) -> None:
    """Load all networks once per process."""
    global _studio
    from ..models.demo.faces import DemoFaces

    _studio = Studio(weights, adapters, Portraits(DemoFaces()))


def draw(name: str, number: int, settings: Settings) -> Drawn:
    return _studio.draw(ROWS[name], number, settings)


def draw_all(keys: Sequence[tuple[str, int]], settings: Settings, options) -> dict[tuple[str, int], Drawn]:
    """The pictures of all rows and references, several at a time, with a progress bar that shows the time left."""
    from tqdm import tqdm

    bar = {"total": len(keys), "unit": "story", "ncols": 90}
    loaded = (options.weights, options.adapters)
    if options.jobs == 1:
        start(*loaded)
        return {key: draw(*key, settings) for key in tqdm(keys, **bar)}
    context = get_context("spawn")
    with ProcessPoolExecutor(options.jobs, context, initializer=start, initargs=loaded) as pool:
        running = {pool.submit(draw, *key, settings): key for key in keys}
        return {running[done]: done.result() for done in tqdm(as_completed(running), **bar)}


def results_of(portrayals: Mapping[str, Sequence[Portrayal]]) -> Results:
    """All measures of each row; a row that is compared with another also has the difference, case by case."""
    values = {
        name: {measure: function(cases) for measure, function in ROWS[name].measures.items()}
        for name, cases in portrayals.items()
    }
    for name, of_row in values.items():
        if ROWS[name].compared and ROWS[name].compared[0] in values:
            other, measure = ROWS[name].compared
            of_row[f"{measure} minus {other}"] = of_row[measure] - values[other][measure]
    return {name: {measure: estimate(column) for measure, column in of_row.items()} for name, of_row in values.items()}


def as_json(results: Results) -> dict[str, dict[str, list[float]]]:
    """Row -> measure -> [estimate, low, high]; the rows of blends are one row. Without values that are not defined."""
    rows: dict[str, dict[str, list[float]]] = {}
    for name, of_row in results.items():
        row, _, ratio = name.partition(" ")
        for measure, value in of_row.items():
            if not np.isnan(value.mean):
                bounds = [value.mean, value.low, value.high]
                rows.setdefault(row, {})[f"{measure} {ratio}".strip()] = bounds
    return rows


def tables(results: Results) -> str:
    """The results in Markdown: rows with looks, rows with parts of a figure, blends, and differences."""
    parts = []
    for columns in (COLUMNS, PART_COLUMNS, BLEND_COLUMNS):
        rows = [
            (name, ROWS[name].title, *(interval(of_row[c]) if c in of_row else "" for c in columns))
            for name, of_row in results.items()
            if columns[0] in of_row
        ]
        if rows:
            parts.append(table(rows, ("row", "what", *columns)))
    differences = [
        (name, measure, interval(value))
        for name, of_row in results.items()
        for measure, value in of_row.items()
        if " minus " in measure
    ]
    if differences:
        parts.append(table(differences, ("row", "difference, reference by reference", "")))
    return "\n\n".join(parts)


def left_out(names: Sequence[str], adapters: Mapping[str, Path | None]) -> dict[str, str]:
    """The rows whose adapter is not given, each with a sentence."""
    missing = (name for name in names if ROWS[name].adapter not in adapters)
    return {name: f"{name} is left out: name its adapter with --{ROWS[name].adapter}." for name in missing}


def picture(path: Path, drawn: Mapping[tuple[str, int], Drawn], numbers: Sequence[int], scale: int = 4) -> None:
    """Save a picture with a line per reference: the reference, and its frames in each row with one character."""
    from PIL import Image

    shown = [name for name in ROWS if ROWS[name].case is ROWS["one"].case and (name, numbers[0]) in drawn]
    lines = []
    for number in numbers:
        reference = ROWS["one"].case(number, 1).references[0].picture[None]
        groups = [reference, *(drawn[name, number].pictures for name in shown)]
        panels = []
        for group in groups:
            for panel in group.repeat(scale, 1).repeat(scale, 2):
                panels.append(np.pad(panel, ((0, 4), (0, 4), (0, 0)), constant_values=255))
            panels.append(np.full((len(panels[-1]), 12, 3), 255, np.uint8))
        lines.append(np.concatenate(panels[:-1], 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(lines)).save(path, optimize=True)


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--references", type=int, default=50, help="number of references (default 50)")
    parser.add_argument("--first", type=int, default=30_000, help="random number of the first one (default 30000)")
    parser.add_argument("--rows", nargs="+", choices=[*ROWS, BLEND], metavar="ROW", default=list(ROWS))
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--picture", type=Path, help="file for a picture of the first six references")
    parser.add_argument("--weights", type=Path, default=demo.FILE, help="other weights of the demo model")
    parser.add_argument("--adapter", type=Path, help="another adapter (default: the shipped one)")
    for name in (NO_ATTENTION_LOSS, NO_POSE):
        parser.add_argument(f"--{name}", type=Path, help=f"adapter trained {name.replace('-', ' ')}, for its row")
    for field in fields(Settings):
        kind: Callable = type(field.default)
        option = f"--{field.name.replace('_', '-')}"
        parser.add_argument(option, type=kind, default=field.default, help=f"(default {field.default})")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: one per core)")
    options = parser.parse_args(arguments)
    others = {name: getattr(options, name.replace("-", "_")) for name in (NO_ATTENTION_LOSS, NO_POSE)}
    options.adapters = {SHIPPED: options.adapter} | {name: path for name, path in others.items() if path is not None}
    return options


def main(arguments: Sequence[str] | None = None) -> Results:
    """Draw, measure, print and write. Returns the results."""
    options = parsed(arguments)
    wanted = [name for name in ROWS if name in options.rows or (name.startswith(f"{BLEND} ") and BLEND in options.rows)]
    missing = left_out(wanted, options.adapters)
    names = [name for name in wanted if name not in missing]
    settings = Settings(**{field.name: getattr(options, field.name) for field in fields(Settings)})
    numbers = range(options.first, options.first + options.references)
    drawn = draw_all([(name, number) for number in numbers for name in names], settings, options)
    portrayals = {}
    for name in names:
        cases = [ROWS[name].case(number, frames_of(ROWS[name], settings)) for number in numbers]
        scenes = [drawn[name, number].scenes for number in numbers]
        portrayals[name] = [
            case.portrayal(StoryPictures(case.story, shown)) for case, shown in zip(cases, scenes, strict=True)
        ]
    results = results_of(portrayals)
    print("\n".join([tables(results), *missing.values()]))
    if options.json:
        write_whole(options.json, (json.dumps(as_json(results), indent=1) + "\n").encode())
    if options.picture:
        picture(options.picture, drawn, numbers[:6])
    return results


if __name__ == "__main__":
    main()
