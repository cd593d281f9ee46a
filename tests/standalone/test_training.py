"""The demo model's training: its lessons, its stops and what it writes. A few small steps, no quality."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from storyloom.models import demo
from storyloom.standalone.demo import demo_model

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
STEPS = 3


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


def begin(train, drawing=2, deep=1):
    return train.Training(1, train.Steps(reading=2, drawing=drawing, deep=deep), True, "cpu")


@pytest.fixture(scope="module")
def trained(train):
    """A whole, tiny training."""
    training, errors = begin(train), []
    training.read(errors.append)
    while training.step < training.total:
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
    assert resumed.advance() == pytest.approx(errors[-1], rel=1e-5)
    for name, value in straight.averages.items():
        assert torch.allclose(resumed.averages[name], value, atol=1e-6), name


def test_a_run_of_other_settings_is_not_continued(train, tmp_path):
    begin(train).save(tmp_path / "state.pt")
    with pytest.raises(SystemExit, match="other settings"):
        begin(train, drawing=7).load(tmp_path / "state.pt")


def test_the_encoders_learn_to_read(train):
    training, errors = begin(train), []
    training.steps = train.Steps(reading=30, drawing=1, deep=1)
    training.read(errors.append)
    assert np.mean(errors[-5:]) < 0.9 * np.mean(errors[:3])


def test_every_block_has_the_depth_of_sdxl_and_one_set_of_weights(trained):
    depths = sorted(len(transformer.transformer_blocks) for transformer in trained.net.transformers())
    assert depths == [2] * 5 + [10] * 6
    assert all(len(set(transformer.transformer_blocks)) == 1 for transformer in trained.net.transformers())


def test_the_file_says_what_the_network_has_learnt(train, trained, tmp_path):
    save_file(trained.weights(), tmp_path / "demo.safetensors")
    model, net = demo_model(tmp_path / "demo.safetensors"), trained.averaged()
    generator = torch.Generator().manual_seed(2)
    rows = torch.randint(0, len(trained.words.vocabulary), (2, 77), generator=generator)
    with torch.no_grad():
        context, pooled = net.encode(rows, rows, torch.tensor([9, 76]))
        halves = zip(context.chunk(2, -1), ("l", "g"), (768, 1280), strict=True)
        scales = {which: demo.ROW_NORM[which] / demo.NARROW**0.5 for which in "lg"}
        wide = torch.cat([half @ demo.basis(width).T * scales[which] for half, which, width in halves], -1)
        latents, t = torch.randn(2, 4, 24, 24, generator=generator), torch.tensor([400, 900])
        ours = net.predict(latents, t, context, pooled)
        sizes = {"text_embeds": pooled @ demo.basis(1280).T, "time_ids": torch.rand(2, 6, generator=generator)}
        theirs = model.unet(latents, t, wide, added_cond_kwargs=sizes).sample
    assert torch.allclose(ours, theirs, atol=0.02 * ours.std())


def test_its_pictures_make_a_contact_sheet(train, trained, tmp_path):
    from PIL import Image

    pictures = train.sample(trained.averaged(), trained.words, ["a fox in the snow"] * 3, seed=1, steps=1)
    assert pictures.shape == (3, 24, 24, 3) and 0 <= pictures.min() and pictures.max() <= 1
    train.contact_sheet(pictures, 2, tmp_path / "sheet.png", scale=2, gap=1)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (2 * 49, 2 * 49)
