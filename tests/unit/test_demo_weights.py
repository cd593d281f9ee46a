"""The demo model's weights: the same everywhere, whatever the order of construction, and tame."""

import hashlib
import subprocess
import sys

import torch
from torch import nn

from storyloom.models.demo import CLIP_G, CLIP_L, HEAD_CHANNELS, POOL, UNET, fill_, pass_noise_through_


class Parts(nn.Module):
    def __init__(self, names):
        super().__init__()
        make = {
            "linear": lambda: nn.Linear(24, 48),
            "conv": lambda: nn.Conv2d(4, 8, 3),
            "mix": lambda: nn.Conv2d(4, 8, 1),
            "norm": lambda: nn.GroupNorm(2, 8),
            "token_embedding": lambda: nn.Embedding(50, 16),
        }
        for name in names:
            self.add_module(name, make[name]())


class Block(nn.Module):
    """The three layers of a UNet that the noise passes through, in the original SDXL layout."""

    def __init__(self, channels=32):
        super().__init__()
        last = nn.Module()
        last.skip_connection = nn.Conv2d(2 * channels, channels, 1)
        last.out_layers = nn.Sequential(nn.SiLU(), nn.Conv2d(channels, channels, 3, padding=1))
        self.input_blocks = nn.ModuleList([nn.Sequential(nn.Conv2d(4, channels, 3, padding=1))])
        self.output_blocks = nn.ModuleList([nn.Sequential(last)])
        self.out = nn.Sequential(nn.GroupNorm(channels, channels), nn.SiLU(), nn.Conv2d(channels, 4, 3, padding=1))

    def forward(self, x):
        h = self.input_blocks[0](x)
        last = self.output_blocks[0][0]
        both = torch.cat([torch.randn_like(h), h], 1)
        return self.out(last.skip_connection(both) + last.out_layers(h))


NAMES = ["linear", "conv", "mix", "norm", "token_embedding"]


def digest(module):
    state = module.state_dict()
    return hashlib.sha256(b"".join(state[name].numpy().tobytes() for name in sorted(state))).hexdigest()


def test_the_same_seed_writes_the_same_weights():
    assert digest(fill_(Parts(NAMES), 3)) == digest(fill_(Parts(NAMES), 3))
    assert digest(fill_(Parts(NAMES), 3)) != digest(fill_(Parts(NAMES), 4))


def test_weights_do_not_depend_on_the_order_of_construction():
    assert digest(fill_(Parts(NAMES))) == digest(fill_(Parts(NAMES[::-1])))


def test_weights_are_the_same_in_another_process():
    code = "import test_demo_weights as t; print(t.digest(t.fill_(t.Parts(t.NAMES))))"
    other = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {[*sys.path, __file__.rpartition('/')[0]]!r}; {code}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert other.stdout.strip() == digest(fill_(Parts(NAMES)))


def test_every_parameter_is_overwritten_with_finite_values():
    module = Parts(NAMES)
    for parameter in module.parameters():
        parameter.data.fill_(float("nan"))
    assert all(parameter.isfinite().all() for parameter in fill_(module).parameters())


def test_two_parameters_of_one_shape_get_different_values():
    module = fill_(nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16)]))
    assert not torch.equal(module[0].weight, module[1].weight)


def test_norms_start_as_the_identity_and_biases_at_zero():
    module = fill_(Parts(NAMES))
    assert (module.norm.weight == 1).all() and (module.norm.bias == 0).all() and (module.linear.bias == 0).all()


def test_layers_keep_the_variance_of_their_input():
    torch.manual_seed(0)
    linear = fill_(nn.ModuleDict({"layer": nn.Linear(512, 512)}))["layer"]
    assert abs(linear(torch.randn(256, 512)).std() - 1) < 0.05


def test_ten_residual_blocks_in_a_row_do_not_blow_up():
    torch.manual_seed(0)
    blocks = fill_(
        nn.ModuleList(nn.ModuleDict({"ff": nn.Linear(128, 128), "fc2": nn.Linear(128, 128)}) for _ in range(30))
    )
    x = torch.randn(64, 128)
    for block in blocks:
        x = x + block["fc2"](block["ff"](nn.functional.layer_norm(x, (128,))))
    assert 1 < x.std() < 5


def test_rows_of_a_large_embedding_are_all_different():
    rows = POOL // 256 * 3
    weight = fill_(nn.ModuleDict({"token_embedding": nn.Embedding(rows, 256)}))["token_embedding"].weight
    assert len(torch.unique(weight[:, :4], dim=0)) == rows
    assert abs(weight.std() - 1) < 0.01


def test_noise_passes_through_the_wired_unet():
    torch.manual_seed(0)
    x = torch.randn(2, 4, 16, 16)
    x = (x - x.mean((2, 3), keepdim=True)) / x.std((2, 3), keepdim=True)
    out = pass_noise_through_(fill_(Block()), strength=0)(x)
    assert torch.allclose(out, x, atol=0.02)


def test_the_wired_unet_adds_a_drawing_of_the_given_strength():
    torch.manual_seed(0)
    x = torch.randn(2, 4, 16, 16)
    drawn = pass_noise_through_(fill_(Block()), strength=0.5)(x) - x
    assert 0.02 < drawn.std() < 1


def test_heads_divide_the_channels_of_every_attention_block():
    for level, channels in enumerate(UNET["model_channels"] * factor for factor in UNET["channel_mult"]):
        assert level == 0 or channels % HEAD_CHANNELS == 0


def test_text_encoders_have_the_widths_that_the_unet_expects():
    assert CLIP_L["hidden_size"] + CLIP_G["hidden_size"] == UNET["context_dim"]
    assert CLIP_G["hidden_size"] + 6 * 256 == UNET["adm_in_channels"]
