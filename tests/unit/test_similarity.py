"""CLIP through open_clip's own classes and DreamSim through a stand-in for its package: what loads, and what never."""

import json
import pickle
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image
from rounding import rounding
from safetensors.torch import save_file

from storyloom.measures.clip import load_open_clip
from storyloom.measures.dreamsim import DREAMSIM_FILES, load_dreamsim
from storyloom.measures.encoders import BATCH, SimilarityError

try:
    import open_clip
except ImportError as missing:
    open_clip, reason = None, f"CLIP IS NOT TESTED: pip install open_clip_torch ({missing})"
else:
    reason = ""
needs_open_clip = pytest.mark.skipif(open_clip is None, reason=reason)

TINY = "storyloom-tiny"
CONFIG = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 16, "head_width": 8, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(network, its file): a CLIP of random numbers that open_clip knows by name."""
    if open_clip is None:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("clip")
    for name, changes in ((TINY, {}), (f"{TINY}-quickgelu", {"quick_gelu": True}), (f"{TINY}-wide", {"embed_dim": 12})):
        (folder / f"{name}.json").write_text(json.dumps(CONFIG | changes))
        open_clip.add_model_config(folder / f"{name}.json")
    torch.manual_seed(3)
    network = open_clip.create_model(TINY).eval()
    save_file(network.state_dict(), folder / "tiny.safetensors")
    return network, folder / "tiny.safetensors"


@pytest.fixture(scope="module")
def encoder(tiny):
    return load_open_clip(TINY, tiny[1])


def pictures(count, height=48, width=40):
    return torch.rand(count, height, width, 3, generator=torch.Generator().manual_seed(count))


@needs_open_clip
def test_features_are_those_of_the_library_itself(tiny, encoder):
    network = tiny[0]
    shown = (pictures(3) * 255).round().to(torch.uint8)
    _, _, prepare = open_clip.create_model_and_transforms(TINY)
    batch = torch.stack([prepare(Image.fromarray(picture.numpy())) for picture in shown])
    words = ["a red fox", "a blue bear"]
    with torch.no_grad():
        seen, read = network.encode_image(batch), network.encode_text(open_clip.get_tokenizer(TINY)(words))
        bound = rounding(network.encode_image, batch)
    torch.testing.assert_close(encoder.images(shown / 255), seen, rtol=0, atol=bound)
    torch.testing.assert_close(encoder.texts(words), read, rtol=0, atol=rounding(torch.clone, read))
    assert encoder.name == f"{TINY} (tiny.safetensors)"


@needs_open_clip
def test_a_hundred_pictures_go_in_batches(encoder, monkeypatch):
    batches = []
    encode = encoder.network.encode_image
    monkeypatch.setattr(encoder.network, "encode_image", lambda batch: batches.append(batch) or encode(batch))
    images = pictures(100, 32, 32)
    features = encoder.images(images)
    sizes = [len(batch) for batch in batches]
    assert max(sizes) <= BATCH and sum(sizes) == 100 and features.shape == (100, 8)
    bound = rounding(encode, batches[-1])
    torch.testing.assert_close(features[[99]], encoder.images(images[[99]]), rtol=0, atol=bound)
    assert features.dtype == torch.float32 and features.device.type == "cpu" and not features.requires_grad


@needs_open_clip
def test_transparent_pictures_are_on_white(encoder):
    clear = torch.zeros(1, 32, 32, 4)
    assert torch.equal(encoder.images(clear), encoder.images(torch.ones(1, 32, 32, 3)))


@needs_open_clip
def test_a_text_that_is_too_long_is_reported(encoder, caplog):
    encoder.texts(["fox"])
    assert not caplog.records
    encoder.texts(["fox", "fox " * 90])
    assert "1 of 2 texts" in caplog.text


@needs_open_clip
@pytest.mark.parametrize("form", ["state", "trained", "parallel", "half"])
def test_every_usual_form_of_a_file_is_the_same_network(tiny, encoder, tmp_path, form):
    state = tiny[0].state_dict()
    path = tmp_path / "tiny.pt"
    if form == "half":
        save_file({name: value.half() for name, value in state.items()}, path)
    else:
        parallel = {f"module.{name}": value for name, value in state.items()}
        content = {"state": state, "trained": {"epoch": 3, "state_dict": state}, "parallel": parallel}[form]
        torch.save(content, path)
    loaded = load_open_clip(TINY, path)
    expected = encoder.images(pictures(2))
    bound = 0.02 if form == "half" else rounding(torch.clone, expected)
    torch.testing.assert_close(loaded.images(pictures(2)), expected, rtol=0, atol=bound)
    assert next(loaded.network.parameters()).dtype == torch.float32


class Evil:
    def __reduce__(self):
        return (exec, ("import pathlib; pathlib.Path('evil').touch()",))


def spoilt(kind, path, state):
    """A file of some kind that is no file of weights."""
    whole = path.with_suffix(".whole")
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("<html>404</html>")
    elif kind == "hostile":
        path.write_bytes(pickle.dumps({"state_dict": Evil()}))
    elif kind == "hostile archive":
        torch.save({"a": Evil()}, path)
    elif kind in ("cut safetensors", "cut archive"):
        (save_file if kind == "cut safetensors" else torch.save)(state, whole)
        path.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    elif kind == "list":
        torch.save([1, 2], path)
    elif kind == "nan":
        save_file({**state, "text_projection": state["text_projection"] * float("nan")}, path)
    elif kind == "torchscript":
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
    return path


@needs_open_clip
@pytest.mark.parametrize(
    "kind, message",
    [
        ("empty", "is empty"),
        ("text", "neither a PyTorch nor a safetensors file"),
        ("hostile", "so it was not opened"),
        ("hostile archive", "which weights do not need"),
        ("cut safetensors", "damaged or incomplete"),
        ("cut archive", "damaged or incomplete"),
        ("list", "contains something other than weights"),
        ("nan", "NaN or infinity in text_projection"),
        ("torchscript", "is a TorchScript archive"),
    ],
)
def test_a_file_that_is_none_gets_one_sentence_and_nothing_in_it_runs(tiny, tmp_path, monkeypatch, kind, message):
    monkeypatch.chdir(tmp_path)
    path = spoilt(kind, tmp_path / "bad.pt", tiny[0].state_dict())
    with pytest.raises(SimilarityError, match=message) as error:
        load_open_clip(TINY, path)
    assert "\n" not in str(error.value) and not (tmp_path / "evil").exists()


@needs_open_clip
def test_a_file_of_another_architecture_is_named_with_its_tensors(tiny):
    with pytest.raises(SimilarityError, match=f"is not {TINY}-wide .*of another shape.*choose the architecture"):
        load_open_clip(f"{TINY}-wide", tiny[1])
    with pytest.raises(SimilarityError, match="is not ViT-S-32-alt .*missing"):
        load_open_clip("ViT-S-32-alt", tiny[1])


@needs_open_clip
@pytest.mark.parametrize(
    "architecture, message",
    [
        ("ViT-Z-99", 'no architecture "ViT-Z-99"'),
        ("hf-hub:someone/something", "no architecture"),
        ("local-dir:/tmp", "no architecture"),
        ("roberta-ViT-B-32", "downloads its tokenizer"),
        ("ViT-B-16-SigLIP", "downloads its tokenizer"),
        ("coca_ViT-B-32", "is a captioning model"),
    ],
)
def test_an_architecture_that_would_need_more_files_is_refused(tiny, architecture, message):
    with pytest.raises(SimilarityError, match=message):
        load_open_clip(architecture, tiny[1])


@pytest.fixture
def no_net(monkeypatch):
    """Whoever would download fails the test."""

    def refuse(*args, **kwargs):
        raise AssertionError("a download was tried")

    monkeypatch.setattr(open_clip.pretrained, "hf_hub_download", refuse)
    monkeypatch.setattr("urllib.request.urlopen", refuse)


@needs_open_clip
def test_a_tag_that_is_not_in_the_cache_is_told_and_not_downloaded(no_net, tmp_path):
    with pytest.raises(SimilarityError, match="not in .*allow the download") as error:
        load_open_clip("ViT-B-32-quickgelu", "openai", cache_dir=tmp_path)
    assert "https://huggingface.co/timm/vit_base_patch32_clip_224.openai" in str(error.value)
    assert not list(tmp_path.iterdir())


@needs_open_clip
def test_a_download_that_fails_gets_one_sentence(no_net, tmp_path):
    with pytest.raises(SimilarityError, match="openai of ViT-B-32-quickgelu could not be downloaded"):
        load_open_clip("ViT-B-32-quickgelu", "openai", cache_dir=tmp_path, download=True)


@pytest.fixture
def tags(tiny, monkeypatch):
    """open_clip knows two tags of the tiny architecture, one for each activation."""
    base = {"mean": (0.5,) * 3, "std": (0.25,) * 3, "interpolation": "bicubic", "resize_mode": "shortest"}
    known = {"plain": {**base, "hf_hub": "storyloom/tiny/"}, "quick": {**base, "hf_hub": "x/y/", "quick_gelu": True}}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, TINY, known)
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, f"{TINY}-quickgelu", known)


def cache(folder, repository, source):
    """Put a file where the Hugging Face cache has it."""
    place = folder / f"models--{repository.replace('/', '--')}"
    snapshot = place / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("abc")
    (snapshot / "open_clip_model.safetensors").write_bytes(source.read_bytes())


@needs_open_clip
def test_a_tag_in_the_cache_is_used_with_its_own_preparation(tiny, tags, encoder, no_net, tmp_path):
    cache(tmp_path, "storyloom/tiny", tiny[1])
    loaded = load_open_clip(TINY, "plain", cache_dir=tmp_path)
    assert loaded.name == f"{TINY} (plain)"
    assert torch.equal(loaded.texts(["fox"]), encoder.texts(["fox"]))
    assert not torch.allclose(loaded.images(pictures(1)), encoder.images(pictures(1))), "other mean and deviation"


@needs_open_clip
def test_weights_for_another_activation_are_refused(tiny, tags, tmp_path):
    cache(tmp_path, "x/y", tiny[1])
    with pytest.raises(SimilarityError, match=f"choose {TINY}-quickgelu"):
        load_open_clip(TINY, "quick", cache_dir=tmp_path)
    load_open_clip(f"{TINY}-quickgelu", "quick", cache_dir=tmp_path)


@needs_open_clip
def test_a_configuration_beside_the_file_is_followed(tiny, encoder, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(tiny[1].read_bytes())
    config = {"model_cfg": {"quick_gelu": False}, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    assert not torch.allclose(load_open_clip(TINY, path).images(pictures(1)), encoder.images(pictures(1)))
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"quick_gelu": True}}))
    with pytest.raises(SimilarityError, match=f"choose {TINY}-quickgelu"):
        load_open_clip(TINY, path)
    (tmp_path / "open_clip_config.json").write_text("{")
    with pytest.raises(SimilarityError, match="not an open_clip configuration"):
        load_open_clip(TINY, path)


@needs_open_clip
def test_a_file_that_is_not_there_is_named_with_what_there_is(tiny):
    with pytest.raises(SimilarityError, match='no file "gone.safetensors".*ViT-B-32-quickgelu has the tags openai'):
        load_open_clip("ViT-B-32-quickgelu", "gone.safetensors")


@needs_open_clip
def test_loading_says_how_far_it_is(tiny):
    steps = []
    load_open_clip(TINY, tiny[1], progress=lambda done, total: steps.append((done, total)))
    assert steps[-1][0] == steps[-1][1] and [done for done, _ in steps] == sorted(done for done, _ in steps)


def test_without_the_packages_the_error_says_what_to_install():
    code = (
        "import sys\n"
        "sys.modules['open_clip'] = sys.modules['dreamsim'] = None\n"
        "from storyloom.measures import clip, dreamsim, encoders\n"
        "for load in (clip.load_open_clip, dreamsim.load_dreamsim):\n"
        "    try:\n"
        "        load('ensemble', '.')\n"
        "    except encoders.SimilarityError as error:\n"
        "        print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    one, other = done.stdout.splitlines()
    assert "pip install open_clip_torch" in one and "pip install dreamsim" in other


# ---- DreamSim --------------------------------------------------------------------------------------------------------


@pytest.fixture
def package(monkeypatch):
    """A stand-in for the package `dreamsim` that has its interface; calls are kept in `calls`."""
    module = types.ModuleType("dreamsim")
    module.calls = []

    class Model(torch.nn.Linear):
        def __init__(self):
            super().__init__(1, 1)

        def embed(self, batch):
            return batch.mean((2, 3))

    def prepare(picture):
        return torch.from_numpy(np.array(picture, np.float32) / 255).permute(2, 0, 1)[None]

    def dreamsim(**settings):
        module.calls.append(settings)
        torch.hub.set_dir(settings["cache_dir"])
        return Model(), prepare

    module.dreamsim = dreamsim
    monkeypatch.setitem(sys.modules, "dreamsim", module)
    return module


def weights_in(folder, kind):
    for name in DREAMSIM_FILES[kind]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_dreamsim_is_a_cosine_distance_of_what_the_package_embeds(package, tmp_path):
    weights_in(tmp_path, "ensemble")
    hub = torch.hub.get_dir()
    dreamsim = load_dreamsim("ensemble", tmp_path)
    assert package.calls == [
        {"pretrained": True, "device": "cpu", "cache_dir": str(tmp_path), "dreamsim_type": "ensemble"}
    ]
    assert torch.hub.get_dir() == hub and dreamsim.name == "DreamSim ensemble"
    images = torch.zeros(3, 4, 4, 3)
    images[0, ..., 0] = images[1, ..., 1] = images[2, ..., :2] = 1
    near = 1 - 2**-0.5
    expected = torch.tensor([[0, 1, near], [1, 0, near], [near, near, 0]], dtype=torch.float64)
    torch.testing.assert_close(dreamsim.distance(images), expected, rtol=0, atol=1e-12)
    assert dreamsim.distance(torch.rand(40, 4, 4, 3)).shape == (40, 40)


@pytest.mark.parametrize("kind", DREAMSIM_FILES)
def test_a_missing_file_is_named_and_the_package_is_never_asked(package, tmp_path, kind):
    weights_in(tmp_path, kind)
    *_, gone = DREAMSIM_FILES[kind]
    (tmp_path / gone).unlink()
    with pytest.raises(SimilarityError, match=f"missing: {gone}.*python -c") as error:
        load_dreamsim(kind, tmp_path)
    assert kind in str(error.value) and not package.calls


def test_what_the_package_fails_at_is_one_sentence(package, tmp_path):
    weights_in(tmp_path, "clip_vitb32")
    package.dreamsim = lambda **settings: (_ for _ in ()).throw(RuntimeError("broken\nmore"))
    with pytest.raises(SimilarityError, match=r"cannot read its weights in .* \(broken\)"):
        load_dreamsim("clip_vitb32", tmp_path)
    with pytest.raises(SimilarityError, match='no kind "vit"'):
        load_dreamsim("vit", tmp_path)
