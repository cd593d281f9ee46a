"""Names that lead elsewhere and texts that nobody types, through the real executor: refused, and nothing is left."""

import re
import shutil
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ImageFont
from story_graphs import STORY, build, call, sample
from story_makers import someone
from test_schemas import CATALOGUE, NUMBERS, node_class
from tiny_models import tiny_clip

NAMES = [
    "../../secret{}",
    "../secret{}",
    "{outside}/secret{}",
    "//{outside}/secret{}",
    "..\\..\\secret{}",
    "C:\\secret{}",
    "file://{outside}/secret{}",
    "~/secret{}",
    "a\0b{}",
    "\ud800{}",
    "x" * 5000 + "{}",
    "..",
    ".",
    "",
    "/dev/zero",
    "there{}/../../../secret{}",
]
LOADERS = {
    "StoryLoom_LoadCharacter": ("file", "storyloom_characters", ".safetensors"),
    "StoryLoom_LoadStoryMaker": ("file", "storymaker", ".bin"),
    "StoryLoom_LoadFaceAnalysis": ("pack", "insightface/models", ""),
    "StoryLoom_Page": ("font", "storyloom_fonts", ".ttf"),
    "StoryLoom_LoadOpenCLIP": ("weights", "open_clip", ".pt"),
}


def everything(folder):
    """Every file under a folder with its size and time."""
    return {path: (path.lstat().st_size, path.lstat().st_mtime_ns) for path in folder.rglob("*") if not path.is_dir()}


@pytest.fixture
def places(host, tmp_path):
    """The models folder with one good file of every kind in it, and the same files outside of every folder."""
    import folder_paths

    models = Path(folder_paths.models_dir)
    characters = host.pack("models.storymaker.characters")
    part = characters.features_of(None, torch.zeros(characters.FEATURES))
    good = characters.CharacterReference("Fox", ((part, 1.0),), torch.zeros(8, 8, 3))
    made = []
    for _, folder, suffix in LOADERS.values():
        place = models / folder
        if not place.exists():
            made.append(models / folder.partition("/")[0])
            place.mkdir(parents=True)
        for target in (place / f"there{suffix}", tmp_path / f"secret{suffix}", models.parent / f"secret{suffix}"):
            if not suffix:
                target.mkdir()
                (target / "det.onnx").write_bytes(b"no model")
            elif suffix == ".safetensors":
                characters.save_character(target, good)
            elif suffix == ".ttf":
                target.write_bytes(ImageFont.load_default(20).font_bytes)
            else:
                torch.save({"image_proj_model": {"x": torch.zeros(1)}}, target)
    yield models, tmp_path
    for folder in made:
        shutil.rmtree(folder)
    for path in models.parent.glob("secret*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def inputs_of(graph, host, node):
    """What a node needs beside its name."""
    if node == "StoryLoom_LoadFaceAnalysis":
        return {"provider": "CPU"}
    if node == "StoryLoom_LoadOpenCLIP":
        return {"architecture": "ViT-B-32", "download": False}
    if node != "StoryLoom_Page":
        return {}
    images = call(graph, host, lambda _: torch.zeros(1, 16, 16, 3), "")
    return {"images": images, "columns": 0, "captions": True, "gap": 0, "caption_size": 0, "title": "A title"}


def message(graph, host, node, name, linked):
    """What is said of a name, typed or through a link, or None when it is taken."""
    widget, graph = LOADERS[node][0], type(graph)()
    settings = inputs_of(graph, host, node)
    settings[widget] = call(graph, host, lambda _: name, "") if linked else name
    graph.capture(x=graph.add(node, **settings)())
    try:
        host.run(graph)
    except Exception as refused:
        return str(refused)
    return None


def details_of(refused):
    """ComfyUI's details of refused widgets, or else the message of the node that raised."""
    errors = [error["details"] for each in getattr(refused, "errors", {}).values() for error in each]
    return " ".join(errors) or str(refused)


@pytest.mark.parametrize("node", LOADERS)
def test_no_name_leads_out_of_its_folder(host, graph, places, node):
    models, outside = places
    _, folder, suffix = LOADERS[node]
    before = {place: everything(place) for place in (models.parent, outside)}
    assert message(graph, host, node, f"there{suffix}", linked=False) is None or node in (
        "StoryLoom_LoadStoryMaker",
        "StoryLoom_LoadFaceAnalysis",
        "StoryLoom_LoadOpenCLIP",
    )
    for pattern in NAMES:
        name = pattern.replace("{outside}", str(outside)).replace("{}", suffix)
        for linked in (False, True):
            error = message(graph, host, node, name, linked)
            assert error, f"{name!r} is taken"
            known = ("not_in_list", "not in list", "not found", "There is no ", "failed validation")
            assert any(words in error for words in known), (name, error)
    assert {place: everything(place) for place in before} == before


@pytest.mark.parametrize("node", ["StoryLoom_SavePage", "StoryLoom_Consistency"])
def test_no_prefix_leads_out_of_the_output_folder(host, graph, tmp_path, node):
    """Refused in one sentence, or taken as Save Image does: "~" is a folder's name there."""
    import folder_paths

    output = Path(folder_paths.get_output_directory())
    before = {place: everything(place) for place in (host.base, tmp_path)}
    taken = set()
    for pattern in [*NAMES, "C:secret", "a/./../../secret", "there/", "...", "x" * 250, "a/" * 3000 + "b"]:
        name = pattern.replace("{outside}", str(tmp_path)).replace("{}", "")
        for linked in (False, True):
            graph = type(graph)()
            inputs = {"images": call(graph, host, lambda _: torch.zeros(1, 48, 48, 3), "")}
            if node == "StoryLoom_Consistency":
                inputs["clip"] = graph.add("StoryLoom_DemoSimilarity")()
            else:
                inputs |= {"format": "png", "quality": 90}
            inputs["filename_prefix"] = call(graph, host, lambda _, name=name: name, "") if linked else name
            graph.add(node, **inputs)
            try:
                host.run(graph)
                taken.add(pattern)
            except Exception as refused:
                error = details_of(refused)
                known = ("has no file name", "is outside the output folder", "too long for a file")
                assert "filename_prefix" in error and any(words in error for words in known), (name[:40], error[:300])
                assert len(error) < 300
    assert taken == {"~/secret{}"}
    shown = Path(folder_paths.get_temp_directory())
    written = {path for path in everything(host.base) if path not in before[host.base] and path.parent != shown}
    assert len(written) == 2 and {path.parent for path in written} == {output / "~"}
    assert everything(tmp_path) == before[tmp_path]
    shutil.rmtree(output / "~")


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights")
def test_links_in_a_models_folder_are_followed_as_comfyui_does_and_never_written_through(host, graph, places):
    """Artists keep models on other disks and link them. What a link leads to is read as any file: safely."""
    models, outside = places
    folder = models / "storyloom_characters"
    (folder / "linked.safetensors").symlink_to(outside / "secret.safetensors")
    (folder / "passwd.safetensors").symlink_to("/etc/passwd")
    (folder / "nowhere.safetensors").symlink_to(outside / "nowhere")
    (folder / "round.safetensors").symlink_to(folder / "round.safetensors")
    assert message(graph, host, "StoryLoom_LoadCharacter", "linked.safetensors", linked=True) is None
    for name in ("passwd", "nowhere", "round"):
        error = message(graph, host, "StoryLoom_LoadCharacter", f"{name}.safetensors", linked=True)
        assert "cannot be read as a character" in error or "not found" in error, error
        assert "root:" not in error
    import folder_paths

    output = Path(folder_paths.get_output_directory(), "storyloom_characters")
    output.mkdir(parents=True, exist_ok=True)
    victim = outside / "secret.safetensors"
    before = victim.read_bytes()
    (output / "victim.safetensors").symlink_to(victim)
    fox = call(graph, host, lambda _: someone(host, 1, "Fox"), "")
    graph.add("StoryLoom_SaveCharacter", character=fox, file_name="victim", overwrite=True)
    host.run(graph)
    assert victim.read_bytes() == before and not (output / "victim.safetensors").is_symlink()
    shutil.rmtree(output)


def numbers_of(node_id):
    """A node's widgets that hold a number."""
    return [entry for entry in node_class(node_id).GET_SCHEMA().inputs if entry.get_io_type() in NUMBERS]


def set_to(host, new_graph, maker, models, node_id, linked, **values):
    """The error of a node with values in some widgets and ordinary things in its other required inputs.

    None if it runs.
    """
    around = {
        "MODEL": models[0],
        "CLIP": models[1],
        "STORYLOOM_STORY": host.pack("prompts.script").parse_story(**STORY),
        "LATENT": {"samples": torch.zeros(3, 4, 8, 8)},
        "IMAGE": torch.zeros(3, 16, 16, 3),
        "STORYLOOM_CHARACTER": someone(host, 1),
        "STORYLOOM_STORYMAKER": maker,
    }
    entries = node_class(node_id).GET_SCHEMA().inputs
    required = [each for each in entries if each.get_io_type() in around and not getattr(each, "optional", False)]
    carried = {each.id: around[each.get_io_type()] for each in required}
    inputs = {each.id: each.default or each.options[0] for each in entries if getattr(each, "options", None)}
    inputs |= {each.id: each.default for each in entries if getattr(each, "default", None) is not None} | values
    graph = new_graph()
    for name, value in (carried | values if linked else carried).items():
        inputs[name] = call(graph, host, lambda _, value=value: value, "")
    graph.capture(x=graph.add(node_id, **inputs)())
    try:
        host.run(graph)
    except Exception as refused:
        return details_of(refused)
    return None


@pytest.mark.parametrize("node_id", CATALOGUE)
def test_a_number_outside_its_range_is_refused_where_it_is_set(host, new_graph, models, maker, node_id):
    """Through a link, where ComfyUI does not look at what arrives, and typed, where it takes NaN."""
    nan, endless = float("nan"), float("inf")
    message_of = partial(set_to, host, new_graph, maker, models, node_id)
    widgets = numbers_of(node_id)
    for widget in widgets:
        whole = widget.get_io_type() == "INT"
        beyond = [widget.min - 1, widget.max + 1, 10**5000] + [widget.min + 0.5] * whole
        for value in (nan, endless, -endless, np.float32("nan"), *beyond, "1" * 1000, None, [1], 1j):
            error = message_of(linked=True, **{widget.id: value})
            kind = "a whole number" if whole else "a number"
            assert error and re.fullmatch(f"{widget.id} is .+: type or connect {kind} from .+ to .+\\.", error), value
            assert len(error) < 200
        for value in (nan, endless, -endless):
            error = message_of(linked=False, **{widget.id: value})
            assert error and re.search(rf"\b{widget.id}\b", error), value
    assert not widgets or message_of(linked=True, **{each.id: np.float64(each.default) for each in widgets}) is None


def test_an_adapter_is_written_in_a_line(maker):
    """ComfyUI writes out the inputs of every node that fails, for the browser: here hundreds of matrices."""
    assert len(str(maker)) < 1000


def test_a_folder_of_fonts_that_is_deleted_is_an_empty_list(host, graph):
    import folder_paths

    folder = Path(folder_paths.models_dir, "storyloom_fonts")
    folder.mkdir()
    assert message(graph, host, "StoryLoom_Page", "built-in", linked=False) is None
    folder.rmdir()
    assert message(graph, host, "StoryLoom_Page", "built-in", linked=False) is None


TEXTS = [
    "a fox \ud800 asleep",
    "a\0b",
    "\u202eesrever",
    "x" * 3000,
    "漢字" * 200,
    "e\u0301" * 300,
    "🦊👩‍👩‍👧" * 50,
    "\x1b[31m red",
    "((((a))))",
    "embedding:../../../etc/passwd",
    "embedding:/etc/passwd",
    "embedding:" + "x" * 5000,
    "<|endoftext|><|startoftext|>",
    "\u0000\u0001\u0002 z",
    "İıſK",
]


@pytest.fixture(scope="module")
def clip(host):
    """A CLIP that knows embeddings, from an empty folder."""
    return tiny_clip(str(host.base / "models" / "embeddings"))


@pytest.mark.parametrize("encode", ["EncodeOnePrompt", "EncodePerFrame"])
def test_texts_that_nobody_types_are_encoded_or_refused_in_words(host, graph, clip, encode):
    for place, text in enumerate(TEXTS):
        graph = type(graph)()
        changes = {"identity": text, "frames": "asleep"} if place % 2 else {"identity": "a fox", "frames": f"is {text}"}
        parts = build(graph, encode, size=(64, 64), **changes)
        graph[parts["positive"][0]]["inputs"]["clip"] = call(graph, host, lambda _: clip, "")
        graph.capture(encoded=parts["positive"])
        try:
            ((context, _),) = host.run(graph).encoded
        except Exception as refused:
            error = details_of(refused)
            known = ("Shorten", "no tokens", "not balanced", "tokenized differently", "unpaired surrogate")
            assert any(words in error for words in known) and len(error) < 1000, (text[:40], error[:300])
        else:
            assert context.isfinite().all(), text[:40]
    parts = build(graph, "EncodePerFrame", size=(64, 64))
    sample(graph, parts, "x", steps=1)
    assert host.run(graph).x["samples"].isfinite().all(), "the server goes on"
