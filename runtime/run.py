"""One sampling run with patches: what it adds to each evaluation and to each UNet call.

Written for ComfyUI's wrapper interface, with everything of the host passed in.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import Tensor

from ..prompts.conditioning import StoryCond
from .cache import RunCache
from .call import KEY, SamplerCall, UNetCall
from .chain import Chain, HostAttend, Replacement
from .compiled import CompiledUNet
from .conditionings import conditioning_of, context_of
from .patch import OUTPUT_BLOCKS, PreparesSteps, ScheduledPatch, acting, nested
from .reading import has_moved_rows, nearest_step, read_call, window_images, with_added_rows
from .uncompiled import uncompiled

CROSS_ATTENTION, CROSS_INPUTS = "attn2", "attn2_patch"
"""ComfyUI's names for cross-attention, and for functions that change its inputs."""

UNET_FUNCTION = "model_function_wrapper"
"""ComfyUI's name for another node's function that calls the UNet in its own way."""

COMPILED = "torch.compile"
"""Name of ComfyUI's wrapper around the UNet call that runs a compiled copy of the UNet instead."""


@dataclass(frozen=True, eq=False)
class LayerAttention:
    """StoryLoom's attention at one layer of one UNet call, around the attention that it replaces.

    cross: whether it is cross-attention; reached: where its patches are noted as called.
    """

    patches: tuple[ScheduledPatch, ...]
    call: UNetCall
    host: HostAttend
    owner: Replacement | None
    cross: bool = False
    reached: set[ScheduledPatch] = field(default_factory=set, repr=False)

    @uncompiled
    def __call__(self, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
        """q, k, v: [rows, tokens, C] projected, heads not split. Not compiled: the host drops its guards here."""
        self.reached.update(self.patches)
        call = self._call(len(q)) if self.cross else self.call
        chain = Chain(options, self.host, self.owner, nested(acting(self.patches, call)), call)
        return chain(q, k, v, options["n_heads"])

    def _call(self, rows: int) -> UNetCall:
        """The call as this layer sees it, with rows that another node has added or moved."""
        call = self.call.call_cache.get((CrossRows, rows), self.call)
        if rows != call.rows and acting(self.patches, call):
            raise ValueError(
                f"Another node has changed the number of rows in cross-attention from {self.call.rows} to {rows}, so "
                "StoryLoom cannot match them to frames. Remove that node (regional prompts?)."
            )
        return call


@dataclass(frozen=True, eq=False)
class CrossRows:
    """Recognises the rows that other nodes add to the inputs of cross-attention, or move."""

    call: UNetCall

    @uncompiled
    def __call__(self, n: Tensor, context: Tensor, value: Tensor, options: dict[str, Any]) -> tuple[Tensor, ...]:
        """As the host calls it: n [rows, N, C], context and value [rows, T, D], returned as they are."""
        if len(n) == len(context):
            self.call.cached((CrossRows, len(n)), lambda: self._seen(options, context))
        return n, context, value

    def _seen(self, options: dict[str, Any], context: Tensor) -> UNetCall:
        """The call with the rows of this layer. Their order is compared once in a run, added rows in every call."""
        moved = (CrossRows, "moved"), lambda: has_moved_rows(self.call, options, context)
        if len(context) != self.call.rows or self.call.cached_by_layout(*moved):
            return with_added_rows(self.call, options, context)
        return self.call


@dataclass(frozen=True, eq=False)
class OutputJoin:
    """StoryLoom's patches at the output blocks of one UNet call, one after the other. reached: as in LayerAttention."""

    patches: tuple[ScheduledPatch, ...]
    call: UNetCall
    reached: set[ScheduledPatch] = field(default_factory=set, repr=False)

    @uncompiled
    def __call__(self, h: Tensor, skip: Tensor | None, options: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """As the host calls it. Not compiled, for the same reason as attention."""
        self.reached.update(self.patches)
        _, block = options["block"]
        for patch in acting(self.patches, self.call):
            h, skip = patch.join(h, skip, block)
        return h, skip


@dataclass(frozen=True, eq=False)
class StoryRun:
    """The two wrappers of one sampling run.

    sigmas: where its steps begin; story: of the run, if any; cache: what patches compute once for the run, dropped with
    it; compiling: ComfyUI's settings for torch.compile, where its UNet is to be compiled; reached: patches that the
    UNet has called.
    """

    patches: tuple[ScheduledPatch, ...]
    host: HostAttend
    sigmas: tuple[float, ...] = ()
    story: StoryCond | None = None
    cache: RunCache = field(default_factory=RunCache, repr=False)
    compiling: Mapping[str, Any] | None = None
    reached: set[ScheduledPatch] = field(default_factory=set, repr=False)

    def evaluate(self, executor, model, conds, x_in: Tensor, timestep: Tensor, model_options: dict[str, Any]):
        """CALC_COND_BATCH wrapper: pass the conditionings of this evaluation on to its UNet calls."""
        options, unet_function = model_options["transformer_options"], model_options.get(UNET_FUNCTION)
        given = {(number, cond["uuid"]): cond for number, group in enumerate(conds) for cond in group or ()}
        known = {key: conditioning_of(cond) for key, cond in given.items()}
        contexts = {key: context for key, cond in given.items() if (context := context_of(cond)) is not None}
        sigma, images = float(timestep.flatten()[0]), window_images(options, x_in.shape[0])
        step = nearest_step(sigma, self.sigmas)
        call = SamplerCall(
            sigma,
            known,
            images,
            step,
            len(self.sigmas),
            self.story,
            self.cache,
            tuple(x_in.shape[-2:]),
            x_in,
            contexts,
            unet_function is not None,
        )
        for patch in acting(self.patches, call):
            if isinstance(patch, PreparesSteps):
                patch.prepare(call)
        model_options = {**model_options, "transformer_options": {**options, KEY: call}}
        if unet_function is not None:
            model_options[UNET_FUNCTION] = partial(self.call_function, unet_function)
        return executor(model, conds, x_in, timestep, model_options)

    def call_function(self, unet_function, apply_model, arguments: dict[str, Any]) -> Tensor:
        """Another node's function around the UNet, with patches for one that runs the UNet's blocks by itself.

        Where it calls the model instead, `call_unet` replaces them by those of that call.
        """
        given = arguments["c"]
        options = given["transformer_options"]
        ordinary = {**options, KEY: replace(options[KEY], wrapped=False)}
        call = read_call(ordinary, arguments["input"], given.get("c_crossattn"))
        given = {**given, "transformer_options": self.installed(options, call)}
        return unet_function(apply_model, {**arguments, "c": given})

    def call_unet(
        self, executor, x: Tensor, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **kwargs
    ):
        """APPLY_MODEL wrapper: install StoryLoom's patches in this call's options, which are complete by now."""
        options = transformer_options or {}
        call = read_call(options, x, c_crossattn)
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
        replacements = _others(options.get("patches_replace", {}))
        taken = {
            slot: self._attention(patches, replacements.get(slot, {}), call, slot == CROSS_ATTENTION)
            for slot, patches in slots.items()
        }
        options = {**options, "patches_replace": {**replacements, **taken}}
        patches = {
            name: [patch for patch in others if not isinstance(patch, CrossRows | OutputJoin)]
            for name, others in options.get("patches", {}).items()
        }
        if patches.get(CROSS_INPUTS) and CROSS_ATTENTION in slots:
            patches[CROSS_INPUTS].append(CrossRows(call))
        if outputs:
            patches.setdefault(OUTPUT_BLOCKS, []).append(OutputJoin(tuple(outputs), call, self.reached))
        if patches:
            options["patches"] = patches
        return options

    def _attention(
        self, patches: list[ScheduledPatch], owners: Mapping[tuple, Replacement], call: UNetCall, cross: bool
    ) -> dict[tuple, Replacement]:
        """One slot's replacements, with the attention of every patched layer replaced.

        In the host a per-index key hides its block's key. So a whole block takes the block key, plus the per-index keys
        that another node owns there already; only a finer choice of layers takes per-index keys alone.
        """
        replaced = dict(owners)
        for key, here in _layers(patches, owners):
            owner = owners.get(key, owners.get(key[:2]))
            replaced[key] = LayerAttention(here, call, self.host, owner, cross, self.reached)
        return replaced


def _others(replacements: Mapping[str, Mapping[tuple, Replacement]]) -> dict[str, dict[tuple, Replacement]]:
    """Replacements of attention by slot without StoryLoom's own, which another node has passed on."""
    owners = {
        slot: {key: one.owner if isinstance(one, LayerAttention) else one for key, one in there.items()}
        for slot, there in replacements.items()
    }
    return {slot: {key: one for key, one in there.items() if one is not None} for slot, there in owners.items()}


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
