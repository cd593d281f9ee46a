"""Trains the demo model on the story world: `make demo-model`. No download, no ComfyUI; minutes on a GPU.

The UNet has SDXL's blocks with few channels and learns v-prediction with zero terminal SNR. Its text encoders are
narrow twins of CLIP's, in the space that `models/demo/model.py` maps to SDXL's widths. They first learn to read, by
naming what captions say; then the whole learns to draw. Every transformer has one block, which is repeated to SDXL's
depth with the same weights and a share of the step each time, so that every attention layer of the shipped model is
alive and the file stays small; most of the training gets by with fewer repetitions, which cost less.

A run that was stopped goes on where it was saved last. The same seed gives the same lessons.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import environment

ROOT = Path(__file__).absolute().parent.parent
OUT = ROOT / "out" / "demo-model"

if Path(sys.prefix).resolve() != environment.VENV.resolve():
    try:
        environment.enter()
    except (environment.SetupError, KeyboardInterrupt) as reason:
        environment.exit_with(reason)

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from storyloom.models.demo import model as demo  # noqa: E402
from storyloom.models.files import write_whole  # noqa: E402
from storyloom.prompts.tokens import END, PADDING, ROOM, START  # noqa: E402
from storyloom.standalone.layers import Cached  # noqa: E402
from storyloom.standalone.text import token_ids  # noqa: E402
from storyloom.standalone.unet import build_unet, diffusers_names  # noqa: E402
from storyloom.world.captions import FigureCaption, FrameCaption, figure_words, frame_words  # noqa: E402
from storyloom.world.draw import draw  # noqa: E402
from storyloom.world.measures import StoryPictures, effect  # noqa: E402
from storyloom.world.reader import Reader  # noqa: E402
from storyloom.world.scene import ACTIONS, LOOKS, PLACES, PROPS, SIZE, SPECIES  # noqa: E402
from storyloom.world.stereotypes import imagine  # noqa: E402
from storyloom.world.stories import Lesson, random_lesson, random_story  # noqa: E402
from storyloom.world.words import all_phrases  # noqa: E402

PICTURES = 32
READ_RATE = RATE = 2e-3
REPETITIONS = ((0.0, 1), (0.8, 3), (0.93, 10))
"""From which share of the drawing steps on a transformer's block is repeated how often, and never beyond SDXL."""
SIMPLE = 0.4
"""Share of the drawing steps that have few captions of several frames, which are ambiguous and slow to learn from."""
WEIGHTS, LOG, SHEET = "demo.safetensors", "log.csv", "contact-sheet.png"
SAVE_EVERY = 100
LOG_EVERY = 50
SHALLOW = {
    **demo.UNET,
    "transformer_depth": [0, 0, 1, 1, 1, 1],
    "transformer_depth_middle": 1,
    "transformer_depth_output": [0, 0, 0, 1, 1, 1, 1, 1, 1],
    "context_dim": 2 * demo.NARROW,
}
ADDED = ("attn1.to_out.0", "attn2.to_out.0", "ff.net.2")
"""The layers whose output a transformer block adds to what it got."""


class Words:
    """Token ids of captions, by the BPE vocabulary that open_clip ships."""

    def __init__(self):
        known = {token for phrase in all_phrases() for token in token_ids(phrase)}
        self.vocabulary = sorted(known | {START, END, *PADDING.values()})
        self.row = {token: row for row, token in enumerate(self.vocabulary)}
        self.unknown = len(self.vocabulary)

    def rows(
        self, pieces: Sequence[str], random: np.random.Generator | None = None
    ) -> tuple[list[int], list[int], list[range], int]:
        """Rows of both embedding tables [77], the rows that each piece takes, and the first end-of-text row.

        random: lets a word be, now and then, one that the model does not know. Raises ValueError when the text is too
        long.
        """
        text, spans = [self.row[START]], []
        for piece in pieces:
            words = [self.row[token] for token in token_ids(piece)]
            if random and words and random.random() < 0.06:
                words.insert(int(random.integers(len(words) + 1)), self.unknown)
            spans.append(range(len(text), len(text) + len(words)))
            text += words
        if len(text) > ROOM + 1:
            raise ValueError(f"The text takes more than {ROOM} tokens.")
        padded = {
            key: text + [self.row[END]] + [self.row[token]] * (ROOM + 1 - len(text)) for key, token in PADDING.items()
        }
        return padded["l"], padded["g"], spans, len(text)


class NarrowEncoder(nn.Module):
    """CLIP's text model in `demo.NARROW` dimensions: pre-norm, causal, norms without parameters."""

    def __init__(self, vocabulary: int, layers: int, heads: int, hidden: int, quick: bool):
        super().__init__()
        width = demo.NARROW
        self.heads, self.quick = heads, quick
        self.embedding = nn.Parameter(torch.randn(vocabulary, width))
        self.position = nn.Parameter(torch.randn(77, width) * 0.3)

        def matrices(rows: int, columns: int, gain: float) -> nn.ParameterList:
            return nn.ParameterList(torch.randn(rows, columns) * gain / math.sqrt(columns) for _ in range(layers))

        self.qkv, self.out = matrices(3 * width, width, 1.0), matrices(width, width, 0.7)
        self.fc1, self.fc2 = matrices(hidden, width, 1.0), matrices(width, hidden, 0.5)

    def forward(self, rows: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
        """rows: [B, 77]. Returns the penultimate states [B, 77, R] and the normed last state at `end` [B, R]."""
        batch, length = rows.shape
        future = torch.ones(length, length, dtype=torch.bool, device=rows.device).triu(1)
        x = self.embedding[rows] + self.position
        penultimate = x
        for qkv, out, fc1, fc2 in zip(self.qkv, self.out, self.fc1, self.fc2, strict=True):
            penultimate = x
            q, k, v = F.linear(_normed(x), qkv).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            scores = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).masked_fill(future, -1e9)
            x = x + F.linear((scores.softmax(-1) @ v).transpose(1, 2).flatten(2), out)
            hidden = F.linear(_normed(x), fc1)
            hidden = hidden * torch.sigmoid(1.702 * hidden) if self.quick else F.gelu(hidden)
            x = x + F.linear(hidden, fc2)
        return penultimate, _normed(x)[torch.arange(batch, device=rows.device), end]


def _normed(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)


ASKED: dict[str, tuple[str, ...]] = {
    "place": PLACES,
    "action": ACTIONS,
    "prop": PROPS,
    "species": SPECIES,
    **{look: ("unsaid", *values) for look, values in LOOKS.items()},
}
"""What the encoders learn to say of a text: the values of each attribute."""


class Questions(nn.Module):
    """Asks encoded text for the attributes that it tells: of rows [N, 2R] and of pooled rows [N, R]."""

    def __init__(self):
        super().__init__()
        answers = sum(map(len, ASKED.values()))
        self.of_rows, self.of_pooled = nn.Linear(2 * demo.NARROW, answers), nn.Linear(demo.NARROW, answers)

    def loss(self, answers: Tensor, told: Sequence[Mapping[str, str]]) -> Tensor:
        """Cross entropy, in nats per question, of answers [N, all values] to what N texts tell."""
        errors = []
        for (name, values), given in zip(ASKED.items(), answers.split(list(map(len, ASKED.values())), 1), strict=True):
            asked = [i for i, each in enumerate(told) if name in each]
            right = torch.tensor([values.index(told[i][name]) for i in asked], device=answers.device)
            if asked:
                errors.append(F.cross_entropy(given[asked], right))
        return sum(errors) / len(errors)


def told_of(frame: FrameCaption | None, who: FigureCaption | None) -> dict[str, str]:
    """Answers to ASKED for a text that tells of a frame, of a character or of both."""
    told = {"place": frame.place, "action": frame.action, "prop": frame.prop} if frame else {}
    if who:
        told |= {"species": who.species, **{look: who.looks.get(look, "unsaid") for look in LOOKS}}
    return told


class PooledOnly(nn.Linear):
    """SDXL's label embedding without the picture sizes that follow the pooled text."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[:, : self.in_features])


class Share(nn.Linear):
    """A linear layer that is applied `parts` times, and gives that part of its output each time."""

    parts = 1

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight / self.parts, self.bias / self.parts)


class Attention:
    """Attention by two matrix products: its backward pass is several times faster on a CPU than the fused one."""

    def __call__(self, attn, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **_) -> Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
        batch, tokens, width = q.shape

        def split(x: Tensor) -> Tensor:
            return x.view(batch, -1, attn.heads, width // attn.heads).transpose(1, 2).flatten(0, 1)

        q, k, v = split(q), split(k), split(v)
        weights = (torch.bmm(q, k.transpose(1, 2)) * q.shape[-1] ** -0.5).softmax(-1).to(v.dtype)
        out = torch.bmm(weights, v).view(batch, attn.heads, tokens, -1).transpose(1, 2).reshape(batch, tokens, width)
        return attn.to_out[0](out)


class Narrow(nn.Module):
    """Both text encoders and the UNet, before they are mapped to SDXL's widths."""

    def __init__(self, vocabulary: int):
        super().__init__()
        self.l, self.g = (
            NarrowEncoder(
                vocabulary, numbers["num_hidden_layers"], demo.NARROW_HEADS, numbers["intermediate_size"], quick
            )
            for numbers, quick in ((demo.CLIP_L, True), (demo.CLIP_G, False))
        )
        self.unet = build_unet(SHALLOW, demo.HEAD_CHANNELS)
        self.unet.set_attn_processor(Attention())
        first = self.unet.add_embedding.linear_1
        self.unet.add_embedding.linear_1 = PooledOnly(demo.NARROW, first.out_features)
        with torch.no_grad():
            for name, parameter in self.unet.named_parameters():
                if name.endswith(("conv2.weight", "proj_out.weight", "conv_out.weight")):
                    parameter.mul_(0.05)
        for transformer in self.transformers():
            block = transformer.transformer_blocks[0]
            for name in ADDED:
                layer = block.get_submodule(name)
                block.set_submodule(name, Share(layer.in_features, layer.out_features))
            for projection in (block.attn2.to_k, block.attn2.to_v):  # of the text: the same in every repetition
                projection.forward = Cached(projection.forward)

    def transformers(self) -> list[nn.Module]:
        """The UNet's spatial transformers, in order."""
        from diffusers.models.transformers.transformer_2d import Transformer2DModel

        return [module for module in self.unet.modules() if isinstance(module, Transformer2DModel)]

    def repeat_blocks(self, times: int) -> None:
        """Apply every transformer's block so often, at most as often as SDXL does."""
        depths = demo.depths_of_widths()
        for transformer in self.transformers():
            block, depth = transformer.transformer_blocks[0], min(times, depths[transformer.inner_dim])
            transformer.transformer_blocks = nn.ModuleList([block] * depth)
            for name in ADDED:
                block.get_submodule(name).parts = depth

    def encode(self, rows_l: Tensor, rows_g: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
        """Context [B, 77, 2R] and pooled [B, R]."""
        states_l, _ = self.l(rows_l, end)
        states_g, pooled = self.g(rows_g, end)
        return torch.cat([states_l, states_g], -1), pooled

    def predict(self, x: Tensor, t: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
        """v [B, 4, h, w] of noisy latents at timesteps t [B]."""
        sizes = torch.zeros(x.shape[0], 6, device=x.device)
        return self.unet(x, t, context, added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes}).sample


def noise_levels(device) -> tuple[Tensor, Tensor]:
    """Signal and noise of all timesteps [1000] each: SDXL's schedule with zero terminal SNR (arXiv 2305.08891)."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    signal = torch.cumprod(1 - betas, 0).sqrt()
    signal = (signal - signal[-1]) * signal[0] / (signal[0] - signal[-1])
    return signal.float().to(device), (1 - signal**2).sqrt().float().to(device)


@dataclass(frozen=True, eq=False)
class Batch:
    """Captions and one picture of each.

    rows_l, rows_g: rows of the embedding tables [B, 77]; ends: first end-of-text rows [B]; spans: rows of each piece;
    strengths: factors of the encoded rows [B, 77]; heard: 0 for a caption that is all zeros [B]; pictures: uint8
    [B, 24, 24, 3].
    """

    lessons: tuple[Lesson, ...]
    spans: tuple[list[range], ...]
    rows_l: Tensor
    rows_g: Tensor
    ends: Tensor
    strengths: Tensor
    heard: Tensor
    pictures: Tensor

    def to(self, device) -> Batch:
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        return Batch(**{name: x.to(device) if isinstance(x, Tensor) else x for name, x in tensors.items()})


def make_batch(words: Words, key: Sequence[int], stereotypes: bool, simple: bool) -> Batch:
    """The batch of this key, always the same.

    A picture of a long text shows any of its frames; where rows are strong or weak, it shows the frame whose rows are
    strong, so that reweighted prompts mean something to the model. simple: few texts of several frames.
    """
    random = np.random.default_rng(key)
    rows = []
    while len(rows) < PICTURES:
        lesson = random_lesson(random, stories=0.1 if simple else 0.42)
        try:
            rows_l, rows_g, spans, end = words.rows(lesson.pieces, random)
        except ValueError:
            continue
        strength, shown = _strengths(lesson, spans, end, random)
        picture = draw(imagine(lesson.frames, shown, lesson.figures, random, stereotypes), random)
        silent = lesson.silent and random.random() < 0.5
        rows.append((lesson, spans, rows_l, rows_g, end, strength, 1.0 - silent, picture))
    lessons, spans, rows_l, rows_g, ends, strengths, heard, drawn = zip(*rows, strict=True)
    return Batch(
        lessons,
        spans,
        torch.tensor(rows_l),
        torch.tensor(rows_g),
        torch.tensor(ends),
        torch.from_numpy(np.stack(strengths)),
        torch.tensor(heard),
        torch.from_numpy(np.stack(drawn)),
    )


def _strengths(lesson: Lesson, spans: list[range], end: int, random) -> tuple[np.ndarray, int]:
    """Factors of the caption's rows, and the frame to show."""
    strength = np.ones(77, np.float32)
    shown = int(random.integers(len(lesson.frames)))
    if len(lesson.frames) > 1 and random.random() < 0.65:
        for frame, part in enumerate(lesson.parts):
            strength[list(spans[part])] = random.uniform(1, 2) if frame == shown else random.uniform(0, 0.3)
        if random.random() < 0.75:
            strength[end:] = random.uniform(0, 0.9) * random.random()
    return strength, shown


def timesteps(count: int, generator: torch.Generator) -> Tensor:
    """Mostly the noisy half of the schedule, where the text decides what is drawn."""
    u = torch.rand(count, generator=generator)
    low, middle, high = (
        torch.randint(a, b, (count,), generator=generator) for a, b in ((0, 300), (300, 700), (700, 1000))
    )
    return torch.where(u < 0.2, low, torch.where(u < 0.55, middle, high))


class Muon(torch.optim.Optimizer):
    """Momentum whose steps are made orthogonal (Jordan et al. 2024), as large as AdamW's (arXiv 2502.16982, eq. 4).

    For matrices and for kernels, whose inputs are taken as one dimension; a tiny UNet learns in about half as many
    steps as with AdamW. torch.optim.Muon takes no kernels.
    """

    def __init__(self, parameters, rate: float, momentum: float = 0.95, decay: float = 1e-3):
        super().__init__(parameters, {"lr": rate, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            alike: dict[tuple, list[tuple[Tensor, Tensor]]] = {}
            for parameter in (p for p in group["params"] if p.grad is not None):
                state = self.state[parameter]
                if not state:
                    state["mean"] = torch.zeros_like(parameter)
                mean = state["mean"]
                mean.lerp_(parameter.grad, 1 - group["momentum"])
                ahead = parameter.grad.lerp(mean, group["momentum"]).flatten(1)
                alike.setdefault(tuple(ahead.shape), []).append((parameter, ahead))
            for shape, pairs in alike.items():
                size = 0.2 * math.sqrt(max(shape)) * group["lr"]
                turns = orthogonal(torch.stack([ahead for _, ahead in pairs]))
                for (parameter, _), turn in zip(pairs, turns, strict=True):
                    parameter.mul_(1 - group["lr"] * group["decay"]).add_(turn.view_as(parameter), alpha=-size)


def orthogonal(matrices: Tensor) -> Tensor:
    """About the nearest orthogonal matrices [N, m, n], by five Newton-Schulz iterations of fifth order, in bfloat16."""
    x = matrices.bfloat16()
    x = x.mT if (tall := x.shape[1] > x.shape[2]) else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return (x.mT if tall else x).to(matrices.dtype)


@dataclass(frozen=True)
class Steps:
    """How long each part of the training is."""

    reading: int = 500
    drawing: int = 2800

    def repetitions(self, step: int) -> int:
        """How often a transformer's block is repeated at a step of drawing."""
        return next(times for share, times in reversed(REPETITIONS) if step >= int(share * self.drawing))


class Training:
    """A run that can be saved and continued after any step."""

    def __init__(self, seed: int, steps: Steps, stereotypes: bool, device: str):
        torch.manual_seed(seed)
        self.seed, self.steps = seed, steps
        self.stereotypes, self.device = stereotypes, torch.device(device)
        self.words = Words()
        self.net = Narrow(len(self.words.vocabulary) + 1).to(self.device)
        self.signal, self.noise = noise_levels(self.device)
        self.step = 0
        self.averages = {name: p.detach().clone() for name, p in self.net.named_parameters()}
        self.log: list[list[float]] = []
        self._optimisers()

    def _optimisers(self) -> None:
        """Muon for matrices and kernels, AdamW for vectors, tables and what touches pixels."""
        edges = ("embedding", "position", "unet.conv_in", "unet.conv_out")
        matrices, others = [], []
        for name, parameter in self.net.named_parameters():
            inner = parameter.ndim >= 2 and not any(edge in name for edge in edges)
            (matrices if inner else others).append(parameter)
        self.optimisers = (Muon(matrices, RATE), torch.optim.AdamW(others, RATE, (0.9, 0.99), weight_decay=1e-3))

    def read(self, show: Callable[[float], None]) -> None:
        """Teach both text encoders what captions say; show(error) after each step. Not saved on the way."""
        questions = Questions().to(self.device)
        learners = [*self.net.l.parameters(), *self.net.g.parameters(), *questions.parameters()]
        optimiser = torch.optim.AdamW(learners, lr=READ_RATE, betas=(0.9, 0.99), weight_decay=1e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, READ_RATE, total_steps=self.steps.reading + 1)
        for step in range(self.steps.reading):
            batch = make_batch(self.words, (self.seed, 1, step), self.stereotypes, simple=True).to(self.device)
            loss = self._reading_error(questions, batch)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            schedule.step()
            show(float(loss.detach()))
        self.averages = {name: p.detach().clone() for name, p in self.net.named_parameters()}

    def _reading_error(self, questions: Questions, batch: Batch) -> Tensor:
        """Every piece is asked at its last row, a caption of one frame and one character also at its end."""
        context, pooled = self.net.encode(batch.rows_l, batch.rows_g, batch.ends)
        places, told, whole, all_told = [], [], [], []
        for i, (lesson, spans) in enumerate(zip(batch.lessons, batch.spans, strict=True)):
            if lesson.silent or len(lesson.figures) > 1:
                continue
            frames = {part: frame for part, frame in zip(lesson.parts, lesson.frames, strict=True) if part is not None}
            for piece, span in enumerate(spans):
                frame = frames.get(piece)
                places.append((i, span[-1]))
                told.append(told_of(frame, None if frame else lesson.figures[0]))
            if len(lesson.frames) == 1:
                whole.append(i)
                all_told.append(
                    told_of(lesson.frames[0] if frames else None, lesson.figures[0] if 0 not in frames else None)
                )
        rows, columns = torch.tensor(places, device=self.device).T
        whole = torch.tensor(whole, device=self.device)
        ends = batch.ends[whole]
        return (
            questions.loss(questions.of_rows(context[rows, columns]), told)
            + questions.loss(questions.of_rows(context[whole, ends]), all_told)
            + questions.loss(questions.of_pooled(pooled[whole]), all_told)
        ) / 3

    def advance(self) -> float:
        """One step of drawing; returns the mean squared error of v."""
        repetitions = self.steps.repetitions(self.step)
        self.net.repeat_blocks(repetitions)
        cosine = 0.5 * (1 + math.cos(math.pi * self.step / self.steps.drawing))
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = RATE * min(1.0, (self.step + 1) / 150) * (0.03 + 0.97 * cosine)
        simple = self.step < SIMPLE * self.steps.drawing
        batch = make_batch(self.words, (self.seed, 2, self.step), self.stereotypes, simple).to(self.device)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.step)
        x0 = demo.to_latents(batch.pictures)
        t = timesteps(x0.shape[0], generator).to(self.device)
        eps = torch.randn(x0.shape, generator=generator).to(self.device)
        a, b = (level[t].view(-1, 1, 1, 1) for level in (self.signal, self.noise))
        context, pooled = self.net.encode(batch.rows_l, batch.rows_g, batch.ends)
        heard = batch.heard[:, None]
        context = context * batch.strengths[..., None] * heard[..., None]
        with torch.autocast(self.device.type, dtype=torch.bfloat16):
            predicted = self.net.predict(a * x0 + b * eps, t, context, pooled * heard)
        loss = (predicted.float() - (a * eps - b * x0)).square().mean()
        self.net.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        for optimiser in self.optimisers:
            optimiser.step()
        decay = min(0.999 if repetitions == 1 else 0.99, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            current = dict(self.net.named_parameters())
            torch._foreach_lerp_(list(self.averages.values()), [current[n] for n in self.averages], 1 - decay)
        self.step += 1
        return float(loss.detach())

    def save(self, path: Path) -> None:
        """Write everything that `load` needs, complete or not at all."""
        state = {
            "settings": self.settings,
            "step": self.step,
            "net": {name: p.detach() for name, p in self.net.named_parameters()},
            "averages": self.averages,
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
            "log": self.log,
        }
        torch.save(state, path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)

    def load(self, path: Path) -> None:
        """Continue a saved run. Raises SystemExit when it was begun with other settings."""
        state = torch.load(path, weights_only=True, map_location=self.device)
        if state["settings"] != self.settings:
            raise SystemExit(
                f"{path} belongs to a run with other settings: {state['settings']}. Remove it or name them."
            )
        with torch.no_grad():
            for name, parameter in self.net.named_parameters():
                parameter.copy_(state["net"][name])
        self.averages = {name: value.to(self.device) for name, value in state["averages"].items()}
        for optimiser, kept in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(kept)
        self.step, self.log = state["step"], state["log"]

    @property
    def settings(self) -> dict:
        return {
            "seed": self.seed,
            "steps": asdict(self.steps),
            "stereotypes": self.stereotypes,
            "words": len(self.words.vocabulary),
        }

    def averaged(self) -> Narrow:
        """A copy of the network with the averaged weights, as deep as SDXL."""
        twin = Narrow(len(self.words.vocabulary) + 1).to(self.device)
        twin.repeat_blocks(REPETITIONS[-1][1])
        with torch.no_grad():
            for name, parameter in twin.named_parameters():
                parameter.copy_(self.averages[name])
        return twin.eval()

    def weights(self) -> dict[str, Tensor]:
        """The averaged weights as they are shipped, float16: the UNet under SDXL's own names, one block each.

        Rows of text have the norm 1 per dimension, so that they reach `demo.ROW_NORM` at SDXL's widths.
        """
        net = self.averaged()
        originals = {name: original for original, name in diffusers_names(SHALLOW).items()}
        parts = {name: layer.parts for name, layer in net.named_modules() if isinstance(layer, Share)}
        sizes = self._row_sizes(net)
        out = {"vocabulary": torch.tensor(self.words.vocabulary, dtype=torch.int32)}
        for name, value in net.named_parameters():
            part, rest = name.split(".", 1)
            value = value.detach() / parts.get(name.rpartition(".")[0], 1)
            if rest.startswith(("embedding", "position", "out.", "fc2.")):  # what is added up to a row
                value = value / sizes[part]
            elif ".attn2.to_k." in name or ".attn2.to_v." in name:
                value = torch.cat(
                    [half * size for half, size in zip(value.chunk(2, 1), sizes.values(), strict=True)], 1
                )
            out[f"unet.{originals[rest]}" if part == "unet" else name] = value.half().cpu().contiguous()
        return out

    @torch.no_grad()
    def _row_sizes(self, net: Narrow) -> dict[str, float]:
        """Norm per dimension of the rows of text, without start, end and padding, by encoder."""
        batch = make_batch(self.words, (self.seed, 3), self.stereotypes, simple=True).to(self.device)
        context, _ = net.encode(batch.rows_l, batch.rows_g, batch.ends)
        places = torch.arange(context.shape[1], device=self.device)
        said = (places > 0) & (places < batch.ends[:, None])
        means = (half[said].norm(dim=1).mean() / math.sqrt(demo.NARROW) for half in context.chunk(2, -1))
        return dict(zip("lg", map(float, means), strict=True))


@torch.inference_mode()
def sample(net: Narrow, words: Words, texts: Sequence[str], seed: int, steps: int = 20, cfg: float = 5.0) -> Tensor:
    """Pictures [B, 24, 24, 3] in 0..1 of one text each: Euler from pure noise, guided away from silence."""
    device = next(net.parameters()).device
    rows = [words.rows([text]) for text in texts]
    context, pooled = net.encode(*(torch.tensor([row[i] for row in rows], device=device) for i in (0, 1, 3)))
    context, pooled = torch.cat([context, context * 0]), torch.cat([pooled, pooled * 0])
    signal, noise = noise_levels(device)
    times = torch.linspace(999, 0, steps + 1).round().long().tolist()
    x = torch.randn(len(texts), 4, SIZE, SIZE, generator=torch.Generator().manual_seed(seed)).to(device)
    for now, then in zip(times, times[1:], strict=False):
        at = torch.full((2 * len(texts),), now, device=device)
        v, v0 = net.predict(x.repeat(2, 1, 1, 1), at, context, pooled).chunk(2)
        v = v0 + cfg * (v - v0)
        x0, eps = signal[now] * x - noise[now] * v, noise[now] * x + signal[now] * v
        x = signal[then] * x0 + noise[then] * eps
    return demo.to_pictures(x0).cpu()


def contact_sheet(pictures: Tensor, columns: int, path: Path, scale: int = 4, gap: int = 4) -> None:
    """Write pictures [N, 24, 24, 3] as a table."""
    from PIL import Image

    large = (pictures.numpy() * 255).round().astype(np.uint8).repeat(scale, 1).repeat(scale, 2)
    missing = -len(large) % columns
    large = np.pad(large, ((0, missing), (gap, 0), (gap, 0), (0, 0)), constant_values=255)
    rows = [np.concatenate(list(large[i : i + columns]), 1) for i in range(0, len(large), columns)]
    Image.fromarray(np.concatenate(rows)).save(path)


def check(training: Training, count: int = 8) -> tuple[Tensor, str]:
    """Pictures of `count` stories of four frames, each frame its own prompt, and a sentence on how good they are."""
    stories = [random_story(10_000 + i) for i in range(count)]
    texts = [f"{figure_words(story.identities[0])} {frame_words(frame)}" for story in stories for frame in story.frames]
    pictures = sample(training.averaged(), training.words, texts, seed=training.seed)
    readings = Reader().read_all(pictures.numpy())
    shown = [
        StoryPictures(story, tuple(reading.scene for reading in readings[4 * i : 4 * i + 4]))
        for i, story in enumerate(stories)
    ]
    aligned, error = effect(shown).alignment.mean, float(np.mean([reading.error for reading in readings]))
    return pictures, f"{aligned:.0%} of {len(texts)} frames show everything they were told; reading error {error:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--reading", type=int, default=Steps.reading, help="steps of the text encoders alone")
    parser.add_argument("--drawing", type=int, default=Steps.drawing, help="steps of the whole model")
    parser.add_argument("--control", action="store_true", help="a world without stereotypes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=None, help=f"folder of the result (default {OUT}/seed-N)")
    parser.add_argument("--pause-after", type=int, default=None, help="stop after this step, to go on another time")
    parser.add_argument("--install", action="store_true", help="make the result the demo model that the pack loads")
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
        f"{len(training.words.vocabulary)} token ids, {training.steps.drawing} steps, at {training.step}, in {folder}",
        flush=True,
    )
    learn(training, saved, options.pause_after)
    if training.step < training.steps.drawing:
        print(f"Paused after step {training.step}: the same command without --pause-after goes on.")
        return
    finish(training, folder)
    if options.install:
        shutil.copy(folder / WEIGHTS, demo.FILE)
        shutil.copy(folder / LOG, demo.FILE.with_name("demo-training.csv"))
        print(f"Installed: {demo.FILE}")


def learn(training: Training, saved: Path, pause_after: int | None) -> None:
    from tqdm import tqdm

    last = min(training.steps.drawing, pause_after or training.steps.drawing)
    if training.step == 0:
        with tqdm(total=training.steps.reading, desc="reading", unit="step", mininterval=5, ncols=100) as bar:

            def show(error: float) -> None:
                bar.set_postfix(error=f"{error:.3f}", refresh=False)
                bar.update()

            training.read(show)
    began, first, errors = time.monotonic(), training.step, []
    with tqdm(
        total=training.steps.drawing, desc="drawing", initial=training.step, unit="step", mininterval=5, ncols=100
    ) as bar:
        while training.step < last:
            errors.append(training.advance())
            bar.update()
            if training.step % LOG_EVERY == 0:
                speed = (training.step - first) * PICTURES / (time.monotonic() - began)
                training.log.append([training.step, round(sum(errors) / len(errors), 5), round(speed, 1)])
                bar.set_postfix(error=f"{training.log[-1][1]:.4f}", pictures_per_second=f"{speed:.0f}")
                errors = []
            if training.step % SAVE_EVERY == 0 or training.step == last:
                training.save(saved)


def finish(training: Training, folder: Path) -> None:
    """Write the weights, the log and a contact sheet."""
    from safetensors.torch import save

    metadata = {"format": "pt", "settings": json.dumps(training.settings), "step": str(training.step)}
    write_whole(folder / WEIGHTS, save(training.weights(), metadata))
    with (folder / LOG).open("w", newline="") as file:
        csv.writer(file).writerows([("step", "mean squared error of v", "pictures per second"), *training.log])
    pictures, verdict = check(training)
    contact_sheet(pictures, 4, folder / SHEET)
    print(verdict)
    for name in (WEIGHTS, LOG, SHEET):
        print(folder / name)


if __name__ == "__main__":
    main()
