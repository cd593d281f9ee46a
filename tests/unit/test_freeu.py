"""FreeU by block: products with a few waves are the published FFT, and only the blocks of a stage are touched."""

import pytest
import torch
from rounding import rounding

from storyloom.attention.freeu import FreeU, Stage, scale_backbone, scale_low_frequencies
from storyloom.runtime.call import UNetCall
from storyloom.runtime.patch import ScheduledPatch
from storyloom.runtime.run import StoryRun

SIZES = [(8, 8), (7, 7), (8, 12), (6, 9), (9, 6), (5, 12), (32, 24), (2, 2), (2, 5), (3, 2), (1, 6), (7, 1), (1, 1)]
STAGES = (Stage(range(3), 1.1, 0.6), Stage(range(3, 6), 1.2, 0.4))


def images(size=(6, 9), channels=4, dtype=torch.float64):
    generator = torch.Generator().manual_seed(size[0] * 100 + size[1])
    return torch.randn(2, channels, *size, generator=generator, dtype=torch.float64).to(dtype) + 0.5


def by_fft(x, scale):
    """The published filter: shift, scale the central bins c - 1 and c of both axes, shift back, real part."""
    spectrum = torch.fft.fftshift(torch.fft.fft2(x), dim=(-2, -1))
    row, column = x.shape[-2] // 2, x.shape[-1] // 2
    mask = torch.ones(x.shape[-2:], dtype=x.dtype)
    mask[row - 1 : row + 1, column - 1 : column + 1] = scale
    return torch.fft.ifft2(torch.fft.ifftshift(spectrum * mask, dim=(-2, -1))).real


def off(a, b):
    return (a.double() - b.double()).abs().max().item()


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("scale", [0.4, 0.0, 1.7])
def test_it_is_the_published_filter_at_any_size(size, scale):
    x = images(size)
    before = x.clone()
    out = scale_low_frequencies(x, scale)
    assert off(out, by_fft(x, scale)) < 1e-12
    assert off(out, x) > 0.1 and torch.equal(x, before)


@pytest.mark.parametrize("dtype, factor", [(torch.float32, 16), (torch.float16, 2), (torch.bfloat16, 2)], ids=str)
@pytest.mark.parametrize("size", [(8, 8), (9, 6), (128, 96)], ids=str)
def test_it_keeps_the_dtype_and_is_as_exact_as_that(dtype, factor, size):
    x = images(size, dtype=dtype)
    out = scale_low_frequencies(x, 0.4)

    def reference(x):
        return by_fft(x.double(), 0.4)

    assert out.dtype == dtype and off(out, reference(x)) < rounding(reference, x, factor=factor)
    assert torch.equal(out, scale_low_frequencies(x.float(), 0.4).to(dtype)), "float32 inside"


def test_half_precision_does_not_overflow_inside():
    x = torch.full((1, 1, 64, 64), 60000.0, dtype=torch.float16)
    assert off(scale_low_frequencies(x, 0.5), torch.full_like(x, 30000.0)) == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("change", [scale_backbone, scale_low_frequencies])
@pytest.mark.parametrize("size", [(6, 9), (128, 96), (1, 1)], ids=str)
def test_the_memory_format_stays_and_the_values_do_not_depend_on_it(change, dtype, size):
    """As --force-channels-last needs it: each convolution would otherwise turn the memory around and back."""
    x = images(size, dtype=dtype)
    for given in (x, x.contiguous(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().transpose(2, 3)):
        out = change(given, 0.4)
        assert out.stride() == given.stride() and torch.equal(out, change(x, 0.4))


@pytest.mark.parametrize("channels", [4, 5])
def test_the_first_half_of_the_backbone_s_channels_is_scaled(channels):
    h = images(channels=channels)
    before = h.clone()
    out = scale_backbone(h, 1.1)
    assert torch.equal(out[:, :2], before[:, :2] * 1.1) and torch.equal(out[:, 2:], before[:, 2:])
    assert torch.equal(h, before)


def test_a_factor_of_1_gives_the_very_tensor():
    x = images()
    assert scale_backbone(x, 1.0) is x and scale_low_frequencies(x, 1.0) is x


def freeu(stages=STAGES, start=0.0, end=1.0):
    return FreeU(stages, start, end)


def joined(patch, block, h, skip):
    """What of h and skip a patch leaves alone at this output block."""
    a, b = patch.join(h, skip, block)
    return a is h, b is skip


def test_every_stage_has_its_own_factors_and_other_blocks_are_left_alone():
    h, skip = images(), images((6, 9), 6)
    for block in range(12):
        a, b = freeu().join(h, skip, block)
        if block > 5:
            assert a is h and b is skip
        else:
            gain, part = (1.1, 0.6) if block < 3 else (1.2, 0.4)
            assert torch.equal(a[:, :2], h[:, :2] * gain) and off(b, by_fft(skip, part)) < 1e-12


def test_a_stage_of_neutral_factors_is_left_alone():
    h, skip = images(), images()
    first_off = freeu((Stage(range(3), 1.0, 1.0), STAGES[1]))
    assert [joined(first_off, block, h, skip) for block in (0, 3)] == [(True, True), (False, False)]
    assert joined(freeu((Stage(range(3), 1.0, 0.6),)), 0, h, skip) == (True, False)
    assert joined(freeu((Stage(range(3), 1.1, 1.0),)), 0, h, skip) == (False, True)
    assert not first_off.neutral and not freeu((Stage(range(3), 1.0, 0.6),)).neutral
    assert freeu((Stage(range(3), 1.0, 1.0), Stage(range(3, 6), 1.0, 1.0))).neutral


def test_a_skip_that_is_the_backbone_itself_is_not_scaled_with_it():
    """A UNet without a middle block hands the same tensor over twice."""
    h = images()
    a, b = freeu().join(h, h, 0)
    assert torch.equal(a[:, 2:], h[:, 2:]) and off(b, by_fft(h, 0.6)) < 1e-12


def test_what_another_node_has_joined_already_is_left_alone():
    h = images()
    a, b = freeu().join(h, None, 0)
    assert a is h and b is None


def run(*patches):
    """A run in which percent 0 is sigma 10 and percent 1 is sigma 0."""
    opened = (ScheduledPatch(patch, 10 * (1 - patch.start_percent), 10 * (1 - patch.end_percent)) for patch in patches)
    return StoryRun(tuple(opened), None)


def call_at(sigma):
    return UNetCall(sigma, (), None)


def test_it_stands_behind_the_functions_of_others_and_their_list_is_left_alone():
    theirs = {"output_block_patch": ["other"], "input_block_patch": ["another"]}
    options = {"patches": theirs, "patches_replace": {"attn1": {("middle", 0): "owner"}}}
    taken = run(freeu()).installed(options, call_at(5.0))
    first, ours = taken["patches"]["output_block_patch"]
    assert first == "other" and taken["patches"]["input_block_patch"] == ["another"]
    assert taken["patches_replace"] == options["patches_replace"]
    assert theirs == {"output_block_patch": ["other"], "input_block_patch": ["another"]}
    h, skip = ours(images(), images(), {"block": ("output", 4)})
    assert torch.equal(h[:, :2], images()[:, :2] * 1.2) and off(skip, by_fft(images(), 0.4)) < 1e-12


def test_two_in_a_row_act_one_after_the_other_each_in_its_window():
    h, skip = images(), images()
    both = run(freeu(), freeu((Stage(range(3), 1.5, 0.5),), end=0.5))
    for sigma, gain, filtered in (
        (8.0, 1.1 * 1.5, by_fft(by_fft(skip, 0.6), 0.5)),
        (2.0, 1.1, by_fft(skip, 0.6)),
    ):
        (ours,) = both.installed({}, call_at(sigma))["patches"]["output_block_patch"]
        a, b = ours(h, skip, {"block": ("output", 1)})
        assert off(a[:, :2], h[:, :2] * gain) < 1e-12 and off(b, filtered) < 1e-12


def test_outside_its_window_everything_passes_through():
    h, skip = images(), images()
    (ours,) = run(freeu(end=0.5)).installed({}, call_at(2.0))["patches"]["output_block_patch"]
    a, b = ours(h, skip, {"block": ("output", 1)})
    assert a is h and b is skip


def test_a_compiled_call_is_never_frozen():
    """Whoever compiles with the guards on transformer_options dropped still gets the function of the call at hand."""

    def block(h, options):
        for patch in options["patches"]["output_block_patch"]:
            h, _ = patch(h * 2, h, options)
        return h + 1

    filtered = {"guard_filter_fn": lambda guards: ["options" not in guard.name for guard in guards]}
    late, block_options = run(freeu(start=0.5)), {"block": ("output", 1)}
    torch.compiler.reset()
    compiled = torch.compile(block, backend="eager", options=filtered)
    try:
        before, after = (compiled(images(), block_options | late.installed({}, call_at(sigma))) for sigma in (8.0, 2.0))
    finally:
        torch.compiler.reset()
    assert torch.equal(before, images() * 2 + 1)
    assert torch.equal(after[:, :2], images()[:, :2] * 2 * 1.1 + 1)
