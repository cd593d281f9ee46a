"""CLIP through open_clip: image and text features for CLIP-I and CLIP-T.

open_clip_torch is optional and imported when a CLIP is loaded. Files are read without executing anything in them, and
nothing is downloaded unless requested.
"""

from __future__ import annotations

import json
import logging
import os
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ..models.files import read_weights
from ..models.storymaker.crops import to_pixels
from .encoders import AGAIN, BATCH, SimilarityError, reason

log = logging.getLogger(__name__)

CONFIG = "open_clip_config.json"
"""A file next to the weights in open_clip's repositories, with the image preparation and the activation."""
PREPARATION = ("mean", "std", "interpolation", "resize_mode")
"""Settings of the image preparation that are read from open_clip."""

Progress = Callable[[int, int], None]


class OpenClip:
    """An open_clip model, on the device of `network`.

    prepare: open_clip's own transform of a Pillow image; tokenize: list of texts -> [N, 77] token ids.
    """

    def __init__(self, name: str, network: nn.Module, prepare: Callable, tokenize: Callable) -> None:
        self.name, self.network = name, network
        self._prepare, self._tokenize = prepare, tokenize

    def images(self, pictures: Tensor) -> Tensor:
        """Features [N, D] of images [N, H, W, 3 or 4] in 0..1; transparency becomes white."""

        def prepared(part: Tensor) -> Tensor:
            return torch.stack([self._prepare(Image.fromarray(to_pixels(picture))) for picture in part])

        return self._batches(self.network.encode_image, pictures, prepared)

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Features [N, D]. Texts are truncated at the encoder's limit, with a warning in the log."""
        tokens = self._tokenize(list(texts))
        full = int((tokens[:, -1] != 0).sum())
        if full:
            log.warning(
                "%s reads %d tokens: %d of %d texts fill or exceed that.", self.name, len(tokens[0]), full, len(texts)
            )
        return self._batches(self.network.encode_text, tokens, lambda part: part)

    @torch.inference_mode()
    def _batches(self, encode: Callable, inputs: Tensor, prepared: Callable[[Tensor], Tensor]) -> Tensor:
        device = next(self.network.parameters()).device
        batches = [encode(prepared(part).to(device)).float().cpu() for part in inputs.split(BATCH)]
        features = torch.cat(batches).clone()
        if not features.isfinite().all():
            raise SimilarityError(f"{self.name} returned NaN or infinity because its weights are damaged: {AGAIN}.")
        return features


def load_open_clip(
    architecture: str,
    weights: str | Path,
    device: str | torch.device = "cpu",
    cache_dir: str | Path | None = None,
    download: bool = False,
    progress: Progress | None = None,
) -> OpenClip:
    """Load a CLIP.

    architecture  an open_clip name with open_clip's own tokenizer: "ViT-B-32-quickgelu"
    weights       a file (safetensors, or a PyTorch file of tensors), or one of open_clip's tags ("openai"), whose file
                  must be in the cache unless `download` is true. An open_clip_config.json next to the file sets the
                  image preparation.
    cache_dir     where tags are looked up and downloaded to; None: the Hugging Face cache and ~/.cache/clip
    progress      called as progress(done, total) during loading
    Raises SimilarityError if open_clip, the architecture or the file is missing, or if the file is damaged, contains
    code or belongs to another architecture.
    """
    open_clip = _open_clip()
    report = progress or (lambda done, total: None)
    steps = 4
    config = _config(open_clip, architecture)
    report(1, steps)
    path, preparation, quick = _locate(open_clip, architecture, weights, cache_dir, download)
    if quick is not None and quick != bool(config.get("quick_gelu", False)):
        other = architecture.removesuffix("-quickgelu") + ("-quickgelu" if quick else "")
        raise SimilarityError(
            f'The weights "{weights}" need the activation of {other}; with {architecture} every result would be wrong: '
            f"choose {other}."
        )
    report(2, steps)
    state = _state(path)
    report(3, steps)
    network = _network(open_clip, config).train(False).requires_grad_(False)
    _fill(network, state, architecture, path)
    settings = {"size": network.visual.image_size, **preparation}
    prepare = open_clip.transform.image_transform_v2(open_clip.transform.PreprocessCfg(**settings), is_train=False)
    name = weights if not Path(weights).is_file() else Path(weights).name
    encoder = OpenClip(
        f"{architecture} ({name})", network.float().to(device), prepare, open_clip.get_tokenizer(architecture)
    )
    report(4, steps)
    return encoder


def _open_clip() -> Any:
    try:
        import open_clip
    except ImportError as error:
        raise SimilarityError(
            f"CLIP needs open_clip_torch, which cannot be imported ({error}): run 'pip install open_clip_torch' with "
            "the Python that runs this."
        ) from error
    return open_clip


def _config(open_clip: Any, architecture: str) -> Mapping[str, Any]:
    """An architecture's settings. Raises SimilarityError if it is unknown or would need further files."""
    config = open_clip.get_model_config(architecture) if architecture in open_clip.list_models() else None
    if config is None:
        raise SimilarityError(
            f'open_clip has no architecture "{architecture}": choose another, such as ViT-B-32-quickgelu.'
        )
    text = config["text_cfg"]
    if {"hf_model_name", "hf_tokenizer_name"} & text.keys() or "siglip" in architecture.lower():
        raise SimilarityError(
            f"{architecture} downloads its tokenizer: choose an architecture that uses open_clip's own, such as "
            "ViT-B-32-quickgelu."
        )
    if "multimodal_cfg" in config:
        raise SimilarityError(f"{architecture} is a captioning model: choose a plain CLIP, such as ViT-B-32-quickgelu.")
    return config


def _network(open_clip: Any, config: Mapping[str, Any]) -> nn.Module:
    """An architecture's network with random weights."""
    parts = {name: value for name, value in config.items() if name != "custom_text"}
    parts["vision_cfg"] = {**parts["vision_cfg"], "timm_model_pretrained": False}
    return (open_clip.CustomTextCLIP if config.get("custom_text") else open_clip.CLIP)(**parts)


def _locate(
    open_clip: Any, architecture: str, weights: str | Path, cache_dir: str | Path | None, download: bool
) -> tuple[Path, dict[str, Any], bool | None]:
    """The file with the weights, its image preparation, and whether it needs QuickGELU (None if unknown)."""
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    path = Path(weights)
    if path.is_file():
        return path, *_beside(path)
    if str(weights) not in tags:
        offered = f"{architecture} has the tags {', '.join(tags)}" if tags else f"{architecture} has no tags"
        raise SimilarityError(f'There is no file "{weights}": choose an existing one. {offered}.')
    pretrained = open_clip.get_pretrained_cfg(architecture, str(weights))
    preparation = {name: pretrained[name] for name in PREPARATION if name in pretrained}
    cached = _cached(pretrained, cache_dir)
    if cached is None and not download:
        raise SimilarityError(
            f"The weights {weights} of {architecture} are not in {_places(pretrained, cache_dir)}: allow the download, "
            f"or get the file from {_source(pretrained)} and choose it."
        )
    if cached is None:
        try:
            cached = Path(open_clip.download_pretrained(pretrained, cache_dir=cache_dir and str(cache_dir)))
        except Exception as error:  # a download fails in many ways
            raise SimilarityError(f"{weights} of {architecture} could not be downloaded ({reason(error)}).") from error
    return cached, preparation, bool(pretrained.get("quick_gelu", False))


def _cached(pretrained: Mapping[str, Any], cache_dir: str | Path | None) -> Path | None:
    """The cached file of a tag's weights, or None. pretrained: open_clip's settings for the tag."""
    folder = None if cache_dir is None else str(cache_dir)
    if pretrained.get("hf_hub"):
        from huggingface_hub import try_to_load_from_cache

        repository, name = os.path.split(pretrained["hf_hub"])
        names = ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"]
        if name:
            names = [f"{Path(name).stem}.safetensors", name] if name.endswith((".bin", ".pth")) else [name]
        for each in names:
            path = try_to_load_from_cache(repository, each, cache_dir=folder)
            if isinstance(path, str):
                return Path(path)
    elif pretrained.get("url"):
        path = Path(folder or os.path.expanduser("~/.cache/clip")) / os.path.basename(pretrained["url"])
        return path if path.is_file() else None
    return None


def _places(pretrained: Mapping[str, Any], cache_dir: str | Path | None) -> str:
    if cache_dir is not None:
        return f"{cache_dir}"
    return "the Hugging Face cache" if pretrained.get("hf_hub") else "~/.cache/clip"


def _source(pretrained: Mapping[str, Any]) -> str:
    if pretrained.get("hf_hub"):
        return f"https://huggingface.co/{os.path.split(pretrained['hf_hub'])[0]}"
    return pretrained.get("url", "")


def _beside(path: Path) -> tuple[dict[str, Any], bool | None]:
    """Image preparation and QuickGELU from the configuration next to a file; {} and None if there is none."""
    config = path.with_name(CONFIG)
    if not config.is_file():
        return {}, None
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
        settings = content.get("preprocess_cfg", {})
        quick = content.get("model_cfg", {}).get("quick_gelu")
        preparation = {name: settings[name] for name in PREPARATION if name in settings}
    except (ValueError, AttributeError, TypeError) as error:
        raise SimilarityError(f'"{config}" is not an open_clip configuration ({reason(error)}): remove it.') from error
    return preparation, quick


def _state(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name."""
    if _is_torchscript(path):
        raise SimilarityError(
            f'"{path}" is a TorchScript archive, as OpenAI published CLIP: it contains a program besides the weights, '
            "so it was not opened. Use open_clip_model.safetensors from https://huggingface.co/timm instead, for "
            "example from timm/vit_base_patch32_clip_224.openai."
        )
    content = read_weights(path, SimilarityError, "choose an existing file", AGAIN)
    state = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise SimilarityError(f'"{path}" contains something other than weights: {AGAIN}.')
    return {str(name).removeprefix("module."): value for name, value in state.items()}


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _fill(network: nn.Module, state: dict[str, Tensor], architecture: str, path: Path) -> None:
    """Load a file's tensors into a network. Raises SimilarityError unless names and shapes match and all are finite."""
    own = network.state_dict()
    state = {name: value for name, value in state.items() if name in own or not name.endswith("position_ids")}
    if "logit_scale" in own and "logit_scale" in state:
        state["logit_scale"] = state["logit_scale"].reshape(own["logit_scale"].shape)
    missing, unknown = own.keys() - state.keys(), state.keys() - own.keys()
    shapes = [name for name in own.keys() & state.keys() if own[name].shape != state[name].shape]
    if missing or unknown or shapes:
        faults = (("missing", missing), ("unknown", unknown), ("of another shape", shapes))
        summary = "; ".join(f"{len(names)} {fault}, such as {min(names)}" for fault, names in faults if names)
        raise SimilarityError(
            f'"{path}" is not {architecture} (tensors: {summary}): choose the architecture that the file belongs to.'
        )
    for name, value in state.items():
        if not value.isfinite().all():
            raise SimilarityError(f'"{path}" contains NaN or infinity in {name}: {AGAIN}.')
    network.load_state_dict(state)
