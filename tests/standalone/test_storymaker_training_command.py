"""The training command end to end: a tiny SDXL, drawn pictures, a few steps."""

import json
import os
import shutil
import signal
import sys
from functools import partial

import numpy as np
import pytest
import torch
from drawn_pictures import write_data
from PIL import Image
from safetensors.torch import load_file, save_file
from small_training import NUMBERS

from storyloom.models.storymaker import weights
from storyloom.models.storymaker.ppr import PositionalPerceiverResampler
from storyloom.standalone.unet import build_unet
from storyloom.training.storymaker import loop
from storyloom.training.storymaker.__main__ import main
from storyloom.training.storymaker.adapter import TrainedAdapter

pytestmark = pytest.mark.usefixtures("one_thread")

WIDTH, RANK, STEPS = 64, 3, 4
"""Width of each text encoder and of the image encoder, rank of the LoRA, and steps of a short run."""
UNET = NUMBERS | {"context_dim": 2 * WIDTH, "adm_in_channels": WIDTH + 6 * 256}
TEXT = {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = TEXT | {"num_attention_heads": 1, "patch_size": 56, "hidden_act": "gelu"}


def tiny_pipeline():
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    from storyloom.standalone.checkpoint import schedule

    config = CLIPTextConfig(**TEXT, projection_dim=WIDTH, eos_token_id=49407)
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    vae = AutoencoderKL(**kinds, block_out_channels=(8,) * 4, norm_num_groups=4, scaling_factor=1.0)
    return StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(config),
        text_encoder_2=CLIPTextModelWithProjection(config),
        tokenizer=None,
        tokenizer_2=None,
        unet=build_unet(UNET, 16),
        scheduler=EulerDiscreteScheduler(**schedule(set())),
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with `sdxl`, `vision`, `pose` and `data`."""
    from diffusers import ControlNetModel
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    pipeline = tiny_pipeline()
    pipeline.save_pretrained(folder / "sdxl")
    CLIPVisionModelWithProjection(CLIPVisionConfig(**VISION)).save_pretrained(folder / "vision")
    pose = ControlNetModel.from_unet(pipeline.unet, conditioning_embedding_out_channels=(4, 4, 4, 4))
    for parameter in pose.controlnet_mid_block.parameters():
        torch.nn.init.normal_(parameter)
    pose.save_pretrained(folder / "pose")
    write_data(folder / "data", poses=True)
    return folder


@pytest.fixture
def train(files, tmp_path):
    """Run the command into the folder `out` of the test, or another one; returns the folder."""

    def run(*words, out=tmp_path / "out", **changes):
        options = {
            "checkpoint": files / "sdxl",
            "image-encoder": files / "vision",
            "data": files / "data",
            "out": out,
            "device": "cpu",
            "resolution": "64x128",
            "precision": "float32",
            "file-precision": "float32",
            "rank": RANK,
            "steps": STEPS,
            "batch": 2,
            "accumulation": 1,
            "rate": "1e-2",
            "validate-every": 0,
            **{name.replace("_", "-"): value for name, value in changes.items()},
        }
        main([*(str(word) for name, value in options.items() for word in (f"--{name}", value)), *map(str, words)])
        return out

    return run


@pytest.fixture
def tiny_file(monkeypatch):
    """Makes the loader of StoryMaker's file expect the tiny SDXL's layers, in place of SDXL's own."""
    unet = build_unet(UNET, 16)
    ppr = partial(PositionalPerceiverResampler, width=2 * WIDTH, image_width=WIDTH)
    adapter = TrainedAdapter(unet, ppr(device="meta"), RANK)
    layers = [
        weights.Layer(name, key, each.to_q_lora.up.out_features, each.to_k_lora.down.in_features, each.cross)
        for name, key, each in zip(adapter.names, adapter.keys, adapter.processors, strict=True)
    ]
    monkeypatch.setattr(weights, "layers", lambda: iter(layers))
    monkeypatch.setattr(weights, "CONTEXT", 2 * WIDTH)
    monkeypatch.setattr(weights, "PositionalPerceiverResampler", ppr)


def result(folder):
    return load_file(folder / "mask.safetensors")


def assert_same(one, other):
    one, other = result(one), result(other)
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def losses(folder, name="loss"):
    state = torch.load(folder / "state.pt", weights_only=True)
    return [row[name] for row in state["log"]]


def test_training_reduces_the_loss_and_writes_storymakers_file(train, tiny_file, tmp_path):
    out = train(steps=20, validate_every=10, validation_steps=2, validation_pictures=2)
    untrained = train(steps=20, rate=0, out=tmp_path / "untrained")
    for name in ("diffusion", "attention"):  # of the same pictures with the same noise
        pairs = [*zip(losses(out, name), losses(untrained, name), strict=True)]
        assert pairs[0][0] == pairs[0][1]
        before, after = (np.mean([one / other for one, other in part]) for part in (pairs[:5], pairs[-5:]))
        assert after < 0.99 and after < before, (name, pairs)
    as_pickle, as_safetensors = (weights.load_storymaker(weights.read_checkpoint(out / f)) for f in
                                 ("mask.bin", "mask.safetensors"))  # fmt: skip
    for read in (as_pickle, as_safetensors):
        assert not read.missing and not read.unused and read.image_kv
    assert all(torch.equal(value, as_safetensors.lora[name]) for name, value in as_pickle.lora.items())
    assert sorted(path.name for path in (out / "validation").iterdir()) == ["step-000010.png", "step-000020.png"]
    with Image.open(out / "validation/step-000020.png") as sheet:
        assert sheet.size == (3 * 384, 2 * 384), "a row of picture, reference and drawing"
        assert np.ptp(np.asarray(sheet)[:384, 768:]) > 20, "nothing is drawn"
    assert (out / "log.csv").read_text().startswith("step,loss,diffusion,attention")


@pytest.mark.skipif(not hasattr(os, "fork") or torch.cuda.is_available(), reason="needs a process that can be forked")
def test_a_run_that_was_killed_goes_on_as_if_it_had_not_been(train, tmp_path):
    """Killed in the step after the one that was saved, whose work is lost and done again."""
    straight = train(out=tmp_path / "straight")
    advance = loop.TrainingLoop.advance

    def dies(self):
        if self.step == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return advance(self)

    child = os.fork()
    if not child:
        loop.TrainingLoop.advance = dies
        try:
            train("--save-every", 2, out=tmp_path / "killed")
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    killed = tmp_path / "killed"
    assert not (killed / "mask.bin").exists()
    assert torch.load(killed / "state.pt", weights_only=True)["step"] == 2
    train("--save-every", 2, out=killed)
    assert_same(straight, killed)
    assert losses(straight) == losses(killed)


def test_a_paused_run_is_only_continued_with_the_same_settings_and_data(train, files, tmp_path, capsys):
    train("--pause-after", 2)
    assert "Paused after step 2" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"other settings: rotation was 10.0 and is 0.0"):
        train("--rotation", 0)
    other = shutil.copytree(files / "data", tmp_path / "data")
    (other / "data.json").write_text((other / "data.json").read_text() + " ")
    with pytest.raises(SystemExit, match="have changed since the run"):
        train(data=other)
    train()
    assert "Continuing after step 2" in capsys.readouterr().out


def test_a_cache_and_the_encoders_single_file_change_nothing(train, files, tmp_path):
    from transformers import CLIPVisionModelWithProjection

    plain = train(out=tmp_path / "plain")
    vision = CLIPVisionModelWithProjection.from_pretrained(files / "vision").state_dict()
    named = {name if name.startswith("vis") else f"vision_model.{name}": value for name, value in vision.items()}
    save_file(named, tmp_path / "vision.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("storyloom.training.storymaker.checkpoint.HEAD_WIDTH", WIDTH)
        cached = train("--cache", tmp_path / "cache", image_encoder=tmp_path / "vision.safetensors")
    assert_same(plain, cached)
    assert len([*(tmp_path / "cache").iterdir()]) == 20


def test_training_continues_from_storymakers_file(train, tiny_file, tmp_path):
    first = train(out=tmp_path / "first")
    again = train("--start", first / "mask.bin", out=tmp_path / "again", rate=0, weight_decay=0, steps=1)
    assert_same(first, again)


def test_ip_adapters_files_are_a_start(train, tmp_path, capsys):
    first = result(train(out=tmp_path / "first"))
    parts = {"image_proj_model.": "image_proj.", "ip_adapter.": "ip_adapter."}
    faceid = {
        new + name[len(old) :]: value
        for old, new in parts.items()
        for name, value in first.items()
        if name.startswith(old)
    }
    torch.save(faceid, tmp_path / "faceid.bin")
    second = train("--ip-adapter-faceid", tmp_path / "faceid.bin", rate=0, weight_decay=0, steps=1)
    taken = ("ip_adapter.", "image_proj_model.proj.", "image_proj_model.perceiver_resampler.")
    second = result(second)
    assert all(
        torch.equal(value, second[name]) == name.startswith(taken)
        for name, value in first.items()
        if "latents" in name or name.startswith(taken)
    )
    assert "tensors taken from IP-Adapter, 0 not found" in capsys.readouterr().out


def test_the_pose_is_a_hint_where_a_controlnet_is_given(train, files, tmp_path):
    without = train(out=tmp_path / "without")
    hinted = train("--controlnet", files / "pose", out=tmp_path / "hinted")
    assert losses(without, "diffusion")[0] != losses(hinted, "diffusion")[0]
    text = losses(train("--controlnet", files / "pose", "--controlnet-reads", "images", out=tmp_path / "images"))
    assert text[0] != losses(hinted)[0]


def test_bad_data_stops_training_unless_it_is_to_be_skipped(train, files, tmp_path, capsys):
    data = shutil.copytree(files / "data", tmp_path / "data")
    (data / "masks/03.png").unlink()
    with pytest.raises(
        SystemExit, match=r"20 pictures: 19 are usable, 1 are not. images/03.png: .*the mask is missing"
    ):
        train(data=data)
    out = train("--bad", "skip", data=data, steps=1)
    assert "19 are usable" in capsys.readouterr().out
    assert "masks/03.png\tthe mask is missing" in (out / "data-report.txt").read_text()


class FaceNetwork(torch.nn.Module):
    def forward(self, faces):
        return torch.nn.functional.adaptive_avg_pool2d(faces, (8, 64)).mean(1).flatten(1)


def test_the_identity_loss_reads_faces_in_the_drawn_picture(train, tmp_path):
    torch.jit.script(FaceNetwork()).save(str(tmp_path / "faces.pt"))
    with pytest.raises(SystemExit, match="add --face-network FILE"):
        train("--identity", 0.1)
    with_faces = train("--identity", 0.1, "--face-network", tmp_path / "faces.pt", steps=6)
    assert "identity" in (with_faces / "log.csv").read_text().splitlines()[0]
    assert any(losses(with_faces, "identity"))


def test_accelerate_gives_the_same_result_in_one_process(train, tmp_path, monkeypatch):
    pytest.importorskip("accelerate", reason='several cards need accelerate: pip install "storyloom[training]"')
    plain = train("--accumulation", 2, out=tmp_path / "plain")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert_same(plain, train("--accumulation", 2, out=tmp_path / "accelerated"))


def test_several_processes_without_accelerate_are_refused_with_what_to_install(train, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(SystemExit, match=r'pip install "storyloom\[training\]"'):
        train()


@pytest.mark.parametrize("what", ["checkpoint", "image_encoder", "controlnet", "data"])
def test_a_file_that_is_missing_or_of_another_kind_is_named(train, tmp_path, what):
    (tmp_path / "other.safetensors").write_bytes(b"no weights at all")
    for path in (tmp_path / "absent", tmp_path / "other.safetensors"):
        with pytest.raises(SystemExit, match=path.name):
            train(**{what: path})


def test_the_command_needs_its_files_and_explains_itself(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "prepare" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([])
    assert "--checkpoint" in capsys.readouterr().err


def test_shards_train_as_the_list_does(train, files, tmp_path):
    main(["pack", str(files / "data"), "--out", str(tmp_path / "shards"), "--per-shard", "6"])
    listed, packed = train(out=tmp_path / "listed"), train(data=tmp_path / "shards", out=tmp_path / "packed")
    assert_same(listed, packed)
    assert len(json.loads((packed / "data-index.json").read_text())["index"]["items"]) == 20
