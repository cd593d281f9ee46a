"""StoryMaker's file: the trained tensors under the names of mask.bin, as a PyTorch and as a safetensors file."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

FILES = ("mask.bin", "mask.safetensors")


def write_storymaker(folder: Path, state: Mapping[str, Mapping[str, Tensor]]) -> list[Path]:
    """Write both files into a folder, each completely or not at all; returns their paths.

    state: as `TrainedAdapter.state` returns it. Names are nested in mask.bin, and dotted in mask.safetensors.
    """
    nested = {part: {name: tensor.cpu() for name, tensor in tensors.items()} for part, tensors in state.items()}
    dotted = {f"{part}.{name}": tensor for part, tensors in nested.items() for name, tensor in tensors.items()}
    as_pickle, as_safetensors = (folder / name for name in FILES)
    _whole(as_pickle, lambda path: torch.save(nested, path))
    _whole(as_safetensors, lambda path: save_file(dotted, path, {"format": "pt"}))
    return [as_pickle, as_safetensors]


def _whole(path: Path, write: Callable[[Path], None]) -> None:
    unfinished = path.with_name(f"{path.name}.tmp")
    write(unfinished)
    os.replace(unfinished, path)
