"""StoryMaker's file in a real ComfyUI: where it is found, and what an artist is told of one that is of no use."""

import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from story_graphs import call
from story_makers import layers

FOLDERS = ("storymaker", "photomaker", "ipadapter")


@pytest.fixture(autouse=True)
def folder(host):
    """models/storymaker, empty; after a test the folders are as they were: other tests need one that is empty."""
    import folder_paths

    places = [Path(folder_paths.models_dir) / name for name in FOLDERS]
    before = [place for place in places if place.exists()]
    places[0].mkdir(parents=True)
    yield places[0]
    for place in places:
        shutil.rmtree(place, ignore_errors=True)
    for place in before:
        place.mkdir()


def listed():
    import nodes

    (options, *_) = nodes.NODE_CLASS_MAPPINGS["StoryLoom_LoadStoryMaker"].INPUT_TYPES()["required"]["file"][1:]
    return options["options"]


def whole(host):
    """A file with the real names and shapes, each tensor one number of its own repeated, so that it stays small."""
    count, network = iter(range(2000)), host.pack("models.storymaker.ppr").PositionalPerceiverResampler(device="meta")
    adapter = host.pack("models.storymaker.weights")._adapter_shapes({})

    def number(shape):
        return torch.tensor(float(next(count)), dtype=torch.float16).expand(shape)

    return {
        "image_proj_model": {name: number(tensor.shape) for name, tensor in network.state_dict().items()},
        "ip_adapter": {name.removeprefix("ip_adapter."): number(shape) for name, shape in adapter.items()},
    }


def load(graph, file="mask.bin"):
    graph.capture(maker=graph.add("StoryLoom_LoadStoryMaker", file=file)())


def test_files_of_three_folders_are_listed_and_a_folder_may_be_missing_or_deleted(folder):
    import folder_paths

    assert listed() == []
    for name, file in zip(FOLDERS, ("b.bin", "c.safetensors", "a.PT"), strict=True):
        place = folder.parent / name
        place.mkdir(exist_ok=True)
        (place / file).write_bytes(b"x")
        (place / "notes.txt").write_bytes(b"x")
    assert listed() == ["a.PT", "b.bin", "c.safetensors"]
    shutil.rmtree(folder.parent / "photomaker")
    assert listed() == ["a.PT", "b.bin"]
    shutil.rmtree(folder)
    assert listed() == ["a.PT"]
    paths = folder_paths.get_folder_paths("storymaker")
    assert paths == [os.path.join(folder_paths.models_dir, name) for name in FOLDERS]
    assert folder_paths.get_folder_paths("photomaker") == [paths[1]], "the host's own entry"


def test_a_whole_file_is_loaded_once_and_anew_when_it_was_replaced(host, graph, folder):
    def loaded():
        graph = Graph()
        load(graph)
        return host.run(graph).maker

    Graph, state, path = type(graph), whole(host), folder / "mask.bin"
    torch.save({"image_proj_model": state["image_proj_model"]}, path)
    with pytest.raises(
        Exception, match="mask.bin: The file contains only half of StoryMaker; ip_adapter is"
    ) as refused:
        loaded()
    assert refused.value.node == "StoryLoom_LoadStoryMaker" and str(refused.value).endswith(".")
    torch.save(state, path)
    maker = loaded()
    assert len(maker.lora) == 2 * 560 and len(maker.adapter.widths) == 70 and maker.adapter.context == 2048
    expected = state["ip_adapter"]["121.to_v_ip.weight"][0, 0]
    assert (maker.adapter.projections["middle_0_0_v"].weight == expected).all()
    assert loaded() is maker
    os.utime(path, (1, 1))
    assert loaded() is not maker


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/storyloom-was-here",)


def hostile(path, host):
    torch.save({"image_proj_model": Evil()}, path)


def bare_pickle(path, host):
    path.write_bytes(pickle.dumps(Evil()))


def truncated(path, host):
    torch.save({"image_proj_model": {"pos_embed": torch.zeros(100, 100)}}, path)
    path.write_bytes(path.read_bytes()[:5000])


def not_finite(path, host):
    adapter = whole(host)["ip_adapter"]
    adapter["7.to_k_ip.weight"] = torch.tensor(torch.nan, dtype=torch.float16).expand(640, 2048)
    torch.save(adapter, path)


def another_adapter(path, host):
    save_file({f"ip_adapter.{key[1]}.to_k_ip.weight": torch.zeros(2, 2) for key in layers()[:3]}, path)


@pytest.mark.parametrize(
    "write, expected",
    [
        (hostile, r"loads \w+.system, which weights do not need, so it was not opened"),
        (bare_pickle, "is not a weights file, so it was not opened"),
        (truncated, "is damaged or incomplete"),
        (lambda path, host: path.write_bytes(b""), "is empty"),
        (lambda path, host: path.write_text("<!DOCTYPE html><html>"), "is neither a PyTorch nor a safetensors file"),
        (not_finite, r"1 not finite: ip_adapter.7.to_k_ip.weight"),
        (another_adapter, "The file's tensors do not match StoryMaker's"),
    ],
    ids=["hostile", "bare pickle", "truncated", "0 bytes", "a web page", "NaN", "another adapter"],
)
def test_a_file_of_no_use_is_refused_in_a_sentence_and_the_next_prompt_runs(host, graph, folder, write, expected):
    write(folder / "mask.bin", host)
    load(graph)
    with pytest.raises(Exception, match=expected) as refused:
        host.run(graph)
    message = str(refused.value)
    assert refused.value.node == "StoryLoom_LoadStoryMaker" and "\n" not in message and message.endswith(".")
    assert not Path("/tmp/storyloom-was-here").exists()
    graph = type(graph)()
    graph.capture(story=graph.add("StoryLoom_Script", identity="a fox", frames="asleep", style="")())
    assert host.run(graph).story.frames


@pytest.mark.parametrize("file", ["../../secret.bin", "/etc/passwd", "missing.bin"])
def test_only_files_of_the_folders_are_loaded(host, graph, folder, file):
    (folder.parent.parent / "secret.bin").write_bytes(b"x")
    load(graph, file)
    with pytest.raises(Exception, match="value_not_in_list"):
        host.run(graph)
    linked = type(graph)()
    load(linked, call(linked, host, lambda _: file, ""))
    with pytest.raises(Exception, match=f'There is no file "{file}": put StoryMaker') as refused:
        host.run(linked)
    assert refused.value.node == "StoryLoom_LoadStoryMaker"
