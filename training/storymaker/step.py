"""The losses of one batch: the UNet's prediction with image tokens, and with the pose of the target as a hint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .adapter import TrainedAdapter
from .batch import Batch
from .drops import Dropped
from .losses import attention_loss, diffusion_loss, identity_loss
from .objective import Objective
from .options import Options
from .processors import ImageContext


@dataclass(frozen=True, eq=False)
class Faces:
    """What the identity loss needs.

    decode: latents to pictures [B, 3, H, W] in -1..1; network: aligned faces [K, 3, side, side] in -1..1 to identity
    vectors. Both are frozen and differentiable; latest: the last timestep at which faces count.
    """

    decode: Callable[[Tensor], Tensor]
    network: Callable[[Tensor], Tensor]
    latest: int = 250
    side: int = 112


class TrainingStep(nn.Module):
    """All networks of a step as one module, which is what distributed training wraps.

    controlnet: a frozen `diffusers.ControlNetModel`, or None. It decouples the pose from the references: training sees
    the target's pose, so the image tokens need not carry it, and drawing leaves it out.
    """

    def __init__(
        self,
        adapter: TrainedAdapter,
        unet: nn.Module,
        objective: Objective,
        options: Options,
        controlnet: nn.Module | None = None,
        faces: Faces | None = None,
    ):
        super().__init__()
        self.adapter, self.unet, self.controlnet = adapter, unet, controlnet
        self.objective, self.options, self.faces = objective, options, faces
        adapter.install(unet)
        if controlnet is not None:
            controlnet.requires_grad_(False)

    def forward(self, batch: Batch, dropped: Dropped, noisy: Tensor, t: Tensor, target: Tensor) -> dict[str, Tensor]:
        """The losses "diffusion", "attention", "identity" without their weights, if they are on, and their sum "loss".

        noisy, target: [B, 4, h, w]; t: [B], from `objective.noisy`.
        """
        options = self.options
        silent = dropped.text.to(noisy.device)
        context = torch.where(silent[:, None, None], batch.empty_context, batch.context)
        added = {
            "text_embeds": torch.where(silent[:, None], batch.empty_pooled, batch.pooled),
            "time_ids": batch.time_ids,
        }
        tokens, keep = self.adapter.tokens(batch, dropped)
        image = ImageContext(tokens, keep, [] if options.attention else None, tuple(noisy.shape[-2:]))
        predicted = self.unet(
            noisy,
            t,
            context,
            added_cond_kwargs=added,
            cross_attention_kwargs={"image": image},
            **self._hint(batch, noisy, t, tokens if options.pose_reads_images else context, added),
        ).sample
        losses = {"diffusion": diffusion_loss(predicted, target, batch.masks, options.foreground)}
        total = losses["diffusion"]
        if options.attention:
            losses["attention"] = attention_loss(image.maps, batch.masks, batch.counts, options.per_layer)
            total = total + options.attention * losses["attention"]
        if options.identity and self.faces is not None and batch.crops is not None:
            losses["identity"] = self._identity(batch, noisy, t, predicted)
            total = total + options.identity * losses["identity"]
        return {"loss": total, **losses}

    def _hint(self, batch: Batch, noisy: Tensor, t: Tensor, context: Tensor, added: dict[str, Tensor]) -> dict:
        """The ControlNet's residuals as arguments of the UNet; none without a ControlNet or a pose."""
        if self.controlnet is None or batch.pose is None:
            return {}
        down, middle = self.controlnet(
            noisy,
            t,
            encoder_hidden_states=context,
            controlnet_cond=batch.pose,
            added_cond_kwargs=added,
            return_dict=False,
        )
        return {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}

    def _identity(self, batch: Batch, noisy: Tensor, t: Tensor, predicted: Tensor) -> Tensor:
        faces, clean = self.faces, self.objective.clean(noisy, t, predicted.to(noisy))
        return identity_loss(
            clean,
            faces.decode,
            batch.id_embeds,
            batch.crops,
            batch.counts,
            t,
            faces.network,
            faces.latest,
            faces.side,
        )
