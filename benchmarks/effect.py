"""The effect of each method on stories of the demo's world, read from the pixels of its pictures.

    python -m storyloom.benchmarks.effect [--stories 50] [--jobs 2]

Draws every story with every method on the demo model, without ComfyUI, reads all attributes back from the pictures and
prints a table: the share of frames that show everything in their text (alignment), how often the looks that the
identity leaves open agree between the frames of a story (consistency) and between stories (chance), and the gain of
consistency over chance, with 95 % bootstrap intervals over stories. Results are saved in `out/effect/` after each
story, so a stopped run can be resumed; `--page` also writes the tables and the picture to `docs/effect.md`.
`--ablations` measures the variants of SVR and NPR that the paper compares. `--weights` measures other weights of the
demo model under another `--label`.
"""

from __future__ import annotations

import argparse
import io
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from hashlib import sha256
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from ..models.demo import model as demo
from ..models.files import write_whole
from ..world.draw import draw
from ..world.measures import Effect, Estimate, StoryPictures, effect, paired_difference
from ..world.reader import Reader, accuracy, confusion
from ..world.scene import SIZE, Figure, Scene
from ..world.stereotypes import imagine
from ..world.stories import WorldStory, random_story, random_story_of_two
from .methods import ABLATIONS, ABLATIONS_COMPARED, COMPARED, METHODS, settings_of, title

ROOT = Path(__file__).absolute().parent.parent
OUT = ROOT / "out" / "effect"
PAGE = ROOT / "docs" / "effect.md"
PICTURE = ROOT / "docs" / "images" / "effect.png"
FIRST_STORY, FIRST_SEED = 20_000, 5_000
NOISE = {True: "same", False: "different"}
SHOWN = ("frames", "none", "svr", "svr+ipca", "csa+svr+ipca")
"""Methods in the picture of docs/effect.md, one row each."""

_pipeline = None


def start(weights: Path) -> None:
    """Load the model once per process, with one thread, since the processes draw stories in parallel."""
    global _pipeline
    import torch

    from ..standalone import StoryPipeline
    from ..standalone.demo import demo_model

    torch.set_num_threads(1)
    _pipeline = StoryPipeline(demo_model(weights))


def pictures_of(pipeline, story: WorldStory, **settings) -> np.ndarray:
    """Pictures of a story, float32 [frames, 24, 24, 3] in 0..1. settings: as for StoryPipeline."""
    quiet = {"progress": lambda done, steps: None}
    result = pipeline(story.identity_text(), story.frames_text().splitlines(), **quiet, **settings)
    return demo.to_pictures(result.latents).numpy()


def draw_story(method: str, shared_noise: bool, number: int, steps: int) -> np.ndarray:
    """Pictures of story `number`, uint8 [frames, 24, 24, 3]."""
    settings = {"shared_noise": shared_noise, "steps": steps, "seed": FIRST_SEED + number} | settings_of(method)
    return (pictures_of(_pipeline, random_story(FIRST_STORY + number), **settings) * 255).round().astype(np.uint8)


class Results:
    """The pictures of all stories by method and noise, on disk."""

    def __init__(self, label: str, weights: Path, steps: int):
        key = sha256(weights.read_bytes() + str(steps).encode()).hexdigest()[:12]
        self.folder = OUT / f"{label.replace(' ', '-')}-{key}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.reader = Reader()

    def path(self, method: str, shared_noise: bool, number: int) -> Path:
        return self.folder / f"{method}-{NOISE[shared_noise]}-{number}.npy"

    def save(self, pictures: np.ndarray, *key) -> None:
        buffer = io.BytesIO()
        np.save(buffer, pictures)
        write_whole(self.path(*key), buffer.getvalue())

    def pictures(self, *key) -> np.ndarray:
        return np.load(self.path(*key), allow_pickle=False)

    def stories(self, method: str, shared_noise: bool, count: int) -> list[StoryPictures]:
        """Every story with its scenes, read once and cached beside the pictures."""
        cache = self.folder / f"{method}-{NOISE[shared_noise]}.json"
        known = json.loads(cache.read_text()) if cache.exists() else []
        for number in range(len(known), count):
            pictures = self.pictures(method, shared_noise, number).astype(np.float32) / 255
            known.append([asdict(reading.scene) for reading in self.reader.read_all(pictures)])
        write_whole(cache, json.dumps(known).encode())
        return [
            StoryPictures(random_story(FIRST_STORY + number), tuple(scene_of(scene) for scene in scenes))
            for number, scenes in enumerate(known[:count])
        ]


def scene_of(fields: dict) -> Scene:
    """A scene from its fields, as `asdict` writes them."""
    return Scene(**{**fields, "figures": tuple(Figure(**figure) for figure in fields["figures"])})


def draw_all(results: Results, methods: Sequence[str], noises: Sequence[bool], options) -> None:
    """Draw every missing story, several at a time, with a progress bar."""
    from tqdm import tqdm

    keys = [(m, n, i) for i in range(options.stories) for m in methods for n in noises]
    missing = [key for key in keys if not results.path(*key).exists()]
    if not missing:
        return
    context = get_context("spawn")
    with ProcessPoolExecutor(options.jobs, context, initializer=start, initargs=(options.weights,)) as pool:
        running = {pool.submit(draw_story, *key, options.steps): key for key in missing}
        for done in tqdm(as_completed(running), total=len(missing), unit="story", ncols=90):
            results.save(done.result(), *running[done])


def percent(share: float, digits: int = 0) -> str:
    return "none" if np.isnan(share) else f"{100 * share:.{digits}f} %"


def interval(estimate: Estimate) -> str:
    if np.isnan(estimate.mean):
        return "none"
    return f"{percent(estimate.mean)} [{estimate.low * 100:.0f}, {estimate.high * 100:.0f}]"


def table(rows: Sequence[tuple[str, ...]], head: Sequence[str]) -> str:
    """A Markdown table, the first two columns left-aligned, the others right-aligned."""
    line = ["---"] * 2 + ["---:"] * (len(head) - 2)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, line, *rows))


def effect_table(effects: dict[tuple[str, bool], Effect]) -> str:
    rows = [
        (title(m), NOISE[n], *map(interval, (e.alignment, e.consistency, e.chance, e.gain)))
        for (m, n), e in effects.items()
    ]
    return table(rows, ("method", "noise", "aligned frames", "same looks", "chance", "gain"))


def rates_table(effects: dict[tuple[str, bool], Effect]) -> str:
    names = ("place", "action", "prop", "species", "looks")
    rows = [(title(m), NOISE[n], *(percent(e.rates[name].mean, 1) for name in names)) for (m, n), e in effects.items()]
    return table(rows, ("method", "noise", *names[:-1], "named looks"))


def difference_table(
    stories: dict[tuple[str, bool], list[StoryPictures]], compared: Sequence[tuple[str, str]] = COMPARED
) -> str:
    rows = []
    for (ours, theirs), noise in ((pair, noise) for pair in compared for noise in NOISE):
        if (ours, noise) in stories and (theirs, noise) in stories:
            difference = paired_difference(stories[ours, noise], stories[theirs, noise])
            name = f"{title(ours)} over {title(theirs)}"
            rows.append(
                (name, NOISE[noise], *map(interval, (difference.alignment, difference.consistency, difference.gain)))
            )
    return table(rows, ("difference, story by story", "noise", "aligned frames", "same looks", "gain"))


def ablation_tables(stories: dict[tuple[str, bool], list[StoryPictures]], count: int) -> str:
    effects = {key: effect(pictures) for key, pictures in stories.items()}
    tables = (effect_table(effects), rates_table(effects), difference_table(stories, ABLATIONS_COMPARED))
    return "\n\n".join((f"The first {count} of the stories above:", *tables))


def noisy_scenes(count: int, noise: float) -> Iterator[tuple[Scene, Scene]]:
    """Random scenes, each with the scene that is read from its drawing after tint, blur and noise."""
    random, reader = np.random.default_rng(9), Reader()
    for number in range(count):
        story = random_story(number) if number % 2 else random_story_of_two(number)
        frame = int(random.integers(len(story.frames)))
        scene = imagine(story.frames, frame, story.identities_in(frame), random, stereotypes=False)
        picture = draw(scene, random) / 255
        around = sum(np.roll(picture, shift, axis) for shift in (-1, 1) for axis in (0, 1)) / 4
        picture = 0.9 * picture + 0.1 * around + random.uniform(-0.03, 0.03, 3)
        picture += random.normal(0, noise, (SIZE, SIZE, 3))
        yield scene, reader.read(picture.clip(0, 1)).scene


def reader_tables(count: int = 1000, noise: float = 0.08) -> str:
    """The reader's accuracy and confusion matrices, in Markdown."""
    matrices = confusion(list(noisy_scenes(count, noise)))
    shares = accuracy(matrices)
    parts = [table([(name, f"{share:.2%}") for name, share in shares.items()], ("attribute", "read right"))]
    for name, (labels, matrix) in matrices.items():
        rows = [(str(label), *(str(n) if n else "" for n in row)) for label, row in zip(labels, matrix, strict=True)]
        parts.append(table(rows, (f"{name}: drawn, read as", *map(str, labels))))
    return "\n\n".join(parts)


def picture(results: Results, stories: Sequence[int], path: Path, scale: int = 4) -> None:
    """Save a picture of these stories side by side, with one row per method of SHOWN."""
    from PIL import Image

    rows = []
    for method in SHOWN:
        row = []
        for number in stories:
            for frame in results.pictures(method, True, number).repeat(scale, 1).repeat(scale, 2):
                row.append(np.pad(frame, ((0, 4), (0, 4), (0, 0)), constant_values=255))
            row.append(np.full((len(row[-1]), 12, 3), 255, np.uint8))
        rows.append(np.concatenate(row[:-1], 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(rows)).save(path, optimize=True)


def write_section(name: str, text: str) -> None:
    """Replace the text between the marks of a section in docs/effect.md."""
    page = PAGE.read_text(encoding="utf-8")
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    head, rest = page.split(begin)
    write_whole(PAGE, f"{head}{begin}\n{text}\n{end}{rest.split(end)[1]}".encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stories", type=int, default=50, help="stories of four frames (default 50)")
    parser.add_argument("--steps", type=int, default=10, help="Euler steps per picture (default 10)")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="stories drawn in parallel (default: one per core)"
    )
    parser.add_argument("--methods", nargs="+", choices=list(METHODS | ABLATIONS), metavar="METHOD")
    parser.add_argument("--noise", nargs="+", choices=list(NOISE.values()), default=list(NOISE.values()))
    parser.add_argument("--weights", type=Path, default=demo.FILE, help="other weights of the demo model")
    parser.add_argument("--label", default="shipped", help="name of these weights on the page")
    parser.add_argument("--ablations", action="store_true", help="measure the paper's ablations of SVR and NPR instead")
    parser.add_argument("--reader", action="store_true", help="measure the reader's accuracy instead of the methods")
    parser.add_argument("--page", action="store_true", help="write the result to docs/effect.md")
    options = parser.parse_args()
    if options.reader:
        parts = {"reader": reader_tables()}
    else:
        parts = measure(options)
    for name, text in parts.items():
        print(f"\n{text}")
        if options.page:
            write_section(name, text)


def measure(options) -> dict[str, str]:
    """Draw and read all stories. Returns section of docs/effect.md -> its tables."""
    results = Results(options.label, options.weights, options.steps)
    noises = [shared for shared, name in NOISE.items() if name in options.noise]
    methods = options.methods or list(ABLATIONS if options.ablations else METHODS)
    draw_all(results, methods, noises, options)
    stories = {(m, n): results.stories(m, n, options.stories) for m in methods for n in noises}
    if options.ablations:
        return {f"ablations {options.label}": ablation_tables(stories, options.stories)}
    if options.page and options.label == "shipped":
        picture(results, range(3), PICTURE)
    effects = {key: effect(pictures) for key, pictures in stories.items()}
    parts = {f"effect {options.label}": f"{effect_table(effects)}\n\n{rates_table(effects)}"}
    if options.label == "shipped":
        parts["differences"] = difference_table(stories)
    return parts


if __name__ == "__main__":
    main()
