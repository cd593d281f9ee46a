"""SDXL's UNet in diffusers, built from the original code's config and with its parameter names.

`input_blocks.4.1` in ComfyUI, LoRA files and single-file checkpoints is `down_blocks.1.attentions.0` in diffusers. The
names are translated by diffusers' own conversion, called with names instead of weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

PREFIX = "model.diffusion_model."


def build_unet(numbers: Mapping[str, Any], head_channels: int):
    """A `diffusers.UNet2DConditionModel` with SDXL's blocks, freshly initialised.

    numbers: as in `models.demo.model.UNET`; head_channels: channels of one attention head. Raises ValueError for a
    layout that diffusers cannot build, such as transformer depths that differ within a resolution.
    """
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel.from_config(unet_config(numbers, head_channels))


def unet_config(numbers: Mapping[str, Any], head_channels: int) -> dict[str, Any]:
    """The config of `diffusers.UNet2DConditionModel` for numbers in the original layout."""
    channels = [numbers["model_channels"] * mult for mult in numbers["channel_mult"]]
    depths = _level_depths(numbers)
    down = ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths]
    up = ["CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(depths)]
    return {
        "sample_size": 128,
        "in_channels": numbers["in_channels"],
        "out_channels": numbers["out_channels"],
        "block_out_channels": channels,
        "down_block_types": down,
        "up_block_types": up,
        "layers_per_block": numbers["num_res_blocks"][0],
        "transformer_layers_per_block": [max(depth, 1) for depth in depths],
        "attention_head_dim": [width // head_channels for width in channels],  # diffusers' name for the head count
        "cross_attention_dim": numbers["context_dim"],
        "use_linear_projection": numbers["use_linear_in_transformer"],
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": numbers["adm_in_channels"],
    }


def unet_numbers(config: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of the original layout, as far as `diffusers_names` needs them, from a diffusers UNet's config."""
    layers, widths = config["layers_per_block"], config["block_out_channels"]
    depths = config["transformer_layers_per_block"]
    depths = [depths] * len(widths) if isinstance(depths, int) else depths
    depths = [depth * kind.startswith("Cross") for depth, kind in zip(depths, config["down_block_types"], strict=True)]
    return {
        "model_channels": widths[0],
        "channel_mult": [width / widths[0] for width in widths],
        "num_res_blocks": [layers] * len(widths),
        "transformer_depth": [depth for depth in depths for _ in range(layers)],
        "transformer_depth_middle": depths[-1],
        "transformer_depth_output": [depth for depth in depths for _ in range(layers + 1)],
        "in_channels": config["in_channels"],
        "out_channels": config["out_channels"],
        "context_dim": config["cross_attention_dim"],
        "use_linear_in_transformer": config["use_linear_projection"],
        "adm_in_channels": config["projection_class_embeddings_input_dim"],
    }


def diffusers_names(numbers: Mapping[str, Any]) -> dict[str, str]:
    """Name of every parameter in the original code -> its name in diffusers."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    originals = list(_original_names(numbers))
    config = unet_config(numbers, head_channels=numbers["model_channels"])
    converted = convert_ldm_unet_checkpoint({PREFIX + name: name for name in originals}, config)
    names = {original: name for name, original in converted.items()}
    return {original: names[original] for original in originals}


def to_diffusers(state_dict: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> dict[str, Tensor]:
    """Weights in the original layout, without prefix, under diffusers' names. Raises KeyError for a missing weight."""
    return {name: state_dict[original] for original, name in diffusers_names(numbers).items()}


def _level_depths(numbers: Mapping[str, Any]) -> list[int]:
    """Transformer blocks per layer at each resolution, finest first. Raises ValueError as `build_unet` does."""
    levels, layers = len(numbers["channel_mult"]), numbers["num_res_blocks"][0]
    depths = [numbers["transformer_depth"][level * layers] for level in range(levels)]
    if (
        set(numbers["num_res_blocks"]) != {layers}
        or list(numbers["transformer_depth"]) != [depth for depth in depths for _ in range(layers)]
        or list(numbers["transformer_depth_output"]) != [depth for depth in depths for _ in range(layers + 1)]
        or numbers["transformer_depth_middle"] != depths[-1]
        or numbers["channel_mult"][0] != 1
    ):
        raise ValueError(
            "diffusers builds UNets with one transformer depth and one number of residual blocks per resolution and "
            f"channel_mult starting at 1, got depths {numbers['transformer_depth']}, middle "
            f"{numbers['transformer_depth_middle']}, output {numbers['transformer_depth_output']}, residual blocks "
            f"{numbers['num_res_blocks']}, channel_mult {numbers['channel_mult']}."
        )
    return depths


def _original_names(numbers: Mapping[str, Any]) -> Iterator[str]:
    depths, layers = _level_depths(numbers), numbers["num_res_blocks"][0]
    mult, last = numbers["channel_mult"], len(depths) - 1
    yield from _affine("time_embed.0", "time_embed.2", "label_emb.0.0", "label_emb.0.2", "input_blocks.0.0")

    number, width = 1, 1
    widths = [1]  # of the skip connections, in model_channels
    for level, depth in enumerate(depths):
        for _ in range(layers):
            yield from _residual(f"input_blocks.{number}.0", width != mult[level])
            yield from _transformer(f"input_blocks.{number}.1", depth)
            number, width = number + 1, mult[level]
            widths.append(width)
        if level != last:
            yield from _affine(f"input_blocks.{number}.0.op")
            number += 1
            widths.append(width)

    yield from _residual("middle_block.0", False)
    yield from _transformer("middle_block.1", depths[-1])
    yield from _residual("middle_block.2", False)

    number = 0
    for level in range(last, -1, -1):
        for layer in range(layers + 1):
            yield from _residual(f"output_blocks.{number}.0", width + widths.pop() != mult[level])
            yield from _transformer(f"output_blocks.{number}.1", depths[level])
            if level and layer == layers:
                yield from _affine(f"output_blocks.{number}.{2 if depths[level] else 1}.conv")
            number, width = number + 1, mult[level]
    yield from _affine("out.0", "out.2")


def _residual(name: str, changes_width: bool) -> Iterator[str]:
    parts = ["in_layers.0", "in_layers.2", "emb_layers.1", "out_layers.0", "out_layers.3"]
    yield from _affine(*(f"{name}.{part}" for part in parts + ["skip_connection"] * changes_width))


def _transformer(name: str, depth: int) -> Iterator[str]:
    if not depth:
        return
    yield from _affine(f"{name}.norm", f"{name}.proj_in", f"{name}.proj_out")
    for block in (f"{name}.transformer_blocks.{j}" for j in range(depth)):
        yield from (f"{block}.{attn}.to_{part}.weight" for attn in ("attn1", "attn2") for part in "qkv")
        affine = ("attn1.to_out.0", "attn2.to_out.0", "ff.net.0.proj", "ff.net.2", "norm1", "norm2", "norm3")
        yield from _affine(*(f"{block}.{part}" for part in affine))


def _affine(*names: str) -> Iterator[str]:
    yield from (f"{name}.{part}" for name in names for part in ("weight", "bias"))
