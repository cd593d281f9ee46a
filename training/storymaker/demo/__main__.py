"""Trains the demo's StoryMaker adapter on the story world: `make demo-storymaker`. No download, no ComfyUI.

The demo model stays frozen. First a pose ControlNet for it is trained, then the adapter, which sees the pose of the
picture that it learns to draw and references of its characters from other pictures. Drawing leaves the pose out.

An interrupted run continues from its last saved state. The same seed gives the same training data.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from ....models.files import write_whole
from ...demo.data import Vocabulary
from ...demo.loop import noise_levels, timesteps
from ...demo.report import contact_sheet
from ..loop import TrainingLoop
from ..objective import Objective
from ..options import Options
from .control import ControlTraining
from .lessons import World
from .networks import frozen_model, new_adapter, repeat_blocks
from .report import check

OUT = Path(__file__).absolute().parents[3] / "out" / "demo-storymaker"
WEIGHTS, LOG, SHEET = "storymaker.safetensors", "log.json", "contact-sheet.png"
STEPS, CONTROL_STEPS = 2400, 400
RATE = 2e-3
REPETITIONS = ((0.0, 1), (0.9, 3), (0.97, 10))
"""(share of the steps, repetitions of each transformer's block from there on); SDXL's depths are the limit."""
SAVE_EVERY, LOG_EVERY = 50, 50


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m storyloom.training.storymaker.demo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seed", type=int, default=1, help="seed of the training (default 1)")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"steps that train the adapter (default {STEPS})")
    parser.add_argument("--control-steps", type=int, default=CONTROL_STEPS, help="steps that train the pose ControlNet")
    parser.add_argument("--no-attention-loss", action="store_true", help="train without the attention loss")
    parser.add_argument("--no-pose", action="store_true", help="train without pose decoupling")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="default: one per core")
    parser.add_argument("--out", type=Path, default=None, help=f"output folder (default {OUT}/...)")
    parser.add_argument("--pause-after", type=int, default=None, help="stop after this step of the adapter's training")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    parts = [
        "seed",
        str(options.seed),
        *["no-attention-loss"] * options.no_attention_loss,
        *["no-pose"] * options.no_pose,
    ]
    folder = options.out or OUT / "-".join(parts)
    folder.mkdir(parents=True, exist_ok=True)
    print(f"Training in {folder}", flush=True)
    trained(options, folder)


def objective() -> Objective:
    """What the demo model was trained to predict."""
    return Objective(*noise_levels("cpu"), kind="v", timesteps=timesteps)


def new_loop(
    options: argparse.Namespace, control: torch.nn.Module | None
) -> tuple[TrainingLoop, World, Callable[[int], None]]:
    """The adapter's training, its data, and a function that sets the repetitions of the blocks for a step."""
    net = frozen_model()
    world = World(net, Vocabulary(), options.seed, poses=control is not None)
    adapter = new_adapter(net, options.seed)
    settings = Options(
        seed=options.seed,
        steps=options.steps,
        rate=RATE,
        schedule="cosine",
        warmup=40,
        weight_decay=1e-3,
        clip=1.0,
        average=0.995,
        attention=0.0 if options.no_attention_loss else 0.1,
    )
    loop = TrainingLoop(adapter, net.unet, objective(), world, settings, control, settings={"batch": world.size})

    def repeat(step: int) -> None:
        times = next(times for share, times in reversed(REPETITIONS) if step >= int(share * options.steps))
        repeat_blocks(net, adapter, times)

    return loop, world, repeat


def trained(options: argparse.Namespace, folder: Path) -> None:
    """Train, or continue. Writes the results after the last step."""
    control = None if options.no_pose else trained_control(options, folder)
    loop, world, repeat = new_loop(options, control)
    saved = folder / "adapter.pt"
    if saved.exists():
        loop.load(saved)
    last = min(options.steps, options.pause_after or options.steps)

    def advance() -> float:
        repeat(loop.step)
        return loop.advance()["loss"]

    learn("adapter", loop, advance, options.steps, last, saved)
    if loop.step < options.steps:
        print(f"Paused after step {loop.step}: run the same command without --pause-after to continue.")
        return
    with torch.no_grad():
        for name, parameter in loop.adapter.named_parameters():
            parameter.copy_(loop.averages[name])
    repeat(options.steps)
    write_whole(folder / WEIGHTS, save(stored(loop), {"format": "pt", "settings": json.dumps(loop.settings)}))
    write_whole(folder / LOG, json.dumps(loop.log[LOG_EVERY - 1 :: LOG_EVERY], indent=0).encode())
    pictures, summary = check(world, loop.adapter)
    contact_sheet(pictures, 6, folder / SHEET)
    print(summary)
    for name in (WEIGHTS, LOG, SHEET):
        print(folder / name)


def stored(loop: TrainingLoop) -> dict[str, Tensor]:
    """The adapter in float16 under mask.bin's names, its two parts and the names in them joined by a dot."""
    parts = loop.state(torch.float16)
    return {f"{part}.{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}


def trained_control(options: argparse.Namespace, folder: Path) -> torch.nn.Module:
    """The pose ControlNet; training it continues from its saved state."""
    net = frozen_model()
    training = ControlTraining(net, objective(), World(net, Vocabulary(), options.seed, part=1), options.control_steps)
    saved = folder / "control.pt"
    if saved.exists():
        training.load(saved)
    learn("pose ControlNet", training, training.advance, options.control_steps, options.control_steps, saved)
    return training.control.eval()


def learn(name: str, training, advance: Callable[[], float], total: int, last: int, saved: Path) -> None:
    """Advance to step `last` with a progress bar; saves the state on the way and at the end."""
    from tqdm import tqdm

    losses: list[float] = []
    with tqdm(total=total, desc=name, initial=training.step, unit="step", mininterval=5, ncols=100) as bar:
        while training.step < last:
            losses = [*losses[1 - LOG_EVERY :], advance()]
            bar.set_postfix(loss=f"{sum(losses) / len(losses):.4f}", refresh=False)
            bar.update()
            if training.step % SAVE_EVERY == 0 or training.step == last:
                training.save(saved)


if __name__ == "__main__":
    main()
