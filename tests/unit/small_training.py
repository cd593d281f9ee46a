"""A tiny SDXL in diffusers, a small token network and random batches, in double precision, for tests of training."""

from copy import deepcopy
from functools import cache

import torch

from storyloom.models.demo import model as demo
from storyloom.models.storymaker.ppr import PositionalPerceiverResampler
from storyloom.training.storymaker.adapter import TrainedAdapter
from storyloom.training.storymaker.batch import Batch
from storyloom.training.storymaker.objective import sdxl

CONTEXT, POOLED, SIDE, ID, FEATURE, RANK = 16, 8, 8, 12, 16, 3
NUMBERS = {
    **demo.UNET,
    "model_channels": 32,
    "num_res_blocks": [1, 1, 1],
    "transformer_depth": [0, 1, 2],
    "transformer_depth_middle": 2,
    "transformer_depth_output": [0, 0, 1, 1, 2, 2],
    "context_dim": CONTEXT,
    "adm_in_channels": 6 * 256 + POOLED,
}
OBJECTIVE = sdxl()


@cache
def _unet():
    from storyloom.standalone.unet import build_unet

    torch.manual_seed(0)
    return build_unet(NUMBERS, 16).train(False)


def tiny_unet(dtype=torch.float64):
    return deepcopy(_unet()).to(dtype)


def tiny_controlnet(unet):
    """A ControlNet whose zero convolutions have random values, so that it has an effect."""
    from diffusers import ControlNetModel

    torch.manual_seed(5)
    net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 4, 4, 4)).to(torch.float64)
    with torch.no_grad():
        for parameter in net.parameters():
            if not parameter.any():
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    return net.train(False)


def tiny_ppr(dtype=torch.float64, width=CONTEXT):
    sizes = {"width": width, "image_width": FEATURE, "id_width": ID, "depth": 2, "head_width": 8}
    return PositionalPerceiverResampler(**sizes, dtype=dtype)


def tiny_adapter(unet, trained=True, seed=3, **settings):
    """An adapter of which nothing is 0 any more if it is trained."""
    adapter = TrainedAdapter(unet, tiny_ppr(unet.dtype), rank=RANK, seed=seed, **settings)
    if trained:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return adapter


def tiny_batch(counts=(1, 2), seed=0, side=SIDE, pose=False, crops=False):
    g = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    pictures, characters = len(counts), sum(counts)
    masks = torch.zeros(pictures, 3, 2 * side, 2 * side, dtype=torch.float64)
    for picture, count in enumerate(counts):
        for i in range(count):
            masks[picture, i, 2 + picture : 9 + i, 5 * i : 5 * i + 5] = 1
    return Batch(
        latents=random(pictures, 4, side, side),
        context=random(pictures, 7, CONTEXT),
        pooled=random(pictures, POOLED),
        time_ids=random(pictures, 6),
        empty_context=random(1, 7, CONTEXT),
        empty_pooled=random(1, POOLED),
        counts=tuple(counts),
        masks=masks,
        id_embeds=torch.nn.functional.normalize(random(characters, ID), dim=-1),
        face=random(characters, 5, FEATURE),
        character=random(characters, 5, FEATURE),
        pose=random(pictures, 3, 8 * side, 8 * side).sigmoid() if pose else None,
        crops=torch.tensor([[[0.5, 0.0, 0.1], [0.0, 0.5, 0.0]]]).double().repeat(characters, 1, 1) if crops else None,
    )


def call(unet, batch, image=None, noisy=None, t=None):
    """The UNet's prediction for a batch, with image tokens or without."""
    noisy = batch.latents if noisy is None else noisy
    t = torch.full((len(noisy),), 400) if t is None else t
    added = {"text_embeds": batch.pooled, "time_ids": batch.time_ids}
    options = None if image is None else {"image": image}
    return unet(noisy, t, batch.context, added_cond_kwargs=added, cross_attention_kwargs=options).sample
