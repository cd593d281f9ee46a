"""The demo model's training: its data, interrupted runs and exported file. A few small steps, not their quality."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from safetensors.torch import save_file

from storyloom.models.demo import model as demo
from storyloom.standalone.demo import demo_model
from storyloom.standalone.text import TextEncoders, tokenize
from storyloom.training.demo import data
from storyloom.training.demo.data import Vocabulary, make_batch, strengths_of
from storyloom.training.demo.export import exported_weights
from storyloom.training.demo.loop import Steps, Training
from storyloom.training.demo.networks import DividedLinear
from storyloom.training.demo.report import contact_sheet, sample
from storyloom.world.stories import random_lesson

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 3


@pytest.fixture(scope="module", autouse=True)
def small_batches():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "BATCH_SIZE", 4)
        yield


def begin(drawing=STEPS):
    return Training(1, Steps(reading=2, drawing=drawing), True, "cpu")


@pytest.fixture(scope="module")
def trained():
    """A complete, tiny training run."""
    training, errors = begin(), []
    training.read(errors.append)
    while training.step < training.steps.drawing:
        errors.append(training.advance())
    assert np.isfinite(errors).all()
    return training


def test_the_same_key_gives_the_same_lessons():
    vocabulary = Vocabulary()
    one, again, other = (make_batch(vocabulary, key, True, simple=False) for key in ((1, 2, 3), (1, 2, 3), (1, 2, 4)))
    assert torch.equal(one.pictures, again.pictures) and torch.equal(one.rows_l, again.rows_l)
    assert not torch.equal(one.pictures, other.pictures)


def test_strong_rows_are_those_of_the_frame_that_is_shown():
    vocabulary, seen = Vocabulary(), 0
    random = np.random.default_rng(5)
    while seen < 20:
        lesson = random_lesson(random, stories=1.0)
        if len(lesson.frames) == 1:
            continue
        _, _, spans, end = vocabulary.rows(lesson.pieces, random)
        strength, shown = strengths_of(lesson, spans, end, random)
        if (strength == 1).all():
            continue
        for frame, part in enumerate(lesson.parts):
            rows = strength[list(spans[part])]
            assert (rows >= 1).all() if frame == shown else (rows <= 0.3).all()
        assert (strength[list(spans[0])] == 1).all()
        seen += 1


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(tmp_path):
    straight, stopped, resumed = begin(), begin(), begin()
    errors = [straight.advance() for _ in range(STEPS)]
    for _ in range(STEPS - 1):
        stopped.advance()
    stopped.save(tmp_path / "state.pt")
    resumed.load(tmp_path / "state.pt")
    assert resumed.advance() == errors[-1]
    for name, value in straight.averages.items():
        assert torch.equal(resumed.averages[name], value), name
    for name, value in straight.net.state_dict().items():
        assert torch.equal(resumed.net.state_dict()[name], value), name


def test_a_run_of_other_settings_is_not_continued(tmp_path):
    begin().save(tmp_path / "state.pt")
    with pytest.raises(SystemExit, match="other settings"):
        begin(drawing=7).load(tmp_path / "state.pt")


def test_the_encoders_learn_to_read():
    training, errors = begin(), []
    training.steps = Steps(reading=30, drawing=1)
    training.read(errors.append)
    assert np.mean(errors[-5:]) < 0.9 * np.mean(errors[:3])


def test_blocks_are_repeated_ever_more_often_up_to_the_depth_of_sdxl(trained):
    steps = Steps(drawing=1000)
    assert [steps.repetitions(step) for step in (0, 799, 800, 929, 930, 999)] == [1, 1, 3, 3, 10, 10]
    for net in (trained.net, trained.averaged()):
        transformers = net.transformers()
        assert sorted(len(each.transformer_blocks) for each in transformers) == [2] * 5 + [10] * 6
        assert all(len(set(each.transformer_blocks)) == 1 for each in transformers)


def test_a_repeated_block_adds_as_much_as_one_that_is_not():
    layer = DividedLinear(8, 8).double()
    x = torch.randn(3, 8, dtype=torch.float64)
    once = layer(x)
    layer.repeats = 10
    assert torch.allclose(10 * layer(x), once, rtol=0, atol=1e-12)


def round_otherwise(net):
    """Move every weight by half a unit in the last place of float16, up or down: the largest rounding in the file."""
    generator, half = torch.Generator().manual_seed(0), torch.finfo(torch.float16).eps / 2
    for parameter in net.parameters():
        up = torch.rand(parameter.shape, generator=generator) < 0.5
        parameter.mul_(torch.where(up, 1 + half, 1 - half))


@contextmanager
def blocks_alone(unet):
    """Collects what the blocks of every spatial transformer add to the output of its `proj_in`."""
    added, hooks = [], []
    for transformer in (module for module in unet.modules() if isinstance(module, Transformer2DModel)):
        hooks += [
            transformer.proj_in.register_forward_hook(lambda _, args, output: added.append(-output)),
            transformer.proj_out.register_forward_pre_hook(lambda _, args: added[-1].add_(args[0])),
        ]
    yield added
    for hook in hooks:
        hook.remove()


def test_the_file_says_what_the_network_has_learnt(trained, tmp_path):
    """The bound is twice the effect of rounding the weights to float16, measured on the network itself.

    The blocks of each transformer are compared separately: early in training, they hardly change the output.
    """
    save_file(exported_weights(trained), tmp_path / "demo.safetensors")
    model, net = demo_model(tmp_path / "demo.safetensors"), trained.averaged()
    encoders = TextEncoders(model.text_encoder, model.text_encoder_2, torch.device("cpu"))
    texts = ["a red fox in the snow, asleep", "a girl on a train with a book"]
    rows = [trained.vocabulary.rows([text]) for text in texts]
    encoded = [encoders(tokenize(text)) for text in texts]
    wide, summaries = (torch.cat(parts) for parts in zip(*((c, i["pooled_output"]) for c, i in encoded), strict=True))
    generator = torch.Generator().manual_seed(2)
    latents, t = torch.randn(2, 4, 24, 24, generator=generator), torch.tensor([400, 900])
    sizes = {"text_embeds": summaries, "time_ids": torch.rand(2, 6, generator=generator)}

    def ours():
        with blocks_alone(net.unet) as added:
            encoded = net.encode(*(torch.tensor([row[i] for row in rows]) for i in (0, 1, 3)))
            return [net.predict(latents, t, *encoded), *added]

    def theirs():
        with blocks_alone(model.unet) as added:
            return [model.unet(latents, t, wide, added_cond_kwargs=sizes).sample, *added]

    with torch.no_grad():
        exact, shipped = ours(), theirs()
        round_otherwise(net)
        rounded = ours()
    assert len(exact) == 1 + 11, "the output and every transformer"
    for one, other, moved in zip(exact, shipped, rounded, strict=True):
        by_rounding = (moved - one).abs().max()
        assert 0 < by_rounding < 0.02 * one.std()
        assert (one - other).abs().max() < 2 * by_rounding
    for which, part in (("l", wide[:, 1:8, :768]), ("g", wide[:, 1:8, 768:])):
        assert 0.7 < part.norm(dim=2).mean() / demo.ROW_NORM[which] < 1.4


def test_its_pictures_make_a_contact_sheet(trained, tmp_path):
    from PIL import Image

    pictures = sample(trained.averaged(), trained.vocabulary, ["a fox in the snow"] * 3, seed=1, steps=1)
    assert pictures.shape == (3, 24, 24, 3) and 0 <= pictures.min() and pictures.max() <= 1
    contact_sheet(pictures, 2, tmp_path / "sheet.png", scale=2, gap=1)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (2 * 49, 2 * 49)
