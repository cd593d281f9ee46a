"""How patches reach a sampling run: settings stay on the model, all work happens while it samples.

A node stores its settings on a clone of the model (`StorySampling`, a wrapper around the sampler). When sampling
starts, the wrapper checks the batch and adds the two wrappers of a `StoryRun` to that run's own options. Nothing is
written to the model, so nothing is left behind, and the order of nodes does not matter.

Written for ComfyUI's wrapper interface, with everything of the host passed in.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ..prompts.conditioning import TAG, StoryCond
from ..prompts.options import check_batch
from ..prompts.tag import story_of
from .cache import RunCache
from .chain import HostAttend
from .compiled import compilable
from .conditionings import UNCONDITIONAL, marked
from .memory import MEMORY_KEY, PREPARE_SAMPLING, Gathering, MemoryWrapper
from .patch import Patch, ScheduledPatch
from .precompute import OUTER_SAMPLE, PRECOMPUTED, RunConditioning, precompute
from .run import COMPILED, StoryRun

SAMPLER_SAMPLE, CALC_COND_BATCH, APPLY_MODEL = "sampler_sample", "calc_cond_batch", "apply_model"
"""ComfyUI's names for what is wrapped: a sampling run, an evaluation of all conditionings, a call of the UNet."""

COMPILE_SETTINGS = "torch_compile_kwargs"
"""Key of ComfyUI's settings for torch.compile."""


@dataclass(frozen=True, eq=False)
class Plan:
    """What is known of a run before its first step.

    story: of the run, if any; steps: sigmas at which its steps begin; entries: its patches, each with the reason why it
    changes nothing, if there is one.
    """

    story: StoryCond | None
    steps: tuple[float, ...]
    entries: tuple[tuple[ScheduledPatch, str | None], ...]

    @property
    def acting(self) -> tuple[ScheduledPatch, ...]:
        return tuple(entry for entry, reason in self.entries if reason is None)


@dataclass(frozen=True, eq=False)
class StorySampling:
    """SAMPLER_SAMPLE wrapper with the settings of all StoryLoom nodes in a model's chain.

    `before_loading` is its OUTER_SAMPLE wrapper. A host without that wrapper leaves it out, and patches then compute
    what they need when they need it.
    """

    patches: tuple[Patch, ...]
    host: HostAttend

    def before_loading(self, executor, noise: Tensor, latent_image, sampler, sigmas: Tensor, *args, **kwargs):
        """Compute what patches need from their own networks while the memory is free, then start the run.

        Raises ValueError as the run itself does, before anything is loaded.
        """
        guider = executor.class_obj
        roles = [(story_of(cond), role) for role, group in guider.conds.items() for cond in group]
        stories = [story for story, _ in roles if story is not None]
        plan = self._plan(stories, noise.shape[0], sigmas, guider.model_patcher.get_model_object("model_sampling"))
        conditionings = [RunConditioning(story or plan.story, role not in UNCONDITIONAL) for story, role in roles]
        patches = [entry.patch for entry in plan.acting]
        options = guider.model_options["transformer_options"]
        options[PRECOMPUTED] = precompute(patches, conditionings, guider.model_patcher.model.get_dtype_inference())
        try:
            return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
        finally:
            options.pop(PRECOMPUTED, None)

    def __call__(self, executor, guider, sigmas: Tensor, extra_args: dict, callback, noise: Tensor, *args, **kwargs):
        """Check the batch against the stories and sample with this run's own wrappers.

        Raises ValueError when a story does not have as many frames as the latent batch has images.
        """
        guider.conds = marked(guider.conds, guider.original_conds)
        stories = [cond[TAG] for group in guider.conds.values() for cond in group if TAG in cond]
        plan = self._plan(stories, noise.shape[0], sigmas, guider.inner_model.model_sampling)
        _log_warnings(plan)
        run = None
        if plan.acting:
            options = extra_args["model_options"]
            precomputed = options.get("transformer_options", {}).pop(PRECOMPUTED, {})
            run = StoryRun(plan.acting, self.host, plan.steps, plan.story, RunCache(precomputed), _compiling(options))
            wrappers = {CALC_COND_BATCH: run.evaluate, APPLY_MODEL: run.call_unet}
            extra_args = {**extra_args, "model_options": _with_wrappers(options, wrappers)}
        samples = executor(guider, sigmas, extra_args, callback, noise, *args, **kwargs)
        if run is not None:
            _warn_of_bypassed(run)
        return samples

    def _plan(self, stories: Sequence[StoryCond], images: int, sigmas: Tensor, model_sampling) -> Plan:
        for story in stories:
            check_batch(story, images)
        story = stories[0] if stories else None
        steps = tuple(sigmas[:-1].tolist())
        to_sigma = model_sampling.percent_to_sigma
        entries = [
            ScheduledPatch(patch, float(to_sigma(patch.start_percent)), float(to_sigma(patch.end_percent)))
            for patch in self.patches
            if not patch.neutral
        ]
        return Plan(story, steps, tuple((entry, _no_effect_reason(entry, story, images, steps)) for entry in entries))


def with_patch(model, patch: Patch, attend: HostAttend):
    """A clone of `model` that carries `patch` to its sampling runs, beside the patches that it carries already.

    model: a ModelPatcher of ComfyUI, or an object with the same wrappers; attend: that host's attention. Raises
    ValueError for a setting that is NaN or infinite.
    """
    for name, value in vars(patch).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{patch.name}: {name} is {value:g}, which is not a finite number; connect another value.")
    patched = model.clone()
    carried = patched.get_wrappers(SAMPLER_SAMPLE, TAG)
    sampling = carried[0] if carried else StorySampling((), attend)
    sampling = replace(sampling, patches=(*sampling.patches, patch))
    wrappers = {(SAMPLER_SAMPLE, TAG): sampling, (OUTER_SAMPLE, TAG): sampling.before_loading}
    gathering = tuple(each for each in sampling.patches if isinstance(each, Gathering))
    if gathering:
        wrappers[PREPARE_SAMPLING, MEMORY_KEY] = MemoryWrapper(gathering)
    for (kind, key), wrapper in wrappers.items():
        patched.remove_wrappers_with_key(kind, key)
        patched.add_wrapper_with_key(kind, key, wrapper)
    return patched


def _log_warnings(plan: Plan) -> None:
    for name, reason in dict.fromkeys((entry.patch.name, reason) for entry, reason in plan.entries if reason):
        logging.warning("%s has no effect in this run: %s.", name, reason)
    warnings = (entry.patch.warning(plan.story) for entry in plan.acting if isinstance(entry.patch, Gathering))
    for warning in dict.fromkeys(filter(None, warnings)):
        logging.warning("%s.", warning)


def _warn_of_bypassed(run: StoryRun) -> None:
    bypassed = dict.fromkeys(entry.patch.name for entry in run.patches if entry not in run.reached)
    if bypassed:
        logging.warning(
            "No effect in this run: %s. The model never called it, as another node runs the UNet in its own way (a "
            "cache of features?). Remove or bypass that node.",
            ", ".join(bypassed),
        )


def _with_wrappers(model_options: dict[str, Any], wrappers: Mapping[str, Any]) -> dict[str, Any]:
    """Model options with our wrappers among the others, and without the one that runs ComfyUI's compiled UNet.

    ComfyUI compiles without guards on transformer_options. A UNet that was compiled without a patch, or with another
    percent range or other blocks, would keep running as compiled and never call our patches.
    """
    options = model_options.get("transformer_options", {})
    present = dict(options.get("wrappers", {}))
    for kind, wrapper in wrappers.items():
        present[kind] = {**present.get(kind, {}), TAG: [wrapper]}
    present[APPLY_MODEL].pop(COMPILED, None)
    return {**model_options, "transformer_options": {**options, "wrappers": present}}


def _compiling(model_options: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """ComfyUI's settings for torch.compile in a run; None when nothing is compiled, or patches would be lost by it."""
    wrappers = model_options.get("transformer_options", {}).get("wrappers", {})
    if not wrappers.get(APPLY_MODEL, {}).get(COMPILED):
        return None
    settings = model_options.get(COMPILE_SETTINGS)
    if compilable(settings):
        return settings
    logging.warning(
        "The torch.compile node is left out of this run, which is slower: with its settings StoryLoom's patches would "
        'silently do nothing. Choose the backend "inductor".'
    )
    return None


def _no_effect_reason(
    entry: ScheduledPatch, story: StoryCond | None, images: int, steps: Sequence[float]
) -> str | None:
    """Why a patch changes nothing in a run, None when it does. steps: sigmas at which the run's steps begin."""
    patch = entry.patch
    reason = patch.no_effect_reason(story, images)
    if reason is None and not any(entry.acts_at(sigma) for sigma in steps[patch.skip_first_steps :]):
        after = f" after the first {patch.skip_first_steps} (skip_first_steps)" if patch.skip_first_steps else ""
        reason = (
            f"none of its {len(steps)} steps{after} lies between start_percent {patch.start_percent:g} and "
            f"end_percent {patch.end_percent:g}"
        )
    return reason
