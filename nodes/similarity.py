"""Encoders for measuring stories: CLIP through open_clip, the demo model's reader, and DreamSim."""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import comfy.model_management
import comfy.model_patcher
import comfy.utils
import folder_paths
from comfy_api.latest import io
from torch import Tensor, nn

from ..measures.clip import OpenClip, load_open_clip
from ..measures.dreamsim import DreamSim, load_dreamsim
from .folders import files_in, register
from .types import Similarity

OPEN_CLIP, DREAMSIM = "open_clip", "dreamsim"
SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
ARCHITECTURES = (
    *("ViT-B-32-quickgelu", "ViT-B-16-quickgelu", "ViT-L-14-quickgelu", "ViT-L-14-336-quickgelu"),
    *("ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-H-14", "ViT-g-14", "ViT-bigG-14", "ViT-H-14-quickgelu"),
)
"""The first is that of the published CLIP-T, the second that of CLIP-I."""
CACHED = "cached: "
TAGS = (
    *("openai", "laion2b_s34b_b79k", "laion2b_s34b_b88k", "laion2b_s32b_b82k", "laion2b_s32b_b79k"),
    *("laion2b_s39b_b160k", "dfn5b"),
)
register(OPEN_CLIP, SUFFIXES, OPEN_CLIP)
register(DREAMSIM, (), DREAMSIM)


@dataclass(frozen=True, eq=False)
class Managed:
    """An Encoder whose network ComfyUI loads onto the device for use, and unloads when memory is short."""

    encoder: OpenClip
    patcher: comfy.model_patcher.ModelPatcher

    @property
    def name(self) -> str:
        return self.encoder.name

    def images(self, pictures: Tensor) -> Tensor:
        load(self.patcher)
        return self.encoder.images(pictures)

    def texts(self, texts: Sequence[str]) -> Tensor:
        load(self.patcher)
        return self.encoder.texts(texts)


@dataclass(frozen=True, eq=False)
class ManagedDreamSim:
    """DreamSim whose networks ComfyUI loads and unloads, as for Managed."""

    dreamsim: DreamSim
    patcher: comfy.model_patcher.ModelPatcher

    @property
    def name(self) -> str:
        return self.dreamsim.name

    def distance(self, images: Tensor) -> Tensor:
        load(self.patcher)
        return self.dreamsim.distance(images)


def patcher_of(network: nn.Module) -> comfy.model_patcher.ModelPatcher:
    """Any network under ComfyUI's memory management."""
    return comfy.model_patcher.ModelPatcher(
        network,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.text_encoder_offload_device(),
    )


def load(patcher: comfy.model_patcher.ModelPatcher) -> None:
    """Load a whole network onto the device: its layers do not cast weights from other devices."""
    comfy.model_management.load_models_gpu([patcher], force_full_load=True)


@dataclass(frozen=True, eq=False)
class ClipVision:
    """A stock CLIP_VISION as an Encoder of images, centre-cropped to a square as in CLIP's own preparation."""

    clip_vision: object
    name: str = "CLIP_VISION"

    def images(self, pictures: Tensor) -> Tensor:
        features = self.clip_vision.encode_image(pictures[..., :3], crop=True)["image_embeds"]
        if features is None or features.ndim != 2:
            raise ValueError(
                "This CLIP_VISION returns no image_embeds to compare images with: load the vision model of a CLIP, "
                "such as CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors."
            )
        if not features.isfinite().all():
            raise ValueError("The CLIP_VISION returned NaN or infinity: start ComfyUI with --fp32-text-enc.")
        return features.detach().float().cpu().clone()


class Kept(dict):
    """The last DreamSim, by kind and folder."""


_kept: weakref.WeakValueDictionary[str, Kept] = weakref.WeakValueDictionary()


def kept() -> Kept:
    """The cache that is kept between executions, for as long as a node references it."""
    held = _kept.get(DREAMSIM)
    if held is None:
        held = _kept[DREAMSIM] = Kept()
    return held


def dreamsim_of(kind: str) -> ManagedDreamSim:
    """DreamSim from models/dreamsim; reuses the last one if it is the same."""
    folders = folder_paths.get_folder_paths(DREAMSIM)
    folder = next((folder for folder in folders if os.path.isdir(folder)), folders[0])
    held = kept()
    if (kind, folder) not in held:
        held.clear()
        dreamsim = load_dreamsim(kind, folder)
        networks = nn.ModuleList(
            [dreamsim.network]
        )  # ComfyUI sets attributes on it, which the package's own network may not allow
        held[kind, folder] = ManagedDreamSim(dreamsim, patcher_of(networks))
    return held[kind, folder]


def similarity_output() -> Similarity.Output:
    return Similarity.Output(
        "similarity", display_name="SIMILARITY", tooltip="An image and text encoder, for Story consistency."
    )


class LoadOpenCLIP(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StoryLoom_LoadOpenCLIP",
            display_name="Load OpenCLIP",
            category="StoryLoom/measure",
            description=(
                "Loads a complete CLIP, image and text encoder, for Story consistency. Needs the package "
                "open_clip_torch. The weights come from models/open_clip or from open_clip's own cache; nothing is "
                "downloaded unless you allow it, and nothing in a file is executed."
            ),
            search_aliases=["CLIP score", "CLIP-T", "CLIP-I", "CLIPScore", "open_clip", "image text similarity"],
            inputs=[
                io.Combo.Input(
                    "architecture",
                    options=list(ARCHITECTURES),
                    tooltip="The network that the weights belong to. Published: ViT-B-32-quickgelu for CLIP-T, "
                    "ViT-B-16-quickgelu for CLIP-I, both with OpenAI's weights. quickgelu is OpenAI's activation.",
                ),
                io.Combo.Input(
                    "weights",
                    options=[*(f"{CACHED}{tag}" for tag in TAGS), *files_in(OPEN_CLIP, SUFFIXES)],
                    tooltip="A file in models/open_clip, or an open_clip tag whose weights are in its cache. Not every "
                    "architecture has every tag; the error message lists the available ones.",
                ),
                io.Boolean.Input(
                    "download",
                    default=False,
                    tooltip="On: downloads missing weights into the cache, 0.6 GB for ViT-B-32, up to 10 GB for "
                    "ViT-bigG-14. Off: an error message shows where to get them.",
                ),
            ],
            outputs=[similarity_output()],
        )

    @classmethod
    def fingerprint_inputs(cls, architecture, weights, download):
        path = None if weights.startswith(CACHED) else folder_paths.get_full_path(OPEN_CLIP, weights)
        return None if path is None else os.stat(path).st_mtime_ns

    @classmethod
    def execute(cls, architecture, weights, download) -> io.NodeOutput:
        source = weights.removeprefix(CACHED)
        if source == weights:
            source = Path(folder_paths.get_full_path_or_raise(OPEN_CLIP, weights))
        bar = comfy.utils.ProgressBar(1)
        encoder = load_open_clip(architecture, source, download=download, progress=bar.update_absolute)
        return io.NodeOutput(Managed(encoder, patcher_of(encoder.network)))


class DemoSimilarity(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StoryLoom_DemoSimilarity",
            display_name="Demo similarity",
            category="StoryLoom/demo",
            description=(
                "Replaces Load OpenCLIP for images from the Demo model: reads its pixel-art scenes exactly, without a "
                "download. Same figures: the share of species, fur, shirt, trousers and hat in which two frames agree. "
                "Shown as told: how much of a frame's text is visible in its image. These are not CLIP scores."
            ),
            search_aliases=["test similarity", "attribute reader", "CLIP score", "StoryLoom demo", "measure demo"],
            inputs=[],
            outputs=[similarity_output()],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        from ..models.demo.similarity import DemoReader

        return io.NodeOutput(DemoReader())
