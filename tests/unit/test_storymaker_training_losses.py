"""StoryMaker's losses against formulas written out picture by picture, and what a training step draws and drops."""

import math

import pytest
import torch
from small_training import tiny_batch
from torch.nn import functional as F

from storyloom.training.storymaker.batch import per_character, places
from storyloom.training.storymaker.drops import NOTHING, Drops, drawn
from storyloom.training.storymaker.losses import attention_loss, diffusion_loss, identity_loss
from storyloom.training.storymaker.objective import Objective, sdxl

CLOSE = {"rtol": 0, "atol": 1e-12}


def random(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def blocks(mask, height, width):
    """Mean of the area of each new pixel, where the sizes divide."""
    rows, columns = mask.shape[0] // height, mask.shape[1] // width
    return torch.stack(
        [
            torch.stack([mask[y * rows : (y + 1) * rows, x * columns : (x + 1) * columns].mean() for x in range(width)])
            for y in range(height)
        ]
    )


def test_the_foreground_weighs_more():
    predicted, target, masks = random(2, 4, 4, 4), random(2, 4, 4, 4, seed=1), random(2, 3, 8, 8, seed=2)
    masks[0] = torch.zeros(3, 8, 8)
    masks[0, 0, :4] = masks[0, 1, 2:6] = 1
    total = 0.0
    for b in range(2):
        foreground = blocks(masks[b].sum(0).clamp(0, 1), 4, 4)
        for y in range(4):
            for x in range(4):
                error = sum(float(predicted[b, c, y, x] - target[b, c, y, x]) ** 2 for c in range(4))
                total += error * (1 + 5 * float(foreground[y, x]))
    assert math.isclose(diffusion_loss(predicted, target, masks, 5.0), total / (2 * 4 * 16), abs_tol=1e-12)
    torch.testing.assert_close(diffusion_loss(predicted, target, masks), F.mse_loss(predicted, target), **CLOSE)


def test_half_precision_predictions_are_compared_in_single():
    predicted = torch.full((1, 4, 4, 4), 300.0, dtype=torch.float16)  # its square is no half-precision number
    assert diffusion_loss(predicted, -predicted, torch.zeros(1, 3, 4, 4)) == 360000


@pytest.fixture
def recorded():
    """Maps of four layers for pictures with one, three and two characters, and their masks."""
    counts, masks = (1, 3, 2), random(3, 3, 16, 8, seed=9)
    for picture, count in enumerate(counts):
        masks[picture, count:] = 0
    maps = [random(3, 4, *size, seed=n) for n, size in enumerate([(4, 2), (2, 1), (2, 1), (8, 4)])]
    return maps, masks, counts


def test_the_papers_attention_loss(recorded):
    """Equations 9 to 12: each layer at its own size, divided by N + 1, then the mean over layers and pictures."""
    maps, masks, counts = recorded
    total = 0.0
    for layer in maps:
        for picture, count in enumerate(counts):
            background = 1 - masks[picture].sum(0).clamp(0, 1)
            errors = [(layer[picture, 0] - blocks(background, *layer.shape[-2:])).square().mean()]
            for i in range(count):
                wanted = blocks(masks[picture, i], *layer.shape[-2:])
                errors.append((layer[picture, 1 + i] - wanted).square().mean())
            total += sum(errors) / (count + 1)
    expected = total / len(maps) / len(counts)
    torch.testing.assert_close(attention_loss(maps, masks, counts), expected, **CLOSE)


def test_the_programs_attention_loss(recorded):
    """The mean map of the coarsest layers, upsampled twice, divided by N; finer layers are not used."""
    maps, masks, counts = recorded
    mean = F.interpolate((maps[1] + maps[2]) / 2, (4, 2), mode="bilinear")
    total = 0.0
    for picture, count in enumerate(counts):
        masked = [1 - masks[picture].sum(0).clamp(0, 1), *masks[picture, :count]]
        for group, mask in enumerate(masked):
            wanted = F.interpolate(blocks(mask, 8, 4)[None, None], (4, 2), mode="bilinear")[0, 0]
            total += (mean[picture, group] - wanted).square().mean() / count
    expected = total / len(counts)
    torch.testing.assert_close(attention_loss(maps, masks, counts, per_layer=False), expected, **CLOSE)
    finer = [maps[0] + 1, *maps[1:3], maps[3] + 1]
    torch.testing.assert_close(attention_loss(finer, masks, counts, per_layer=False), expected, **CLOSE)


@pytest.mark.parametrize("per_layer", [True, False])
def test_maps_of_absent_characters_do_not_count(recorded, per_layer):
    maps, masks, counts = recorded
    before = attention_loss(maps, masks, counts, per_layer)
    for layer in maps:
        layer[0, 2:] += 1
        layer[2, 3:] += 1
    assert attention_loss(maps, masks, counts, per_layer) == before


def test_maps_that_equal_the_masks_have_no_loss():
    masks = torch.zeros(1, 3, 8, 8)
    masks[0, 0, :, :4] = 1
    layer = torch.cat([1 - masks[:, :1], masks], 1)
    assert attention_loss([layer], masks, (1,)) == 0
    assert attention_loss([layer.roll(4, -1)], masks, (1,)) == 1


class Recogniser:
    """A stand-in for a face network: the mean colour of each quarter of the crop."""

    def __init__(self):
        self.seen = []

    def __call__(self, faces):
        self.seen.append(faces)
        return F.adaptive_avg_pool2d(faces, 2).flatten(1)


def test_the_identity_loss_sees_aligned_faces_of_late_timesteps():
    latents = random(3, 4, 8, 8).requires_grad_()
    counts, t = (1, 2, 1), torch.tensor([250, 10, 251])
    crops = torch.zeros(4, 2, 3, dtype=torch.float64)
    crops[0] = torch.tensor([[1, 0, 0], [0, 1, 0]])  # the whole picture
    crops[2] = torch.tensor([[0.5, 0, 0.5], [0, 0.5, -0.5]])  # its upper right quarter
    crops[3] = crops[0]
    identities = random(4, 12, seed=4)
    network, decoded = Recogniser(), []

    def decode(x):
        decoded.append(x)
        return 2 * x[:, :3] - 1

    loss = identity_loss(latents, decode, identities, crops, counts, t, network, side=4)
    whole, corner = (F.adaptive_avg_pool2d(2 * x[:3] - 1, 4) for x in (latents[0], latents[1, :, :4, 4:]))
    assert decoded[0].shape[0] == 2
    torch.testing.assert_close(network.seen[0][1], 2 * latents[1, :3, :4, 4:] - 1, **CLOSE)
    expected = [
        1 - F.cosine_similarity(network(face[None])[0], identities[m], 0) for m, face in ((0, whole), (2, corner))
    ]
    torch.testing.assert_close(loss, sum(expected) / 2, **CLOSE)
    loss.backward()
    assert latents.grad[:2, :3].any() and not latents.grad[2].any()
    assert not latents.grad[1, :, 5:].any(), "only the face"


def test_the_identity_loss_is_0_without_a_face_to_see():
    batch = tiny_batch((1, 1), crops=True)
    arguments = batch.latents, None, batch.id_embeds, batch.crops, batch.counts

    def network(faces):
        raise AssertionError("nothing to see")

    assert identity_loss(*arguments, torch.tensor([251, 900]), network) == 0
    hidden = arguments[:3] + (batch.crops * 0, batch.counts)
    assert identity_loss(*hidden, torch.tensor([1, 2]), network) == 0


def test_drops_have_their_probabilities_and_exclude_each_other():
    counts = (1, 3) * 20000
    dropped = drawn(Drops(), counts, torch.Generator().manual_seed(0))
    text, picture = dropped.text, dropped.picture
    shares = [
        (text & ~picture).double().mean() - 0.10,
        (picture & ~text).double().mean() - 0.05,
        (picture & text).double().mean() - 0.05,
        1 - dropped.face.double().mean() - 0.10,
        1 - dropped.appearance.double().mean() - 0.10,
    ]
    assert max(map(abs, shares)) < 0.01
    assert set(dropped.face.tolist()) == {0.0, 1.0}
    assert len(dropped.face) == sum(counts)
    assert not torch.equal(dropped.face, dropped.appearance)


@pytest.mark.parametrize("name", ["text", "picture", "both", "face", "appearance"])
def test_each_drop_can_be_certain_or_never(name):
    everything = drawn(Drops(**{**vars(NOTHING), name: 1.0}), (1, 2), torch.Generator().manual_seed(1))
    seen = {
        "text": everything.text.all(),
        "picture": everything.picture.all(),
        "face": not everything.face.any(),
        "appearance": not everything.appearance.any(),
    }
    wanted = {"text", "picture"} if name == "both" else {name}
    assert {each for each, is_dropped in seen.items() if is_dropped} == wanted
    nothing = drawn(NOTHING, (1, 2), torch.Generator().manual_seed(1))
    assert not (nothing.text.any() or nothing.picture.any()) and nothing.face.all() and nothing.appearance.all()


def test_a_generator_s_seed_decides_what_is_dropped():
    first, again, other = (drawn(Drops(), (2,) * 50, torch.Generator().manual_seed(seed)) for seed in (4, 4, 5))
    assert torch.equal(first.text, again.text) and torch.equal(first.face, again.face)
    assert not torch.equal(first.face, other.face)


def test_characters_are_counted_picture_by_picture():
    assert places((2, 1, 3)) == [(0, 0), (0, 1), (1, 0), (2, 0), (2, 1), (2, 2)]
    assert per_character(torch.tensor([5, 6, 7]), (2, 1, 3)).tolist() == [5, 5, 6, 7, 7, 7]


def test_a_batch_in_half_precision_keeps_masks_and_identities_precise():
    batch = tiny_batch((1, 2), pose=True, crops=True).to("cpu", torch.bfloat16)
    assert batch.latents.dtype == batch.face.dtype == batch.pose.dtype == torch.bfloat16
    assert batch.masks.dtype == batch.id_embeds.dtype == batch.crops.dtype == torch.float32
    assert batch.counts == (1, 2)
    assert tiny_batch().to("cpu", torch.float64).masks.dtype == torch.float64


@pytest.mark.parametrize("kind", ["epsilon", "v"])
def test_the_objective_s_target_leads_back_to_the_latents(kind):
    signals = sdxl().signal.double()  # in single precision, the squares of signal and noise do not quite add up to 1
    schedule = Objective(signals, (1 - signals**2).sqrt(), noise_offset=0.1)
    objective = Objective(schedule.signal, schedule.noise, kind, schedule.noise_offset)
    latents = random(6, 4, 5, 3)
    noisy, t, target = objective.noisy(latents, torch.Generator().manual_seed(2))
    signal, noise = (level[t].double().view(-1, 1, 1, 1) for level in (schedule.signal, schedule.noise))
    eps = (noisy - signal * latents) / noise
    torch.testing.assert_close(target, eps if kind == "epsilon" else signal * eps - noise * latents, rtol=0, atol=1e-9)
    torch.testing.assert_close(objective.clean(noisy, t, target), latents, rtol=0, atol=1e-9)
    again = objective.noisy(latents, torch.Generator().manual_seed(2))
    assert all(map(torch.equal, (noisy, t, target), again))


def test_sdxl_s_schedule_is_the_published_one():
    """As diffusers computes it for SDXL's configuration."""
    diffusers = pytest.importorskip("diffusers")
    published = diffusers.DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    torch.testing.assert_close(sdxl().signal, published.alphas_cumprod.sqrt(), rtol=0, atol=1e-5)
    torch.testing.assert_close(sdxl().noise, (1 - published.alphas_cumprod).sqrt(), rtol=0, atol=1e-5)


def test_a_noise_offset_moves_whole_channels():
    schedule, latents = sdxl(0.0), torch.zeros(2, 4, 64, 64)
    plain = schedule.noisy(latents, torch.Generator().manual_seed(0))[2]
    offset = Objective(schedule.signal, schedule.noise, noise_offset=0.5)
    moved = offset.noisy(latents, torch.Generator().manual_seed(0))[2] - plain
    assert moved.std((2, 3)).max() < 1e-6
    assert 0.1 < moved.mean((2, 3)).std() < 1.5


def test_timesteps_are_the_caller_s():
    schedule = sdxl()
    late = Objective(schedule.signal, schedule.noise, timesteps=lambda count, generator: torch.full((count,), 7))
    assert late.noisy(torch.zeros(3, 4, 2, 2), torch.Generator())[1].tolist() == [7, 7, 7]
