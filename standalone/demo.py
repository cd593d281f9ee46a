"""The demo model on diffusers: the weights that ship with the pack, in diffusers' UNet and transformers' encoders."""

from __future__ import annotations

import logging
from collections.abc import Callable, Container, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ..models.demo import model as demo
from ..prompts.script import Story
from ..prompts.tokens import END
from .checkpoint import schedule
from .model import StoryModel
from .text import spelling, token_ids
from .unet import build_unet, to_diffusers


def demo_model(weights_file: Path | None = None) -> StoryModel:
    """The demo model in float32 on the CPU. weights_file: other weights than those that ship.

    Raises DemoFileError.
    """
    from diffusers import EulerDiscreteScheduler
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    weights = demo.load_weights(weights_file)
    config_l = CLIPTextConfig(**demo.CLIP_L, hidden_act="quick_gelu", eos_token_id=END)
    config_g = CLIPTextConfig(**demo.CLIP_G, hidden_act="gelu", projection_dim=1280, eos_token_id=END)
    return StoryModel(
        unet=build_with_weights(
            partial(build_unet, demo.UNET, demo.HEAD_CHANNELS), to_diffusers(weights.unet, demo.UNET)
        ),
        text_encoder=build_with_weights(partial(CLIPTextModel, config_l), weights.clip_l),
        text_encoder_2=build_with_weights(partial(CLIPTextModelWithProjection, config_g), weights.clip_g),
        scheduler=EulerDiscreteScheduler(**schedule({"v_pred", "ztsnr"})),
        decode=demo.decode,
        width=demo.WIDTH,
        height=demo.HEIGHT,
        device=torch.device("cpu"),
        on_story=partial(warn_of_unknown_words, frozenset(weights.vocabulary)),
    )


def warn_of_unknown_words(vocabulary: Container[int], story: Story) -> None:
    """Log the words of a story that are not in the vocabulary (token ids)."""
    before, after = story.style_around
    texts = (*(character.description for character in story.characters), *(frame.text for frame in story.frames))
    unknown = demo.unknown_words(token_ids(" ".join([before, *texts, after])), spelling(), vocabulary)
    if unknown:
        logging.warning("The demo model was not trained on: %s. It draws the rest.", ", ".join(unknown))


def build_with_weights(make: Callable[[], nn.Module], weights: Mapping[str, Tensor]) -> nn.Module:
    """The module that `make` builds, with these tensors as frozen weights; no weight is initialised first.

    transformers 5 omits `text_model.` from CLIP-L's names.
    """
    with torch.device("meta"):
        module = make()
    own = module.state_dict()
    named = {name if name in own else name.removeprefix("text_model."): tensor for name, tensor in weights.items()}
    module.load_state_dict(named, assign=True)
    for part in module.modules():
        if hasattr(part, "position_ids"):  # not among the weights
            part.position_ids = torch.arange(part.position_ids.shape[-1])[None]
    return module.train(False).requires_grad_(False)
