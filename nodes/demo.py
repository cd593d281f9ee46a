"""The demo model, a tiny SDXL that ships with the pack, built from ComfyUI's own classes; and its StoryMaker."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from tempfile import TemporaryDirectory

import comfy.clip_vision
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.supported_models
import folder_paths
import torch
from comfy.sdxl_clip import SDXLClipModel
from comfy.taesd.taesd import TAESD
from comfy_api.latest import io

from ..models.demo import model as demo
from ..models.demo import storymaker as demo_storymaker
from ..models.demo import vision as demo_vision
from .storymaker_patcher import storymaker_of
from .types import StoryMaker as StoryMakerType


class DemoModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StoryLoom_DemoModel",
            display_name="Demo model",
            category="StoryLoom/demo",
            description=(
                "A tiny SDXL that comes with the pack and draws pixel-art stories in seconds on any machine: a cat, "
                "fox, rabbit, bear, robot or girl in nine places. It has SDXL's blocks, tokenizer and conditioning, so "
                "a workflow built on it also runs on a real checkpoint: replace it with Load Checkpoint. Use 192x192, "
                "16 steps and cfg 5. The log lists words that it was not trained on."
            ),
            search_aliases=["test model", "no download", "tiny SDXL", "pixel art", "StoryLoom demo"],
            inputs=[],
            outputs=[
                io.Model.Output(
                    "model",
                    display_name="MODEL",
                    tooltip="A tiny SDXL UNet with SDXL's own blocks; v-prediction with zero terminal SNR.",
                ),
                io.Clip.Output(
                    "clip",
                    display_name="CLIP",
                    tooltip="SDXL's real tokenizer with two tiny text encoders that know about 320 tokens.",
                ),
                io.Vae.Output(
                    "vae",
                    display_name="VAE",
                    tooltip="Decodes each latent pixel to a square of 8x8 pixels. It has no trained weights.",
                ),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        model, clip, vae = build_model(), build_clip(), build_vae()
        model.cached_patcher_init = (build_model, ())
        clip.patcher.cached_patcher_init = (_clip_patcher, ())
        vae.patcher.cached_patcher_init = (_vae_patcher, ())
        return io.NodeOutput(model, clip, vae)


class DemoStoryMaker(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StoryLoom_DemoStoryMaker",
            display_name="Demo StoryMaker",
            category="StoryLoom/demo",
            description=(
                "Replaces StoryMaker's adapter and image encoder for the Demo model, so that you can try a workflow "
                "with reference images without a download. Its weights are random: images change, but do not come to "
                "resemble the character."
            ),
            search_aliases=["StoryMaker", "test adapter", "example adapter", "random weights", "StoryLoom demo"],
            inputs=[],
            outputs=[
                StoryMakerType.Output(
                    "storymaker",
                    display_name="STORYMAKER",
                    tooltip="Random weights for the Demo model, for Apply StoryMaker.",
                ),
                io.ClipVision.Output(
                    "clip_vision",
                    display_name="CLIP_VISION",
                    tooltip="The demo's image encoder, which keeps colours and positions, for Character from image.",
                ),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(storymaker_of(demo_storymaker.demo_storymaker()), build_clip_vision())


def build_clip_vision() -> comfy.clip_vision.ClipVisionModel:
    """The demo's image encoder in float32, with CLIP ViT-H's input size and feature shape."""
    with TemporaryDirectory() as folder:  # ComfyUI 0.19 accepts the configuration only as a file
        config = Path(folder, "config.json")
        config.write_text(json.dumps(demo_vision.VISION), encoding="utf-8")
        encoder = comfy.clip_vision.ClipVisionModel(str(config))
    encoder.model.float()
    encoder.load_sd(demo_vision.state_dict())
    return encoder


def build_model(disable_dynamic: bool = False) -> comfy.model_patcher.ModelPatcher:
    """The demo UNet as a comfy.model_base.SDXL in float32; `disable_dynamic` excludes it from dynamic VRAM."""
    config = _DemoSDXL(demo.UNET)
    config.unet_config["num_head_channels"] = demo.HEAD_CHANNELS
    config.set_inference_dtype(torch.float32, None)
    offload_device = comfy.model_management.unet_offload_device()
    model = config.get_model({}, "", device=offload_device)
    patcher = comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    patched = patcher(model, comfy.model_management.get_torch_device(), offload_device)
    model.load_model_weights(demo.load_unet(), assign=patched.is_dynamic())
    return patched


class _DemoSDXL(comfy.supported_models.SDXL):
    """SDXL as configured for a checkpoint with the keys `v_pred` and `ztsnr`."""

    def model_type(self, state_dict, prefix=""):
        self.sampling_settings = {**self.sampling_settings, "zsnr": True}
        return comfy.model_base.ModelType.V_PREDICTION


def build_clip(disable_dynamic: bool = False) -> comfy.sd.CLIP:
    """SDXL's tokenizer and both text encoders at full width, three layers deep."""
    target = comfy.supported_models.SDXL(demo.UNET).clip_target()
    target.clip = _DemoEncoders
    options = {"clip_l_model_config": demo.CLIP_L, "clip_g_model_config": demo.CLIP_G, "dtype": torch.float32}
    unused = {"text_projection.weight": torch.eye(demo.CLIP_L["hidden_size"])}
    encoders = {"clip_l": {**demo.load_encoder("l"), **unused}, "clip_g": demo.load_encoder("g")}
    clip = comfy.sd.CLIP(
        target,
        embedding_directory=folder_paths.get_folder_paths("embeddings"),
        state_dict={
            f"{name}.transformer.{key}": value for name, part in encoders.items() for key, value in part.items()
        },
        model_options=options,
        disable_dynamic=disable_dynamic,
    )
    clip.cond_stage_model.spelling = clip.tokenizer.clip_l.inv_vocab
    clip.cond_stage_model.vocabulary = frozenset(demo.load_vocabulary())
    return clip


class _DemoEncoders(SDXLClipModel):
    """SDXL's two text encoders, which log the words that are not in the demo's vocabulary."""

    spelling: dict[int, str]
    vocabulary: frozenset[int]

    def encode_token_weights(self, token_weight_pairs):
        tokens = [token for chunk in token_weight_pairs["l"] for token, *_ in chunk if isinstance(token, int)]
        unknown = demo.unknown_words(tokens, self.spelling, self.vocabulary)
        if unknown:
            logging.warning("The demo model was not trained on: %s. It draws the rest.", ", ".join(unknown))
        return super().encode_token_weights(token_weight_pairs)


def build_vae() -> comfy.sd.VAE:
    """A VAE in the form of a TAESD that averages squares of 8x8 pixels and draws such squares."""
    vae = comfy.sd.VAE(sd=TAESD(latent_channels=4).state_dict(), dtype=torch.float32)
    tiny = vae.first_stage_model
    tiny.taesd_encoder, tiny.taesd_decoder = demo.autoencoder()
    with torch.no_grad():
        tiny.vae_scale.fill_(demo.LATENT_SCALE)
        tiny.vae_shift.zero_()
    return vae


def _clip_patcher(disable_dynamic: bool = False) -> comfy.model_patcher.ModelPatcher:
    return build_clip(disable_dynamic).patcher


def _vae_patcher(disable_dynamic: bool = False) -> comfy.model_patcher.ModelPatcher:
    return build_vae().patcher
