"""ComfyUI that stays in double precision, so that two ways to compute the same agree to 1e-9 on any processor.

ComfyUI computes in the dtype of a network's weights, but rounds to float32 what leaves a network or a sampler, and
what a LoRA is added to; so does the host on diffusers. Here float64 stays as it is at these places. Networks of other
dtypes notice nothing.
"""

import sys
from contextlib import contextmanager

import pytest
import torch

CLOSE = 1e-9
"""Bound of the distance between two ways to compute the same in double precision."""

ROUNDING = {
    "float": ("comfy/model_base.py", "modules/attention.py", "nodes_freelunch.py", "standalone/sampling.py"),
    "to": (
        "comfy/sample.py",
        "comfy/samplers.py",
        "comfy/controlnet.py",
        "comfy/model_management.py",
        "comfy/model_patcher.py",
        "comfy/float.py",
        "scheduling_euler_discrete.py",
    ),
}
"""Files in which these methods of a tensor would round it."""


def unrounded(name):
    """The method of torch.Tensor of this name, which keeps a float64 tensor's dtype where the host asks for float32."""
    original, files = getattr(torch.Tensor, name), ROUNDING[name]

    def method(tensor, *args, **kwargs):
        if tensor.dtype == torch.float64 and sys._getframe(1).f_code.co_filename.replace("\\", "/").endswith(files):
            if name == "float":
                return tensor
            args = [torch.float64 if value is torch.float32 else value for value in args]
            kwargs = {key: torch.float64 if value is torch.float32 else value for key, value in kwargs.items()}
        return original(tensor, *args, **kwargs)

    return method


def in_its_models_precision(inner_sample):
    """A guider's sampling run, whose latents and noise levels are of float64 from its start where the model is."""

    def method(guider, noise, latent_image, device, sampler, sigmas, *args, **kwargs):
        if guider.inner_model.get_dtype() == torch.float64:
            noise, latent_image, sigmas = noise.double(), latent_image.double(), sigmas.double()
        return inner_sample(guider, noise, latent_image, device, sampler, sigmas, *args, **kwargs)

    return method


@contextmanager
def kept_double():
    """While this lasts, what is in double precision stays so."""
    from comfy.samplers import CFGGuider

    with pytest.MonkeyPatch.context() as patch:
        for name in ROUNDING:
            patch.setattr(torch.Tensor, name, unrounded(name))
        patch.setattr(CFGGuider, "inner_sample", in_its_models_precision(CFGGuider.inner_sample))
        yield
