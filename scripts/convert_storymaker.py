"""Converts StoryMaker's mask.bin, a pickle, to safetensors, which contains only weights and loads faster.

    python scripts/convert_storymaker.py mask.bin mask.safetensors --dtype fp16

Needs torch, einops and safetensors, which ComfyUI's Python environment has. It installs nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).absolute().parent.parent
METADATA = {"format": "pt", "model": "StoryMaker"}


class ConversionError(Exception):
    """The file was not converted; the message is one sentence for the user."""


def load_pack() -> None:
    """Make this folder importable as `storyloom`, whatever its name."""
    if "storyloom" not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            "storyloom", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
        )
        sys.modules["storyloom"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["storyloom"])


def convert(source: Path, target: Path, dtype: str | None = None, force: bool = False) -> str:
    """Write StoryMaker's tensors under dotted names. Returns a sentence about the written file.

    dtype: "fp32", "fp16" or "bf16"; None keeps the dtype of the source. The target appears complete or not at all.
    Raises ConversionError, or StoryMakerFileError if the source is not a complete StoryMaker file.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    from storyloom.models.storymaker.weights import load_storymaker, read_checkpoint, split_parts

    if target.exists() and not force:
        raise ConversionError(f'"{target}" already exists: choose another name, or overwrite it with --force.')
    if not target.parent.is_dir():
        raise ConversionError(f'The folder "{target.parent}" does not exist: create it, or choose another.')
    state_dict = read_checkpoint(source)
    weights = load_storymaker(state_dict)
    if weights.missing:
        raise ConversionError(weights.missing)
    target_dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, None: None}[dtype]
    tensors = {}
    for part, weights_of_part in split_parts(state_dict)[0].items():
        for name, tensor in weights_of_part.items():
            tensors[f"{part}.{name}"] = converted = tensor.to(target_dtype or tensor.dtype).contiguous()
            if not torch.stack(converted.aminmax()).isfinite().all():
                raise ConversionError(f"{part}.{name} has values outside the range of {dtype}: choose another --dtype.")

    unfinished = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        save_file(tensors, unfinished, METADATA)
        shutil.copymode(source, unfinished)  # safetensors creates files that only their owner can read
        os.replace(unfinished, target)
    except (OSError, SafetensorError) as error:
        raise ConversionError(f'"{target}" cannot be written ({error}): choose another path.') from error
    finally:
        unfinished.unlink(missing_ok=True)
    left = f"; left out {len(weights.unused)} others" if weights.unused else ""
    return f"Written: {target}, {len(tensors)} tensors, {target.stat().st_size / 1e9:.2f} GB{left}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="StoryMaker's mask.bin")
    parser.add_argument("target", type=Path, help="the .safetensors file to write")
    parser.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), help="dtype (default: that of the source)")
    parser.add_argument("--force", action="store_true", help="overwrite the target")
    options = parser.parse_args()
    load_pack()
    from storyloom.models.storymaker.weights import StoryMakerFileError

    try:
        print(convert(options.source, options.target, options.dtype, options.force))
    except (ConversionError, StoryMakerFileError) as reason:
        raise SystemExit(str(reason)) from None


if __name__ == "__main__":
    main()
