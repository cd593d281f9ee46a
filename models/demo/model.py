"""The demo model: a tiny SDXL trained on the story world, and the expansion of its small file to SDXL's layers.

Blocks, transformer depths, context width 2048 and pooled width 2816 are SDXL's own (arXiv 2307.01952), so everything
that patches an SDXL UNet finds the same layers; only the channels are fewer. The file stores each text encoder in 128
dimensions, mapped here to SDXL's 768 and 1280 by an orthonormal basis, which preserves norms and singular values, and
one block per transformer, which is repeated to SDXL's depth. Host-free: the host builds its classes from these dicts
and loads these weights.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import Conv2d
from torch.nn.functional import pad

from ...prompts.tokens import END, START

FILE = Path(__file__).with_name("demo.safetensors")

WIDTH = HEIGHT = 192
"""Image size in pixels that the model is trained on; its pixel-art pixels are 8 wide."""
HEAD_CHANNELS = 32
UNET = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "channel_mult": [1, 2, 4],
    "num_res_blocks": [2, 2, 2],
    "transformer_depth": [0, 0, 2, 2, 10, 10],
    "transformer_depth_middle": 10,
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    "context_dim": 2048,
    "num_classes": "sequential",
    "adm_in_channels": 2816,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": True,
    "use_temporal_attention": False,
    "use_temporal_resblock": False,
    "use_checkpoint": False,
    "legacy": False,
}
CLIP_L = {"hidden_size": 768, "num_attention_heads": 12, "num_hidden_layers": 3, "intermediate_size": 128}
CLIP_G = {"hidden_size": 1280, "num_attention_heads": 20, "num_hidden_layers": 3, "intermediate_size": 128}
TOKENS = 49408

NARROW, NARROW_HEADS = 128, 2
"""Width and heads of each text encoder in training and in the file."""
ROW_NORM = {"l": 28.0, "g": 35.0}
"""Norm of a typical output row of each encoder at SDXL's widths, as in the real encoders."""
LATENT_GAIN = 2.0
LATENT_SCALE = 0.13025
"""SDXL's factor between the autoencoder's latents and the UNet's."""
LUMA = (0.299, 0.587, 0.114)


class DemoFileError(ValueError):
    """The demo's file is missing, damaged or of another kind. The message is one sentence for the user."""

    __module__ = "storyloom"  # ComfyUI shows the module before the message; otherwise it would be this file's path


@dataclass(frozen=True, eq=False)
class DemoWeights:
    """State dicts in float32 at SDXL's widths.

    unet        under the original SDXL names (`input_blocks.0.0.weight`), no prefix
    clip_l      under transformers' names (`text_model.embeddings...`)
    clip_g      as clip_l, with `text_projection.weight`
    vocabulary  the token ids that the model was trained on, sorted
    """

    unet: dict[str, Tensor]
    clip_l: dict[str, Tensor]
    clip_g: dict[str, Tensor]
    vocabulary: tuple[int, ...]


def load_weights(path: Path | None = None) -> DemoWeights:
    """Read the demo's file and expand it to SDXL's widths. path: default the file that ships with the pack.

    Raises DemoFileError.
    """
    path = path or FILE
    return DemoWeights(load_unet(path), load_encoder("l", path), load_encoder("g", path), load_vocabulary(path))


def load_unet(path: Path = FILE) -> dict[str, Tensor]:
    """`DemoWeights.unet` alone. Raises DemoFileError."""
    with _refusing(path):
        return _wide_unet({name.removeprefix("unet."): value for name, value in _read(path, "unet.").items()})


def load_encoder(which: str, path: Path = FILE) -> dict[str, Tensor]:
    """`DemoWeights.clip_l` (which: "l") or `clip_g` ("g") alone. Raises DemoFileError."""
    with _refusing(path):
        return _wide_encoder(_read(path, f"{which}.", "vocabulary"), which)


def load_vocabulary(path: Path = FILE) -> tuple[int, ...]:
    """`DemoWeights.vocabulary` alone. Raises DemoFileError."""
    with _refusing(path):
        return tuple(_read(path, "vocabulary")["vocabulary"].long().tolist())


@contextmanager
def _refusing(path: Path) -> Iterator[None]:
    try:
        yield
    except (KeyError, RuntimeError, IndexError) as error:
        raise DemoFileError(f"{path} is not a weights file of the demo model: {error}.") from error


def unknown_words(tokens: Iterable[int], spelling: Mapping[int, str], vocabulary: Container[int]) -> list[str]:
    """The words of a text that the model was not trained on, each once, in order.

    tokens: the text's token ids for CLIP-L, with or without start, end and padding. spelling: token id -> its letters,
    with "</w>" at the end of a word, as in the BPE vocabulary.
    """
    unknown: dict[str, None] = {}
    word, known = "", True
    for token in tokens:
        if token in (START, END):
            continue
        letters = spelling[token]
        word += letters.removesuffix("</w>")
        known = known and token in vocabulary
        if letters.endswith("</w>"):
            if not known:
                unknown[word] = None
            word, known = "", True
    return list(unknown)


def _read(path: Path, *parts: str) -> dict[str, Tensor]:
    """The tensors whose names begin with one of `parts`, in float32."""
    if not path.is_file():
        raise DemoFileError(f"The demo model's weights are missing: {path}. Install the pack again.")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name).float() for name in file.keys() if name.startswith(parts)}
    except (SafetensorError, OSError) as error:
        raise DemoFileError(
            f"The demo model's weights {path} are damaged ({error}). Install the pack again."
        ) from error


@cache
def basis(width: int) -> Tensor:
    """Orthonormal columns [width, 128]: cosines (DCT-II), each orthogonal to the constant vector.

    A layer norm at the full width therefore gets mean 0 and, up to a factor, the narrow vector's own norm.
    """
    frequencies = 1 + (width - 1) // NARROW * torch.arange(NARROW, dtype=torch.float64)
    places = torch.arange(width, dtype=torch.float64)[:, None] + 0.5
    return (math.sqrt(2 / width) * torch.cos(math.pi / width * places * frequencies)).float()


def depths_of_widths() -> dict[int, int]:
    """Channels -> transformer blocks per spatial transformer, 0 if there is none."""
    widths = (UNET["model_channels"] * mult for mult in UNET["channel_mult"])
    return dict(zip(widths, UNET["transformer_depth"][:: UNET["num_res_blocks"][0]], strict=True))


def _scale(which: str) -> float:
    return ROW_NORM[which] / math.sqrt(NARROW)


def _wide_unet(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """The stored UNet with SDXL's context and pooled widths, its transformer blocks repeated."""
    wide: dict[str, Tensor] = {}
    depths = depths_of_widths()
    for name, value in stored.items():
        if ".attn2.to_k." in name or ".attn2.to_v." in name:
            value = reading_text(value)
        elif name == "label_emb.0.0.weight":
            pooled = value @ basis(CLIP_G["hidden_size"]).T
            value = pad(pooled, (0, UNET["adm_in_channels"] - pooled.shape[1]))
        if ".transformer_blocks.0." in name:
            head = name.split(".transformer_blocks.0.")[0]
            for j in range(depths[stored[f"{head}.norm.weight"].shape[0]]):
                wide[name.replace(".transformer_blocks.0.", f".transformer_blocks.{j}.")] = value.clone()
        else:
            wide[name] = value
    return wide


def reading_text(matrix: Tensor) -> Tensor:
    """A matrix [rows, 2048] for text tokens at full width from one for narrow text tokens [rows, 256]."""
    halves = zip(matrix.split(NARROW, 1), ("l", "g"), (CLIP_L, CLIP_G), strict=True)
    return torch.cat([half @ basis(clip["hidden_size"]).T / _scale(which) for half, which, clip in halves], 1)


def _wide_encoder(stored: dict[str, Tensor], which: str) -> dict[str, Tensor]:
    """A stored text encoder at its full width. Every token outside the vocabulary gets the embedding for unknown."""
    numbers = CLIP_L if which == "l" else CLIP_G
    width, scale = numbers["hidden_size"], _scale(which)
    out, into = basis(width) * scale, basis(width).T / math.sqrt(width / NARROW)
    learnt = stored[f"{which}.embedding"] @ out.T
    embedding = learnt[-1].repeat(TOKENS, 1)
    embedding[stored["vocabulary"].long()] = learnt[:-1]
    ones, zeros = torch.ones(width), torch.zeros(width)
    wide = {
        "text_model.embeddings.token_embedding.weight": embedding,
        "text_model.embeddings.position_embedding.weight": stored[f"{which}.position"] @ out.T,
        "text_model.final_layer_norm.weight": ones,
        "text_model.final_layer_norm.bias": zeros,
    }
    if which == "g":
        wide["text_projection.weight"] = basis(width) @ into
    for i in range(numbers["num_hidden_layers"]):
        layer = f"text_model.encoder.layers.{i}."
        qkv, joined, fc1, fc2 = (stored[f"{which}.{part}.{i}"] for part in ("qkv", "out", "fc1", "fc2"))
        spare = width - NARROW  # attention dimensions beyond the stored ones are zero
        padded = {
            f"self_attn.{part}_proj": pad(each @ into, (0, 0, 0, spare))
            for part, each in zip("qkv", qkv.chunk(3), strict=True)
        }
        matrices = {
            **padded,
            "self_attn.out_proj": pad(out @ joined, (0, spare)),
            "mlp.fc1": fc1 @ into,
            "mlp.fc2": out @ fc2,
        }
        for name, matrix in matrices.items():
            wide[f"{layer}{name}.weight"] = matrix
            wide[f"{layer}{name}.bias"] = torch.zeros(len(matrix))
        for norm in ("layer_norm1", "layer_norm2"):
            wide[f"{layer}{norm}.weight"], wide[f"{layer}{norm}.bias"] = ones, zeros
    return wide


def to_latents(pictures: Tensor) -> Tensor:
    """UNet latents [B, 4, h, w] of pixel-art pictures uint8 [B, h, w, 3]: colours and brightness."""
    colours = pictures.permute(0, 3, 1, 2).float() / 255 - 0.5
    brightness = (colours * torch.tensor(LUMA).view(1, 3, 1, 1)).sum(1, keepdim=True)
    return torch.cat([colours, brightness], 1) * LATENT_GAIN


def to_pictures(latents: Tensor) -> Tensor:
    """Pixel-art pictures [B, h, w, 3] in 0..1 from UNet latents [B, 4, h, w]."""
    return (latents[:, :3] / LATENT_GAIN + 0.5).clamp(0, 1).permute(0, 2, 3, 1)


def decode(latents: Tensor) -> Tensor:
    """Images [B, 8h, 8w, 3] in 0..1 from UNet latents [B, 4, h, w]: each latent pixel becomes a square."""
    return to_pictures(latents).repeat_interleave(8, 1).repeat_interleave(8, 2)


def autoencoder() -> tuple[nn.Sequential, nn.Sequential]:
    """Encoder [B, 3, 8h, 8w] in 0..1 -> UNet latents [B, 4, h, w], and the decoder back.

    Neither is trained: the encoder averages squares of 8x8 pixels, the decoder draws such squares.
    """
    mix, unmix = Conv2d(3, 4, 1), Conv2d(4, 3, 1)
    identity, luma = torch.eye(3), torch.tensor(LUMA)
    with torch.no_grad():
        mix.weight[:] = LATENT_GAIN * torch.cat([identity, luma[None]])[..., None, None]
        mix.bias[:] = -0.5 * LATENT_GAIN
        unmix.weight[:] = pad(identity / LATENT_GAIN, (0, 1))[..., None, None]
        unmix.bias[:] = 0.5
    encoder = nn.Sequential(nn.AvgPool2d(8), mix)
    decoder = nn.Sequential(unmix, nn.Upsample(scale_factor=8, mode="nearest"))
    return encoder.requires_grad_(False), decoder.requires_grad_(False)
