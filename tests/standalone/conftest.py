"""A small random SDXL on diffusers: all of its blocks, few channels, one layer each."""

import math
import os
from functools import partial

import pytest
import torch

from storyloom.models.demo import model as demo

pytest.importorskip("diffusers", reason='the host without ComfyUI needs diffusers: pip install "storyloom[standalone]"')
pytest.importorskip("open_clip", reason='the host without ComfyUI needs open_clip: pip install "storyloom[standalone]"')

SMALL = {
    "model_channels": 32,
    "transformer_depth": [0, 0, 1, 1, 2, 2],
    "transformer_depth_middle": 2,
    "transformer_depth_output": [0, 0, 0, 1, 1, 1, 2, 2, 2],
    "context_dim": 2048,
}


@pytest.fixture(scope="session")
def numbers():
    return {**demo.UNET, **SMALL}


@pytest.fixture(scope="session")
def small(numbers):
    """A StoryModel of 64 x 64 pixels whose decoder shows three of the four latents."""
    from diffusers import EulerDiscreteScheduler
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    from storyloom.standalone.checkpoint import schedule
    from storyloom.standalone.demo import build_with_weights
    from storyloom.standalone.model import StoryModel
    from storyloom.standalone.unet import build_unet

    def text(kind, width, activation):
        sizes = {"num_hidden_layers": 3, "intermediate_size": 64, "num_attention_heads": width // 64}
        config = CLIPTextConfig(hidden_size=width, projection_dim=width, hidden_act=activation, **sizes)
        return random_(partial(kind, config))

    def random_(make):
        with torch.device("meta"):
            shapes = {name: tensor.shape for name, tensor in make().state_dict().items()}
        return build_with_weights(make, {name: values(name, shape) for name, shape in shapes.items()})

    def values(name, shape):
        """Weights that preserve the variance through layers; large tables repeat a few rows, for speed."""
        if len(shape) < 2:
            return torch.full(shape, float(name.endswith("weight")))
        rows = torch.randn(min(shape[0], 1999), *shape[1:], generator=generator) / math.prod(shape[1:]) ** 0.5
        return rows.repeat(-(-shape[0] // len(rows)), *[1] * (len(shape) - 1))[: shape[0]]

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or 1))
    generator = torch.Generator().manual_seed(0)
    return StoryModel(
        unet=random_(partial(build_unet, numbers, 16)),
        text_encoder=text(CLIPTextModel, 768, "quick_gelu"),
        text_encoder_2=text(CLIPTextModelWithProjection, 1280, "gelu"),
        scheduler=EulerDiscreteScheduler(**schedule({"v_pred", "ztsnr"})),
        decode=lambda latents: latents[:, :3].repeat_interleave(8, 2).repeat_interleave(8, 3).movedim(1, -1).sigmoid(),
        width=64,
        height=64,
        device=torch.device("cpu"),
    )


@pytest.fixture(scope="session")
def draw(small):
    """Draw a story of three frames in two steps; settings as of StoryPipeline."""
    from storyloom.standalone import StoryPipeline

    pipeline = StoryPipeline(small)
    frames = ["asleep in the snow", "reading on a train # On the train.", "drinking tea"]
    return partial(pipeline, "a red fox in a blue coat", frames, steps=2, seed=7, progress=lambda done, steps: None)


@pytest.fixture(scope="module")
def one_thread():
    """Makes the numbers reproducible: several threads would sum gradients in any order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
