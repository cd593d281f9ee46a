"""StoryMaker's file (arXiv 2409.12576): reads it safely and gives its 1373 tensors the names that hosts use.

`mask.bin` contains the network that makes image tokens (`image_proj_model`, see `ppr`), and for each attention layer of
SDXL's UNet a LoRA for its projections and, for cross-attention, key and value projections for the image tokens
(`ip_adapter`). Layers are numbered in the order of diffusers: down, up, middle; each block's self-attention, then its
cross-attention.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..files import read_weights
from .ppr import PositionalPerceiverResampler

log = logging.getLogger(__name__)

PROJECTION, ADAPTER = "image_proj_model", "ip_adapter"
MEANING = {PROJECTION: "the network that makes image tokens", ADAPTER: "the changes to the UNet's attention"}
CONTEXT = 2048
"""Width of text and image tokens."""
CHANNELS = 320
"""Base channels of SDXL's UNet; its layers' widths are multiples of it."""
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LONGEST = 300
"""Most characters of a name in an error message."""
NAMED = 3
"""Most names of each kind in an error message."""

Key = tuple[str, int, int]
"""("input" | "middle" | "output", number, index of the transformer block), in ComfyUI's numbering."""
AGAIN = "download StoryMaker's mask.bin again"


class LayerSlot(NamedTuple):
    """A spatial transformer of SDXL's UNet: its names in diffusers and in ComfyUI, its width and number of blocks."""

    diffusers: str
    part: str
    number: int
    width: int
    depth: int


LAYER_SLOTS = (
    LayerSlot("down_blocks.1.attentions.0", "input", 4, 640, 2),
    LayerSlot("down_blocks.1.attentions.1", "input", 5, 640, 2),
    LayerSlot("down_blocks.2.attentions.0", "input", 7, 1280, 10),
    LayerSlot("down_blocks.2.attentions.1", "input", 8, 1280, 10),
    LayerSlot("up_blocks.0.attentions.0", "output", 0, 1280, 10),
    LayerSlot("up_blocks.0.attentions.1", "output", 1, 1280, 10),
    LayerSlot("up_blocks.0.attentions.2", "output", 2, 1280, 10),
    LayerSlot("up_blocks.1.attentions.0", "output", 3, 640, 2),
    LayerSlot("up_blocks.1.attentions.1", "output", 4, 640, 2),
    LayerSlot("up_blocks.1.attentions.2", "output", 5, 640, 2),
    LayerSlot("mid_block.attentions.0", "middle", 0, 1280, 10),
)
"""In the file's order."""


class StoryMakerFileError(ValueError):
    """A file is missing, damaged or not StoryMaker's. The message is one sentence for the user."""

    __module__ = "storyloom"  # ComfyUI shows the module before the message; otherwise it would be this file's path


@dataclass(frozen=True, eq=False)
class StoryMakerWeights:
    """StoryMaker's tensors in the file's dtype.

    ppr       state dict of `ppr.PositionalPerceiverResampler`
    lora      LoRA matrices under diffusers' names, rank from the tensors, without alpha (factor 1):
              `down_blocks.1.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.up.weight` [out, rank]
    image_kv  cross-attention layer, for example ("middle", 0, 9) -> the key and value matrices [C, 2048]
    missing   a sentence on the part that the file lacks, which is empty here; "" for a complete file
    unused    names of the file's tensors that belong to neither part
    """

    ppr: dict[str, Tensor]
    lora: dict[str, Tensor]
    image_kv: dict[Key, tuple[Tensor, Tensor]]
    missing: str = ""
    unused: tuple[str, ...] = ()


class Layer(NamedTuple):
    """An attention layer. processor: diffusers' name; source: width of the inputs of its keys and values."""

    processor: str
    key: Key
    width: int
    source: int
    cross: bool

    @property
    def inputs(self) -> dict[str, int]:
        """The projections that have a LoRA, and the width of each one's input."""
        return {"q": self.width, "k": self.source, "v": self.source, "out": self.width}


def load_storymaker(state_dict: Mapping[str, Any]) -> StoryMakerWeights:
    """Sort the tensors of StoryMaker's file.

    state_dict: {"image_proj_model": {...}, "ip_adapter": {...}}, the same with dotted names, or the contents of one of
    the two, in float32, float16 or bfloat16; may be on the meta device. Raises StoryMakerFileError, which names the
    tensors, unless each part that is present has exactly its tensors, with the right shapes and finite values.
    """
    parts, unused = split_parts(state_dict)
    projection, adapter = parts[PROJECTION], parts[ADAPTER]
    if not projection and not adapter:
        content = f"only {listed(unused)}" if unused else "nothing"
        raise StoryMakerFileError(f"The file contains {content}, and no part of StoryMaker: choose its mask.bin.")
    _refuse_faults(
        {f"{part}.{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()},
        (_projection_shapes() if projection else {}) | (_adapter_shapes(adapter) if adapter else {}),
    )

    lora, image_kv = {}, {}
    for number, layer in enumerate(layers() if adapter else ()):
        for target in layer.inputs:
            for half in ("up", "down"):
                name = f"to_{target}_lora.{half}.weight"
                lora[f"{layer.processor}.{name}"] = adapter[f"{number}.{name}"]
        if layer.cross:
            image_kv[layer.key] = adapter[f"{number}.to_k_ip.weight"], adapter[f"{number}.to_v_ip.weight"]
    missing = ""
    if not projection or not adapter:
        part = ADAPTER if projection else PROJECTION
        missing = (
            f"The file contains only half of StoryMaker; {part} is missing ({MEANING[part]}): choose the complete "
            "mask.bin."
        )
    return StoryMakerWeights(projection, lora, image_kv, missing, unused)


def split_parts(state_dict: Mapping[str, Any]) -> tuple[dict[str, dict[str, Tensor]], tuple[str, ...]]:
    """The tensors of both parts by their names within the part, and the names of tensors that belong to neither.

    state_dict: as for `load_storymaker`. If it lacks the names of the parts, numbered tensors are the adapter's.
    """
    parts: dict[str, dict[str, Tensor]] = {PROJECTION: {}, ADAPTER: {}}
    flat = _flat(state_dict)
    named = any(name.partition(".")[0] in parts for name in flat)
    unused = []
    for name, tensor in flat.items():
        part, _, inside = name.partition(".")
        if not named:
            part, inside = ADAPTER if part.isdigit() else PROJECTION, name
        if part in parts:
            parts[part][inside] = tensor
        else:
            unused.append(name)
    return parts, tuple(unused)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The tensors of a PyTorch or safetensors file, recognised by content; nested once if the file is.

    Nothing in the file is executed. Large files are memory-mapped if their format allows it. Raises StoryMakerFileError
    if the file is missing, damaged, of another kind, or contains anything but tensors.
    """
    path = Path(path)
    return _only_tensors(read_weights(path, StoryMakerFileError, "choose StoryMaker's mask.bin", AGAIN), path)


def _only_tensors(state_dict: Any, path: Path) -> dict[str, Any]:
    """Return `state_dict` if it contains only dense CPU tensors. Otherwise raises StoryMakerFileError."""
    values = _flat(state_dict) if isinstance(state_dict, dict) else {"": state_dict}
    for name, value in values.items():
        dense = isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu"
        if not name or not dense:
            content = f"{type(value).__name__} {name[:LONGEST]}".strip()
            raise StoryMakerFileError(f'"{path}" contains something other than weights ({content}): {AGAIN}.')
    return state_dict


def _flat(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Values of a dict and of the dicts inside it, under dotted names."""
    flat = {}
    for name, value in state_dict.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}.{inner}": each for inner, each in value.items()}
        else:
            flat[f"{name}"] = value
    return flat


def layers(channels: int = CHANNELS) -> Iterator[Layer]:
    """The 140 attention layers in the file's order. channels: base channels of a UNet with SDXL's layout."""
    for slot in LAYER_SLOTS:
        width = slot.width * channels // CHANNELS
        for j in range(slot.depth):
            for attn, source in (("attn1", width), ("attn2", CONTEXT)):
                processor = f"{slot.diffusers}.transformer_blocks.{j}.{attn}.processor"
                yield Layer(processor, (slot.part, slot.number, j), width, source, attn == "attn2")


def _projection_shapes() -> dict[str, tuple[int, ...]]:
    network = PositionalPerceiverResampler(device="meta").state_dict()
    return {f"{PROJECTION}.{name}": tuple(tensor.shape) for name, tensor in network.items()}


def _adapter_shapes(adapter: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Expected shapes of the adapter's tensors. The rank of each LoRA is read from the matrix that exists, and clamped.

    A tensor in a file may be one number expanded to billions, so an unlimited rank could exhaust memory.
    """
    shapes = {}
    for number, layer in enumerate(layers()):
        for target, source in layer.inputs.items():
            down, up = (f"{number}.to_{target}_lora.{half}.weight" for half in ("down", "up"))
            halves = ((adapter.get(down), 0), (adapter.get(up), 1))
            ranks = [half.shape[axis] for half, axis in halves if half is not None and half.ndim == 2]
            rank = min(max(1, ranks[0]), layer.width, source) if ranks else 1
            shapes |= {f"{ADAPTER}.{down}": (rank, source), f"{ADAPTER}.{up}": (layer.width, rank)}
        if layer.cross:
            shapes |= {f"{ADAPTER}.{number}.to_{which}_ip.weight": (layer.width, CONTEXT) for which in "kv"}
    return shapes


def _refuse_faults(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise StoryMakerFileError unless `tensors` has exactly these names and shapes, and finite values.

    The message names the first faults of each kind; if there are more, the log lists them all.
    """
    faults: dict[str, list[str]] = {"missing": [name for name in shapes if name not in tensors]}
    for name, tensor in tensors.items():
        if name not in shapes:
            faults.setdefault("unknown", []).append(name)
        elif tensor.shape != shapes[name]:
            mismatch = f"{name} {list(tensor.shape)} instead of {list(shapes[name])}"
            faults.setdefault("of another shape", []).append(mismatch)
        elif tensor.dtype not in DTYPES:
            faults.setdefault("of an unsupported dtype", []).append(f"{name} {tensor.dtype}")
        elif not tensor.is_meta and not torch.stack(tensor.aminmax()).isfinite().all():
            faults.setdefault("not finite", []).append(name)
    for fault, names in faults.items():
        if len(names) > NAMED:
            log.warning("Tensors of StoryMaker's file, %d %s: %s", len(names), fault, ", ".join(names))
    summary = "; ".join(f"{len(names)} {fault}: {listed(names)}" for fault, names in faults.items() if names)
    if summary:
        raise StoryMakerFileError(f"The file's tensors do not match StoryMaker's ({summary}): {AGAIN}.")


def listed(names: Sequence[str]) -> str:
    """The first NAMED names, and how many more there are."""
    rest = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(name[:LONGEST] for name in names[:NAMED]) + rest
