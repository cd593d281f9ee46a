"""Operations and memory of one training step of StoryMaker at full size, without a graphics card.

    python -m storyloom.benchmarks.storymaker_training [--controlnet] [--batch N]

SDXL's UNet in diffusers, the adapter and the batch are on the meta device: layers compute shapes only, and the code of
the training itself runs. PyTorch's FlopCounterMode counts matrix products, convolutions and attention (a multiplication
with its addition is two operations). Attention runs in PyTorch's flash kernel, as on graphics cards, except to the
image tokens, whose probabilities the attention loss needs.

Activations are what autograd saves for the backward pass; with gradient checkpointing, the inputs of the checkpointed
blocks and, at the peak, what one block saves. UNet, ControlNet and activations are bf16; what learns, its gradients and
both moments of AdamW are float32. Autocast also keeps a bf16 copy of what learns during a step, which is not counted.
Text encoders and VAE are not included, because their results can be computed before the training.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from ..models.demo import model as demo
from ..models.storymaker.ppr import CHARACTERS, FEATURES, PositionalPerceiverResampler
from ..models.storymaker.weights import CONTEXT
from ..standalone.unet import build_unet
from ..training.storymaker.adapter import TrainedAdapter
from ..training.storymaker.batch import Batch
from ..training.storymaker.drops import NOTHING, drawn
from ..training.storymaker.objective import sdxl
from ..training.storymaker.options import Options
from ..training.storymaker.step import TrainingStep
from .common import table

SDXL = {**demo.UNET, "model_channels": 320}
LEARNING_BYTES = {"weights": 4, "gradients": 4, "AdamW": 8}
"""Bytes of each number that learns."""
TFLOP, GIB = 1e12, 2**30


@dataclass(frozen=True)
class Cost:
    """One step. Operations of the forward, the backward and the repeated forward pass; memory in bytes.

    recomputed    operations that gradient checkpointing adds
    frozen        weights of UNet and ControlNet
    learning      number of values that learn
    activations   saved without gradient checkpointing
    checkpointed  largest amount that is saved at one time with it
    """

    forward: int
    backward: int
    recomputed: int
    frozen: int
    learning: int
    activations: int
    checkpointed: int

    @property
    def fixed(self) -> int:
        """Bytes of weights, gradients and optimiser."""
        return self.frozen + self.learning * sum(LEARNING_BYTES.values())


@dataclass
class Saved:
    """Storages that autograd saves, each counted once, apart from those in `known`."""

    known: set[int]
    kept: dict[int, Tensor] = field(default_factory=dict)

    def __call__(self, tensor: Tensor) -> Tensor:
        key = tensor.untyped_storage()._cdata
        if key not in self.known:
            self.kept.setdefault(key, tensor)
        return tensor


def size(tensors: Iterator[Tensor]) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def count(step: TrainingStep, batch: Batch) -> Cost:
    """Operations and memory of one step, counted in one forward and one backward pass without checkpointing."""
    learning = {id(parameter) for parameter in step.adapter.parameters()}
    saved = Saved({parameter.untyped_storage()._cdata for parameter in step.parameters()})
    blocks: list[tuple[dict[int, Tensor], dict[int, Tensor], int]] = []
    flops = FlopCounterMode(display=False)

    def run_block(block: nn.Module, *inputs):
        """Run what checkpointing would run twice, and note its operations and what it saves."""
        before, operations = set(saved.kept), flops.get_total_flops()
        output = block(*inputs)
        if not output.requires_grad:  # nothing before it learns, so the backward pass never reaches it
            return output
        inside = {key: tensor for key, tensor in saved.kept.items() if key not in before}
        given = {tensor.untyped_storage()._cdata: tensor for tensor in inputs if isinstance(tensor, Tensor)}
        blocks.append((inside, given, flops.get_total_flops() - operations))
        return output

    noise = torch.empty_like(batch.latents)
    t = torch.zeros(len(noise), dtype=torch.long, device=noise.device)
    dropped = drawn(NOTHING, batch.counts, torch.Generator())
    hooks = torch.autograd.graph.saved_tensors_hooks(saved, lambda tensor: tensor)
    with checkpointing(step.unet, run_block), flash_on_meta(), hooks:
        with flops:
            loss = step(batch, dropped, noise, t, noise)["loss"]
            forward = flops.get_total_flops()
            loss.backward()
        total = flops.get_total_flops()
    inside = {key for block, _, _ in blocks for key in block}
    outside = {key: tensor for key, tensor in saved.kept.items() if key not in inside}
    for _, given, _ in blocks:
        outside |= {key: tensor for key, tensor in given.items() if key not in saved.known}
    return Cost(
        forward=forward,
        backward=total - forward,
        recomputed=sum(operations for _, _, operations in blocks),
        frozen=sum(p.numel() * p.element_size() for p in step.parameters() if id(p) not in learning),
        learning=sum(parameter.numel() for parameter in step.adapter.parameters()),
        activations=size(saved.kept.values()),
        checkpointed=size(outside.values()) + max(size(block.values()) for block, _, _ in blocks),
    )


@contextmanager
def checkpointing(unet: nn.Module, run_block) -> Iterator[None]:
    """Give the blocks that diffusers would checkpoint to a function instead."""
    unet.enable_gradient_checkpointing(run_block)
    try:
        yield
    finally:
        unet.disable_gradient_checkpointing()


@contextmanager
def flash_on_meta() -> Iterator[None]:
    """Let attention without a mask choose the flash kernel on the meta device too, where PyTorch would not."""
    chosen = F.scaled_dot_product_attention

    def attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **options) -> Tensor:
        if attn_mask is None and q.is_meta:
            return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]
        return chosen(q, k, v, attn_mask=attn_mask, **options)

    with mock.patch.object(F, "scaled_dot_product_attention", attention):
        yield


def full_size(controlnet: bool, dtype: torch.dtype = torch.bfloat16) -> TrainingStep:
    """StoryMaker's training on the meta device, in one dtype throughout."""
    from diffusers import ControlNetModel

    with torch.device("meta"):
        unet = build_unet(SDXL, 64).to(dtype)
        pose = ControlNetModel.from_unet(unet, load_weights_from_unet=False).to(dtype) if controlnet else None
    adapter = TrainedAdapter(unet, PositionalPerceiverResampler(device="meta", dtype=dtype))
    return TrainingStep(adapter, unet, sdxl(), Options(), pose)


def full_batch(characters: int, side: int, pictures: int = 1, dtype: torch.dtype = torch.bfloat16) -> Batch:
    """A batch on the meta device. side: of the pictures in pixels."""

    def empty(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    everybody = pictures * characters
    return Batch(
        latents=empty(pictures, 4, side // 8, side // 8),
        context=empty(pictures, 77, CONTEXT),
        pooled=empty(pictures, 1280),
        time_ids=empty(pictures, 6),
        empty_context=empty(1, 77, CONTEXT),
        empty_pooled=empty(1, 1280),
        counts=(characters,) * pictures,
        masks=empty(pictures, CHARACTERS, side, side),
        id_embeds=empty(everybody, 512),
        face=empty(everybody, FEATURES, 1280),
        character=empty(everybody, FEATURES, 1280),
        pose=empty(pictures, 3, side, side),
    )


def main() -> None:
    parser = argparse.ArgumentParser("python -m storyloom.benchmarks.storymaker_training", description=__doc__)
    parser.add_argument("--controlnet", action="store_true", help="with a ControlNet for the pose")
    parser.add_argument("--batch", type=int, default=1, help="pictures of a batch (default 1)")
    parser.add_argument("--side", type=int, default=1024, help="side of the pictures in pixels (default 1024)")
    options = parser.parse_args()
    step, rows = full_size(options.controlnet), []
    for characters in range(1, CHARACTERS + 1):
        cost = count(step, full_batch(characters, options.side, options.batch))
        operations = [cost.forward, cost.backward, cost.recomputed, cost.forward + cost.backward + cost.recomputed]
        memory = [cost.activations, cost.checkpointed, cost.fixed + cost.activations, cost.fixed + cost.checkpointed]
        rows.append([f"{characters}"] + [f"{x / TFLOP:.2f}" for x in operations] + [f"{x / GIB:.2f}" for x in memory])
    header = ["characters", "forward", "backward", "again", "sum"]
    header += ["saved", "saved, checkpointed", "all", "all, checkpointed"]
    print(table(header, rows))
    parts = ", ".join(f"{name} {cost.learning * each / GIB:.2f}" for name, each in LEARNING_BYTES.items())
    print(f"TFLOP and GiB. Of all, frozen weights {cost.frozen / GIB:.2f}; of what learns, {parts}.")


if __name__ == "__main__":
    main()
