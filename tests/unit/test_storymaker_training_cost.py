"""The count of operations and memory of a training step, on a small model."""

import pytest
import torch
from small_training import OBJECTIVE, tiny_adapter, tiny_batch, tiny_unet
from torch.utils.checkpoint import set_checkpoint_early_stop
from torch.utils.flop_counter import FlopCounterMode

from storyloom.benchmarks.storymaker_training import count, flash_on_meta, full_batch
from storyloom.training.storymaker.drops import NOTHING, drawn
from storyloom.training.storymaker.options import Options
from storyloom.training.storymaker.step import TrainingStep

pytest.importorskip("diffusers", reason="the training runs on diffusers")


def step_of(unet):
    return TrainingStep(tiny_adapter(unet), unet, OBJECTIVE, Options())


def operations(step, batch):
    """Of a forward and a backward pass, by the counter alone."""
    t = torch.zeros(len(batch.latents), dtype=torch.long, device=batch.latents.device)
    with FlopCounterMode(display=False) as counter:
        dropped = drawn(NOTHING, batch.counts, torch.Generator())
        step(batch, dropped, batch.latents, t, batch.latents)["loss"].backward()
    return counter.get_total_flops()


def test_the_count_is_that_of_a_real_step():
    step, batch = step_of(tiny_unet()), tiny_batch((1, 2))
    cost = count(step, batch)
    assert cost.forward + cost.backward == operations(step, batch)
    step.unet.enable_gradient_checkpointing()
    with set_checkpoint_early_stop(False):
        assert cost.forward + cost.backward + cost.recomputed == operations(step, batch)


def test_memory_is_that_of_what_is_frozen_of_what_learns_and_of_what_is_saved():
    step, batch = step_of(tiny_unet()), tiny_batch((1, 2))
    cost = count(step, batch)
    adapter = sum(parameter.numel() for parameter in step.adapter.parameters())
    everything = sum(parameter.numel() for parameter in step.parameters())
    assert cost.fixed == 8 * (everything - adapter) + 16 * adapter
    assert 0 < cost.checkpointed < cost.activations
    more = count(step, tiny_batch((1, 2, 1, 2)))
    assert 1.9 < more.activations / cost.activations < 2.1


def test_the_meta_device_counts_the_flash_kernel():
    unet = tiny_unet(torch.float32)
    step = step_of(unet).to("meta")
    batch = tiny_batch((1, 2)).to("meta", torch.float32)
    attention = 0
    for name in step.adapter.names:  # 4 operations for each query, key and channel
        layer = unet.get_submodule(name.removesuffix(".processor"))
        pixels = (4 if layer.to_q.out_features == 64 else 2) ** 2
        attention += 2 * 4 * pixels * (7 if layer.is_cross_attention else pixels) * layer.to_q.out_features
    uncounted = count(step_of(tiny_unet()), tiny_batch((1, 2)))  # the counter does not know the CPU's kernel
    assert count(step, batch).forward == uncounted.forward + attention
    with flash_on_meta():
        q = torch.empty(1, 2, 64, 16, device="meta", requires_grad=True)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
            torch.nn.functional.scaled_dot_product_attention(q, q, q)
    assert all(tensor.numel() < 64 * 64 for tensor in saved), "no matrix of probabilities"


def test_the_full_batch_is_one_that_the_training_accepts():
    batch = full_batch(3, 64, pictures=2)
    small = tiny_batch((3, 3), pose=True)
    assert batch.counts == small.counts
    for name in ("latents", "context", "pooled", "time_ids", "masks", "id_embeds", "face", "character", "pose"):
        assert getattr(batch, name).ndim == getattr(small, name).ndim, name
        assert getattr(batch, name).shape[0] == getattr(small, name).shape[0], name
