"""Putting StoryLoom's patches onto a ComfyUI MODEL."""

from __future__ import annotations

from comfy.ldm.modules import attention as comfy_attention

from ..attention import sampling
from ..attention.blocks import Blocks, choose_blocks
from ..attention.sampling import Patch


def with_patch(model, patch: Patch):
    """A clone of `model` that carries `patch` to its sampling runs, beside the patches that it carries already."""
    return sampling.with_patch(model, patch, attend)


def blocks_of(model, text: str) -> Blocks:
    """The blocks of `model` that a block string names. Raises ValueError when it is not a UNet or has no such block."""
    return choose_blocks(text, attention_depths(model))


def attention_depths(model) -> dict[tuple[str, int], int]:
    """Number of attention layers of every block of a UNet that has any. Raises ValueError for other networks."""
    unet = model.get_model_object("diffusion_model")
    parts = {
        "input": getattr(unet, "input_blocks", ()),
        "middle": [getattr(unet, "middle_block", None) or ()],
        "output": getattr(unet, "output_blocks", ()),
    }
    depths = {
        (part, number): sum(len(getattr(layer, "transformer_blocks", ())) for layer in block)
        for part, blocks in parts.items()
        for number, block in enumerate(blocks)
    }
    depths = {key: depth for key, depth in depths.items() if depth}
    if not depths:
        raise _not_a_unet(model, "with attention blocks")
    return depths


def attention_widths(model) -> tuple[dict[tuple[str, int, int], int], int]:
    """Channels of every cross-attention layer of a UNet, and the width of the text that they look at.

    Raises ValueError for other networks.
    """
    unet, widths, contexts = model.get_model_object("diffusion_model"), {}, set()
    for part, number in attention_depths(model):
        block = unet.middle_block if part == "middle" else getattr(unet, f"{part}_blocks")[number]
        layers = [layer for each in block for layer in getattr(each, "transformer_blocks", ())]
        for index, layer in enumerate(layers):
            widths[part, number, index] = layer.attn2.to_k.out_features
            contexts.add(layer.attn2.to_k.in_features)
    return widths, max(contexts)


def lowest_stages(model) -> tuple[range, range]:
    """Output blocks of a UNet at its lowest resolution, and at the next. Raises ValueError for other networks."""
    unet = model.get_model_object("diffusion_model")
    if not hasattr(unet, "output_blocks"):
        raise _not_a_unet(model, "with output blocks")
    upper, lowest = (blocks + 1 for blocks in unet.num_res_blocks[-2:])
    return range(lowest), range(lowest, lowest + upper)


def _not_a_unet(model, wanted: str) -> ValueError:
    return ValueError(
        f"This model ({type(model.model).__name__}) is not a UNet {wanted}. "
        "StoryLoom's model patches work on SDXL and its relatives (refiner, SSD-1B, Vega) and on SD 1.5."
    )


def attend(q, k, v, heads, mask, options):
    """The attention that ComfyUI itself would run at this layer; looked up late, since other packs exchange it."""
    kernel = comfy_attention.optimized_attention if mask is None else comfy_attention.optimized_attention_masked
    precision = options.get("attn_precision")
    return kernel(q, k, v, heads, mask=mask, attn_precision=precision, transformer_options=options)
