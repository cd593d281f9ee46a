"""StoryMaker's file (arXiv 2409.12576): reads it safely and names its 1373 tensors as hosts name them.

`mask.bin` holds the network that makes image tokens (`image_proj_model`, see `ppr`), and for each attention layer of
SDXL's UNet a low-rank change of its projections and, for cross-attention, keys and values for the tokens
(`ip_adapter`). It numbers the layers as diffusers lists them: down, up, middle; each block's self-attention, then its
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
"""Channels of SDXL's UNet, of which its layers' widths are multiples."""
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LONGEST = 300
"""Characters of a name that an error tells."""
NAMED = 3
"""Names of each kind that an error tells."""

Key = tuple[str, int, int]
"""("input" | "middle" | "output", number, index of the transformer block), as ComfyUI counts."""
AGAIN = "download StoryMaker's mask.bin again"


class Place(NamedTuple):
    """A spatial transformer of SDXL's UNet: its names in diffusers and in ComfyUI, its width and number of blocks."""

    diffusers: str
    part: str
    number: int
    width: int
    depth: int


PLACES = (
    Place("down_blocks.1.attentions.0", "input", 4, 640, 2),
    Place("down_blocks.1.attentions.1", "input", 5, 640, 2),
    Place("down_blocks.2.attentions.0", "input", 7, 1280, 10),
    Place("down_blocks.2.attentions.1", "input", 8, 1280, 10),
    Place("up_blocks.0.attentions.0", "output", 0, 1280, 10),
    Place("up_blocks.0.attentions.1", "output", 1, 1280, 10),
    Place("up_blocks.0.attentions.2", "output", 2, 1280, 10),
    Place("up_blocks.1.attentions.0", "output", 3, 640, 2),
    Place("up_blocks.1.attentions.1", "output", 4, 640, 2),
    Place("up_blocks.1.attentions.2", "output", 5, 640, 2),
    Place("mid_block.attentions.0", "middle", 0, 1280, 10),
)
"""In the order in which the file numbers them."""


class StoryMakerFileError(ValueError):
    """A file is missing, damaged or not StoryMaker's; the message is one sentence for the user."""

    __module__ = "storyloom"  # ComfyUI shows it before the message, and would show the path of this file


@dataclass(frozen=True, eq=False)
class StoryMakerWeights:
    """StoryMaker's tensors in the dtype of the file.

    ppr       state dict of `ppr.PositionalPerceiverResampler`
    lora      halves of the low-rank changes under diffusers' names, rank from the tensors, without alpha (factor 1):
              `down_blocks.1.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.up.weight` [out, rank]
    image_kv  by cross-attention layer, for example ("middle", 0, 9): the matrices [C, 2048] for keys and values
    missing   one sentence on the half that the file lacks and that is empty here, "" when it is whole
    unused    names of the file's tensors that belong to neither half
    """

    ppr: dict[str, Tensor]
    lora: dict[str, Tensor]
    image_kv: dict[Key, tuple[Tensor, Tensor]]
    missing: str = ""
    unused: tuple[str, ...] = ()


class Layer(NamedTuple):
    """An attention layer. processor: diffusers' name; source: width of what its keys and values are made of."""

    processor: str
    key: Key
    width: int
    source: int
    cross: bool

    @property
    def inputs(self) -> dict[str, int]:
        """The projections that have a low-rank change, with the width of what each projects."""
        return {"q": self.width, "k": self.source, "v": self.source, "out": self.width}


def load_storymaker(state_dict: Mapping[str, Any]) -> StoryMakerWeights:
    """Sort the tensors of StoryMaker's file.

    state_dict: {"image_proj_model": {...}, "ip_adapter": {...}}, the same under dotted names, or the inside of one of
    the two, in float32, float16 or bfloat16, on the meta device too. Raises StoryMakerFileError, naming the tensors,
    when a half that is there has not exactly its tensors, in their shapes and with finite values.
    """
    parts, unused = split_parts(state_dict)
    projection, adapter = parts[PROJECTION], parts[ADAPTER]
    if not projection and not adapter:
        found = f"only {listed(unused)}" if unused else "nothing"
        raise StoryMakerFileError(f"The file contains {found}, and no part of StoryMaker: choose its mask.bin.")
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
    """The tensors of both parts by their names inside, and the names of those that belong to neither.

    state_dict: as for `load_storymaker`. Without the parts' names, numbered tensors are the adapter's.
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
    """The tensors of a PyTorch or safetensors file, told apart by content; nested once, if the file is.

    Nothing in the file is executed. Large files are mapped into memory instead of being read where their format allows
    it. Raises StoryMakerFileError when the file is missing, damaged, of another kind, or holds more than tensors.
    """
    path = Path(path)
    return _only_tensors(read_weights(path, StoryMakerFileError, "choose StoryMaker's mask.bin", AGAIN), path)


def _only_tensors(state_dict: Any, path: Path) -> dict[str, Any]:
    """The same, once it is known to hold dense tensors on the CPU and nothing else. Raises StoryMakerFileError."""
    values = _flat(state_dict) if isinstance(state_dict, dict) else {"": state_dict}
    for name, value in values.items():
        dense = isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu"
        if not name or not dense:
            found = f"{type(value).__name__} {name[:LONGEST]}".strip()
            raise StoryMakerFileError(f'"{path}" contains something other than weights ({found}): {AGAIN}.')
    return state_dict


def _flat(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Values of a dict and of the dicts in it, under dotted names."""
    flat = {}
    for name, value in state_dict.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}.{inner}": each for inner, each in value.items()}
        else:
            flat[f"{name}"] = value
    return flat


def layers(channels: int = CHANNELS) -> Iterator[Layer]:
    """The 140 attention layers in the file's order. channels: of a smaller UNet with the layout of SDXL's."""
    for place in PLACES:
        width = place.width * channels // CHANNELS
        for j in range(place.depth):
            for attn, source in (("attn1", width), ("attn2", CONTEXT)):
                processor = f"{place.diffusers}.transformer_blocks.{j}.{attn}.processor"
                yield Layer(processor, (place.part, place.number, j), width, source, attn == "attn2")


def _projection_shapes() -> dict[str, tuple[int, ...]]:
    network = PositionalPerceiverResampler(device="meta").state_dict()
    return {f"{PROJECTION}.{name}": tuple(tensor.shape) for name, tensor in network.items()}


def _adapter_shapes(adapter: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Shapes of the adapter's tensors; the rank of each pair is that of the half that is there, as far as it can be.

    A tensor in a file may be one number that claims to be billions, so a rank without bounds would be one of memory.
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


def _refuse_faults(found: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise StoryMakerFileError unless `found` has exactly these names and shapes, and finite values.

    The message names the first faults of each kind; where there are more, the log has them all.
    """
    faults: dict[str, list[str]] = {"missing": [name for name in shapes if name not in found]}
    for name, tensor in found.items():
        if name not in shapes:
            faults.setdefault("unknown", []).append(name)
        elif tensor.shape != shapes[name]:
            told = f"{name} {list(tensor.shape)} instead of {list(shapes[name])}"
            faults.setdefault("of another shape", []).append(told)
        elif tensor.dtype not in DTYPES:
            faults.setdefault("of an unsupported dtype", []).append(f"{name} {tensor.dtype}")
        elif not tensor.is_meta and not torch.stack(tensor.aminmax()).isfinite().all():
            faults.setdefault("not finite", []).append(name)
    for fault, names in faults.items():
        if len(names) > NAMED:
            log.warning("Tensors of StoryMaker's file, %d %s: %s", len(names), fault, ", ".join(names))
    told = "; ".join(f"{len(names)} {fault}: {listed(names)}" for fault, names in faults.items() if names)
    if told:
        raise StoryMakerFileError(f"The file's tensors do not match StoryMaker's ({told}): {AGAIN}.")


def listed(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    rest = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(name[:LONGEST] for name in names[:NAMED]) + rest
