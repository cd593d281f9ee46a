"""The plan of a run: its prompt sets, methods and settings."""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass, fields, replace
from hashlib import sha256
from pathlib import Path

from .graph import DEMO_SETTINGS, PUBLISHED, Method, Settings, digest, graph_of, parse_method
from .prompts import DEMO, DEMO_STORIES, PromptSet, chosen, demo_sets, read_prompts
from .session import Job

OUT = Path(__file__).absolute().parents[2] / "out" / "consistory"


@dataclass(frozen=True)
class Plan:
    """Everything that a run has to draw. The key of a set with a method is "method/set"."""

    prompts: str
    prompts_digest: str
    settings: Settings
    methods: tuple[Method, ...]
    sets: tuple[PromptSet, ...]

    @property
    def run_settings(self) -> dict:
        """The settings that determine the pictures of the folder: `run.json`."""
        seed = "each set's own" if all(one.seed is not None for one in self.sets) else self.settings.seed
        return {
            "prompts": self.prompts,
            "prompts_sha256": self.prompts_digest,
            **asdict(self.settings),
            "seed": seed,
        }

    def keys(self, method: Method) -> list[str]:
        return [f"{method.name}/{one.name}" for one in self.sets]

    def job(self, method: Method, one: PromptSet) -> Job:
        key, graph = f"{method.name}/{one.name}", graph_of(one, method, self.settings)
        return Job(key, f"{key} {digest(graph)}", graph, len(one.settings))

    def texts(self, method: Method, one: PromptSet) -> dict:
        """The content of a set's `set.json`."""
        texts = {**asdict(one), "settings": list(one.settings), "identity": one.identity, "prompts": one.prompts}
        return {**texts, "method": method.name, "seed": self.settings.seed if one.seed is None else one.seed}


def plan_of(options: argparse.Namespace) -> Plan:
    """The plan for the options. Raises PromptFileError, and ValueError for an unknown method or an invalid size."""
    changes = {field.name: getattr(options, field.name) for field in fields(Settings)}
    changes = {name: value for name, value in changes.items() if value is not None}
    is_demo = options.prompts == DEMO
    base = DEMO_SETTINGS if changes.get("checkpoint", DEMO if is_demo else None) == DEMO else Settings()
    settings = replace(base, **changes)
    for side in ("width", "height"):
        if getattr(settings, side) % 8 or getattr(settings, side) < 64:
            raise ValueError(f"--{side} must be at least 64 and a multiple of 8, got {getattr(settings, side)}.")
    if is_demo:
        sets = demo_sets(DEMO_STORIES if options.limit is None else options.limit)
        name, prompts_digest = DEMO, ""
        if options.seed is not None:
            sets = [replace(one, seed=None) for one in sets]
    else:
        path = Path(options.prompts)
        sets, name = read_prompts(path), path.name
        prompts_digest = sha256(path.read_bytes()).hexdigest()
    methods = tuple(dict.fromkeys(map(parse_method, options.method or [PUBLISHED])))
    return Plan(name, prompts_digest, settings, methods, tuple(chosen(sets, options.only, options.limit)))


def folder_of(options: argparse.Namespace, plan: Plan) -> Path:
    return options.out or OUT / f"{Path(plan.prompts).stem}-{Path(plan.settings.checkpoint).stem}"
