"""The command line of training: its options, and the settings that they stand for."""

from __future__ import annotations

import argparse
from pathlib import Path

from .data import buckets
from .data.reading import SMALLEST, Limits
from .data.references import ROTATION
from .drops import Drops
from .options import PRECISIONS, Options

SCHEDULES = {"constant": "constant", "cosine": "cosine", "paper": "stages"}
"""Option -> name in `Options`."""
DESCRIPTION = """Trains StoryMaker (arXiv 2409.12576) for an SDXL checkpoint on a folder of pictures.

The data is made by `prepare`, or is in the published form (docs/training-storymaker.md). An interrupted run continues
exactly when the same command is given again. The result, mask.bin, is loaded by every StoryMaker loader.

For several cards: accelerate launch -m storyloom.training.storymaker ... (pip install "storyloom[training]")

Other commands, each with --help:
  python -m storyloom.training.storymaker prepare   makes training data from a folder of photos
  python -m storyloom.training.storymaker pack      packs training data into WebDataset shards
"""


def parser() -> argparse.ArgumentParser:
    """The parser of the training command."""
    made = argparse.ArgumentParser(
        "python -m storyloom.training.storymaker",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_files(made.add_argument_group("files"))
    _add_data(made.add_argument_group("data"))
    _add_training(made.add_argument_group("training"))
    _add_losses(made.add_argument_group("losses and drops"))
    _add_output(made.add_argument_group("run and output"))
    return made


def _add_files(group) -> None:
    add = group.add_argument
    add("--checkpoint", type=Path, required=True, help="SDXL: a .safetensors file, or a folder saved by diffusers")
    add("--image-encoder", type=Path, required=True, help="CLIP ViT-H: its file, or a folder saved by transformers")
    add("--data", type=Path, required=True, help="folder with data.json or .tar shards, or one such file")
    add("--out", type=Path, required=True, help="folder of the run: its state, result, log and validation pictures")
    add("--start", type=Path, metavar="MASK.BIN", help="continue from StoryMaker's file")
    add("--ip-adapter-plus", type=Path, help="start from ip-adapter-plus_sdxl_vit-h (appearance)")
    add("--ip-adapter-faceid", type=Path, help="start from ip-adapter-faceid-plusv2_sdxl (face, LoRA, keys, values)")
    add("--controlnet", type=Path, help="folder of a pose ControlNet, for pose decoupling; needs pose pictures")
    add("--controlnet-reads", choices=("text", "images"), default="text", help="what the ControlNet attends to")


def _add_data(group) -> None:
    add = group.add_argument
    add(
        "--bad", choices=("skip", "refuse"), default="refuse", help="what to do with unusable pictures (default refuse)"
    )
    add(
        "--resolution",
        type=resolution,
        default=(buckets.SHORT, buckets.LONG),
        metavar="N or SHORTxLONG",
        help=f"largest sides in pixels (default {buckets.SHORT}x{buckets.LONG}, as published)",
    )
    add("--smallest", type=int, default=SMALLEST, help=f"shortest side of a usable picture (default {SMALLEST})")
    add(
        "--repeats",
        type=repeats,
        default=buckets.REPEATS,
        metavar="N,N,N",
        help="how often an epoch contains pictures of one, two and three persons (default 1,2,5)",
    )
    add("--rotation", type=float, default=ROTATION, help="largest rotation of the references, in degrees (default 10)")
    add("--face-from", choices=("crop", "photo"), default="crop", help="face from the masked crop, or from the photo")
    add("--time-ids", choices=("size", "published"), default="size", help="sizes that the UNet gets as condition")
    add("--cache", type=Path, help="folder that keeps encoded pictures and texts; frees the encoders' memory")
    add("--workers", type=int, default=4, help="threads that check the data (default 4)")


def _add_training(group) -> None:
    add = group.add_argument
    add("--steps", type=int, default=8000, help="updates of the weights (default 8000)")
    add("--batch", type=int, default=1, help="pictures per batch and card (default 1)")
    add("--accumulation", type=int, default=8, help="batches per step and card (default 8)")
    add("--rate", type=float, default=1e-4, help="learning rate of AdamW (default 1e-4)")
    add("--schedule", choices=SCHEDULES, default="paper", help="paper: half the rate in the second half (default)")
    add("--warmup", type=int, default=0, help="steps in which the rate rises from 0")
    add("--weight-decay", type=float, default=0.01, help="of AdamW (default 0.01)")
    add("--clip", type=float, help="largest norm of the gradient (default none)")
    add("--precision", choices=PRECISIONS, default="bf16", help="of the computation (default bf16)")
    add("--gradient-checkpointing", action="store_true", help="less memory, about a third slower")
    add("--rank", type=int, default=128, help="of the LoRA (default 128, as in StoryMaker's file)")
    add("--average", type=float, default=0.0, help="decay of the weights' moving average (default 0: none)")
    add("--noise-offset", type=float, default=0.05, help="default 0.05, as published")
    add("--seed", type=int, default=0, help="of everything random (default 0)")
    add("--device", help="default: cuda if there is one, else cpu")


def _add_losses(group) -> None:
    add, drops = group.add_argument, Drops()
    add("--attention", type=float, default=0.1, help="weight of the attention loss, 0 for none (default 0.1)")
    add(
        "--attention-form",
        choices=("layers", "mean"),
        default="layers",
        help="loss of each layer, as in the paper, or of the layers' mean map, as in its program (default layers)",
    )
    add("--foreground", type=float, default=0.0, help="extra weight of the persons; the program has 5 (default 0)")
    add("--identity", type=float, default=0.0, help="weight of the identity loss (default 0: none)")
    add("--face-network", type=Path, help="TorchScript file for it: faces [K, 3, 112, 112] in -1..1 to [K, 512]")
    for name, what in (
        ("text", "the text"),
        ("picture", "the references"),
        ("both", "text and references"),
        ("face", "a face's tokens"),
        ("appearance", "an appearance's tokens"),
    ):
        share = getattr(drops, name)
        add(f"--drop-{name}", type=float, default=share, help=f"share of training without {what} (default {share})")


def _add_output(group) -> None:
    add = group.add_argument
    add("--save-every", type=int, default=250, help="steps between saved states (default 250)")
    add("--validate-every", type=int, default=500, help="steps between validation pictures, 0 for none (default 500)")
    add("--validation-pictures", type=int, default=4, help="how many, from the beginning of the data (default 4)")
    add("--validation-steps", type=int, default=25, help="sampling steps of each (default 25)")
    add("--file-precision", choices=("float32", "fp16", "bf16"), default="fp16", help="of mask.bin (default fp16)")
    add("--pause-after", type=int, help="stop after this step; the same command continues later")


def limits_of(arguments: argparse.Namespace) -> Limits:
    short, long = arguments.resolution
    return Limits(short, long, arguments.smallest, arguments.controlnet is not None, arguments.face_from)


def options_of(arguments: argparse.Namespace) -> Options:
    """The loop's settings."""
    names = ("seed", "steps", "accumulation", "rate", "warmup", "weight_decay", "clip", "precision", "average")
    losses = ("attention", "foreground", "identity")
    return Options(
        **{name: getattr(arguments, name) for name in (*names, *losses)},
        schedule=SCHEDULES[arguments.schedule],
        drops=Drops(**{name: getattr(arguments, f"drop_{name}") for name in Drops.__dataclass_fields__}),
        per_layer=arguments.attention_form == "layers",
        pose_reads_images=arguments.controlnet_reads == "images",
    )


def resolution(text: str) -> tuple[int, int]:
    """ "1024" -> (1024, 1024), "960x1286" -> (960, 1286): the largest short and long side."""
    sides = [int(side) for side in text.split("x")]
    short, long = sides * 2 if len(sides) == 1 else sides
    if not buckets.MULTIPLE <= short <= long:
        raise ValueError(text)
    return short, long


def repeats(text: str) -> tuple[int, ...]:
    """ "1,2,5" -> (1, 2, 5)."""
    numbers = tuple(int(number) for number in text.split(","))
    if len(numbers) != len(buckets.REPEATS) or min(numbers) < 1:
        raise ValueError(text)
    return numbers
