"""The demo model's training: its lessons, its stops and what it writes. A few small steps, no quality."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from storyloom.models.demo import model as demo
from storyloom.standalone.demo import demo_model
from storyloom.standalone.text import TextEncoders, tokenize

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
STEPS = 3


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The same computation gives the same numbers: several threads would add up gradients in any order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def train():
    sys.path.insert(0, str(SCRIPTS))
    spec = importlib.util.spec_from_file_location("storyloom_script_train_demo", SCRIPTS / "train_demo.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    module.PICTURES = 4
    yield module
    sys.path.remove(str(SCRIPTS))
    del sys.modules[spec.name]


def begin(train, drawing=STEPS):
    return train.Training(1, train.Steps(reading=2, drawing=drawing), True, "cpu")


@pytest.fixture(scope="module")
def trained(train):
    """A whole, tiny training."""
    training, errors = begin(train), []
    training.read(errors.append)
    while training.step < training.steps.drawing:
        errors.append(training.advance())
    assert np.isfinite(errors).all()
    return training


def test_the_same_key_gives_the_same_lessons(train):
    words = train.Words()
    one, again, other = (train.make_batch(words, key, True, simple=False) for key in ((1, 2, 3), (1, 2, 3), (1, 2, 4)))
    assert torch.equal(one.pictures, again.pictures) and torch.equal(one.rows_l, again.rows_l)
    assert not torch.equal(one.pictures, other.pictures)


def test_strong_rows_are_those_of_the_frame_that_is_shown(train):
    words, seen = train.Words(), 0
    random = np.random.default_rng(5)
    while seen < 20:
        lesson = train.random_lesson(random, stories=1.0)
        if len(lesson.frames) == 1:
            continue
        _, _, spans, end = words.rows(lesson.pieces, random)
        strength, shown = train._strengths(lesson, spans, end, random)
        if (strength == 1).all():
            continue
        for frame, part in enumerate(lesson.parts):
            rows = strength[list(spans[part])]
            assert (rows >= 1).all() if frame == shown else (rows <= 0.3).all()
        assert (strength[list(spans[0])] == 1).all()
        seen += 1


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(train, tmp_path):
    straight, stopped, resumed = begin(train), begin(train), begin(train)
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


def test_a_run_of_other_settings_is_not_continued(train, tmp_path):
    begin(train).save(tmp_path / "state.pt")
    with pytest.raises(SystemExit, match="other settings"):
        begin(train, drawing=7).load(tmp_path / "state.pt")


def test_the_encoders_learn_to_read(train):
    training, errors = begin(train), []
    training.steps = train.Steps(reading=30, drawing=1)
    training.read(errors.append)
    assert np.mean(errors[-5:]) < 0.9 * np.mean(errors[:3])


def test_blocks_are_repeated_ever_more_often_up_to_the_depth_of_sdxl(train, trained):
    steps = train.Steps(drawing=1000)
    assert [steps.repetitions(step) for step in (0, 799, 800, 929, 930, 999)] == [1, 1, 3, 3, 10, 10]
    for net in (trained.net, trained.averaged()):
        transformers = net.transformers()
        assert sorted(len(each.transformer_blocks) for each in transformers) == [2] * 5 + [10] * 6
        assert all(len(set(each.transformer_blocks)) == 1 for each in transformers)


def test_a_repeated_block_adds_as_much_as_one_that_is_not(train):
    layer = train.Share(8, 8).double()
    x = torch.randn(3, 8, dtype=torch.float64)
    once = layer(x)
    layer.parts = 10
    assert torch.allclose(10 * layer(x), once, rtol=0, atol=1e-12)


def round_otherwise(net):
    """Move every weight by half a unit in the last place of float16, up or down: as far as the file's rounding may."""
    generator, half = torch.Generator().manual_seed(0), torch.finfo(torch.float16).eps / 2
    for parameter in net.parameters():
        up = torch.rand(parameter.shape, generator=generator) < 0.5
        parameter.mul_(torch.where(up, 1 + half, 1 - half))


def test_the_file_says_what_the_network_has_learnt(train, trained, tmp_path):
    """In float16: the bound is twice what rounding its weights may do, measured on the network itself."""
    save_file(trained.weights(), tmp_path / "demo.safetensors")
    model, net = demo_model(tmp_path / "demo.safetensors"), trained.averaged()
    encoders = TextEncoders(model.text_encoder, model.text_encoder_2, torch.device("cpu"))
    texts = ["a red fox in the snow, asleep", "a girl on a train with a book"]
    rows = [trained.words.rows([text]) for text in texts]
    encoded = [encoders(tokenize(text)) for text in texts]
    wide, summaries = (torch.cat(parts) for parts in zip(*((c, i["pooled_output"]) for c, i in encoded), strict=True))
    generator = torch.Generator().manual_seed(2)
    latents, t = torch.randn(2, 4, 24, 24, generator=generator), torch.tensor([400, 900])
    sizes = {"text_embeds": summaries, "time_ids": torch.rand(2, 6, generator=generator)}

    def predict():
        return net.predict(latents, t, *net.encode(*(torch.tensor([row[i] for row in rows]) for i in (0, 1, 3))))

    with torch.no_grad():
        theirs = model.unet(latents, t, wide, added_cond_kwargs=sizes).sample
        ours = predict()
        round_otherwise(net)
        by_rounding = (predict() - ours).abs().max()
    assert 0 < by_rounding < 0.02 * ours.std()
    assert (ours - theirs).abs().max() < 2 * by_rounding
    for which, part in (("l", wide[:, 1:8, :768]), ("g", wide[:, 1:8, 768:])):
        assert 0.7 < part.norm(dim=2).mean() / demo.ROW_NORM[which] < 1.4


def test_its_pictures_make_a_contact_sheet(train, trained, tmp_path):
    from PIL import Image

    pictures = train.sample(trained.averaged(), trained.words, ["a fox in the snow"] * 3, seed=1, steps=1)
    assert pictures.shape == (3, 24, 24, 3) and 0 <= pictures.min() and pictures.max() <= 1
    train.contact_sheet(pictures, 2, tmp_path / "sheet.png", scale=2, gap=1)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (2 * 49, 2 * 49)
