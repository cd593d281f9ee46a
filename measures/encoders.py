"""Encoders that tell how alike pictures are, and how well they fit a text: CLIP through open_clip, and DreamSim.

open_clip_torch and dreamsim are optional and imported when one is loaded. Files are read without executing anything in
them, and nothing is downloaded unless asked.
"""

from __future__ import annotations

import json
import logging
import os
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor, nn

from ..models.files import read_weights
from ..models.storymaker.crops import to_pixels

log = logging.getLogger(__name__)

BATCH = 16
"""Pictures and texts that go through a network at a time."""
AGAIN = "download it again, or choose another"
CONFIG = "open_clip_config.json"
"""A file that open_clip's repositories have beside the weights: how pictures are prepared, and which activation."""
_DINO = ("dino_vitb16_pretrain.pth", "facebookresearch_dino_main/hubconf.py", "checkpoints/dino_vitbase16_pretrain.pth")
DREAMSIM_FILES = {
    "ensemble": (*_DINO, "clip_vitb16_pretrain.pth.tar", "open_clip_vitb16_pretrain.pth.tar", "ensemble_lora"),
    "dino_vitb16": (*_DINO, "dino_vitb16_single_lora"),
    "clip_vitb32": ("clip_vitb32_pretrain.pth.tar", "clip_vitb32_single_lora"),
    "open_clip_vitb32": ("open_clip_vitb32_pretrain.pth.tar", "open_clip_vitb32_single_lora"),
}
"""What the package's folder holds for each kind once it has downloaded it. ensemble is the published one."""

Progress = Callable[[int, int], None]


class SimilarityError(ValueError):
    """An encoder cannot be had; the message is one sentence for the user."""


class Encoder(Protocol):
    """Says of pictures and of texts where they lie in one space.

    name: what it is, for reports. May also have image_label, text_label, conventions and images_for, see
    `measures.consistency.measure`.
    """

    name: str

    def images(self, pictures: Tensor) -> Tensor:
        """Features [N, D], float32 on the CPU, of pictures [N, H, W, 3] in 0..1."""

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Features [N, D], float32 on the CPU."""


class OpenClip:
    """A CLIP of open_clip's on whatever device `network` lies.

    prepare: open_clip's own transform of a Pillow image; tokenize: list of texts -> [N, 77] token ids.
    """

    def __init__(self, name: str, network: nn.Module, prepare: Callable, tokenize: Callable) -> None:
        self.name, self.network = name, network
        self._prepare, self._tokenize = prepare, tokenize

    def images(self, pictures: Tensor) -> Tensor:
        """Features [N, D] of pictures [N, H, W, 3 or 4] in 0..1; transparency shows white."""

        def prepared(part: Tensor) -> Tensor:
            return torch.stack([self._prepare(Image.fromarray(to_pixels(picture))) for picture in part])

        return self._batches(self.network.encode_image, pictures, prepared)

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Features [N, D]. What exceeds the encoder's tokens does not count, with a warning in the log."""
        tokens = self._tokenize(list(texts))
        cut = int((tokens[:, -1] != 0).sum())
        if cut:
            log.warning(
                "%s reads %d tokens: %d of %d texts fill or exceed that.", self.name, len(tokens[0]), cut, len(texts)
            )
        return self._batches(self.network.encode_text, tokens, lambda part: part)

    @torch.inference_mode()
    def _batches(self, encode: Callable, inputs: Tensor, prepared: Callable[[Tensor], Tensor]) -> Tensor:
        device = next(self.network.parameters()).device
        found = [encode(prepared(part).to(device)).float().cpu() for part in inputs.split(BATCH)]
        features = torch.cat(found).clone()
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

    architecture  of open_clip's own with its own tokenizer: "ViT-B-32-quickgelu"
    weights       a file (safetensors, or a PyTorch file of tensors), or one of open_clip's tags ("openai"), whose file
                  must lie in the cache unless `download`. Of a file's neighbour open_clip_config.json, where there is
                  one, the preparation of pictures is taken.
    cache_dir     where tags are looked for and downloaded to; None: the Hugging Face cache and ~/.cache/clip
    progress      called as progress(done, total) in steps of loading
    Raises SimilarityError when open_clip, the architecture or the file is missing, the file is damaged, holds code or
    belongs to another architecture.
    """
    open_clip = _open_clip()
    told = progress or (lambda done, total: None)
    steps = 4
    config = _config(open_clip, architecture)
    told(1, steps)
    path, prepared, quick = _found(open_clip, architecture, weights, cache_dir, download)
    if quick is not None and quick != bool(config.get("quick_gelu", False)):
        other = architecture.removesuffix("-quickgelu") + ("-quickgelu" if quick else "")
        raise SimilarityError(
            f'The weights "{weights}" need the activation of {other}; with {architecture} every result would be wrong: '
            f"choose {other}."
        )
    told(2, steps)
    state = _state(path)
    told(3, steps)
    network = _network(open_clip, config).eval().requires_grad_(False)
    _fill(network, state, architecture, path)
    settings = {"size": network.visual.image_size, **prepared}
    prepare = open_clip.transform.image_transform_v2(open_clip.transform.PreprocessCfg(**settings), is_train=False)
    name = weights if not Path(weights).is_file() else Path(weights).name
    encoder = OpenClip(
        f"{architecture} ({name})", network.float().to(device), prepare, open_clip.get_tokenizer(architecture)
    )
    told(4, steps)
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
    """An architecture's settings. Raises SimilarityError for one that is unknown or would need other files."""
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


def _found(
    open_clip: Any, architecture: str, weights: str | Path, cache_dir: str | Path | None, download: bool
) -> tuple[Path, dict[str, Any], bool | None]:
    """The file of some weights, how it wants pictures prepared, and whether it is for QuickGELU; None: not known."""
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    path = Path(weights)
    if path.is_file():
        return path, *_beside(path)
    if str(weights) not in tags:
        offered = f"{architecture} has the tags {', '.join(tags)}" if tags else f"{architecture} has no tags"
        raise SimilarityError(f'There is no file "{weights}": choose an existing one. {offered}.')
    told = open_clip.get_pretrained_cfg(architecture, str(weights))
    prepared = {name: told[name] for name in ("mean", "std", "interpolation", "resize_mode") if name in told}
    cached = _cached(told, cache_dir)
    if cached is None and not download:
        raise SimilarityError(
            f"The weights {weights} of {architecture} are not in {_places(told, cache_dir)}: allow the download, or "
            f"get the file from {_source(told)} and choose it."
        )
    if cached is None:
        try:
            cached = Path(open_clip.download_pretrained(told, cache_dir=cache_dir and str(cache_dir)))
        except Exception as error:  # whatever a network makes of it
            raise SimilarityError(f"{weights} of {architecture} could not be downloaded ({_reason(error)}).") from error
    return cached, prepared, bool(told.get("quick_gelu", False))


def _cached(told: Mapping[str, Any], cache_dir: str | Path | None) -> Path | None:
    """Where a tag's weights lie already. told: what open_clip knows of the tag."""
    folder = None if cache_dir is None else str(cache_dir)
    if told.get("hf_hub"):
        from huggingface_hub import try_to_load_from_cache

        repository, name = os.path.split(told["hf_hub"])
        names = ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"]
        if name:
            names = [f"{Path(name).stem}.safetensors", name] if name.endswith((".bin", ".pth")) else [name]
        for each in names:
            path = try_to_load_from_cache(repository, each, cache_dir=folder)
            if isinstance(path, str):
                return Path(path)
    elif told.get("url"):
        path = Path(folder or os.path.expanduser("~/.cache/clip")) / os.path.basename(told["url"])
        return path if path.is_file() else None
    return None


def _places(told: Mapping[str, Any], cache_dir: str | Path | None) -> str:
    if cache_dir is not None:
        return f"{cache_dir}"
    return "the Hugging Face cache" if told.get("hf_hub") else "~/.cache/clip"


def _source(told: Mapping[str, Any]) -> str:
    return f"https://huggingface.co/{os.path.split(told['hf_hub'])[0]}" if told.get("hf_hub") else told.get("url", "")


def _beside(path: Path) -> tuple[dict[str, Any], bool | None]:
    """How a file's neighbour says that pictures are prepared, and whether it is for QuickGELU. {}, None without one."""
    config = path.with_name(CONFIG)
    if not config.is_file():
        return {}, None
    try:
        told = json.loads(config.read_text(encoding="utf-8"))
        prepared = told.get("preprocess_cfg", {})
        quick = told.get("model_cfg", {}).get("quick_gelu")
        known = {name: prepared[name] for name in ("mean", "std", "interpolation", "resize_mode") if name in prepared}
    except (ValueError, AttributeError, TypeError) as error:
        raise SimilarityError(f'"{config}" is not an open_clip configuration ({_reason(error)}): remove it.') from error
    return known, quick


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
    """Give a network a file's tensors. Raises SimilarityError unless they are all of them, in their shapes, finite."""
    own = network.state_dict()
    state = {name: value for name, value in state.items() if name in own or not name.endswith("position_ids")}
    if "logit_scale" in own and "logit_scale" in state:
        state["logit_scale"] = state["logit_scale"].reshape(own["logit_scale"].shape)
    missing, unknown = own.keys() - state.keys(), state.keys() - own.keys()
    shapes = [name for name in own.keys() & state.keys() if own[name].shape != state[name].shape]
    if missing or unknown or shapes:
        faults = (("missing", missing), ("unknown", unknown), ("of another shape", shapes))
        told = "; ".join(f"{len(names)} {what}, such as {min(names)}" for what, names in faults if names)
        raise SimilarityError(
            f'"{path}" is not {architecture} (tensors: {told}): choose the architecture that the file belongs to.'
        )
    for name, value in state.items():
        if not value.isfinite().all():
            raise SimilarityError(f'"{path}" contains NaN or infinity in {name}: {AGAIN}.')
    network.load_state_dict(state)


class DreamSim:
    """DreamSim (arXiv 2306.09344), a perceptual distance: 0 for equal pictures, lower is more alike.

    network: its `embed` makes [N, D] of pictures [N, 3, 224, 224], on whatever device it lies, whose cosine distance
    DreamSim is; prepare: a Pillow image -> one of these pictures.
    """

    def __init__(self, name: str, network: nn.Module, prepare: Callable) -> None:
        self.name, self.network, self._prepare = name, network, prepare

    @torch.inference_mode()
    def distance(self, images: Tensor) -> Tensor:
        """Distances [N, N], float64 on the CPU, of pictures [N, H, W, 3] in 0..1; 0 on the diagonal."""
        found, device = [], next(self.network.parameters()).device
        for part in images.split(BATCH):
            shown = torch.cat([self._prepare(Image.fromarray(to_pixels(picture))) for picture in part])
            found.append(self.network.embed(shown.to(device)).reshape(len(part), -1).cpu().double())
        unit = nn.functional.normalize(torch.cat(found), dim=1)
        return (1 - unit @ unit.T).fill_diagonal_(0).clone()


def load_dreamsim(kind: str, cache_dir: str | Path, device: str | torch.device = "cpu") -> DreamSim:
    """DreamSim through its own package. kind: of DREAMSIM_FILES; cache_dir: the package's folder of weights.

    Raises SimilarityError when the package or one of its files is missing: nothing is downloaded.
    """
    if kind not in DREAMSIM_FILES:
        raise SimilarityError(f'DreamSim has no kind "{kind}": choose one of {", ".join(DREAMSIM_FILES)}.')
    try:
        import dreamsim
    except ImportError as error:
        raise SimilarityError(
            f"DreamSim needs its package, which cannot be imported ({error}): run 'pip install dreamsim' with the "
            "Python that runs this, or turn dreamsim off."
        ) from error
    folder = Path(cache_dir)
    missing = [name for name in DREAMSIM_FILES[kind] if not (folder / name).exists()]
    if missing:
        call = f"dreamsim(pretrained=True, device='cpu', cache_dir=r'{folder}', dreamsim_type='{kind}')"
        raise SimilarityError(
            f"DreamSim's weights are not in {folder} (missing: {', '.join(missing)}). To let the package download "
            f'them, run python -c "from dreamsim import dreamsim; {call}", or turn dreamsim off.'
        )
    hub = torch.hub.get_dir()
    try:
        model, prepare = dreamsim.dreamsim(
            pretrained=True, device=str(device), cache_dir=str(folder), dreamsim_type=kind
        )
    except Exception as error:  # whatever the package makes of damaged files
        raise SimilarityError(f"DreamSim cannot read its weights in {folder} ({_reason(error)}): {AGAIN}.") from error
    finally:
        torch.hub.set_dir(hub)  # the package moves it
    return DreamSim(f"DreamSim {kind}", model, prepare)


def _reason(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
