"""Measures of a set's pictures: similarity, and for the demo model the scenes that they show."""

from __future__ import annotations

import io
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .graph import escaped
from .store import Store, as_json
from .workers import RayWorker, ThreadWorker

METRICS = "metrics.json"
CLIP_I, CLIP_T = "ViT-B-16-quickgelu", "ViT-B-32-quickgelu"
"""Architectures of the published measures."""


@dataclass(frozen=True)
class MeasureOptions:
    """clip_i, clip_t: weights of CLIP_I and CLIP_T, a file or a tag of open_clip; dreamsim: a folder.

    demo: use the demo model's reader instead, and store the scenes that it reads.
    """

    clip_i: str = "openai"
    clip_t: str = "openai"
    dreamsim: Path | None = None
    download: bool = False
    device: str = "cpu"
    demo: bool = False


class Measurer:
    """Measures one set at a time with encoders that are loaded once."""

    def __init__(self, options: MeasureOptions):
        self.options = options
        self.encoders: dict[str, Any] = {}

    def load(self) -> tuple[dict[str, str], list[str]]:
        """Load the encoders. Returns measure -> name of its encoder, and a sentence for each measure without one."""
        options, reasons = self.options, []
        if options.demo:
            from ...models.demo.similarity import DemoReader

            reader = DemoReader()
            self.encoders = {"clip_i": reader, "clip_t": reader}
        else:
            from ...measures.clip import load_open_clip
            from ...measures.dreamsim import load_dreamsim
            from ...measures.encoders import SimilarityError

            settings = {"device": options.device, "download": options.download}
            loaders = {
                "clip_i": lambda: load_open_clip(CLIP_I, options.clip_i, **settings),
                "clip_t": lambda: load_open_clip(CLIP_T, options.clip_t, **settings),
            }
            if options.dreamsim is not None:
                loaders["dreamsim"] = lambda: load_dreamsim("ensemble", options.dreamsim, options.device)
            for name, load in loaders.items():
                try:
                    self.encoders[name] = load()
                except SimilarityError as error:
                    reasons.append(f"{name.replace('_', '-').upper()} is not measured: {error}")
        return {name: encoder.name for name, encoder in self.encoders.items()}, reasons

    def measure(
        self, pictures: Sequence[bytes], prompts: Sequence[str], identity: str, settings: Sequence[str]
    ) -> dict:
        """The content of `metrics.json`: "encoders", "consistency", and with the demo's reader "shown" per frame."""
        import numpy as np
        import torch
        from PIL import Image

        from ...measures.measuring import measure

        images = np.stack(
            [np.asarray(Image.open(io.BytesIO(file)).convert("RGB"), np.float32) / 255 for file in pictures]
        )
        encoders = self.encoders
        if self.options.demo and world_story(identity, settings) is None:
            encoders = {name: encoder for name, encoder in encoders.items() if name != "clip_t"}  # no text is parsed
        consistency = measure(
            torch.from_numpy(images),
            list(prompts),
            image_encoder=encoders.get("clip_i"),
            text_encoder=encoders.get("clip_t"),
            dreamsim=encoders.get("dreamsim"),
        )
        metrics = {
            "encoders": {name: encoder.name for name, encoder in self.encoders.items()},
            "consistency": consistency.to_json(),
        }
        return metrics | ({"shown": shown(images, identity, settings)} if self.options.demo else {})


def shown(images, identity: str, settings: Sequence[str]) -> list[dict] | None:
    """The scene read from every picture, None if the set is not a story of the demo's world."""
    from ...world.reader import Reader
    from ...world.scene import SIZE

    _, height, width, _ = images.shape
    if world_story(identity, settings) is None or height != width or height % SIZE:
        return None
    return [asdict(reading.scene) for reading in Reader().read_all(images)]


def world_story(identity: str, settings: Sequence[str]):
    """A set as a story of the demo's world, None if it cannot be parsed."""
    from ...world.parsing import parse_world_story

    return parse_world_story(escaped(identity), [escaped(setting) for setting in settings])


class MeasureQueue:
    """Measures the drawn sets of a folder while others are drawn, and stores the results there.

    again: measure sets that already have all measures, too. faults: key of a set that cannot be measured -> reason.
    """

    def __init__(self, store: Store, worker: ThreadWorker | RayWorker, again: bool = False):
        self.store, self.worker, self.again = store, worker, again
        self.faults: dict[str, str] = {}
        self._loading = worker.call("load")
        self._running: dict[Future, str] = {}
        self._pending: list[str] = []

    def loaded(self) -> tuple[dict[str, str], list[str]]:
        """The result of `Measurer.load`; its errors do not stop the drawing."""
        try:
            return self._loading.result()
        except Exception as error:
            return {}, [f"Nothing is measured: {error}"]

    def add(self, keys: Sequence[str]) -> None:
        """Queue drawn sets."""
        self._pending += keys

    def collect(self, wait: bool = False) -> int:
        """Store the finished measures; wait: for at least one set. Returns the number of sets that remain."""
        if wait or self._loading.done():
            names, _ = self.loaded()
            for key in self._pending:
                if names and (self.again or self._missing(key, names)):
                    self._start(key)
            self._pending.clear()
        if wait and self._running:
            next(iter(self._running)).exception()
        for future in [future for future in self._running if future.done()]:
            key = self._running.pop(future)
            try:
                self.store.write(self.store.folder / key / METRICS, as_json(future.result()))
            except Exception as error:  # out of memory, a damaged picture: measure the others
                self.faults[key] = f"not measured: {error}"
        return len(self._running) + len(self._pending)

    def _missing(self, key: str, names: dict[str, str]) -> bool:
        """Whether the folder lacks a measure, or has it from another encoder."""
        stored = (self.store.read(key, METRICS) or {}).get("encoders", {})
        return any(stored.get(measure) != name for measure, name in names.items())

    def _start(self, key: str) -> None:
        texts = self.store.read(key, "set.json")
        prompts = texts["prompts"], texts["identity"], texts["settings"]
        self._running[self.worker.call("measure", self.store.pictures(key), *prompts)] = key
