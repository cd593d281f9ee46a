"""Euler sampling of a diffusers UNet, passing through the wrappers that ComfyUI's patches hang on.

A run calls, from outside in: SAMPLER_SAMPLE once, CALC_COND_BATCH once per step, APPLY_MODEL once per UNet call. Every
call carries ComfyUI's `transformer_options`, so StoryLoom's patches cannot tell the hosts apart.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import isclose
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ..prompts.conditioning import batch_contexts
from ..prompts.encode import Entry
from ..runtime.sampling import APPLY_MODEL, CALC_COND_BATCH, SAMPLER_SAMPLE
from .layers import OPTIONS, Remembered, replaceable_attention
from .patcher import UNetPatcher, wrapped

Progress = Callable[[int, int], None]
"""progress(steps done, steps in all)"""

ALWAYS = 999_999_999.9
"""Sigma of 0 percent: above that of any schedule."""


class ModelSampling:
    """Noise levels of a model and what its output means, from a diffusers scheduler."""

    def __init__(self, scheduler):
        kind = scheduler.config.prediction_type
        if kind not in ("epsilon", "v_prediction"):
            raise ValueError(f'The model predicts "{kind}", StoryLoom samples "epsilon" and "v_prediction" models.')
        self.velocity = kind == "v_prediction"
        cumulative = scheduler.alphas_cumprod.cpu().double()
        self.log_sigmas = ((1 - cumulative) / cumulative).sqrt().log()

    def percent_to_sigma(self, percent: float) -> float:
        """Noise level at a percentage of the schedule, 0 the first step and 1 the last."""
        if percent <= 0:
            return ALWAYS
        if percent >= 1:
            return 0.0
        place = (1 - percent) * (len(self.log_sigmas) - 1)
        low = int(place)
        return float(torch.lerp(*self.log_sigmas[low : low + 2], place - low).exp())

    def timestep(self, sigma: Tensor) -> Tensor:
        """Training step with the noise level nearest to each sigma [B]."""
        distance = (sigma.cpu().double().log()[:, None] - self.log_sigmas).abs()
        return distance.argmin(dim=1).to(sigma.device)

    def calculate_input(self, sigma: Tensor, x: Tensor) -> Tensor:
        return x / (sigma**2 + 1).sqrt()

    def calculate_denoised(self, sigma: Tensor, output: Tensor, x: Tensor) -> Tensor:
        """The clean latents that the UNet's output for noisy latents x means. sigma: [B, 1, 1, 1]."""
        if self.velocity:
            return x / (sigma**2 + 1) - output * sigma / (sigma**2 + 1).sqrt()
        return x - output * sigma


@dataclass(frozen=True, eq=False)
class UNetModel:
    """A UNet that takes noisy latents and returns clean ones, for one sampling run.

    batch_texts stacks contexts as `batch_contexts`; the text is the same in every step, so it is the same tensor too.
    """

    unet: nn.Module
    model_sampling: ModelSampling
    dtype: torch.dtype
    batch_texts: Remembered = field(default_factory=lambda: Remembered(lambda *texts: batch_contexts(texts)))

    def apply_model(self, x: Tensor, t: Tensor, **kwargs) -> Tensor:
        """x: [B, 4, h, w]; t: sigma of every row [B]. Returns the denoised latents [B, 4, h, w]."""
        options = kwargs.pop(OPTIONS)
        call = wrapped(self._apply_model, APPLY_MODEL, options)
        return call(x, t, None, kwargs.pop("c_crossattn"), None, options, **kwargs)

    def _apply_model(
        self, x: Tensor, t: Tensor, c_concat, c_crossattn: Tensor, control, options: dict[str, Any], text_embeds: Tensor
    ) -> Tensor:
        sigma = t[:, None, None, None]
        height, width = 8 * x.shape[2], 8 * x.shape[3]
        size = torch.tensor([height, width, 0, 0, height, width], device=x.device).repeat(x.shape[0], 1)
        (output,) = self.unet(
            self.model_sampling.calculate_input(sigma, x).to(self.dtype),
            self.model_sampling.timestep(t),
            c_crossattn.to(self.dtype),
            added_cond_kwargs={"text_embeds": text_embeds.to(self.dtype), "time_ids": size.to(self.dtype)},
            cross_attention_kwargs={OPTIONS: {**options, "original_shape": list(x.shape)}},
            return_dict=False,
        )
        return self.model_sampling.calculate_denoised(sigma, output.float(), x)


@dataclass(eq=False)
class Guider:
    """Classifier-free guidance, with the members that sampler wrappers read from ComfyUI's CFGGuider."""

    inner_model: UNetModel
    conds: dict[str, list[dict]]
    cfg: float
    original_conds: dict[str, list[dict]] = field(init=False)

    def __post_init__(self):
        self.original_conds = self.conds

    def predict(self, x: Tensor, sigma: Tensor, model_options: dict[str, Any]) -> Tensor:
        """The guided clean latents. With cfg 1 the negative is not asked."""
        negative = None if isclose(self.cfg, 1.0) else self.conds["negative"]
        call = wrapped(calc_cond_batch, CALC_COND_BATCH, model_options[OPTIONS])
        said, unsaid = call(self.inner_model, [self.conds["positive"], negative], x, sigma, model_options)
        return said if negative is None else unsaid + (said - unsaid) * self.cfg


def calc_cond_batch(
    model: UNetModel, conds: Sequence[list[dict] | None], x_in: Tensor, timestep: Tensor, model_options: dict[str, Any]
) -> list[Tensor | None]:
    """Denoised latents for each group of conditionings, all of them in one UNet call; None for a group that is None.

    x_in: [B, 4, h, w]; timestep: sigma of every image [B]. The chunks of the call stand in ComfyUI's order, last first.
    """
    chunks = [(number, cond) for number, group in enumerate(conds) for cond in group or ()][::-1]
    options = {
        **model_options[OPTIONS],
        "cond_or_uncond": [number for number, _ in chunks],
        "uuids": [cond["uuid"] for _, cond in chunks],
        "sigmas": timestep,
    }
    output = model.apply_model(
        x_in.repeat(len(chunks), 1, 1, 1),
        timestep.repeat(len(chunks)),
        c_crossattn=model.batch_texts(*(cond["model_conds"]["c_crossattn"].cond for _, cond in chunks)),
        text_embeds=torch.cat([cond["pooled_output"] for _, cond in chunks]),
        transformer_options=options,
    )
    said: dict[int, list[Tensor]] = {}
    for (number, _), part in zip(chunks, output.chunk(len(chunks)), strict=True):
        said.setdefault(number, []).append(part)
    return [torch.stack(said[number]).mean(0) if number in said else None for number in range(len(conds))]


def _rows(tensor: Tensor, rows: int) -> Tensor:
    """One row per image: a single row counts for all of them."""
    return tensor.expand(rows, *tensor.shape[1:]) if tensor.shape[0] == 1 else tensor


def converted(entries: Sequence[Entry], rows: int, device: torch.device, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Conditionings as a guider holds them, each with a row for every image and a uuid of its own."""
    return [
        {
            **info,
            "cross_attn": context,
            "pooled_output": _rows(info["pooled_output"].to(device, dtype), rows),
            "model_conds": {"c_crossattn": SimpleNamespace(cond=_rows(context.to(device, dtype), rows))},
            "uuid": uuid.uuid4(),
        }
        for context, info in entries
    ]


@torch.no_grad()
def sample_euler(
    model: UNetPatcher,
    positive: Sequence[Entry],
    negative: Sequence[Entry],
    noise: Tensor,
    scheduler,
    steps: int,
    cfg: float,
    progress: Progress = lambda done, steps: None,
) -> Tensor:
    """Draw latents [B, 4, h, w] from noise of the same shape and variance 1, with diffusers' Euler scheduler.

    scheduler: any diffusers scheduler of the model, only its config is read. Raises ValueError when a story in the
    conditionings does not have as many frames as `noise` has images.
    """
    from diffusers import EulerDiscreteScheduler

    euler = EulerDiscreteScheduler.from_config(scheduler.config, prediction_type="original_sample")
    euler.set_timesteps(steps, device=noise.device)
    unet = model.get_model_object("diffusion_model")
    dtype = unet.dtype  # diffusers looks at every parameter to tell
    where = (noise.shape[0], noise.device, dtype)
    conds = {"positive": converted(positive, *where), "negative": converted(negative, *where)}
    guider = Guider(UNetModel(unet, model.get_model_object("model_sampling"), dtype), conds, cfg)
    options = model.run_options()
    options[OPTIONS]["sample_sigmas"] = sigmas = euler.sigmas.to(noise.device)
    extra_args = {"model_options": options}

    def run(guider: Guider, sigmas: Tensor, extra_args: dict[str, Any], callback: Progress, noise: Tensor) -> Tensor:
        x = noise * euler.init_noise_sigma
        for i, timestep in enumerate(euler.timesteps):
            euler.scale_model_input(x, timestep)
            denoised = guider.predict(x, sigmas[i].repeat(x.shape[0]), extra_args["model_options"])
            x = euler.step(denoised, timestep, x, return_dict=False)[0]
            callback(i + 1, steps)
        return x

    with replaceable_attention(unet), model.patched_weights():
        sampler = wrapped(run, SAMPLER_SAMPLE, options[OPTIONS])
        return sampler(guider, sigmas, extra_args, progress, noise.float())


def story_noise(frames: int, height: int, width: int, seed: int, shared: bool) -> Tensor:
    """Noise [frames, 4, height / 8, width / 8] of variance 1, from the CPU so that a seed gives it on any device.

    shared: every frame gets the noise of the first one.
    """
    generator = torch.Generator().manual_seed(seed)
    size = (1, 4, height // 8, width // 8)
    noise = torch.cat([torch.randn(size, generator=generator) for _ in range(1 if shared else frames)])
    return noise.expand(frames, -1, -1, -1).contiguous()
