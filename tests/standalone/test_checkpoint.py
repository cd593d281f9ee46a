"""The scheduler and the checks of a single-file checkpoint. Whole files are loaded in tests/host."""

import pickle

import pytest
import torch
from safetensors.torch import save, save_file

from storyloom.standalone.checkpoint import load_checkpoint
from storyloom.standalone.sampling import ModelSampling

SDXL = ("model.diffusion_model.label_emb.0.0.weight", "conditioner.embedders.1.model.ln_final.weight")
KINDS = {"epsilon": (), "ztsnr alone": ("ztsnr",), "v": ("v_pred",), "v with zero snr": ("v_pred", "ztsnr")}


@pytest.fixture
def loaded(tmp_path, monkeypatch):
    """Load a checkpoint file with these empty tensors; only its scheduler is built."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    class Pipeline:
        def __init__(self, path, config, **kwargs):
            self.scheduler = EulerDiscreteScheduler.from_pretrained(config, subfolder="scheduler")

        def to(self, device):
            return self

    def load(*names):
        path = tmp_path / "model.safetensors"
        save_file({name: torch.zeros(1) for name in SDXL} | {name: torch.tensor([]) for name in names}, path)
        return load_checkpoint(path)

    monkeypatch.setattr(StableDiffusionXLPipeline, "from_single_file", Pipeline)
    return load


GOOD = save({name: torch.zeros(1) for name in SDXL})
DAMAGED = {
    "empty": b"",
    "half a header": GOOD[:20],
    "half the numbers": GOOD[:-2],
    "more than it says": GOOD + b"0000",
    "a header that claims a terabyte": (1 << 40).to_bytes(8, "little") + GOOD[8:],
    "a header that is no JSON": GOOD.replace(b"{", b"[", 1),
    "numbers that claim a place beyond the end": GOOD.replace(b"[0,4]", b"[0,9]"),
    "another number type": GOOD.replace(b'"F32"', b'"F99"'),
    "a pickle": pickle.dumps({name: [0.0] for name in SDXL}),
    "another model": save({SDXL[0]: torch.zeros(1)}),
    "of SDXL nothing but two names": GOOD,
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_what_is_no_checkpoint_is_refused_in_one_sentence(tmp_path, kind):
    path = tmp_path / "model.safetensors"
    path.write_bytes(DAMAGED[kind])
    with pytest.raises(ValueError, match="cannot be read as SDXL: .") as refused:
        load_checkpoint(path)
    assert "\n" not in str(refused.value)
    assert [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_is_read_as_predicting_what_it_says(loaded, kind):
    scheduler = loaded(*KINDS[kind]).scheduler
    sampling = ModelSampling(scheduler)
    scheduler.set_timesteps(4)
    assert sampling.velocity == kind.startswith("v")
    largest = 4096 if kind == "v with zero snr" else 14.6146
    assert sampling.log_sigmas[-1].exp().item() == pytest.approx(largest, rel=1e-3)
    assert scheduler.timesteps[0] == (999 if kind == "v with zero snr" else 751)
