"""StoryMaker's file: every tensor lands where it belongs, and what is no such file is refused in one sentence."""

import importlib.util
import io
import os
import pickle
import subprocess
import sys
import tarfile
import zipfile
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from storyloom.models.storymaker import weights as storymaker
from storyloom.models.storymaker.ppr import PositionalPerceiverResampler
from storyloom.models.storymaker.weights import StoryMakerFileError, load_storymaker, read_checkpoint

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "convert_storymaker.py"

PROCESSORS = (
    (range(0, 4), "down_blocks.1.attentions.0", ("input", 4), 640),
    (range(4, 8), "down_blocks.1.attentions.1", ("input", 5), 640),
    (range(8, 28), "down_blocks.2.attentions.0", ("input", 7), 1280),
    (range(28, 48), "down_blocks.2.attentions.1", ("input", 8), 1280),
    (range(48, 68), "up_blocks.0.attentions.0", ("output", 0), 1280),
    (range(68, 88), "up_blocks.0.attentions.1", ("output", 1), 1280),
    (range(88, 108), "up_blocks.0.attentions.2", ("output", 2), 1280),
    (range(108, 112), "up_blocks.1.attentions.0", ("output", 3), 640),
    (range(112, 116), "up_blocks.1.attentions.1", ("output", 4), 640),
    (range(116, 120), "up_blocks.1.attentions.2", ("output", 5), 640),
    (range(120, 140), "mid_block.attentions.0", ("middle", 0), 1280),
)


def adapter_shapes(rank=128, scaled_to=None):
    """Shapes of `ip_adapter`; scaled_to: (width of all layers, context) instead of the real ones."""
    shapes = {}
    for numbers, _, _, width in PROCESSORS:
        width, context = scaled_to or (width, 2048)
        for i in numbers:
            source = context if i % 2 else width
            for target, inside in (("q", width), ("k", source), ("v", source), ("out", width)):
                shapes[f"{i}.to_{target}_lora.down.weight"] = (rank, inside)
                shapes[f"{i}.to_{target}_lora.up.weight"] = (width, rank)
            if i % 2:
                shapes |= {f"{i}.to_k_ip.weight": (width, context), f"{i}.to_v_ip.weight": (width, context)}
    return shapes


def without_memory(shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def published(make=without_memory, rank=128):
    """A file with the real names and shapes."""
    network = PositionalPerceiverResampler(device="meta").state_dict()
    return {
        "image_proj_model": {name: make(tuple(value.shape)) for name, value in network.items()},
        "ip_adapter": {name: make(shape) for name, shape in adapter_shapes(rank).items()},
    }


def flat(nested):
    return {f"{part}.{name}": value for part, inside in nested.items() for name, value in inside.items()}


def numbered(dtype=torch.float16):
    """Real shapes, each tensor one number of its own repeated, so that the file stays small."""
    count = iter(range(2000))
    return published(lambda shape: torch.tensor(float(next(count)), dtype=dtype).expand(shape), rank=2)


def one_sentence(refused):
    text = str(refused.value)
    assert "\n" not in text and text.endswith(".") and ": " in text, text
    return text


def test_the_synthetic_file_is_as_large_as_the_published_one():
    whole = published()
    assert len(whole["image_proj_model"]) == 113 and len(whole["ip_adapter"]) == 1260
    assert sum(x.numel() for x in whole["ip_adapter"].values()) == pytest.approx(526.6e6, rel=1e-4)
    assert sum(x.numel() for x in flat(whole).values()) == pytest.approx(831e6, rel=1e-3)


def test_every_tensor_lands_where_the_table_says():
    whole = published()
    adapter = whole["ip_adapter"]
    weights = load_storymaker(whole)
    assert weights.ppr == whole["image_proj_model"] and weights.missing == "" and weights.unused == ()
    lora, image_kv = {}, {}
    for numbers, place, (part, number), _ in PROCESSORS:
        for i in numbers:
            j, cross = divmod(i - numbers.start, 2)
            name = f"{place}.transformer_blocks.{j}.attn{1 + cross}.processor"
            for target in ("q", "k", "v", "out"):
                for half in ("up", "down"):
                    lora[f"{name}.to_{target}_lora.{half}.weight"] = adapter[f"{i}.to_{target}_lora.{half}.weight"]
            if cross:
                image_kv[part, number, j] = adapter[f"{i}.to_k_ip.weight"], adapter[f"{i}.to_v_ip.weight"]
    assert len(lora) == 1120 and len(image_kv) == 70
    assert weights.lora.keys() == lora.keys() and all(weights.lora[name] is lora[name] for name in lora)
    assert weights.image_kv.keys() == image_kv.keys()
    for key, pair in image_kv.items():
        assert all(a is b for a, b in zip(weights.image_kv[key], pair, strict=True))
    assert "mid_block.attentions.0.transformer_blocks.9.attn2.processor.to_out_lora.up.weight" in weights.lora
    assert sum(k.shape[0] for k, _ in weights.image_kv.values()) == 83_200
    landed = 113 + len(weights.lora) + 2 * len(weights.image_kv)
    assert landed == len(flat(whole))


def test_dotted_names_are_the_same_as_nested_ones():
    whole = published()
    nested, dotted = load_storymaker(whole), load_storymaker(flat(whole))
    assert dotted.ppr == nested.ppr and dotted.lora == nested.lora and dotted.image_kv == nested.image_kv


@pytest.mark.parametrize("bare", [True, False])
def test_half_a_file_lands_and_says_what_is_missing(bare):
    whole = published()
    for part, other in (("image_proj_model", "ip_adapter"), ("ip_adapter", "image_proj_model")):
        weights = load_storymaker(whole[part] if bare else {part: whole[part]})
        assert f"{other} is missing" in weights.missing and weights.missing.count(".") == 2  # mask.bin and the end
        filled = [bool(weights.ppr), bool(weights.lora), bool(weights.image_kv)]
        assert filled == ([True, False, False] if part == "image_proj_model" else [False, True, True])


@pytest.mark.parametrize("rank", [1, 4, 64, 128])
def test_any_rank_will_do(rank):
    weights = load_storymaker(published(rank=rank))
    assert {min(x.shape) for x in weights.lora.values()} == {rank}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_number_type_is_kept(dtype):
    weights = load_storymaker(published(partial(without_memory, dtype=dtype)))
    tensors = [*weights.ppr.values(), *weights.lora.values(), *(x for pair in weights.image_kv.values() for x in pair)]
    assert {x.dtype for x in tensors} == {dtype}


def test_tensors_of_other_parts_are_reported_and_do_no_harm():
    weights = load_storymaker(published() | {"optimizer": {"step": torch.zeros(1)}, "epoch": torch.zeros(1)})
    assert weights.unused == ("optimizer.step", "epoch") and weights.missing == "" and len(weights.lora) == 1120


def refused(change):
    whole = published()
    change(whole["image_proj_model"], whole["ip_adapter"])
    with pytest.raises(StoryMakerFileError) as error:
        load_storymaker(whole)
    return one_sentence(error)


def test_missing_tensors_are_counted_and_the_first_ones_named_and_the_log_has_all(caplog):
    def change(ppr, adapter):
        del ppr["bg_embed"], adapter["7.to_k_ip.weight"], adapter["0.to_q_lora.down.weight"]
        del adapter["139.to_out_lora.up.weight"]

    text = refused(change)
    assert "4 missing: image_proj_model.bg_embed, ip_adapter.0.to_q_lora.down.weight, " in text
    assert "and 1 more" in text and "shape" not in text and "139" not in text
    (line,) = caplog.messages
    names = ("image_proj_model.bg_embed", "ip_adapter.0.to_q_lora.down.weight", "ip_adapter.7.to_k_ip.weight")
    assert line == f"Tensors of StoryMaker's file, 4 missing: {', '.join(names)}, ip_adapter.139.to_out_lora.up.weight"


def test_unknown_tensors_are_named():
    def change(ppr, adapter):
        ppr["resample.layers.4.0.to_q.weight"] = adapter["140.to_k_ip.weight"] = torch.zeros(1)
        adapter["0.to_k_ip.weight"] = torch.zeros(640, 640)

    text = refused(change)
    assert "3 unknown: image_proj_model.resample.layers.4.0.to_q.weight, ip_adapter.140.to_k_ip.weight, " in text
    assert "missing" not in text


@pytest.mark.parametrize(
    "name, shape, expected",
    [
        ("pos_embed", (2, 20, 2048), "image_proj_model.pos_embed [2, 20, 2048] instead of [3, 20, 2048]"),
        ("1.to_k_ip.weight", (640, 768), "ip_adapter.1.to_k_ip.weight [640, 768] instead of [640, 2048]"),
        ("120.to_q_lora.down.weight", (128, 640), "[128, 640] instead of [128, 1280]"),
        ("3.to_v_lora.up.weight", (640, 64), "ip_adapter.3.to_v_lora.up.weight [640, 64] instead of [640, 128]"),
        ("3.to_v_lora.down.weight", (128,), "ip_adapter.3.to_v_lora.down.weight [128] instead of [128, 2048]"),
    ],
)
def test_a_wrong_shape_is_reported_with_the_right_one(name, shape, expected):
    def change(ppr, adapter):
        part = ppr if name in ppr else adapter
        part[name] = torch.empty(shape, device="meta")

    text = refused(change)
    assert f"1 of another shape: {expected}" in text or (expected in text and "1 of another shape: " in text)


def test_a_pair_without_rank_is_refused():
    def change(ppr, adapter):
        adapter["0.to_q_lora.down.weight"], adapter["0.to_q_lora.up.weight"] = torch.empty(0, 640), torch.empty(640, 0)

    assert "2 of another shape: ip_adapter.0.to_q_lora.down.weight [0, 640] instead of [1, 640]" in refused(change)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_no_numbers_are_refused_with_the_name(value):
    def change(ppr, adapter):
        ppr["bg_embed"] = torch.zeros(1, 20, 2048)
        ppr["bg_embed"][0, 7, 99] = value
        adapter["5.to_v_ip.weight"] = torch.full((640, 2048), value, dtype=torch.float16)

    assert "2 not finite: image_proj_model.bg_embed, ip_adapter.5.to_v_ip.weight" in refused(change)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float64, torch.float8_e4m3fn])
def test_other_number_types_are_refused(dtype):
    def change(ppr, adapter):
        ppr["bg_embed"] = torch.zeros(1, 20, 2048).to(dtype)

    assert f"image_proj_model.bg_embed {dtype}" in refused(change)


def test_another_model_is_refused_with_few_names():
    foreign = {f"model.diffusion_model.input_blocks.{i}.0.weight": torch.zeros(2) for i in range(2000)}
    with pytest.raises(StoryMakerFileError, match="2000 unknown") as error:
        load_storymaker(foreign)
    assert len(one_sentence(error)) < 600


def test_an_empty_file_holds_nothing():
    for nothing in ({}, {"ip_adapter": {}, "image_proj_model": {}}):
        with pytest.raises(StoryMakerFileError, match="no part of StoryMaker"):
            load_storymaker(nothing)


# ---- reading ---------------------------------------------------------------------------------------------------------


def test_a_pickle_with_real_shapes_is_read_and_sorted(tmp_path):
    path = tmp_path / "mask.bin"
    torch.save(numbered(), path)
    weights = load_storymaker(read_checkpoint(str(path)))
    values = [x.flatten()[0].item() for x in weights.ppr.values()]
    assert values == list(range(113))
    up = weights.lora["mid_block.attentions.0.transformer_blocks.9.attn2.processor.to_out_lora.up.weight"]
    assert up.dtype == torch.float16 and up.shape == (1280, 2) and up[0, 0] == 113 + 1257
    k, v = weights.image_kv["middle", 0, 9]
    assert k.shape == (1280, 2048) and (k[0, 0], v[0, 0]) == (113 + 1258, 113 + 1259)


def little():
    return {"image_proj_model": {"bg_embed": torch.arange(6.0).view(2, 3)}, "ip_adapter": {"1.x": torch.ones(2).half()}}


def zipped(path):
    torch.save(little(), path)


def legacy(path):
    torch.save(little(), path, _use_new_zipfile_serialization=False)


def safe(path):
    save_file(flat(little()), path)


@pytest.mark.parametrize("write", [zipped, legacy, safe])
@pytest.mark.parametrize("name", ["mask.bin", "mask.safetensors", "mask"])
def test_the_format_is_told_by_content_not_by_name(tmp_path, write, name):
    write(tmp_path / name)
    tensors = read_checkpoint(tmp_path / name)
    tensors = tensors if write is safe else flat(tensors)
    assert tensors.keys() == flat(little()).keys()
    assert all(torch.equal(tensors[key], value) for key, value in flat(little()).items())
    assert {value.dtype for value in tensors.values()} == {torch.float32, torch.float16}


class Payload:
    """A pickle that creates a file when a careless reader opens it."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch '{self.mark}'",)


def hostile_zip(path, mark):
    torch.save({"image_proj_model": {"bg_embed": Payload(mark)}}, path)


def hostile_legacy(path, mark):
    torch.save({"image_proj_model": Payload(mark)}, path, _use_new_zipfile_serialization=False)


def hostile_pickle(protocol, path, mark):
    path.write_bytes(pickle.dumps({"bg_embed": Payload(mark)}, protocol=protocol))


HOSTILE = [hostile_zip, hostile_legacy, *(partial(hostile_pickle, protocol) for protocol in (0, 2, 4))]


@pytest.mark.parametrize("write", HOSTILE)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_nothing_in_a_hostile_file_is_run(tmp_path, write):
    path, mark = tmp_path / "mask.bin", tmp_path / "was run"
    write(path=path, mark=mark)
    with pytest.raises(StoryMakerFileError) as error:
        read_checkpoint(path)
    assert "mask.bin" in one_sentence(error)
    assert not mark.exists()
    if write in (hostile_zip, hostile_legacy):
        assert f"loads {os.system.__module__}.system" in str(error.value)


def test_the_payload_would_have_run(tmp_path):
    path, mark = tmp_path / "mask.bin", tmp_path / "was run"
    hostile_zip(path, mark)
    torch.load(path, weights_only=False)
    assert mark.exists()


def empty(path):
    path.write_bytes(b"")


def folder(path):
    path.mkdir()


def absent(path):
    pass


def half_a_zip(path):
    torch.save({"x": torch.zeros(100_000)}, path)
    path.write_bytes(path.read_bytes()[:200_000])


def half_a_legacy_file(path):
    torch.save({"x": torch.zeros(100_000)}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:200_000])


def half_a_safetensors_file(path):
    save_file({"x": torch.zeros(100_000)}, path)
    path.write_bytes(path.read_bytes()[:200_000])


def few_bytes(path):
    path.write_bytes(b"PK\x03\x04")


def web_page(path):
    path.write_text("<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>")


def pointer(path):
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3300000000\n")


def noise(path):
    path.write_bytes(bytes(range(1, 128)) * 100)


def another_zip(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")


def bomb(path):
    """A real file, one of whose tensors is compressed to a thousandth."""
    torch.save({"x": torch.zeros(1_000_000)}, path)
    with zipfile.ZipFile(path) as archive:
        inside = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in inside.items():
            archive.writestr(name, content)


def short_record(path):
    """A real file with less data than its tensors say."""
    torch.save({"x": torch.zeros(100_000)}, path)
    with zipfile.ZipFile(path) as archive:
        inside = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in inside.items():
            archive.writestr(name, content[:1000])


def old_tar(path):
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("sys_info"), io.BytesIO())


def a_list(path):
    torch.save([torch.zeros(2)], path)


def a_tensor(path):
    torch.save(torch.zeros(2), path)


def numbers(path):
    torch.save({"image_proj_model": {"bg_embed": torch.zeros(2)}, "step": 5}, path)


def deeper(path):
    torch.save({"model": {"image_proj_model": {"bg_embed": torch.zeros(2)}}}, path)


def endless(path):
    inside = {}
    inside["again"] = inside
    torch.save(inside, path)


def sparse(path):
    torch.save({"x": torch.eye(3).to_sparse()}, path)


def without_data(path):
    torch.save({"x": torch.empty(3, device="meta")}, path)


REFUSED = {
    empty: "is empty",
    folder: "is a folder",
    absent: "does not exist",
    half_a_zip: "damaged or incomplete",
    half_a_legacy_file: "damaged or incomplete",
    half_a_safetensors_file: "damaged or incomplete",
    few_bytes: "damaged or incomplete",
    web_page: "begins with '<!DOCTYPE html>",
    pointer: "begins with 'version https://git-lfs",
    noise: "neither a PyTorch nor a safetensors file",
    another_zip: "damaged or incomplete",
    bomb: "compressed archive",
    short_record: "damaged or incomplete",
    old_tar: "neither a PyTorch nor a safetensors file",
    a_list: "list",
    a_tensor: "Tensor",
    numbers: "int step",
    deeper: "dict model.image_proj_model",
    endless: "endlessly nested objects",
    sparse: "Tensor x",
    without_data: "Tensor x",
}


@pytest.mark.parametrize("write", REFUSED, ids=lambda write: write.__name__)
def test_what_is_no_file_of_weights_is_refused_with_one_sentence(tmp_path, write):
    path = tmp_path / "mask.bin"
    write(path)
    with pytest.raises(StoryMakerFileError) as error:
        read_checkpoint(path)
    text = one_sentence(error)
    assert str(path) in text and REFUSED[write] in text


# ---- the converter ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def converter():
    spec = importlib.util.spec_from_file_location("storyloom_script_convert_storymaker", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def whole(monkeypatch):
    """A file with all names for a StoryMaker of its small size."""
    small = partial(PositionalPerceiverResampler, width=16, image_width=8, id_width=4, head_width=4)
    monkeypatch.setattr(storymaker, "PositionalPerceiverResampler", small)
    monkeypatch.setattr(storymaker, "LAYER_SLOTS", tuple(slot._replace(width=8) for slot in storymaker.LAYER_SLOTS))
    monkeypatch.setattr(storymaker, "CONTEXT", 16)
    generator = torch.Generator().manual_seed(0)
    shapes = {name: tuple(value.shape) for name, value in small(device="meta").state_dict().items()}
    both = {"image_proj_model": shapes, "ip_adapter": adapter_shapes(2, (8, 16))}
    return {
        part: {name: torch.randn(shape, generator=generator) for name, shape in inside.items()}
        for part, inside in both.items()
    }


@pytest.fixture
def mask(whole, tmp_path):
    """The file. Its content is of the kind that is read fastest."""
    save_file(flat(whole), tmp_path / "mask.bin")
    return tmp_path / "mask.bin"


def test_a_converted_file_holds_the_same_tensors(converter, whole, tmp_path):
    source, target = tmp_path / "mask.bin", tmp_path / "mask.safetensors"
    torch.save(whole, source)
    source.chmod(0o640)
    report = converter.convert(source, target)
    assert str(target) in report and "1373 tensors" in report
    before, after = flat(whole), read_checkpoint(target)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    with safe_open(target, framework="pt") as file:
        assert file.metadata() == {"format": "pt", "model": "StoryMaker"}
    a, b = load_storymaker(whole), load_storymaker(after)
    assert a.lora.keys() == b.lora.keys() and a.image_kv.keys() == b.image_kv.keys() and not b.missing
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mask.bin", "mask.safetensors"]
    assert target.stat().st_mode == source.stat().st_mode


@pytest.mark.parametrize("name, dtype", [("fp16", torch.float16), ("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_a_conversion_may_change_the_number_type(converter, whole, mask, name, dtype):
    target = mask.with_name("mask.safetensors")
    converter.convert(mask, target, name)
    after = read_checkpoint(target)
    assert all(torch.equal(after[key], value.to(dtype)) for key, value in flat(whole).items())


def test_parts_of_others_are_left_out_and_counted(converter, whole, mask):
    save_file({**flat(whole), "optimizer.step": torch.zeros(1)}, mask)
    target = mask.with_name("mask.safetensors")
    assert "left out 1 " in converter.convert(mask, target)
    assert read_checkpoint(target).keys() == flat(whole).keys()


def test_an_existing_file_is_overwritten_only_when_asked(converter, mask):
    target = mask.with_name("mask.safetensors")
    target.write_text("mine")
    with pytest.raises(converter.ConversionError, match="--force") as error:
        converter.convert(mask, target)
    assert target.read_text() == "mine" and one_sentence(error)
    converter.convert(mask, target, force=True)
    assert len(read_checkpoint(target)) == 1373


def test_a_conversion_that_fails_leaves_nothing_behind(converter, mask, monkeypatch):
    target = mask.with_name("mask.safetensors")
    target.write_text("mine")

    def full(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr(converter.os, "replace", full)
    with pytest.raises(converter.ConversionError, match="No space left") as error:
        converter.convert(mask, target, force=True)
    assert one_sentence(error) and target.read_text() == "mine"
    assert sorted(path.name for path in mask.parent.iterdir()) == ["mask.bin", "mask.safetensors"]


def test_values_that_do_not_fit_the_number_type_are_reported(converter, whole, mask):
    whole["ip_adapter"]["9.to_k_ip.weight"] = torch.full((8, 16), 1e6)
    save_file(flat(whole), mask)
    target = mask.with_name("out.safetensors")
    with pytest.raises(converter.ConversionError, match="ip_adapter.9.to_k_ip.weight .* fp16") as error:
        converter.convert(mask, target, "fp16")
    assert one_sentence(error) and not target.exists()
    converter.convert(mask, target, "bf16")


def test_half_a_file_is_not_converted(converter, whole, mask):
    save_file(whole["ip_adapter"], mask)
    with pytest.raises(converter.ConversionError, match="image_proj_model is missing"):
        converter.convert(mask, mask.with_name("out.safetensors"))


def test_a_folder_that_is_not_there_is_reported_at_once(converter, tmp_path):
    with pytest.raises(converter.ConversionError, match="does not exist"):
        converter.convert(tmp_path / "mask.bin", tmp_path / "nowhere" / "out.safetensors")


def test_the_script_runs_by_itself_and_refuses_in_one_sentence(tmp_path):
    path, mark = tmp_path / "mask.bin", tmp_path / "was run"
    hostile_zip(path, mark)
    command = [sys.executable, "-I", str(SCRIPT), str(path), str(tmp_path / "mask.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1 and done.stdout == "" and not mark.exists()
    assert "which weights do not need" in done.stderr and done.stderr.count("\n") == 1
