"""What patches need from ComfyUI: the blocks of a MODEL and the attention function."""

from __future__ import annotations

from collections.abc import Iterable

from comfy.ldm.modules import attention as comfy_attention
from comfy.ldm.modules.diffusionmodules.openaimodel import Downsample, Upsample

from ..runtime.blocks import Blocks, choose_blocks
from ..runtime.memory import Level


def blocks_of(model, text: str) -> Blocks:
    """The blocks of `model` selected by a block string. Raises ValueError if it is not a UNet or lacks such a block."""
    return choose_blocks(text, attention_depths(model))


def attention_depths(model) -> dict[tuple[str, int], int]:
    """Number of attention layers in every UNet block with attention. Raises ValueError for other networks."""
    return {key: len(transformers) for key, transformers in _transformers(model).items()}


def attention_widths(model) -> tuple[dict[tuple[str, int, int], int], int]:
    """Channels of every cross-attention layer of a UNet, and the width of the context.

    Raises ValueError for other networks.
    """
    layers = {
        (*key, index): transformer.attn2.to_k
        for key, transformers in _transformers(model).items()
        for index, transformer in enumerate(transformers)
    }
    widths = {key: layer.out_features for key, layer in layers.items()}
    return widths, max(layer.in_features for layer in layers.values())


def attention_levels(model, blocks: Iterable[tuple[str, int]]) -> tuple[Level, ...]:
    """Resolutions and widths of the self-attention in these blocks of a UNet."""
    transformers, levels, halvings = _transformers(model), {}, 0
    for block, layers in _blocks(model).items():
        if block in transformers:
            levels[block] = Level(transformers[block][0].attn1.to_k.out_features, halvings)
        halvings += sum(isinstance(layer, Downsample) for layer in layers)
        halvings -= sum(isinstance(layer, Upsample) for layer in layers)
    return tuple(dict.fromkeys(levels[block] for block in blocks))


def _transformers(model) -> dict[tuple[str, int], list]:
    """The transformer blocks in every UNet block with attention. Raises ValueError for other networks."""
    every = {
        block: [transformer for layer in layers for transformer in getattr(layer, "transformer_blocks", ())]
        for block, layers in _blocks(model).items()
    }
    with_attention = {key: transformers for key, transformers in every.items() if transformers}
    if not with_attention:
        raise _not_a_unet(model, "with attention blocks")
    return with_attention


def _blocks(model) -> dict[tuple[str, int], Iterable]:
    """The layers of every UNet block, in execution order; empty for other networks."""
    unet = model.get_model_object("diffusion_model")
    parts = {
        "input": getattr(unet, "input_blocks", ()),
        "middle": [getattr(unet, "middle_block", None) or ()],
        "output": getattr(unet, "output_blocks", ()),
    }
    return {(part, number): layers for part, blocks in parts.items() for number, layers in enumerate(blocks)}


def lowest_stages(model) -> tuple[range, range]:
    """Output blocks of a UNet at its lowest resolution, and at the next. Raises ValueError for other networks."""
    unet = model.get_model_object("diffusion_model")
    if not hasattr(unet, "output_blocks"):
        raise _not_a_unet(model, "with output blocks")
    upper, lowest = (blocks + 1 for blocks in unet.num_res_blocks[-2:])
    return range(lowest), range(lowest, lowest + upper)


def _not_a_unet(model, requirement: str) -> ValueError:
    return ValueError(
        f"This model ({type(model.model).__name__}) is not a UNet {requirement}. "
        "StoryLoom's model patches work on SDXL and its relatives (refiner, SSD-1B, Vega) and on SD 1.5."
    )


def attend(q, k, v, heads, mask, options):
    """ComfyUI's own attention at this layer; looked up at call time, since other packs may replace it."""
    kernel = comfy_attention.optimized_attention if mask is None else comfy_attention.optimized_attention_masked
    precision = options.get("attn_precision")
    return kernel(q, k, v, heads, mask=mask, attn_precision=precision, transformer_options=options)
