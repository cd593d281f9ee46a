"""Everything in ComfyUI that the pack relies on, and the versions in which it was seen."""

from __future__ import annotations

from dataclasses import dataclass

VERSIONS = ("0.19.3", "0.33.0")
ROOTS = ("comfy", "comfy_api", "comfy_execution", "comfy_extras", "execution", "folder_paths", "nodes", "server")
"""ComfyUI's modules and packages."""


@dataclass(frozen=True)
class Interface:
    """One thing that has to be there.

    name       full name of a module, class, function or attribute; with `file`: a text in that file
    used       where the pack uses it
    first      first parameters, in this order: others pass them by position
    accepts    parameters that the pack passes by name
    file       of ComfyUI, in which `name` is a string, a parameter or an attribute
    otherwise  what the pack does without it; "" if it needs it
    seen       versions that have it
    """

    name: str
    used: str
    first: tuple[str, ...] = ()
    accepts: tuple[str, ...] = ()
    file: str = ""
    otherwise: str = ""
    seen: tuple[str, ...] = VERSIONS


def _texts(file: str, used: str, names: str, **more) -> tuple[Interface, ...]:
    return tuple(Interface(name, used, file=file, **more) for name in names.split())


IMPORTED = {
    "comfy.cli_args": "args",
    "comfy.clip_vision": "ClipVisionModel clip_preprocess",
    "comfy.ldm.modules.attention": "optimized_attention optimized_attention_masked",
    "comfy.ldm.modules.diffusionmodules.openaimodel": "Downsample Upsample",
    "comfy.lora": "load_lora model_lora_keys_unet",
    "comfy.model_base.ModelType": "V_PREDICTION",
    "comfy.model_management": "current_loaded_models free_memory get_torch_device intermediate_device "
    "intermediate_dtype load_models_gpu text_encoder_offload_device unet_offload_device",
    "comfy.model_patcher": "CoreModelPatcher ModelPatcher",
    "comfy.ops": "manual_cast",
    "comfy.sd": "CLIP VAE",
    "comfy.sdxl_clip": "SDXLClipModel SDXLTokenizer",
    "comfy.supported_models": "SDXL",
    "comfy.taesd.taesd": "TAESD",
    "comfy.utils": "ProgressBar",
    "comfy_api.latest": "ComfyExtension",
    "comfy_api.latest.io": "AnyType.Input Boolean.Input Clip.Input Clip.Output ClipVision.Input ClipVision.Output "
    "Combo.Input ComfyNode Conditioning.Input Conditioning.Output Custom Float.Input FolderType.output "
    "Hidden.extra_pnginfo Hidden.prompt Image.Input Image.Output Input Int.Input Int.Output Latent.Input "
    "Latent.Output Mask.Input Mask.Output Model.Input Model.Output NodeOutput Output Photomaker.Input Schema "
    "String.Input String.Output Vae.Output",
    "comfy_api.latest.ui": "PreviewImage SavedResult",
    "folder_paths": "add_model_folder_path folder_names_and_paths get_filename_list get_filename_list_ "
    "get_folder_paths get_full_path get_full_path_or_raise get_output_directory get_save_image_path models_dir",
}
"""Names that the nodes import or read from a module; a test compares them with the code."""

_PATCHER, _RUN, _CALL = "comfy.model_patcher.ModelPatcher", "runtime/sampling.py", "runtime/run.py"

CALLED = (
    # the entry point and the schemas of nodes
    Interface("comfy_api.latest.ComfyExtension.get_node_list", "nodes/__init__.py"),
    Interface(
        "comfy_api.latest.io.Schema",
        "nodes/",
        accepts=("node_id", "display_name", "category", "inputs", "outputs", "description", "search_aliases", "hidden"),
    ),
    Interface("comfy_api.latest.io.Schema", "nodes/", accepts=("is_output_node", "is_input_list")),
    Interface(
        "comfy_api.latest.io.Input",
        "nodes/",
        first=("id",),
        accepts=("display_name", "optional", "tooltip", "advanced"),
    ),
    Interface("comfy_api.latest.io.Output", "nodes/", first=("id",), accepts=("display_name", "tooltip")),
    Interface("comfy_api.latest.io.Output", "nodes/batches.py", accepts=("is_output_list",)),
    Interface("comfy_api.latest.io.Int.Input", "nodes/", accepts=("default", "min", "max", "step")),
    Interface("comfy_api.latest.io.Int.Input.get_io_type", "nodes/ranges.py"),
    Interface("comfy_api.latest.io.NodeOutput", "nodes/", accepts=("ui",)),
    Interface("comfy_api.latest.io.ComfyNode.hidden", "nodes/save_page.py"),
    Interface("comfy_api.latest.io.ComfyNode.define_schema", "nodes/ranges.py"),
    Interface("server.PromptServer.instance", "nodes/routes.py", otherwise="the script editor shows no lengths"),
    Interface("server.PromptServer.routes", "nodes/routes.py", otherwise="the script editor shows no lengths"),
    # models
    Interface(f"{_PATCHER}.clone", _RUN),
    Interface(f"{_PATCHER}.get_wrappers", _RUN, first=("wrapper_type", "key")),
    Interface(f"{_PATCHER}.add_wrapper_with_key", _RUN, first=("wrapper_type", "key", "wrapper")),
    Interface(f"{_PATCHER}.remove_wrappers_with_key", _RUN, first=("wrapper_type", "key")),
    Interface(f"{_PATCHER}.get_model_object", f"nodes/patching.py, {_RUN}", first=("name",)),
    Interface(f"{_PATCHER}.add_patches", "nodes/storymaker.py", first=("patches", "strength_patch")),
    Interface(f"{_PATCHER}.is_clone", "nodes/storymaker_patcher.py", first=("other",)),
    Interface(f"{_PATCHER}.is_dynamic", "nodes/demo.py"),
    Interface(f"{_PATCHER}.load_device", "nodes/storymaker_patcher.py, nodes/similarity.py"),
    Interface(f"{_PATCHER}.model", "nodes/, runtime/"),
    Interface(_PATCHER, "nodes/", first=("model", "load_device", "offload_device")),
    Interface("comfy.model_management.LoadedModel.model", "nodes/storymaker_patcher.py"),
    Interface("comfy.model_management.free_memory", "nodes/storymaker_patcher.py", ("memory_required", "device")),
    Interface("comfy.model_management.load_models_gpu", "nodes/similarity.py", ("models",), ("force_full_load",)),
    Interface("comfy.model_base.BaseModel.diffusion_model", _CALL),
    Interface("comfy.model_base.BaseModel.model_config", "nodes/storymaker.py"),
    Interface("comfy.model_base.BaseModel.model_sampling", _RUN),
    Interface("comfy.model_base.BaseModel.memory_required", "runtime/memory.py", first=("input_shape",)),
    Interface("comfy.model_base.BaseModel.get_dtype_inference", f"{_RUN}, runtime/memory.py"),
    Interface("comfy.model_base.BaseModel.load_model_weights", "nodes/demo.py", accepts=("assign",)),
    Interface("comfy.model_sampling.ModelSamplingDiscrete.percent_to_sigma", _RUN, first=("percent",)),
    *(
        Interface(f"comfy.ldm.modules.diffusionmodules.openaimodel.UNetModel.{name}", "nodes/patching.py")
        for name in ("input_blocks", "middle_block", "output_blocks", "num_res_blocks")
    ),
    Interface("comfy.ldm.modules.attention.SpatialTransformer.transformer_blocks", "nodes/patching.py"),
    Interface("comfy.ldm.modules.attention.BasicTransformerBlock.attn1", "nodes/patching.py"),
    Interface("comfy.ldm.modules.attention.BasicTransformerBlock.attn2", "nodes/patching.py"),
    Interface("comfy.ldm.modules.attention.CrossAttention.to_k", "nodes/patching.py"),
    Interface(
        "comfy.ldm.modules.attention.attention_pytorch",
        "nodes/patching.py",
        ("q", "k", "v", "heads", "mask", "attn_precision"),
        ("transformer_options",),
    ),
    Interface("comfy.lora.load_lora", "nodes/storymaker.py", first=("lora", "to_load")),
    Interface("comfy.lora.model_lora_keys_unet", "nodes/storymaker.py", first=("model", "key_map")),
    Interface("comfy.supported_models.SDXL.clip_target", "nodes/demo.py"),
    Interface("comfy.supported_models.SDXL.get_model", "nodes/demo.py", ("state_dict", "prefix", "device")),
    Interface("comfy.supported_models.SDXL.model_type", "nodes/demo.py", first=("state_dict", "prefix")),
    Interface("comfy.supported_models.SDXL.sampling_settings", "nodes/demo.py"),
    Interface("comfy.supported_models.SDXL.set_inference_dtype", "nodes/demo.py", ("dtype", "manual_cast_dtype")),
    Interface("comfy.supported_models.SDXL.unet_config", "nodes/demo.py"),
    # text, images and files
    Interface("comfy.sd.CLIP.tokenize", "nodes/conditioning.py", first=("text",), accepts=("return_word_ids",)),
    Interface(
        "comfy.sd.CLIP.encode_from_tokens_scheduled", "nodes/conditioning.py", first=("tokens",), accepts=("show_pbar",)
    ),
    Interface("comfy.sd.CLIP.cond_stage_model", "nodes/demo.py"),
    Interface("comfy.sd.CLIP.patcher", "nodes/demo.py"),
    Interface("comfy.sd.CLIP.tokenizer", "nodes/demo.py"),
    Interface("comfy.sd.CLIP", "nodes/demo.py", ("target", "embedding_directory"), ("state_dict", "disable_dynamic")),
    Interface("comfy.sd.VAE", "nodes/demo.py", first=("sd",), accepts=("dtype",)),
    Interface("comfy.sd.VAE.first_stage_model", "nodes/demo.py"),
    Interface("comfy.sd.VAE.patcher", "nodes/demo.py"),
    Interface("comfy.sd1_clip.SDTokenizer.inv_vocab", "nodes/demo.py"),
    Interface("comfy.sd1_clip.SDTokenizer.tokenize_with_weights", "nodes/routes.py", ("text", "return_word_ids")),
    Interface("comfy.sdxl_clip.SDXLTokenizer.clip_l", "nodes/demo.py"),
    Interface("comfy.sdxl_clip.SDXLTokenizer.tokenize_with_weights", "nodes/routes.py", ("text", "return_word_ids")),
    Interface("comfy.sdxl_clip.SDXLClipModel.encode_token_weights", "nodes/demo.py", first=("token_weight_pairs",)),
    *(
        Interface(f"comfy.taesd.taesd.TAESD.{name}", "nodes/demo.py")
        for name in ("taesd_encoder", "taesd_decoder", "vae_scale", "vae_shift")
    ),
    Interface("comfy.clip_vision.ClipVisionModel.encode_image", "nodes/pictures.py", first=("image",)),
    Interface("comfy.clip_vision.ClipVisionModel.get_sd", "nodes/demo.py"),
    Interface("comfy.clip_vision.ClipVisionModel.load_sd", "nodes/demo.py", first=("sd",)),
    Interface("comfy.utils.ProgressBar.update_absolute", "nodes/", first=("value", "total")),
    Interface("comfy.controlnet.ControlBase.cond_hint_original", "prompts/batches.py"),
    Interface("comfy.controlnet.ControlBase.previous_controlnet", "prompts/batches.py"),
    Interface("comfy_api.latest.ui.PreviewImage.as_dict", "nodes/consistency.py, nodes/save_page.py"),
    Interface("folder_paths.get_save_image_path", "nodes/save_page.py", ("filename_prefix", "output_dir")),
    # a sampling run: what wrappers are called with, and what they read
    Interface("comfy.samplers.CFGGuider.outer_sample", _RUN, ("noise", "latent_image", "sampler", "sigmas")),
    Interface(
        "comfy.samplers.KSAMPLER.sample", _RUN, first=("model_wrap", "sigmas", "extra_args", "callback", "noise")
    ),
    Interface("comfy.samplers._calc_cond_batch", _CALL, first=("model", "conds", "x_in", "timestep", "model_options")),
    Interface(
        "comfy.model_base.BaseModel._apply_model",
        _CALL,
        first=("x", "t", "c_concat", "c_crossattn", "control", "transformer_options"),
    ),
    Interface(
        "comfy.sampler_helpers._prepare_sampling",
        "runtime/memory.py",
        first=("model", "noise_shape", "conds", "model_options"),
    ),
    Interface("comfy.patcher_extension.WrapperExecutor.class_obj", f"{_RUN}, {_CALL}"),
    *(
        Interface(f"comfy.patcher_extension.WrappersMP.{name}", "runtime/")
        for name in ("APPLY_MODEL", "CALC_COND_BATCH", "DIFFUSION_MODEL", "PREPARE_SAMPLING", "SAMPLER_SAMPLE")
    ),
    Interface(
        "comfy.patcher_extension.WrappersMP.OUTER_SAMPLE",
        "runtime/precompute.py",
        otherwise="StoryMaker's networks are loaded beside the UNet",
    ),
    *(
        Interface(f"comfy.samplers.CFGGuider.{name}", f"{_RUN}, runtime/conditionings.py")
        for name in ("conds", "inner_model", "model_options", "model_patcher", "original_conds")
    ),
    Interface("comfy.conds.CONDCrossAttn", "runtime/conditionings.py"),
    Interface("comfy.conds.CONDCrossAttn.cond", "runtime/conditionings.py"),
    Interface("comfy.context_windows.IndexListContextWindow.dim", "runtime/call.py"),
    Interface("comfy.context_windows.IndexListContextWindow.index_list", "runtime/call.py"),
    Interface("comfy.context_windows.IndexListContextHandler.context_length", "runtime/memory.py"),
    Interface("comfy.context_windows.IndexListContextHandler.dim", "runtime/memory.py"),
)
"""Methods, attributes and parameters of objects that the pack is given, or that call it."""

_UNET, _ATTENTION = "comfy/ldm/modules/diffusionmodules/openaimodel.py", "comfy/ldm/modules/attention.py"

TEXTS = (
    *_texts("comfy/samplers.py", "runtime/reading.py", "cond_or_uncond uuids"),
    *_texts("comfy/samplers.py", "prompts/options.py, which checks the number of images with it", "noise"),
    *_texts(_ATTENTION, "runtime/run.py", "attn2_patch"),
    *_texts(
        "comfy_extras/nodes_photomaker.py",
        "nodes/photomaker.py",
        "id_pixel_values prompt_embeds class_tokens_mask",
    ),
    *_texts("comfy/samplers.py", "runtime/", "transformer_options model_conds area uuid"),
    *_texts("comfy/model_base.py", "runtime/conditionings.py", "c_crossattn"),
    *_texts(
        "comfy/samplers.py",
        "runtime/run.py, for functions of other nodes around the call",
        "model_function_wrapper input timestep c",
        otherwise="no such wrapper can be set",
    ),
    *_texts("comfy/samplers.py", _RUN, "model_options"),
    *_texts("comfy/patcher_extension.py", _RUN, "wrappers"),
    *_texts("comfy/patcher_extension.py", _RUN, "sampler_sample calc_cond_batch apply_model"),
    *_texts("comfy/patcher_extension.py", "runtime/compiled.py", "diffusion_model"),
    *_texts("comfy/patcher_extension.py", "runtime/memory.py", "prepare_sampling"),
    *_texts("comfy/patcher_extension.py", "runtime/precompute.py", "outer_sample"),
    *_texts(_ATTENTION, _CALL, "patches_replace attn1 attn2 block block_index n_heads"),
    *_texts(_ATTENTION, "runtime/compiled.py", "dim_head attn_precision"),
    *_texts(_ATTENTION, "attention/storymaker.py, runtime/compiled.py", "activations_shape"),
    *_texts(_UNET, _CALL, "input middle output"),
    *_texts(_UNET, "runtime/patch.py", "output_block_patch patches"),
    *_texts(_UNET, "runtime/compiled.py", "original_shape transformer_index"),
    *_texts("comfy/context_windows.py", "runtime/reading.py", "context_window"),
    *_texts(
        "comfy/context_windows.py",
        "runtime/reading.py",
        "causal_anchor_index",
        otherwise="windows repeat no image",
        seen=("0.33.0",),
    ),
    *_texts("comfy/context_windows.py", "runtime/memory.py", "context_handler"),
    *_texts("comfy/sampler_helpers.py", "runtime/conditionings.py", "cross_attn model_conds uuid"),
    *_texts("comfy/samplers.py", "runtime/conditionings.py", "positive negative"),
    *_texts("comfy_extras/nodes_custom_sampler.py", "runtime/conditionings.py", "middle"),
    *_texts("comfy_extras/nodes_perpneg.py", "runtime/conditionings.py", "empty_negative_prompt"),
    *_texts(
        "comfy_api/torch_helpers/torch_compile.py",
        "runtime/run.py, runtime/sampling.py",
        "torch.compile torch_compile_kwargs",
    ),
    *_texts("comfy_api/torch_helpers/torch_compile.py", "runtime/compiled.py", "backend mode options dynamic"),
    *_texts("comfy/clip_vision.py", "nodes/pictures.py", "penultimate_hidden_states"),
    *_texts("comfy/clip_vision.py", "nodes/similarity.py", "image_embeds"),
    *_texts("comfy/supported_models_base.py", "nodes/demo.py", "num_head_channels"),
    *_texts("comfy/clip_model.py", "nodes/demo.py", "hidden_size"),
    *_texts("comfy_api/latest/_ui.py", "nodes/consistency.py, nodes/save_page.py", "images"),
    *_texts("comfy/cli_args.py", "nodes/save_page.py", "--disable-metadata"),
    *_texts("comfy/sd1_clip.py", "nodes/conditioning.py", "disable_weights"),
    *_texts("comfy/sdxl_clip.py", "nodes/conditioning.py", "g l"),
    *_texts("comfy/sd1_clip.py", "nodes/demo.py", "{}_model_config"),
    *_texts("nodes.py", "nodes/batches.py, nodes/story.py", "samples batch_index noise_mask"),
    *_texts("nodes.py", "nodes/conditioning.py", "pooled_output"),
    *_texts("nodes.py", "prompts/batches.py", "control"),
    *_texts("nodes.py", "__init__.py", "comfy_entrypoint WEB_DIRECTORY"),
    *_texts("folder_paths.py", "nodes/", "embeddings"),
    *_texts("app/custom_node_manager.py", "workflows/, locales/", "workflows locales nodeDefs.json"),
    *_texts("app/subgraph_manager.py", "subgraphs/", "*/subgraphs/*.json"),
)
"""Texts that both sides spell alike: keys, slots, options and folders."""
