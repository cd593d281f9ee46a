"""The published forms of two methods, only for comparing cost and results with StoryLoom's.

Consistent self-attention (StoryDiffusion, arXiv 2405.01434) as a dense mask over all tokens of all images, and with a
bank that a first pass writes and later passes read; identity-preserving cross-attention (One-Prompt-One-Story, arXiv
2501.13554) with an extra pass over the identity prompt, whose keys and values are stored at every step. Both are
written from descriptions of the published programs, as ComfyUI's replacements and patches, and avoid their waste: masks
are made once per step in the kernel's dtype, all frames of a prompt are one batch, and no result is discarded. Layers
are not skipped at random.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..attention.consistent import sample_tokens

SAMPLER_SAMPLE, CALC_COND_BATCH = "sampler_sample", "calc_cond_batch"
"""ComfyUI's names of the wrapped calls: a sampling run, and an evaluation of all conditionings."""

POSITIVE = 0
"""ComfyUI's index of the positive in an ordinary guider."""

Options = dict[str, Any]


@dataclass(eq=False)
class Steps:
    """Counts the evaluations of a run, as the programs do; with one evaluation per step this is the step."""

    now: int = -1
    made: dict = field(default_factory=dict)
    """Cache of the current step."""

    def begin(self, executor, *args, **kwargs):
        self.now = -1
        return executor(*args, **kwargs)

    def evaluate(self, executor, *args, **kwargs):
        self.now += 1
        self.made.clear()
        return executor(*args, **kwargs)

    def counted(self, model):
        """A clone of the model whose evaluations are counted here."""
        model = model.clone()
        model.add_wrapper_with_key(SAMPLER_SAMPLE, "published", self.begin)
        model.add_wrapper_with_key(CALC_COND_BATCH, "published", self.evaluate)
        return model

    def once(self, key, make):
        """`make()`, computed once per step and key."""
        if key not in self.made:
            self.made[key] = make()
        return self.made[key]


def dense_mask(subsets: Sequence[Tensor], tokens: int, like: Tensor) -> Tensor:
    """Bias of the logits of all tokens of all images, 0 for visible and -inf for hidden tokens: [B N, B N].

    subsets: tokens of each image that the others see; tokens: N; like: a tensor of the result's dtype and device.
    """
    images = len(subsets)
    shown = torch.zeros(images, tokens, dtype=torch.bool)
    for image, subset in enumerate(subsets):
        shown[image, subset] = True
    seen = shown.flatten().repeat(images, 1)
    for image in range(images):
        seen[image, image * tokens : (image + 1) * tokens] = True
    bias = torch.zeros(seen.shape).masked_fill(~seen, float("-inf")).to(like)
    return bias.repeat_interleave(tokens, dim=0)


def with_dense_mask(model, rate: float, seed: int, first: int):
    """Consistent self-attention over all tokens of all images with a dense mask, in the output blocks.

    rate, seed: as in the node; first: first step. Returns the patched model and its step counter.
    """
    from ..nodes.patching import attend, attention_depths

    steps = Steps()

    def attention(q: Tensor, k: Tensor, v: Tensor, options: Options) -> Tensor:
        if steps.now < first:
            return attend(q, k, v, options["n_heads"], None, options)
        halves, tokens = len(options["cond_or_uncond"]), q.shape[1]
        images = q.shape[0] // halves

        def mask() -> Tensor:
            subsets = [sample_tokens(seed, steps.now, image, tokens, rate) for image in range(images)]
            return dense_mask(subsets, tokens, q)[None, None]

        together = (part.reshape(halves, images * tokens, -1) for part in (q, k, v))
        return attend(*together, options["n_heads"], steps.once(tokens, mask), options).reshape(q.shape)

    model = steps.counted(model)
    for part, number in attention_depths(model):
        if part == "output":
            model.set_model_attn1_replace(attention, part, number)
    return model, steps


@dataclass(eq=False)
class Bank:
    """Hidden states [n, C] of the first images that all others see, by step, layer and half of guidance."""

    rate: float
    seed: int
    first: int
    shown: dict[tuple, Tensor] = field(default_factory=dict)

    def _subset(self, steps: Steps, image: int, tokens: int, device: torch.device) -> Tensor:
        def drawn() -> Tensor:
            return sample_tokens(self.seed, steps.now, image, tokens, self.rate).to(device)

        return steps.once((image, tokens), drawn)

    def written_by(self, model):
        """A clone of the model whose images attend to each other and write their shown tokens to the bank."""
        return self._patched(model, self._write)

    def read_by(self, model):
        """A clone of the model whose images attend to themselves and to the bank."""
        return self._patched(model, self._read)

    def _patched(self, model, context):
        steps = Steps()

        def patch(n: Tensor, own: Tensor, values: Tensor, options: Options) -> tuple[Tensor, Tensor, Tensor]:
            if options["block"][0] != "output" or steps.now < self.first:
                return n, own, values
            seen = context(n, steps, options)
            return n, seen, seen

        model = steps.counted(model)
        model.set_model_attn1_patch(patch)
        return model

    def _write(self, n: Tensor, steps: Steps, options: Options) -> Tensor:
        kinds, layer = options["cond_or_uncond"], _layer(options)
        hidden = n.unflatten(0, (len(kinds), -1))
        images, tokens = hidden.shape[1:3]
        shown = [hidden[:, j, self._subset(steps, j, tokens, n.device)] for j in range(images)]
        for half, kind in enumerate(kinds):
            self.shown[steps.now, layer, kind] = torch.cat([part[half] for part in shown])
        seen = [
            torch.cat([hidden[:, i], *(part for j, part in enumerate(shown) if j != i)], dim=1) for i in range(images)
        ]
        return torch.stack(seen, dim=1).flatten(0, 1)

    def _read(self, n: Tensor, steps: Steps, options: Options) -> Tensor:
        kinds, layer = options["cond_or_uncond"], _layer(options)
        each = n.shape[0] // len(kinds)
        shown = [self.shown[steps.now, layer, kind].expand(each, -1, -1) for kind in kinds]
        return torch.cat([n, torch.cat(shown)], dim=1)


@dataclass(eq=False)
class StoredIdentity:
    """Keys and values [1, 77, C] of the identity prompt, for every step, layer and half of guidance.

    counted: the columns that are used: start token and identity.
    """

    counted: range
    kept: dict[tuple, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def stored_by(self, model):
        """A clone of the model that draws one image and stores its keys and values."""
        return self._patched(model, self._store)

    def used_by(self, model):
        """A clone of the model whose positive rows also attend to the stored keys and values."""
        return self._patched(model, self._use)

    def _patched(self, model, attention):
        from ..nodes.patching import attention_depths

        steps = Steps()

        def replacement(q: Tensor, k: Tensor, v: Tensor, options: Options) -> Tensor:
            return attention(q, k, v, steps, options)

        model = steps.counted(model)
        for part, number in attention_depths(model):
            model.set_model_attn2_replace(replacement, part, number)
        return model

    def _store(self, q: Tensor, k: Tensor, v: Tensor, steps: Steps, options: Options) -> Tensor:
        from ..nodes.patching import attend

        for half, kind in enumerate(options["cond_or_uncond"]):
            self.kept[steps.now, _layer(options), kind] = k[half : half + 1], v[half : half + 1]
        return attend(q, k, v, options["n_heads"], None, options)

    def _use(self, q: Tensor, k: Tensor, v: Tensor, steps: Steps, options: Options) -> Tensor:
        from ..nodes.patching import attend

        kinds, heads = options["cond_or_uncond"], options["n_heads"]
        each = q.shape[0] // len(kinds)
        out = []
        for kind, *rows in zip(kinds, *(part.split(each) for part in (q, k, v)), strict=True):
            mask = None
            if kind == POSITIVE:
                mask = steps.once("mask", lambda: self._mask(k.shape[1], q))
                stored = self.kept[steps.now, _layer(options), kind]
                rows[1:] = [
                    torch.cat([own, more.expand(each, -1, -1)], dim=1)
                    for own, more in zip(rows[1:], stored, strict=True)
                ]
            out.append(attend(*rows, heads, mask, options))
        return torch.cat(out)

    def _mask(self, columns: int, like: Tensor) -> Tensor:
        """Bias [1, 1, 1, 2 T] of the logits of a frame's own columns, then of the stored ones."""
        bias = torch.full((2 * columns,), float("-inf"))
        bias[:columns] = 0
        bias[[columns + column for column in self.counted]] = 0
        return bias.to(like)[None, None, None]


def _layer(options: Options) -> tuple:
    return (*options["block"], options["block_index"])
