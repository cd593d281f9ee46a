"""One sampling run with patches: what it adds to each evaluation and to each UNet call.

Written for ComfyUI's wrapper interface, with everything of the host passed in.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..prompts.conditioning import StoryCond
from .cache import RunCache
from .call import KEY, SamplerCall, UNetCall, nearest_step, read_call, window_images
from .chain import Chain, HostAttend, Replacement
from .compiled import CompiledUNet
from .conditionings import conditioning_of
from .patch import OUTPUT_BLOCKS, PreparesSteps, ScheduledPatch, acting, nested
from .uncompiled import uncompiled

COMPILED = "torch.compile"
"""Name of ComfyUI's wrapper around the UNet call that runs a compiled copy of the UNet instead."""


@dataclass(frozen=True, eq=False)
class LayerAttention:
    """StoryLoom's attention at one layer of one UNet call, around the attention that it replaces."""

    patches: tuple[ScheduledPatch, ...]
    call: UNetCall
    host: HostAttend
    owner: Replacement | None

    @uncompiled
    def __call__(self, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
        """q, k, v: [rows, tokens, C] projected, heads not split. Not compiled: the host drops its guards here."""
        chain = Chain(options, self.host, self.owner, nested(acting(self.patches, self.call)), self.call)
        return chain(q, k, v, options["n_heads"])


@dataclass(frozen=True, eq=False)
class OutputJoin:
    """StoryLoom's patches at the output blocks of one UNet call, one after the other."""

    patches: tuple[ScheduledPatch, ...]
    call: UNetCall

    @uncompiled
    def __call__(self, h: Tensor, skip: Tensor | None, options: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """As the host calls it. Not compiled, for the same reason as attention."""
        _, block = options["block"]
        for patch in acting(self.patches, self.call):
            h, skip = patch.join(h, skip, block)
        return h, skip


@dataclass(frozen=True, eq=False)
class StoryRun:
    """The two wrappers of one sampling run.

    sigmas: where its steps begin; story: of the run, if any; cache: what patches compute once for the run, dropped with
    it; compiling: ComfyUI's settings for torch.compile, where its UNet is to be compiled.
    """

    patches: tuple[ScheduledPatch, ...]
    host: HostAttend
    sigmas: tuple[float, ...] = ()
    story: StoryCond | None = None
    cache: RunCache = field(default_factory=RunCache, repr=False)
    compiling: Mapping[str, Any] | None = None

    def evaluate(self, executor, model, conds, x_in: Tensor, timestep: Tensor, model_options: dict[str, Any]):
        """CALC_COND_BATCH wrapper: pass the conditionings of this evaluation on to its UNet calls."""
        options = model_options["transformer_options"]
        known = {
            (number, cond["uuid"]): conditioning_of(cond) for number, group in enumerate(conds) for cond in group or ()
        }
        sigma, images = float(timestep.flatten()[0]), window_images(options, x_in.shape[0])
        step = nearest_step(sigma, self.sigmas)
        call = SamplerCall(sigma, known, images, step, len(self.sigmas), self.story, self.cache, tuple(x_in.shape[-2:]))
        for patch in acting(self.patches, call):
            if isinstance(patch, PreparesSteps):
                patch.prepare(call)
        model_options = {**model_options, "transformer_options": {**options, KEY: call}}
        return executor(model, conds, x_in, timestep, model_options)

    def call_unet(
        self, executor, x: Tensor, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **kwargs
    ):
        """APPLY_MODEL wrapper: install StoryLoom's patches in this call's options, which are complete by now."""
        options = transformer_options or {}
        call = read_call(options, x.shape[0], x.device)
        if call is not None:
            options = self.installed(options, call)
        if call is None or self.compiling is None:
            return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
        model = executor.class_obj
        unet = model.diffusion_model
        model.diffusion_model = self.cache.get_or_make(
            (COMPILED, id(unet)), lambda: CompiledUNet(unet, self.host, self.compiling)
        )
        try:
            return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
        finally:
            model.diffusion_model = unet

    def installed(self, options: dict[str, Any], call: UNetCall) -> dict[str, Any]:
        """A copy of transformer_options with StoryLoom's patches in their slots, around or after other nodes'."""
        slots: dict[str, list[ScheduledPatch]] = {}
        for entry in self.patches:
            slots.setdefault(entry.patch.slot, []).append(entry)
        outputs = slots.pop(OUTPUT_BLOCKS, ())
        replacements = options.get("patches_replace", {})
        taken = {slot: self._attention(patches, replacements.get(slot, {}), call) for slot, patches in slots.items()}
        options = {**options, "patches_replace": {**replacements, **taken}}
        if outputs:
            others = options.get("patches", {})
            join = OutputJoin(tuple(outputs), call)
            options["patches"] = {**others, OUTPUT_BLOCKS: [*others.get(OUTPUT_BLOCKS, ()), join]}
        return options

    def _attention(
        self, patches: list[ScheduledPatch], owners: Mapping[tuple, Replacement], call: UNetCall
    ) -> dict[tuple, Replacement]:
        """One slot's replacements, with the attention of every patched layer replaced.

        In the host a per-index key hides its block's key. So a whole block takes the block key, plus the per-index keys
        that another node owns there already; only a finer choice of layers takes per-index keys alone.
        """
        replaced = dict(owners)
        for key, here in _layers(patches, owners):
            replaced[key] = LayerAttention(here, call, self.host, owners.get(key, owners.get(key[:2])))
        return replaced


def _layers(
    patches: list[ScheduledPatch], owners: Mapping[tuple, Replacement]
) -> Iterator[tuple[tuple, tuple[ScheduledPatch, ...]]]:
    """Keys that patches replace in one slot, each with the patches that act there."""
    for block in dict.fromkeys(block for entry in patches for block in entry.patch.blocks):
        here = [entry for entry in patches if block in entry.patch.blocks]
        whole = tuple(entry for entry in here if entry.patch.blocks[block] is None)
        finer = {j for entry in here for j in entry.patch.blocks[block] or ()}
        if whole:
            yield block, whole
            finer |= {key[2] for key in owners if len(key) == 3 and key[:2] == block}
        for j in sorted(finer):
            yield (
                (*block, j),
                tuple(entry for entry in here if entry in whole or j in (entry.patch.blocks[block] or ())),
            )
