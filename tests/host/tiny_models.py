"""ComfyUI's own networks at a tiny size, with random weights."""

import math

import torch

TEXT = {"l": 96, "g": 160}
"""Widths of the two text encoders, an eighth of SDXL's own: projecting text that wide cost more than all else."""
TEXT_HEAD = 32
UNET = {
    "use_checkpoint": False,
    "image_size": 32,
    "use_spatial_transformer": True,
    "legacy": False,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "use_temporal_attention": False,
    "use_temporal_resblock": False,
}
SDXL = UNET | {
    "channel_mult": [1, 1, 2],
    "num_res_blocks": [2, 2, 2],
    "num_head_channels": 16,
    "transformer_depth": [0, 0, 1, 1, 2, 2],
    "transformer_depth_middle": 2,
    "transformer_depth_output": [0, 0, 0, 1, 1, 1, 2, 2, 2],
    "use_linear_in_transformer": True,
    "context_dim": sum(TEXT.values()),
    "num_classes": "sequential",
    "adm_in_channels": TEXT["g"] + 6 * 256,
}
WIDE_TEXT = {"l": 768, "g": 1280}
WIDE = SDXL | {"context_dim": 2048, "adm_in_channels": 2816}
"""A UNet for text as wide as SDXL's, by which files are known as SDXL."""
SHALLOW = SDXL | {
    "channel_mult": [1, 2],
    "num_res_blocks": [1, 1],
    "transformer_depth": [0, 1],
    "transformer_depth_middle": 1,
    "transformer_depth_output": [0, 0, 1, 1],
}
"""A UNet with few layers, since compiling takes its time with each."""
SD15 = UNET | {
    "channel_mult": [1, 2, 2, 2],
    "num_res_blocks": [2, 2, 2, 2],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_middle": 1,
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "use_linear_in_transformer": False,
    "context_dim": 768,
    "adm_in_channels": None,
}
FLUX = {
    "image_model": "flux",
    "in_channels": 16,
    "out_channels": 16,
    "vec_in_dim": 8,
    "context_in_dim": 8,
    "hidden_size": 16,
    "mlp_ratio": 1.0,
    "num_heads": 1,
    "depth": 1,
    "depth_single_blocks": 1,
    "axes_dim": [4, 6, 6],
    "theta": 10000,
    "patch_size": 2,
    "qkv_bias": True,
    "guidance_embed": False,
    "txt_ids_dims": [],
}


def fill_(module, seed):
    """Give every parameter of a module that ComfyUI leaves uninitialised a value, with variance kept through layers."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(False)
        if parameter.ndim >= 2:
            drawn = torch.randn(parameter.shape, generator=generator)  # the same numbers in every dtype
            parameter.copy_(drawn / math.sqrt(parameter[0].numel()))
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    return module


def tiny_model(family, layout, dtype=torch.float32, computed=None):
    """A MODEL of one of comfy.supported_models' families with the layout of its blocks and little else.

    dtype: of the weights; computed: of the arithmetic, if it is another.
    """
    import comfy.model_management
    import comfy.model_patcher
    import comfy.supported_models

    config = getattr(comfy.supported_models, family)({**layout, "dtype": dtype})
    config.unet_config |= layout
    config.set_inference_dtype(dtype, computed)
    cpu = torch.device("cpu")
    model = config.get_model({}, "", device=cpu)
    fill_(model.diffusion_model, 0)
    device = comfy.model_management.get_torch_device()
    return comfy.model_patcher.CoreModelPatcher(model, load_device=device, offload_device=cpu)


def tiny_controlnet():
    """A CONTROL_NET for the tiny SDXL, in double precision."""
    import comfy.cldm.cldm
    import comfy.controlnet
    import comfy.ops

    settings = {"hint_channels": 3, "dtype": torch.float64, "operations": comfy.ops.disable_weight_init}
    network = fill_(comfy.cldm.cldm.ControlNet(**SDXL, **settings), 5)
    return comfy.controlnet.ControlNet(network, load_device=torch.device("cpu"), manual_cast_dtype=None)


def tiny_lora(width=64, context=SDXL["context_dim"]):
    """State dict of a LoRA for the keys of one layer of the tiny SDXL, in self- and in cross-attention.

    width: channels of the layer; context: of the text. The demo model has 128 and 2048.
    """
    generator = torch.Generator().manual_seed(3)
    state = {}
    for slot, source in (("attn1", width), ("attn2", context)):
        name = f"diffusion_model.output_blocks.1.1.transformer_blocks.0.{slot}.to_k"
        state[f"{name}.lora_up.weight"] = torch.randn(width, 4, generator=generator) / 2
        state[f"{name}.lora_down.weight"] = torch.randn(4, source, generator=generator) / 2
    return state


def tiny_clip(embedding_directory=None, widths=TEXT):
    """A CLIP with SDXL's tokenizer, and shallow and narrow encoders of random weights."""
    import comfy.sd
    import comfy.sdxl_clip
    import comfy.supported_models_base

    def encoder(width):
        return {
            "num_hidden_layers": 3,
            "intermediate_size": 64,
            "hidden_size": width,
            "num_attention_heads": width // TEXT_HEAD,
        }

    target = comfy.supported_models_base.ClipTarget(comfy.sdxl_clip.SDXLTokenizer, comfy.sdxl_clip.SDXLClipModel)
    options = {"clip_l_model_config": encoder(widths["l"]), "clip_g_model_config": encoder(widths["g"])}
    clip = comfy.sd.CLIP(target, embedding_directory=embedding_directory, model_options=options, parameters=0)
    fill_(clip.cond_stage_model, 1)
    return clip
