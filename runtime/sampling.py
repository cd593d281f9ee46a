"""Where patches meet a sampling run: settings wait on the model, all work happens while it samples.

A node stores its settings on a clone of the model (`StorySampling`, a wrapper around the sampler). When sampling starts
the wrapper checks the batch and adds two wrappers to that run's own options: one sees every evaluation and learns which
conditioning is a story's, one sees every UNet call and puts StoryLoom's patches around whatever stands there then.
Nothing is written to the model, so nothing is left behind, and the order of nodes does not matter.

Written for ComfyUI's wrapper interface, with everything of the host passed in.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from ..prompts.conditioning import TAG, StoryCond
from .blocks import Blocks
from .call import KEY, Conditioning, SamplerCall, UNetCall, nearest_step, read_call, window_images
from .chain import Below, HostAttend, Inner, Replacement
from .compiled import CompiledUNet, can_compile
from .foresight import FORESEEN, OUTER_SAMPLE, Asked, foresee
from .kept import Kept
from .memory import PREPARE_SAMPLING, TELL, Gathering, ToldMemory
from .uncompiled import uncompiled

SAMPLER_SAMPLE, CALC_COND_BATCH, APPLY_MODEL = "sampler_sample", "calc_cond_batch", "apply_model"
"""ComfyUI's names for what is wrapped: a sampling run, an evaluation of all conditionings, a call of the UNet."""

OUTPUT_BLOCKS = "output_block_patch"
"""ComfyUI's name for functions that change what an output block of a UNet gets."""

COMPILED, COMPILE_SETTINGS = "torch.compile", "torch_compile_kwargs"
"""Name of ComfyUI's wrapper around the UNet call that runs a compiled copy of the UNet instead, and of its settings."""


class Patch(Protocol):
    """Settings of one method, stored on the model by a node: an AttentionPatch or an OutputPatch, as its slot says."""

    name: str
    slot: str
    start_percent: float
    end_percent: float
    skip_first_steps: int

    @property
    def neutral(self) -> bool:
        """Whether these settings change nothing at all."""

    def hindrance(self, story: StoryCond | None, images: int) -> str | None:
        """Why these settings change nothing in a run over so many images, None when they do."""


class AttentionPatch(Patch, Protocol):
    """A patch in slot "attn1" or "attn2", on the attention layers of some blocks.

    adds: whether it calls what stands underneath once, as the host would, and adds to the answer. Such a patch goes
    around those that change keys and values.
    """

    blocks: Blocks
    adds: bool

    def combine(self, other: object) -> AttentionPatch | None:
        """These settings and another node's as one, on one layer at one time; None when both act by themselves."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, heads: int, call: UNetCall, inner: Inner | Below) -> Tensor:
        """Attention of one layer; `inner` is what stood there before, or a patch of ours."""


class OutputPatch(Patch, Protocol):
    """A patch in slot OUTPUT_BLOCKS, on what the output blocks of a UNet get."""

    def join(self, h: Tensor, skip: Tensor | None, block: int) -> tuple[Tensor, Tensor | None]:
        """Backbone and skip, [rows, channels, height, width] each, that output block `block` gets instead of these."""


@runtime_checkable
class Prepared(Protocol):
    """A patch that makes something new in every step, before the UNet is called: there the card would wait for it."""

    def prepare(self, evaluation: SamplerCall) -> None:
        """Make what the UNet calls of an evaluation will need, as far as earlier ones in the run have shown it."""


def check_window(start_percent: float, end_percent: float) -> None:
    """Raise ValueError when a patch's window ends before it starts, or nobody knows where."""
    if math.isnan(start_percent) or math.isnan(end_percent):
        raise ValueError(
            f"start_percent {start_percent:g} and end_percent {end_percent:g} are not both numbers: type or connect "
            "numbers from 0 to 1."
        )
    if start_percent > end_percent:
        raise ValueError(
            f"start_percent {start_percent:g} lies after end_percent {end_percent:g}, so the patch would never act. "
            "Set start_percent below end_percent."
        )


@dataclass(frozen=True, eq=False)
class Opened:
    """A patch and the sigmas between which it acts, both ends included."""

    patch: Patch
    first: float
    last: float

    def at(self, sigma: float) -> bool:
        return self.last <= sigma <= self.first


def _acting(patches: Iterable[Opened], call: SamplerCall | UNetCall) -> list[Patch]:
    """The patches that act in this evaluation or UNet call."""
    open_now = [opened.patch for opened in patches if opened.at(call.sigma)]
    return [patch for patch in open_now if call.step >= patch.skip_first_steps]


@dataclass(frozen=True, eq=False)
class LayerAttention:
    """StoryLoom's attention at one layer of one UNet call, around the one that stood there before."""

    patches: tuple[Opened, ...]
    call: UNetCall
    host: HostAttend
    owner: Replacement | None

    @uncompiled
    def __call__(self, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
        """q, k, v: [rows, tokens, C] projected, heads not split. Not compiled: the host drops its guards here."""
        inner: Inner | Below = Inner(options, self.host, self.owner)
        for patch in _one_around_the_other(_acting(self.patches, self.call)):
            inner = Below(patch, self.call, inner)
        return inner(q, k, v, options["n_heads"])


def _one_around_the_other(patches: Iterable[AttentionPatch]) -> list[AttentionPatch]:
    """Patches of one layer, combined where they do, from the innermost to the outermost."""
    chain: list[AttentionPatch] = []
    for patch in patches:
        for place, other in enumerate(chain):
            both = other.combine(patch)
            if both is not None:
                chain[place] = both
                break
        else:
            chain.append(patch)
    return sorted(chain, key=lambda patch: patch.adds)


@dataclass(frozen=True, eq=False)
class OutputJoin:
    """StoryLoom's patches at the output blocks of one UNet call, one after the other."""

    patches: tuple[Opened, ...]
    call: UNetCall

    @uncompiled
    def __call__(self, h: Tensor, skip: Tensor | None, options: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """As the host calls it, and not compiled, for the same reason as attention."""
        _, block = options["block"]
        for patch in _acting(self.patches, self.call):
            h, skip = patch.join(h, skip, block)
        return h, skip


ROLE = "storyloom_role"
"""Key of a guider's name for a conditioning, in the dicts of a run. One without it is not the guider's own."""

UNCONDITIONAL = (None, "negative", "empty_negative_prompt", "middle")
"""Roles that the positive is guided away from: nobody's (the model node of Perp-Neg), ordinary, PerpNeg, DualCFG."""


@dataclass(frozen=True, eq=False)
class StoryRun:
    """One sampling run: its two wrappers.

    sigmas: noise levels at which its steps begin; story: what it draws, if it is a story; kept: what patches make once
    for the run, dropped with it; compiling: ComfyUI's settings for torch.compile, where its UNet is to be compiled.
    """

    patches: tuple[Opened, ...]
    host: HostAttend
    sigmas: tuple[float, ...] = ()
    story: StoryCond | None = None
    kept: Kept = field(default_factory=Kept, repr=False)
    compiling: Mapping[str, Any] | None = None

    def evaluate(self, executor, model, conds, x_in: Tensor, timestep: Tensor, model_options: dict[str, Any]):
        """CALC_COND_BATCH wrapper: tell the UNet calls of this evaluation what its conditionings are."""
        options = model_options["transformer_options"]
        known = {
            (number, cond["uuid"]): _conditioning(cond) for number, group in enumerate(conds) for cond in group or ()
        }
        sigma, images = float(timestep.flatten()[0]), window_images(options, x_in.shape[0])
        step = nearest_step(sigma, self.sigmas)
        call = SamplerCall(sigma, known, images, step, len(self.sigmas), self.story, self.kept, tuple(x_in.shape[-2:]))
        for patch in _acting(self.patches, call):
            if isinstance(patch, Prepared):
                patch.prepare(call)
        model_options = {**model_options, "transformer_options": {**options, KEY: call}}
        return executor(model, conds, x_in, timestep, model_options)

    def call_unet(
        self, executor, x: Tensor, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **kwargs
    ):
        """APPLY_MODEL wrapper: put StoryLoom's patches into this call's options, which are complete by now."""
        options = transformer_options or {}
        call = read_call(options, x.shape[0], x.device)
        if call is not None:
            options = self.installed(options, call)
        if call is None or self.compiling is None:
            return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
        model = executor.class_obj
        unet = model.diffusion_model
        model.diffusion_model = self.kept.once(
            (COMPILED, id(unet)), lambda: CompiledUNet(unet, self.host, self.compiling)
        )
        try:
            return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
        finally:
            model.diffusion_model = unet

    def installed(self, options: dict[str, Any], call: UNetCall) -> dict[str, Any]:
        """A copy of transformer_options with StoryLoom's patches in their slots, around or after what stands there."""
        slots: dict[str, list[Opened]] = {}
        for opened in self.patches:
            slots.setdefault(opened.patch.slot, []).append(opened)
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
        self, patches: list[Opened], owners: Mapping[tuple, Replacement], call: UNetCall
    ) -> dict[tuple, Replacement]:
        """One slot's replacements with the attention of every patched layer replaced.

        A per-index key hides its block's key in the host, so a whole block takes the block key, plus the per-index keys
        that somebody owns there already; per-index keys alone are taken where the choice itself is finer.
        """
        taken = dict(owners)
        for key, here in _layers(patches, owners):
            taken[key] = LayerAttention(here, call, self.host, owners.get(key, owners.get(key[:2])))
        return taken


@dataclass(frozen=True, eq=False)
class StorySampling:
    """SAMPLER_SAMPLE wrapper that carries the settings of all StoryLoom nodes in a model's chain.

    `before_loading` is its OUTER_SAMPLE wrapper. A host without that wrapper leaves it out, and patches then make what
    they need when they need it.
    """

    patches: tuple[Patch, ...]
    host: HostAttend

    def with_patch(self, patch: Patch) -> StorySampling:
        return replace(self, patches=(*self.patches, patch))

    def before_loading(self, executor, noise: Tensor, latent_image, sampler, sigmas: Tensor, *args, **kwargs):
        """Make what the run's patches need of their own networks while the memory is theirs, then let it start.

        Raises ValueError as the run itself does, before anything is loaded.
        """
        guider = executor.class_obj
        options = guider.model_options["transformer_options"]
        options[FORESEEN] = self._foreseen(guider, noise.shape[0], sigmas)
        try:
            return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
        finally:
            options.pop(FORESEEN, None)

    def _foreseen(self, guider, images: int, sigmas: Tensor) -> dict[Hashable, Any]:
        stories = [story for group in guider.conds.values() for cond in group if (story := _told(cond)) is not None]
        for story in stories:
            _check_batch(story, images)
        story = stories[0] if stories else None
        steps = tuple(sigmas[:-1].tolist())
        entries = self._opened(guider.model_patcher.get_model_object("model_sampling"))
        acting = [entry.patch for entry in entries if _hindrance(entry, story, images, steps) is None]
        asked = [
            Asked(_told(cond) or story, role not in UNCONDITIONAL)
            for role, group in guider.conds.items()
            for cond in group
        ]
        return foresee(acting, asked, guider.model_patcher.model.get_dtype_inference())

    def __call__(self, executor, guider, sigmas: Tensor, extra_args: dict, callback, noise: Tensor, *args, **kwargs):
        """Check the batch against the stories and sample with this run's own wrappers.

        Raises ValueError when a story does not have as many frames as the latent batch has images.
        """
        guider.conds = _marked(guider.conds, guider.original_conds)
        stories = [cond[TAG] for group in guider.conds.values() for cond in group if TAG in cond]
        for story in stories:
            _check_batch(story, noise.shape[0])
        story = stories[0] if stories else None
        steps = tuple(sigmas[:-1].tolist())
        entries = self._opened(guider.inner_model.model_sampling)
        hindrances = [_hindrance(entry, story, noise.shape[0], steps) for entry in entries]
        pairs = list(zip(entries, hindrances, strict=True))
        for name, hindrance in dict.fromkeys((entry.patch.name, hindrance) for entry, hindrance in pairs if hindrance):
            logging.warning("%s has no effect in this run: %s.", name, hindrance)
        opened = tuple(entry for entry, hindrance in pairs if hindrance is None)
        remarks = (entry.patch.remark(story) for entry in opened if isinstance(entry.patch, Gathering))
        for remark in dict.fromkeys(filter(None, remarks)):
            logging.warning("%s.", remark)
        if opened:
            options = extra_args["model_options"]
            kept = options.get("transformer_options", {}).pop(FORESEEN, {})
            run = StoryRun(opened, self.host, steps, story, Kept(kept), _compiling(options))
            wrappers = {CALC_COND_BATCH: run.evaluate, APPLY_MODEL: run.call_unet}
            extra_args = {**extra_args, "model_options": _with_wrappers(options, wrappers)}
        return executor(guider, sigmas, extra_args, callback, noise, *args, **kwargs)

    def _opened(self, model_sampling) -> tuple[Opened, ...]:
        to_sigma = model_sampling.percent_to_sigma
        return tuple(
            Opened(patch, float(to_sigma(patch.start_percent)), float(to_sigma(patch.end_percent)))
            for patch in self.patches
            if not patch.neutral
        )


def with_patch(model, patch: Patch, attend: HostAttend):
    """A clone of `model` that carries `patch` to its sampling runs, beside the patches that it carries already.

    model: a ModelPatcher of ComfyUI, or what has its wrappers; attend: that host's attention. Raises ValueError for a
    setting that is NaN or infinite.
    """
    for name, value in vars(patch).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{patch.name}: {name} is {value:g}, which is no number to work with: connect another.")
    patched = model.clone()
    carried = patched.get_wrappers(SAMPLER_SAMPLE, TAG)
    sampling = carried[0] if carried else StorySampling((), attend)
    sampling = sampling.with_patch(patch)
    wrappers = {(SAMPLER_SAMPLE, TAG): sampling, (OUTER_SAMPLE, TAG): sampling.before_loading}
    gathering = tuple(each for each in sampling.patches if isinstance(each, Gathering))
    if gathering:
        wrappers[PREPARE_SAMPLING, TELL] = ToldMemory(gathering)
    for (kind, key), wrapper in wrappers.items():
        patched.remove_wrappers_with_key(kind, key)
        patched.add_wrapper_with_key(kind, key, wrapper)
    return patched


def _layers(patches: list[Opened], owners: Mapping[tuple, Replacement]) -> Iterator[tuple[tuple, tuple[Opened, ...]]]:
    """Keys to take in one slot, each with the patches that act there."""
    for block in dict.fromkeys(block for opened in patches for block in opened.patch.blocks):
        here = [opened for opened in patches if block in opened.patch.blocks]
        whole = tuple(opened for opened in here if opened.patch.blocks[block] is None)
        finer = {j for opened in here for j in opened.patch.blocks[block] or ()}
        if whole:
            yield block, whole
            finer |= {key[2] for key in owners if len(key) == 3 and key[:2] == block}
        for j in sorted(finer):
            yield (*block, j), tuple(o for o in here if o in whole or j in (o.patch.blocks[block] or ()))


def _with_wrappers(model_options: dict[str, Any], wrappers: Mapping[str, Any]) -> dict[str, Any]:
    """Model options with our wrappers among the others, and without the one that runs ComfyUI's compiled UNet.

    ComfyUI compiles without guards on transformer_options, so a UNet that was compiled without a patch, or with another
    window or other blocks, would go on as it was and never call ours.
    """
    options = model_options.get("transformer_options", {})
    present = dict(options.get("wrappers", {}))
    for kind, wrapper in wrappers.items():
        present[kind] = {**present.get(kind, {}), TAG: [wrapper]}
    present[APPLY_MODEL].pop(COMPILED, None)
    return {**model_options, "transformer_options": {**options, "wrappers": present}}


def _compiling(model_options: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """ComfyUI's settings for torch.compile in a run, None where nobody compiles or patches would be lost by it."""
    wrappers = model_options.get("transformer_options", {}).get("wrappers", {})
    if not wrappers.get(APPLY_MODEL, {}).get(COMPILED):
        return None
    settings = model_options.get(COMPILE_SETTINGS)
    if can_compile(settings):
        return settings
    logging.warning(
        "The torch.compile node is left out of this run, which is slower: with its settings StoryLoom's patches would "
        'silently do nothing. Choose the backend "inductor".'
    )
    return None


def _marked(conds: Mapping[str, list[dict]], original: Mapping[str, list[dict]]) -> dict[str, list[dict]]:
    """This run's conditionings, each with its role, and tagged with the story whose context it really holds.

    A tag travels with a conditioning's dict, but the context may be another's: ConditioningZeroOut leaves only zeros,
    and for a region the host adds a copy of the dict, with the context of the other side, behind that side's own.
    """
    stories = {
        id(_context(cond)): cond[TAG]
        for name, group in conds.items()
        for cond in group[: len(original.get(name, group))]
        if TAG in cond and _context(cond) is not None and _context(cond).any()
    }
    return {
        name: [_with_marks(cond, name, stories.get(id(_context(cond)))) for cond in group]
        for name, group in conds.items()
    }


def _told(cond: Mapping[str, Any]) -> StoryCond | None:
    """The story of a conditioning that is not encoded for the UNet yet, None also where only zeros are left of it."""
    context = cond.get("cross_attn")
    return cond.get(TAG) if context is not None and context.any() else None


def _with_marks(cond: dict, role: str, story: StoryCond | None) -> dict:
    marked = {key: value for key, value in cond.items() if key != TAG} | {ROLE: role}
    return marked if story is None else {**marked, TAG: story}


def _conditioning(cond: Mapping[str, Any]) -> Conditioning:
    area = cond.get("area")
    positive = cond.get(ROLE) not in UNCONDITIONAL
    return Conditioning(cond.get(TAG), _context_length(cond), positive, None if area is None else tuple(area))


def _context(cond: Mapping[str, Any]) -> Tensor | None:
    """A conditioning's text context [rows, T, D], as the UNet gets it; None when it has none."""
    encoded = cond.get("model_conds", {}).get("c_crossattn")
    return None if encoded is None else encoded.cond


def _context_length(cond: Mapping[str, Any]) -> int:
    context = _context(cond)
    return 1 if context is None else context.shape[1]


def _check_batch(story: StoryCond, images: int) -> None:
    if len(story.rows) != images:
        raise ValueError(
            f"The story has {_counted(len(story.rows), 'frame')} but the latent batch has {_counted(images, 'image')}. "
            'Use "Empty story latent" with this story connected, or a latent batch with one image per frame.'
        )


def _counted(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def _hindrance(opened: Opened, story: StoryCond | None, images: int, steps: Sequence[float]) -> str | None:
    """Why a patch changes nothing in a run, None when it does. steps: noise levels at which the run's steps begin."""
    patch = opened.patch
    hindrance = patch.hindrance(story, images)
    if hindrance is None and not any(opened.at(sigma) for sigma in steps[patch.skip_first_steps :]):
        after = f" after the first {patch.skip_first_steps} (skip_first_steps)" if patch.skip_first_steps else ""
        hindrance = (
            f"none of its {len(steps)} steps{after} lies between start_percent {patch.start_percent:g} and "
            f"end_percent {patch.end_percent:g}"
        )
    return hindrance
