"""Euler sampling of a diffusers UNet through the wrappers that ComfyUI's patches use.

A run calls, from outside in: SAMPLER_SAMPLE once, CALC_COND_BATCH once per step, APPLY_MODEL once per UNet call. Every
call passes ComfyUI's `transformer_options`, so StoryLoom's patches work the same in both hosts.
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
from .layers import OPTIONS, Cached, replaceable_attention
from .patcher import UNetPatcher, wrapped

Progress = Callable[[int, int], None]
"""progress(steps done, total steps)"""

ALWAYS = 999_999_999.9
"""Sigma at 0 percent, above every sigma of any schedule."""


class ModelSampling:
    """Sigmas and prediction type of a model, from a diffusers scheduler. Raises ValueError for an unknown type."""

    def __init__(self, scheduler):
        kind = scheduler.config.prediction_type
        if kind not in ("epsilon", "v_prediction"):
            raise ValueError(f'The model predicts "{kind}"; use a model that predicts "epsilon" or "v_prediction".')
        self.velocity = kind == "v_prediction"
        cumulative = scheduler.alphas_cumprod.cpu().double()
        self.log_sigmas = ((1 - cumulative) / cumulative).sqrt().log()

    def percent_to_sigma(self, percent: float) -> float:
        """Sigma at a fraction of the schedule: 0 is the first step, 1 the last."""
        if percent <= 0:
            return ALWAYS
        if percent >= 1:
            return 0.0
        position = (1 - percent) * (len(self.log_sigmas) - 1)
        low = int(position)
        return float(torch.lerp(*self.log_sigmas[low : low + 2], position - low).exp())

    def timestep(self, sigma: Tensor) -> Tensor:
        """Training timestep with the sigma nearest to each sigma [B]."""
        distance = (sigma.cpu().double().log()[:, None] - self.log_sigmas).abs()
        return distance.argmin(dim=1).to(sigma.device)

    def calculate_input(self, sigma: Tensor, x: Tensor) -> Tensor:
        return x / (sigma**2 + 1).sqrt()

    def calculate_denoised(self, sigma: Tensor, output: Tensor, x: Tensor) -> Tensor:
        """Denoised latents from the UNet's output for noisy latents x. sigma: [B, 1, 1, 1]."""
        if self.velocity:
            return x / (sigma**2 + 1) - output * sigma / (sigma**2 + 1).sqrt()
        return x - output * sigma


@dataclass(frozen=True, eq=False)
class UNetModel:
    """A UNet that maps noisy latents to denoised ones, for one sampling run.

    batch_texts: `batch_contexts`, cached; the text is the same in every step, so the tensor is the same object too.
    """

    unet: nn.Module
    model_sampling: ModelSampling
    dtype: torch.dtype
    batch_texts: Cached = field(default_factory=lambda: Cached(lambda *texts: batch_contexts(texts)))

    def apply_model(self, x: Tensor, t: Tensor, **kwargs) -> Tensor:
        """Denoised latents [B, 4, h, w]. x: [B, 4, h, w]; t: sigma of each row [B]."""
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
    """Classifier-free guidance, with the attributes that sampler wrappers read from ComfyUI's CFGGuider."""

    inner_model: UNetModel
    conds: dict[str, list[dict]]
    cfg: float
    original_conds: dict[str, list[dict]] = field(init=False)

    def __post_init__(self):
        self.original_conds = self.conds

    def predict(self, x: Tensor, sigma: Tensor, model_options: dict[str, Any]) -> Tensor:
        """The guided denoised latents. With cfg 1 the negative is not evaluated."""
        negative_conds = None if isclose(self.cfg, 1.0) else self.conds["negative"]
        call = wrapped(calc_cond_batch, CALC_COND_BATCH, model_options[OPTIONS])
        conds = [self.conds["positive"], negative_conds]
        positive, negative = call(self.inner_model, conds, x, sigma, model_options)
        return positive if negative_conds is None else negative + (positive - negative) * self.cfg


def calc_cond_batch(
    model: UNetModel, conds: Sequence[list[dict] | None], x_in: Tensor, timestep: Tensor, model_options: dict[str, Any]
) -> list[Tensor | None]:
    """Denoised latents for each group of conditionings, all of them in one UNet call; None for a group that is None.

    x_in: [B, 4, h, w]; timestep: sigma of each image [B]. The chunks of the call are in ComfyUI's order, last first.
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
    outputs: dict[int, list[Tensor]] = {}
    for (number, _), part in zip(chunks, output.chunk(len(chunks)), strict=True):
        outputs.setdefault(number, []).append(part)
    return [torch.stack(outputs[number]).mean(0) if number in outputs else None for number in range(len(conds))]


def _rows(tensor: Tensor, rows: int) -> Tensor:
    """One row per image; a single row is repeated for all images."""
    return tensor.expand(rows, *tensor.shape[1:]) if tensor.shape[0] == 1 else tensor


def converted(entries: Sequence[Entry], rows: int, device: torch.device, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Conditionings in a guider's form, each with one row per image and its own uuid."""
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
    """Latents [B, 4, h, w] sampled from noise of the same shape and variance 1, with diffusers' Euler scheduler.

    scheduler: any diffusers scheduler of the model; only its config is read. Raises ValueError if a story in the
    conditionings does not have one frame per image of `noise`.
    """
    from diffusers import EulerDiscreteScheduler

    euler = EulerDiscreteScheduler.from_config(scheduler.config, prediction_type="original_sample")
    euler.set_timesteps(steps, device=noise.device)
    unet = model.get_model_object("diffusion_model")
    dtype = unet.dtype  # computed once: diffusers goes through every parameter
    target = (noise.shape[0], noise.device, dtype)
    conds = {"positive": converted(positive, *target), "negative": converted(negative, *target)}
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
    """Noise [frames, 4, height / 8, width / 8] of variance 1, made on the CPU so that it is the same on any device.

    shared: every frame gets the noise of the first.
    """
    generator = torch.Generator().manual_seed(seed)
    size = (1, 4, height // 8, width // 8)
    noise = torch.cat([torch.randn(size, generator=generator) for _ in range(1 if shared else frames)])
    return noise.expand(frames, -1, -1, -1).contiguous()
