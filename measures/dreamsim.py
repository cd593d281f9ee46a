"""DreamSim (arXiv 2306.09344), a perceptual distance, through its own package.

The package is optional and imported when DreamSim is loaded. Nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from ..models.storymaker.crops import to_pixels
from .encoders import AGAIN, BATCH, SimilarityError, reason

_DINO = ("dino_vitb16_pretrain.pth", "facebookresearch_dino_main/hubconf.py", "checkpoints/dino_vitbase16_pretrain.pth")
DREAMSIM_FILES = {
    "ensemble": (*_DINO, "clip_vitb16_pretrain.pth.tar", "open_clip_vitb16_pretrain.pth.tar", "ensemble_lora"),
    "dino_vitb16": (*_DINO, "dino_vitb16_single_lora"),
    "clip_vitb32": ("clip_vitb32_pretrain.pth.tar", "clip_vitb32_single_lora"),
    "open_clip_vitb32": ("open_clip_vitb32_pretrain.pth.tar", "open_clip_vitb32_single_lora"),
}
"""Files in the package's folder for each kind after its download. ensemble is the published one."""


class DreamSim:
    """DreamSim (arXiv 2306.09344), a perceptual distance: 0 for equal images, lower means more similar.

    network: on any device; its `embed` maps images [N, 3, 224, 224] to features [N, D], whose cosine distance is
    DreamSim; prepare: a Pillow image -> [1, 3, 224, 224].
    """

    def __init__(self, name: str, network: nn.Module, prepare: Callable) -> None:
        self.name, self.network, self._prepare = name, network, prepare

    @torch.inference_mode()
    def distance(self, images: Tensor) -> Tensor:
        """Distances [N, N], float64 on the CPU, of images [N, H, W, 3] in 0..1; 0 on the diagonal."""
        features, device = [], next(self.network.parameters()).device
        for part in images.split(BATCH):
            prepared = torch.cat([self._prepare(Image.fromarray(to_pixels(picture))) for picture in part])
            features.append(self.network.embed(prepared.to(device)).reshape(len(part), -1).cpu().double())
        unit = nn.functional.normalize(torch.cat(features), dim=1)
        return (1 - unit @ unit.T).fill_diagonal_(0).clone()


def load_dreamsim(kind: str, cache_dir: str | Path, device: str | torch.device = "cpu") -> DreamSim:
    """Load DreamSim through its own package. kind: a key of DREAMSIM_FILES; cache_dir: the package's weights folder.

    Raises SimilarityError if the package or one of its files is missing; nothing is downloaded.
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
    except Exception as error:  # damaged files make the package raise all kinds of errors
        raise SimilarityError(f"DreamSim cannot read its weights in {folder} ({reason(error)}): {AGAIN}.") from error
    finally:
        torch.hub.set_dir(hub)  # the package changes it
    return DreamSim(f"DreamSim {kind}", model, prepare)
