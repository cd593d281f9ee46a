"""Demo model: a tiny SDXL with random weights, built in process from ComfyUI's own classes."""

from __future__ import annotations

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.supported_models
import folder_paths
import torch
from comfy.ldm.models.autoencoder import AutoencoderKL
from comfy_api.latest import io

from ..models import demo


class DemoModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StoryLoom_DemoModel",
            display_name="Demo model",
            category="StoryLoom/demo",
            description=(
                "A demo: a tiny SDXL with random weights that draws coloured noise. It exists so that every workflow "
                "runs with no download; for real pictures put Load Checkpoint with an SDXL model in its place."
            ),
            search_aliases=["test model", "tiny SDXL", "random weights", "StoryLoom demo"],
            inputs=[],
            outputs=[
                io.Model.Output("model", display_name="MODEL", tooltip="A tiny SDXL UNet with SDXL's own blocks."),
                io.Clip.Output(
                    "clip", display_name="CLIP", tooltip="SDXL's real tokenizer with two tiny random text encoders."
                ),
                io.Vae.Output("vae", display_name="VAE", tooltip="A tiny random VAE: 8 pixels per latent, 4 channels."),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        model, clip, vae = build_model(), build_clip(), build_vae()
        model.cached_patcher_init = (build_model, ())
        clip.patcher.cached_patcher_init = (_clip_patcher, ())
        vae.patcher.cached_patcher_init = (_vae_patcher, ())
        return io.NodeOutput(model, clip, vae)


def build_model(disable_dynamic: bool = False) -> comfy.model_patcher.ModelPatcher:
    """The demo UNet as a comfy.model_base.SDXL in float32; `disable_dynamic` keeps it out of dynamic VRAM."""
    config = comfy.supported_models.SDXL(demo.UNET)
    config.unet_config["num_head_channels"] = demo.HEAD_CHANNELS
    config.set_inference_dtype(torch.float32, None)
    offload_device = comfy.model_management.unet_offload_device()
    model = config.get_model({}, "", device=offload_device)
    _allocate_(model.diffusion_model)
    demo.pass_noise_through_(demo.fill_(model.diffusion_model))
    patcher = comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    return patcher(model, comfy.model_management.get_torch_device(), offload_device)


def build_clip(disable_dynamic: bool = False) -> comfy.sd.CLIP:
    """SDXL's tokenizer and both text encoders at full width, three layers deep."""
    target = comfy.supported_models.SDXL(demo.UNET).clip_target()
    options = {"clip_l_model_config": demo.CLIP_L, "clip_g_model_config": demo.CLIP_G, "dtype": torch.float32}
    encoders = demo.fill_(_allocate_(target.clip(dtype=torch.float32, model_options=options)))
    return comfy.sd.CLIP(
        target,
        embedding_directory=folder_paths.get_folder_paths("embeddings"),
        state_dict=encoders.state_dict(),
        model_options=options,
        disable_dynamic=disable_dynamic,
    )


def build_vae() -> comfy.sd.VAE:
    """A small AutoencoderKL, filled before ComfyUI wraps it."""
    network = demo.fill_(_allocate_(AutoencoderKL(**demo.VAE)), demo.VAE_SEED)
    return comfy.sd.VAE(sd=network.state_dict(), config={"params": demo.VAE}, dtype=torch.float32)


def _clip_patcher(disable_dynamic: bool = False) -> comfy.model_patcher.ModelPatcher:
    return build_clip(disable_dynamic).patcher


def _vae_patcher(disable_dynamic: bool = False) -> comfy.model_patcher.ModelPatcher:
    return build_vae().patcher


def _allocate_(module: torch.nn.Module) -> torch.nn.Module:
    """Give storage to layers that ComfyUI leaves empty until a state dict is loaded (it does so for dynamic VRAM)."""
    for part in module.modules():
        if isinstance(part, torch.nn.Linear) and part.weight is None:
            part.weight = _parameter(part.weight_comfy_model_dtype, part.out_features, part.in_features)
            if part.comfy_need_lazy_init_bias:
                part.bias = _parameter(part.bias_comfy_model_dtype, part.out_features)
        elif isinstance(part, torch.nn.Embedding) and part.weight.is_meta:
            part.weight = _parameter(part.weight_comfy_model_dtype, part.num_embeddings, part.embedding_dim)
    return module


def _parameter(dtype: torch.dtype | None, *shape: int) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)
