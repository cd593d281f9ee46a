"""Trains the demo model on the story world: `make demo-model`. No download, no ComfyUI; minutes on a GPU.

The UNet has SDXL's blocks with few channels and learns v-prediction with zero terminal SNR. Its text encoders are
narrow versions of CLIP's, which `models/demo/model.py` maps to SDXL's widths. They are first trained to recognise the
attributes in captions; then the whole model learns to draw. Every transformer has one block, which is repeated to
SDXL's depth with the same weights, each repetition adding its share, so that every attention layer of the shipped model
has an effect and the file stays small. Most of the training uses fewer repetitions, which are cheaper.

An interrupted run continues from its last saved state. The same seed gives the same training data.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import save

from ...models.demo import model as demo
from ...models.files import write_whole
from .export import exported_weights
from .loop import Steps, Training, learn
from .report import check, contact_sheet

OUT = Path(__file__).absolute().parents[2] / "out" / "demo-model"
WEIGHTS, LOG, SHEET = "demo.safetensors", "log.csv", "contact-sheet.png"


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m storyloom.training.demo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seed", type=int, default=1, help="seed of the training (default 1)")
    parser.add_argument("--reading", type=int, default=Steps.reading, help="steps that train the text encoders alone")
    parser.add_argument("--drawing", type=int, default=Steps.drawing, help="steps that train the whole model")
    parser.add_argument("--control", action="store_true", help="train on a world without stereotypes")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: cuda if there is one"
    )
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count() or 1, help="PyTorch threads (default: one per core)"
    )
    parser.add_argument("--out", type=Path, default=None, help=f"output folder (default {OUT}/seed-N)")
    parser.add_argument(
        "--pause-after", type=int, default=None, help="stop after this step; the same command continues later"
    )
    parser.add_argument("--install", action="store_true", help="install the result as the pack's demo model")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    folder = options.out or OUT / f"{'control' if options.control else 'seed'}-{options.seed}"
    folder.mkdir(parents=True, exist_ok=True)
    steps = Steps(options.reading, options.drawing)
    training = Training(options.seed, steps, not options.control, options.device)
    saved = folder / "state.pt"
    if saved.exists():
        training.load(saved)
    print(
        f"{len(training.vocabulary.tokens)} token ids, step {training.step} of {training.steps.drawing}, in {folder}",
        flush=True,
    )
    learn(training, saved, options.pause_after)
    if training.step < training.steps.drawing:
        print(f"Paused after step {training.step}: run the same command without --pause-after to continue.")
        return
    finish(training, folder)
    if options.install:
        shutil.copy(folder / WEIGHTS, demo.FILE)
        shutil.copy(folder / LOG, demo.FILE.with_name("demo-training.csv"))
        print(f"Installed: {demo.FILE}")


def finish(training: Training, folder: Path) -> None:
    """Write the weights, the log and a contact sheet."""
    metadata = {"format": "pt", "settings": json.dumps(training.settings), "step": str(training.step)}
    write_whole(folder / WEIGHTS, save(exported_weights(training), metadata))
    with (folder / LOG).open("w", newline="") as file:
        csv.writer(file).writerows([("step", "mean squared error of v", "pictures per second"), *training.log])
    pictures, summary = check(training)
    contact_sheet(pictures, 4, folder / SHEET)
    print(summary)
    for name in (WEIGHTS, LOG, SHEET):
        print(folder / name)


if __name__ == "__main__":
    main()
