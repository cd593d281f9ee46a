"""StoryMaker: loading its file, and applying characters from reference images to a model."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import comfy.lora
import folder_paths
from comfy_api.latest import io
from torch import Tensor

from ..attention.storymaker import ImageConditioning
from ..models.storymaker.adapter import StoryMakerAdapter
from ..models.storymaker.weights import (
    StoryMakerFileError,
    listed,
    load_storymaker,
    read_checkpoint,
)
from ..runtime.patch import check_percents
from ..runtime.sampling import with_patch
from .attention import model_input, model_output, percent_inputs
from .folders import files_in, register
from .patching import attend, attention_widths, blocks_of
from .ranges import in_range
from .storymaker_patcher import storymaker_of
from .types import Character as CharacterType
from .types import StoryMaker as StoryMakerType

log = logging.getLogger(__name__)

KIND = "storymaker"
SUFFIXES = (".bin", ".safetensors", ".pt", ".pth")
SOURCE = "https://huggingface.co/RED-AIGC/StoryMaker"
UP = "_lora.up.weight"
"""Suffix of the LoRA up matrices."""

register(KIND, SUFFIXES, "storymaker", "photomaker", "ipadapter")


class LoadStoryMaker(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StoryLoom_LoadStoryMaker",
            display_name="Load StoryMaker adapter",
            category="StoryLoom/character",
            description=(
                "Loads the StoryMaker adapter, which lets an SDXL model draw characters from reference images: face, "
                f"hair, clothes and build. The file is mask.bin ({SOURCE}), or a safetensors copy of it, in "
                "models/storymaker. Nothing is downloaded, and nothing in the file is executed."
            ),
            search_aliases=["StoryMaker", "mask.bin", "PPR", "IP-Adapter", "character adapter", "face adapter"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=files_in(KIND, SUFFIXES),
                    tooltip="StoryMaker's mask.bin, or a .safetensors copy of it, in models/storymaker, "
                    "models/photomaker or models/ipadapter.",
                )
            ],
            outputs=[
                StoryMakerType.Output(
                    "storymaker", display_name="STORYMAKER", tooltip="The loaded adapter, for Apply StoryMaker."
                )
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, file):
        path = folder_paths.get_full_path(KIND, file)
        return None if path is None else os.stat(path).st_mtime_ns

    @classmethod
    def execute(cls, file) -> io.NodeOutput:
        path = folder_paths.get_full_path(KIND, file)
        if path is None:
            raise StoryMakerFileError(
                f'There is no file "{file}": put StoryMaker\'s mask.bin ({SOURCE}) into models/storymaker and press R.'
            )
        weights = load_storymaker(read_checkpoint(Path(path)))
        if weights.missing:
            raise StoryMakerFileError(f"{file}: {weights.missing}")
        return io.NodeOutput(storymaker_of(weights))


class ApplyStoryMaker(io.ComfyNode):
    """StoryMaker's image conditioning (arXiv 2409.12576)."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        numbers = (1, 2, 3)
        return io.Schema(
            node_id="StoryLoom_ApplyStoryMaker",
            display_name="Apply StoryMaker (PPR)",
            category="StoryLoom/character",
            description=(
                "Makes an SDXL model draw up to three characters as they look in their reference images: face, hair, "
                "clothes and build (StoryMaker). Place it anywhere between the checkpoint and KSampler. With a "
                "StoryLoom encode node, each frame gets the characters that its line names; with any other prompt, "
                "every image gets all of them."
            ),
            search_aliases=[
                "StoryMaker",
                "PPR",
                "IPAdapter",
                "reference character",
                "face",
                "outfit",
                "photo of a person",
            ],
            inputs=[
                model_input(),
                StoryMakerType.Input("storymaker", tooltip="The adapter, from Load StoryMaker adapter."),
                *(
                    CharacterType.Input(
                        f"character_{number}",
                        optional=number > 1,
                        tooltip=(
                            "A character that may appear. One with a name from the story script plays that character; "
                            "those without a name play the script's characters in order of appearance."
                        ),
                    )
                    for number in numbers
                ),
                io.Float.Input(
                    "token_strength",
                    default=0.8,
                    min=0.0,
                    max=2.0,
                    step=0.05,
                    tooltip="Strength of the reference images relative to the prompt. 0 is off. Published: 0.8.",
                ),
                io.Float.Input(
                    "lora_strength",
                    default=0.8,
                    min=-2.0,
                    max=2.0,
                    step=0.05,
                    tooltip=(
                        "Strength of the adapter's LoRA, which changes the model itself at no cost in time. 0 is off. "
                        "Published: 0.8."
                    ),
                ),
                io.Float.Input(
                    "face_strength",
                    default=1.0,
                    min=0.0,
                    max=2.0,
                    step=0.05,
                    advanced=True,
                    tooltip="Multiplies the face tokens. 0 leaves the face to the prompt. Published: 1.",
                ),
                io.Float.Input(
                    "appearance_strength",
                    default=1.0,
                    min=0.0,
                    max=2.0,
                    step=0.05,
                    advanced=True,
                    tooltip=(
                        "Multiplies the tokens for hair, clothes and build. 0 keeps only the face, for other clothes "
                        "or a drawn style. Published: 1."
                    ),
                ),
                *percent_inputs(),
                *(
                    io.Mask.Input(
                        f"region_{number}",
                        optional=True,
                        tooltip=(
                            f"Where in the image character {number} takes effect: white in a mask of any size, one for "
                            "all images or one per image. Not connected: everywhere."
                        ),
                    )
                    for number in numbers
                ),
            ],
            outputs=[model_output()],
        )

    @classmethod
    @in_range
    def execute(
        cls,
        model,
        storymaker,
        character_1,
        token_strength,
        lora_strength,
        face_strength,
        appearance_strength,
        start_percent,
        end_percent,
        character_2=None,
        character_3=None,
        region_1=None,
        region_2=None,
        region_3=None,
    ) -> io.NodeOutput:
        check_percents(start_percent, end_percent)
        check_fit(model, storymaker.adapter)
        pairs = ((character_1, region_1), (character_2, region_2), (character_3, region_3))
        for number, (character, region) in enumerate(pairs, start=1):
            check_region(region, number, character)
        connected = [pair for pair in pairs if pair[0] is not None]
        if not connected:
            raise ValueError("character_1 received no character: connect Character from image or Load character to it.")
        characters, regions = zip(*connected, strict=True)
        storymaker.adapter.check_characters(characters)
        patch = ImageConditioning(
            storymaker.adapter,
            characters,
            tuple(region if region is None else region.reshape(-1, *region.shape[-2:]) for region in regions),
            token_strength,
            face_strength,
            appearance_strength,
            start_percent,
            end_percent,
            blocks_of(model, "all"),
            storymaker.resident,
        )
        patched = with_patch(model, patch, attend)
        if lora_strength:
            add_lora(patched, storymaker.lora, lora_strength)
        return io.NodeOutput(patched)


def check_fit(model, adapter: StoryMakerAdapter) -> None:
    """Raise ValueError if the adapter does not fit this model."""
    widths, context = attention_widths(model)
    family = type(model.model.model_config).__name__
    if context != adapter.context:
        raise ValueError(
            f"StoryMaker needs SDXL, whose text tokens are {adapter.context} wide. Those of this model ({family}) are "
            f"{context} wide: load an SDXL checkpoint."
        )
    if widths != adapter.widths:
        raise ValueError(
            f"StoryMaker needs the {len(adapter.widths)} cross-attention layers of SDXL, but the {len(widths)} of this "
            f"model ({family}) differ: load an SDXL checkpoint that is not distilled into a smaller network."
        )


def check_region(mask: Tensor | None, number: int, character: object) -> None:
    """Raise ValueError for a region without its character, and for one that is not finite masks [..., H, W]."""
    if mask is None:
        return
    if character is None:
        raise ValueError(
            f"region_{number} is connected but character_{number} is not: connect that character, or disconnect the "
            "region."
        )
    if mask.ndim < 2 or 0 in mask.shape[-2:]:
        raise ValueError(
            f"region_{number} has shape {list(mask.shape)} instead of [masks, height, width]: connect a MASK."
        )
    if not mask.isfinite().all():
        raise ValueError(f"region_{number} contains NaN or infinity: check the node that produced it.")


def add_lora(model, lora: dict[str, Tensor], strength: float) -> None:
    """Add the adapter's LoRA to a model's patches. Raises ValueError if a part of it matches no layer."""
    names = comfy.lora.model_lora_keys_unet(model.model, {})
    patches = comfy.lora.load_lora(dict(lora), names)
    landed = model.add_patches(patches, strength)
    changes = [name.removesuffix(UP) for name in lora if name.endswith(UP)]
    lost = [name for name in changes if names.get(name) not in landed]
    if lost:
        log.warning("StoryMaker LoRA changes without a matching layer in this model: %s", ", ".join(lost))
        raise ValueError(
            f"Only {len(landed)} of StoryMaker's {len(changes)} LoRA changes match a layer of this model. Without a "
            f"match: {listed(lost)}. Load an SDXL checkpoint."
        )
