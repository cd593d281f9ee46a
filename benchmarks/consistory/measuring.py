"""What is measured of a set's pictures, apart from drawing: similarity, and on the demo model what they show."""

from __future__ import annotations

import io
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path

from .graph import escaped
from .places import RayPlace, ThreadPlace
from .store import Store, as_json

METRICS = "metrics.json"
CLIP_I, CLIP_T = "ViT-B-16-quickgelu", "ViT-B-32-quickgelu"
"""Architectures of the published measures."""


@dataclass(frozen=True)
class Choice:
    """What measures. clip_i, clip_t: weights of CLIP_I and CLIP_T, a file or a tag of open_clip's; dreamsim: a folder.

    demo: the demo model's reader instead, and exactly what its pictures show.
    """

    clip_i: str = "openai"
    clip_t: str = "openai"
    dreamsim: Path | None = None
    download: bool = False
    device: str = "cpu"
    demo: bool = False


class Ruler:
    """Measures set by set; what it needs is loaded once."""

    def __init__(self, choice: Choice):
        self.choice = choice
        self.tools: dict[str, object] = {}

    def load(self) -> tuple[dict[str, str], list[str]]:
        """Measure -> name of what measures it, and a sentence for each that cannot be measured."""
        choice, reasons = self.choice, []
        if choice.demo:
            from ...models.demo.similarity import DemoReader

            reader = DemoReader()
            self.tools = {"clip_i": reader, "clip_t": reader}
        else:
            from ...measures.encoders import SimilarityError, load_dreamsim, load_open_clip

            how = {"device": choice.device, "download": choice.download}
            loaders = {
                "clip_i": lambda: load_open_clip(CLIP_I, choice.clip_i, **how),
                "clip_t": lambda: load_open_clip(CLIP_T, choice.clip_t, **how),
            }
            if choice.dreamsim is not None:
                loaders["dreamsim"] = lambda: load_dreamsim("ensemble", choice.dreamsim, choice.device)
            for name, load in loaders.items():
                try:
                    self.tools[name] = load()
                except SimilarityError as error:
                    reasons.append(f"{name.replace('_', '-').upper()} is not measured: {error}")
        return {name: tool.name for name, tool in self.tools.items()}, reasons

    def measure(
        self, pictures: Sequence[bytes], prompts: Sequence[str], identity: str, settings: Sequence[str]
    ) -> dict:
        """What `metrics.json` holds: "consistency", and where the demo's reader can tell, "shown" per frame."""
        import numpy as np
        import torch
        from PIL import Image

        from ...measures.consistency import measure

        images = np.stack(
            [np.asarray(Image.open(io.BytesIO(file)).convert("RGB"), np.float32) / 255 for file in pictures]
        )
        tools = self.tools
        if self.choice.demo and world_story(identity, settings) is None:
            tools = {name: tool for name, tool in tools.items() if name != "clip_t"}  # it would understand nothing
        found = measure(
            torch.from_numpy(images),
            list(prompts),
            image_encoder=tools.get("clip_i"),
            text_encoder=tools.get("clip_t"),
            dreamsim=tools.get("dreamsim"),
        )
        told = {"encoders": {name: tool.name for name, tool in self.tools.items()}, "consistency": found.to_json()}
        return told | ({"shown": shown(images, identity, settings)} if self.choice.demo else {})


def shown(images, identity: str, settings: Sequence[str]) -> list[dict] | None:
    """The scene of every picture as the reader sees it; None for a text that is not the demo world's."""
    from ...world.reader import Reader
    from ...world.scene import SIZE

    _, height, width, _ = images.shape
    if world_story(identity, settings) is None or height != width or height % SIZE:
        return None
    return [asdict(reading.scene) for reading in Reader().read_all(images)]


def world_story(identity: str, settings: Sequence[str]):
    """A set as a story of the demo's world, None where its words are others."""
    from ...world.parsing import parse_world_story

    return parse_world_story(escaped(identity), [escaped(setting) for setting in settings])


class Measuring:
    """Measures drawn sets of a folder one after the other while others are drawn, and keeps the results there.

    again: also where the folder already has what would be measured. faults: sets that cannot be measured, and why.
    """

    def __init__(self, store: Store, place: ThreadPlace | RayPlace, again: bool = False):
        self.store, self.place, self.again = store, place, again
        self.faults: dict[str, str] = {}
        self._loading = place.call("load")
        self._running: dict[Future, str] = {}
        self._asked: list[str] = []

    def loaded(self) -> tuple[dict[str, str], list[str]]:
        """What `Ruler.load` gives. Whatever goes wrong there stops no drawing."""
        try:
            return self._loading.result()
        except Exception as error:
            return {}, [f"Nothing is measured: {error}"]

    def add(self, keys: Sequence[str]) -> None:
        """Ask for drawn sets."""
        self._asked += keys

    def collect(self, wait: bool = False) -> int:
        """Keep what is measured by now, and with `wait` one set at least; returns how many remain."""
        if wait or self._loading.done():
            names, _ = self.loaded()
            for key in self._asked:
                if names and (self.again or self._missing(key, names)):
                    self._start(key)
            self._asked.clear()
        if wait and self._running:
            next(iter(self._running)).exception()
        for future in [future for future in self._running if future.done()]:
            key = self._running.pop(future)
            try:
                self.store.write(self.store.folder / key / METRICS, as_json(future.result()))
            except Exception as error:  # out of memory, a damaged picture: the others are measured
                self.faults[key] = f"not measured: {error}"
        return len(self._running) + len(self._asked)

    def _missing(self, key: str, names: dict[str, str]) -> bool:
        """Whether the folder lacks something of what can be measured."""
        there = (self.store.read(key, METRICS) or {}).get("encoders", {})
        return any(there.get(measure) != name for measure, name in names.items())

    def _start(self, key: str) -> None:
        texts = self.store.read(key, "set.json")
        said = texts["prompts"], texts["identity"], texts["settings"]
        self._running[self.place.call("measure", self.store.pictures(key), *said)] = key
