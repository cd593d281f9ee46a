"""The workflow that draws a prompt set with a method, in ComfyUI's API format."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256

from .prompts import DEMO, PromptSet

REWEIGHTINGS = {"none": "none", "npr": "npr", "svr": "svr", "svr-eot": "svr_eot"}
"""Part of a method's name -> reweighting of the story as one prompt."""
VANILLA, IPCA, CSA = "vanilla", "ipca", "csa"
PUBLISHED = "svr-eot+ipca"
"""The method of the published benchmark."""
FRAMES = "frames"
"""Id of the node that previews the pictures."""
TEXT_ENCODE = {
    "pooled": "full",
    "order": "weaken_first",
    "weaken_alpha": 0.01,
    "weaken_beta": 0.05,
    "enhance_alpha": -0.01,
    "enhance_beta": 1.0,
    "window": "circular",
    "enhance_identity": False,
}
WHOLE = {"start_percent": 0.0, "end_percent": 1.0}


@dataclass(frozen=True)
class Method:
    """reweighting: of the story as one prompt, None for one prompt per frame. ipca, csa: whether they are on."""

    reweighting: str | None = None
    ipca: bool = False
    csa: bool = False

    @property
    def name(self) -> str:
        """The canonical spelling: "csa+svr+ipca"."""
        text = next((name for name, value in REWEIGHTINGS.items() if value == self.reweighting), "")
        return "+".join(filter(None, [self.csa * CSA, text, self.ipca * IPCA])) or VANILLA


def parse_method(text: str) -> Method:
    """A method by its name: "vanilla", or parts joined by + in any order. Raises ValueError for an unknown name."""
    parts = text.strip().lower().split("+")
    texts = [part for part in parts if part in REWEIGHTINGS]
    known = parts == [VANILLA] or all(part in REWEIGHTINGS or part in (IPCA, CSA) for part in parts)
    if not known or len(texts) > 1 or len(set(parts)) < len(parts):
        raise ValueError(
            f'There is no method "{text}": write vanilla, or join with + at most one of {", ".join(REWEIGHTINGS)} '
            f"with {IPCA} and {CSA}, as in {PUBLISHED}."
        )
    return Method(REWEIGHTINGS[texts[0]] if texts else None, IPCA in parts, CSA in parts)


@dataclass(frozen=True)
class Settings:
    """Sampling settings. checkpoint: a file name on the server, or "demo". seed: for sets without their own.

    The defaults are those of the published benchmark, as far as ComfyUI's own samplers have them.
    """

    checkpoint: str = "sd_xl_base_1.0.safetensors"
    seed: int = 42
    steps: int = 50
    width: int = 1024
    height: int = 1024
    cfg: float = 5.0
    sampler: str = "euler"
    scheduler: str = "ddim_uniform"
    shared_noise: bool = True
    identity_weight: float = 2.0
    sampling_rate: float = 0.5


DEMO_SETTINGS = Settings(DEMO, steps=10, width=192, height=192, scheduler="simple")
"""The settings of docs/effect.md: ComfyUI's "simple" has the same steps as the host without ComfyUI."""


def graph_of(one: PromptSet, method: Method, settings: Settings) -> dict:
    """A prompt for POST /prompt that previews one picture per frame at the node FRAMES."""
    seed = settings.seed if one.seed is None else one.seed
    graph: dict[str, dict] = {}

    def add(name: str, kind: str, **inputs) -> str:
        graph[name] = {"class_type": kind, "inputs": inputs}
        return name

    if settings.checkpoint == DEMO:
        add("checkpoint", "StoryLoom_DemoModel")
    else:
        add("checkpoint", "CheckpointLoaderSimple", ckpt_name=settings.checkpoint)
    frames = "\n".join(map(escaped, one.settings))
    story = [add("story", "StoryLoom_Script", identity=escaped(one.identity), frames=frames, style=""), 0]
    encode = {"clip": ["checkpoint", 1], "story": story, "literal": True}
    if method.reweighting is None:
        add("text", "StoryLoom_EncodePerFrame", **encode)
    else:
        add("text", "StoryLoom_EncodeOnePrompt", **encode, reweighting=method.reweighting, **TEXT_ENCODE)
    model = ["checkpoint", 0]
    if method.csa:
        sharing = {"sampling_rate": settings.sampling_rate, "anchors": 0, "skip_first_steps": 1, "schedule": "steady"}
        where = {"blocks": "output", "seed": seed}
        model = [add(CSA, "StoryLoom_ConsistentSelfAttention", model=model, **sharing, **WHOLE, **where), 0]
    if method.ipca:
        weight = {"identity_weight": settings.identity_weight, "blocks": "all"}
        model = [add(IPCA, "StoryLoom_IPCA", model=model, **weight, **WHOLE), 0]
    size = {"width": settings.width, "height": settings.height}
    add("noise", "StoryLoom_EmptyLatent", **size, story=story, shared_noise=settings.shared_noise)
    add("zeros", "ConditioningZeroOut", conditioning=["text", 0])
    add(
        "sampler",
        "KSampler",
        model=model,
        positive=["text", 0],
        negative=["zeros", 0],
        latent_image=["noise", 0],
        seed=seed,
        steps=settings.steps,
        cfg=settings.cfg,
        sampler_name=settings.sampler,
        scheduler=settings.scheduler,
        denoise=1.0,
    )
    add("pictures", "VAEDecode", samples=["sampler", 0], vae=["checkpoint", 2])
    add(FRAMES, "PreviewImage", images=["pictures", 0])
    return graph


def escaped(text: str) -> str:
    """A text that the story script reads literally."""
    return "".join(f"\\{sign}" if sign in "#[]" else sign for sign in text)


def digest(graph: Mapping) -> str:
    """A short hash of a workflow."""
    return sha256(json.dumps(graph, sort_keys=True).encode()).hexdigest()[:16]
