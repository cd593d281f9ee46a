"""What is computed in double precision is computed on the CPU: there are devices that have none."""

import numpy as np
import pytest
import torch
from no_float64 import DEVICE, There, a_device_without_float64, there

from storyloom.measures.dreamsim import DreamSim
from storyloom.prompts.svr import SVRSettings, express_frame, reweight_rows
from storyloom.prompts.tokens import StoryTokens

TOKENS = StoryTokens(identity=range(1, 4), frames=(range(4, 7), range(7, 9), range(9, 12)), eot=12, length=20)


def test_the_device_refuses_float64_and_computes_else():
    with a_device_without_float64():
        here = torch.arange(6.0).to(DEVICE).reshape(2, 3)
        assert isinstance(here, There) and here.device == DEVICE
        assert (here @ here.T).cpu().tolist() == [[5.0, 14.0], [14.0, 50.0]]
        with pytest.raises(TypeError, match="float64"):
            here.double()
        with pytest.raises(TypeError, match="float64"):
            torch.ones(2, dtype=torch.float64).to(DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rows_are_reweighted(dtype):
    hidden = torch.randn(20, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = reweight_rows(hidden, [4, 5, 12], -0.01, 1.0)
    with a_device_without_float64():
        result = reweight_rows(there(hidden), [4, 5, 12], -0.01, 1.0)
        assert result.device == DEVICE and result.dtype == dtype
        assert torch.equal(result.cpu(), expected)


@pytest.mark.parametrize("eot", ["svr", "scale"])
def test_a_frame_is_expressed(eot):
    hidden = torch.randn(20, 32, generator=torch.Generator().manual_seed(1))
    settings = SVRSettings(eot=eot)
    expected = express_frame(hidden, TOKENS, 1, settings)
    with a_device_without_float64():
        given = there(hidden)
        result = express_frame(given, TOKENS, 1, settings)
        assert result.device == DEVICE and torch.equal(result.cpu(), expected)
        assert torch.equal(given.cpu(), hidden), "what arrives stays as it is"


def test_dreamsim_measures():
    def prepare(image):
        return torch.from_numpy(np.array(image, np.float32)).flatten()[None] / 255

    class Network(torch.nn.Module):
        def __init__(self, place):
            super().__init__()
            self.place = place

        def parameters(self, recurse=True):
            yield torch.empty(0, device=self.place)

        def embed(self, shown):
            return shown

    images = torch.rand(3, 4, 4, 3, generator=torch.Generator().manual_seed(1))
    expected = DreamSim("DreamSim", Network("cpu"), prepare).distance(images)
    with a_device_without_float64():
        result = DreamSim("DreamSim", Network(DEVICE), prepare).distance(images)
    assert result.dtype == torch.float64 and torch.equal(result, expected)
