"""A training run on real data: its parts are put together, it is trained, saved, validated and exported."""

from __future__ import annotations

import csv
import io
import os
from argparse import Namespace
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

import torch

from ...models.files import read_weights, write_whole
from ...models.storymaker.ppr import PositionalPerceiverResampler
from ...models.storymaker.weights import StoryMakerFileError, load_storymaker, read_checkpoint
from .adapter import TrainedAdapter
from .arguments import limits_of, options_of
from .checkpoint import encoders_of, load_controlnet, load_image_encoder, load_sdxl, objective_of
from .data.batches import Batches, Share
from .data.buckets import Plan
from .data.scan import Index, index_of, known_index, summary
from .data.sources import DataError, open_source
from .encoders import Cache
from .export import write_storymaker
from .loop import TrainingLoop
from .options import PRECISIONS
from .sample import Drawing
from .step import Faces
from .validation import Validation

STATE, LOG = "state.pt", "log.csv"


class Run:
    """A run of the training command. arguments: as `arguments.parser` returns them.

    Raises ValueError with one sentence for the user if a file or the data cannot be used.
    """

    def __init__(self, arguments: Namespace):
        self.arguments, self.folder = arguments, arguments.out
        self.options = options_of(arguments)
        self.accelerator = accelerator_of(arguments)
        ranks, rank = (1, 0) if self.accelerator is None else (
            self.accelerator.num_processes, self.accelerator.process_index
        )  # fmt: skip
        self.main = rank == 0
        self.share = Share(arguments.accumulation, rank, ranks)
        self.device = self._device()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.resumed = (self.folder / STATE).exists()
        self.source, self.limits = open_source(arguments.data), limits_of(arguments)
        self.index = self._index()

        dtype = PRECISIONS[arguments.precision] or torch.float32
        self.pipeline = load_sdxl(arguments.checkpoint, self.device, dtype)
        if arguments.gradient_checkpointing:
            self.pipeline.unet.enable_gradient_checkpointing()
        self.encoders = encoders_of(self.pipeline, load_image_encoder(arguments.image_encoder, self.device, dtype))
        controlnet = arguments.controlnet and load_controlnet(arguments.controlnet, self.device, dtype)
        self.adapter = self._adapter()
        self.batches = self._batches()
        self.loop = TrainingLoop(
            self.adapter,
            self.pipeline.unet,
            objective_of(self.pipeline, arguments.noise_offset),
            self.batches,
            self.options,
            controlnet,
            faces=self._faces(),
            accelerator=self.accelerator,
            settings=self._settings(),
        )
        if self.resumed:
            self.loop.load(self.folder / STATE)
        how = Drawing(steps=arguments.validation_steps, seed=arguments.seed)
        self.validation = Validation(self.pipeline, self.adapter, self.batches, arguments.validation_pictures, how)

    def _device(self) -> torch.device:
        if self.accelerator is not None:
            return self.accelerator.device
        return torch.device(self.arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))

    def _index(self) -> Index:
        """The usable pictures; the main process checks the data, and the others wait for its index."""
        if self.resumed:
            return known_index(self.source, self.limits, self.folder)
        index, fault = None, None
        if self.main:
            with progress_bar(len(self.source.items), "checking data", "picture", self.main) as bar:
                try:
                    arguments = self.arguments
                    index = index_of(
                        self.source, self.limits, self.folder, arguments.bad, arguments.workers, bar.update
                    )
                except DataError as error:
                    (self.folder / "data-index.json").unlink(missing_ok=True)
                    fault = error
        if self.accelerator is not None:
            self.accelerator.wait_for_everyone()
        if fault is not None:
            raise fault
        return index or known_index(self.source, self.limits, self.folder)

    def _adapter(self) -> TrainedAdapter:
        """The adapter with the weights from which training starts."""
        arguments, unet = self.arguments, self.pipeline.unet
        ppr = PositionalPerceiverResampler(
            width=unet.config.cross_attention_dim,
            image_width=self.encoders.vision.config.hidden_size,
            device=self.device,
        )
        adapter = TrainedAdapter(unet, ppr, arguments.rank, arguments.seed)
        if self.resumed:
            return adapter
        if arguments.start:
            adapter.load(load_storymaker(read_checkpoint(arguments.start)))
        plus, faceid = (
            path and read_weights(path, StoryMakerFileError, "choose an IP-Adapter file", "download it again")
            for path in (arguments.ip_adapter_plus, arguments.ip_adapter_faceid)
        )
        if plus or faceid:
            found = adapter.from_ip_adapter(plus, faceid)
            self.say(f"{found.taken} tensors taken from IP-Adapter, {len(found.missing)} not found.")
        return adapter

    def _batches(self) -> Batches:
        arguments = self.arguments
        plan = Plan(self.index.sizes, self.index.persons, arguments.batch, arguments.seed, arguments.repeats)
        cache = Cache(arguments.cache, "\n".join(map(str, (*self._models(), arguments.precision))))
        batches = Batches(
            self.source,
            self.index,
            self.limits,
            plan,
            self.encoders,
            cache=cache,
            share=self.share,
            rotation=arguments.rotation,
            time_ids=arguments.time_ids,
        )
        if arguments.cache:
            with progress_bar(len(batches.own), "encoding data", "picture", self.main) as bar:
                batches.encode_all(bar.update)
            if self.accelerator is not None:
                self.accelerator.wait_for_everyone()
            self._move_encoders("cpu")
        return batches

    def _move_encoders(self, device: torch.device | str) -> None:
        """Move what only encodes captions and pictures, and draws; the identity loss always needs the VAE."""
        self.encoders.move_text(device)
        if not self.options.identity:
            self.encoders.vae.to(device)

    def _validate(self) -> None:
        """Draw the validation pictures with the present weights, in the main process."""
        if self.main:
            self._move_encoders(self.device)
            with self._autocast():
                self.validation.write(self.folder / "validation" / f"step-{self.loop.step:06d}.png")
            if self.arguments.cache:
                self._move_encoders("cpu")
        if self.accelerator is not None:
            self.accelerator.wait_for_everyone()

    def _autocast(self):
        dtype = PRECISIONS[self.options.precision]
        return torch.autocast(self.device.type, dtype=dtype) if dtype else nullcontext()

    def _faces(self) -> Faces | None:
        arguments = self.arguments
        if not arguments.identity:
            return None
        if arguments.face_network is None:
            raise ValueError("The identity loss needs a face network: add --face-network FILE, or --identity 0.")
        network = torch.jit.load(str(arguments.face_network), self.device).train(False)
        for parameter in network.parameters():
            parameter.requires_grad_(False)
        vae = self.encoders.vae

        def decode(latents: torch.Tensor) -> torch.Tensor:
            with torch.autocast(self.device.type, enabled=False):  # the VAE overflows in float16
                return vae.decode((latents / vae.config.scaling_factor).to(vae.dtype)).sample

        return Faces(decode, network)

    def _models(self) -> list[list]:
        """Name and size of the files of the encoders, by which a cache and a saved state recognise them."""
        paths = (self.arguments.checkpoint, self.arguments.image_encoder)
        return [[path.name, path.stat().st_size if path.is_file() else 0] for path in paths]

    def _settings(self) -> dict[str, Any]:
        """What else the result of the run depends on."""
        arguments = self.arguments
        names = ("batch", "rank", "rotation", "time_ids", "noise_offset")
        return {name: getattr(arguments, name) for name in names} | {
            "repeats": list(arguments.repeats),
            "limits": asdict(self.limits),
            "data": self.source.fingerprint,
            "pictures": len(self.index.items),
            "models": self._models(),
            "processes": self.share.ranks,
        }

    def say(self, text: str) -> None:
        if self.main:
            print(text, flush=True)

    def train(self) -> None:
        """Train to the last step or to the pause, then write the result."""
        loop, arguments = self.loop, self.arguments
        self.say(f"{summary(self.index)} {self.batches.plan.length} batches per epoch, in {self.folder}.")
        if loop.step:
            self.say(f"Continuing after step {loop.step}.")
        last = min(self.options.steps, arguments.pause_after or self.options.steps)
        try:
            with progress_bar(self.options.steps, "training", "step", self.main, loop.step) as bar:
                while loop.step < last:
                    losses = loop.advance()
                    bar.set_postfix({name: f"{value:.4f}" for name, value in losses.items()}, refresh=False)
                    bar.update()
                    if arguments.validate_every and loop.step % arguments.validate_every == 0:
                        self._validate()
                    if loop.step % arguments.save_every == 0 or loop.step == last:
                        self.save()
        except KeyboardInterrupt:
            raise SystemExit(
                f"Stopped: the same command continues after the last saved state in {self.folder}."
            ) from None
        if loop.step < self.options.steps:
            self.say(f"Paused after step {loop.step}: the same command without --pause-after continues.")
        elif self.main:
            dtypes = {"float32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
            for path in write_storymaker(self.folder, loop.state(dtypes[arguments.file_precision])):
                self.say(str(path))

    def save(self) -> None:
        """Write the log and the state, by which the run continues exactly."""
        if self.main:
            names = list(dict.fromkeys(name for row in self.loop.log for name in row))
            text = io.StringIO(newline="")
            writer = csv.DictWriter(text, names)
            writer.writeheader()
            writer.writerows(self.loop.log)
            write_whole(self.folder / LOG, text.getvalue().encode("utf-8"))
        self.loop.save(self.folder / STATE)
        if self.accelerator is not None:
            self.accelerator.wait_for_everyone()


def accelerator_of(arguments: Namespace) -> Any:
    """An `accelerate.Accelerator` where `accelerate launch` has started this process, otherwise None.

    Raises ValueError if accelerate is not installed.
    """
    if not any(name.startswith("ACCELERATE_") for name in os.environ) and int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return None
    try:
        from accelerate import Accelerator
    except ImportError as error:
        raise ValueError(
            f"Training on several cards needs accelerate, which cannot be imported ({error}): run pip install "
            '"storyloom[training]".'
        ) from error
    precision = {"float32": "no"}.get(arguments.precision, arguments.precision)
    return Accelerator(mixed_precision=precision, cpu=arguments.device == "cpu")


def progress_bar(total: int, name: str, unit: str, shown: bool, first: int = 0):
    """A tqdm bar with the time left."""
    from tqdm import tqdm

    return tqdm(total=total, desc=name, initial=first, unit=unit, mininterval=2, ncols=110, disable=not shown)
