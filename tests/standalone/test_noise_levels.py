"""Noise levels of a model on a device without double precision."""

from types import SimpleNamespace

import torch
from no_float64 import DEVICE, a_device_without_float64, there

from storyloom.standalone.sampling import ModelSampling


def scheduler(cumulative):
    return SimpleNamespace(config=SimpleNamespace(prediction_type="epsilon"), alphas_cumprod=cumulative)


def test_they_are_the_same_on_a_device_without_float64():
    cumulative = torch.linspace(0.999, 0.01, 1000)
    sigmas = torch.tensor([0.05, 1.0, 7.5])
    plain = ModelSampling(scheduler(cumulative))
    expected = plain.timestep(sigmas)
    with a_device_without_float64():
        sampling = ModelSampling(scheduler(there(cumulative)))
        steps = sampling.timestep(there(sigmas))
        assert steps.device == DEVICE and torch.equal(steps.cpu(), expected)
        assert torch.equal(sampling.log_sigmas, plain.log_sigmas)
