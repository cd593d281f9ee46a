"""The templates: what the browser interface opens, what POST /prompt runs, and that both are the same graph."""

import asyncio
import importlib
import json
import os
import sys
from functools import cache
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

PACK = Path(__file__).resolve().parents[2]
WORKFLOWS = PACK / "workflows"
NAMES = sorted(path.stem for path in WORKFLOWS.glob("*.json"))
ONE, TOGETHER, TWO, LONG = REAL = ("One Prompt One Story", "Consistent Characters", "Two Characters", "Long Story")
PHOTO, PEOPLE, OUTFIT = STORYMAKER = ("Character from a Photo", "Two People", "Change the Outfit")
PHOTOMAKER = "PhotoMaker Story"
BOTH, DID = "Demo - With and Without", "Did It Work"
NOTES = {"MarkdownNote", "Note"}
"""Nodes that exist in the browser only."""
WIDGETS = {"INT": int, "FLOAT": (int, float), "STRING": str, "BOOLEAN": bool}
BYPASSED = 4
"""Mode of a bypassed node in the browser's format."""
PANEL = 96
"""Width and height of the frames that tests draw."""
TITLE = 30
"""Height of the title bar above a node's position."""


def demo(name):
    """Name of the same workflow for the demo model."""
    return f"Demo - {name}"


def read(name, folder=WORKFLOWS):
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


def api(name):
    return read(name, WORKFLOWS / "api")


@pytest.fixture(scope="module")
def classes(host):
    """NODE_CLASS_MAPPINGS with the stock nodes of the workflows."""
    import nodes

    (host.base / "input").mkdir(exist_ok=True)  # Load Image lists it
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "server", SimpleNamespace(PromptServer=None))  # 0.19 imports it; none runs here
        for name in ("nodes_preview_any", "nodes_images", "nodes_mask", "nodes_photomaker"):
            path = os.path.join(os.environ["COMFYUI_PATH"], "comfy_extras", f"{name}.py")
            assert asyncio.run(nodes.load_custom_node(path, module_parent="comfy_extras"))
    return nodes.NODE_CLASS_MAPPINGS


@pytest.fixture(scope="module")
def loaded_once(host):
    """Loads the demo models once: loading them for every workflow takes longer than drawing."""
    nodes_of = host.pack("nodes.demo")
    with pytest.MonkeyPatch.context() as patch:
        for node in (nodes_of.DemoModel, nodes_of.DemoStoryMaker):
            made = cache(node.execute)
            patch.setattr(node, "execute", classmethod(lambda cls, made=made: made()))
        yield


FILES = {
    "checkpoints": ("sd_xl_base_1.0.safetensors",),
    "storymaker": ("mask.bin",),
    "clip_vision": ("CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors",),
    "controlnet": ("controlnet-openpose-sdxl-1.0.safetensors",),
    "photomaker": ("photomaker-v1.bin",),
    "insightface": ("models/buffalo_l/det_10g.onnx",),
    "storyloom_characters": ("person.safetensors",),
}
PICTURES = ("photo.png", "photo 2.png", "woman.png", "man.png", "clothing.png", "pose.png")


@pytest.fixture(scope="module")
def checkpoints(host, tmp_path_factory):
    """Folders with the files that the real workflows name. The files are empty; only their names are checked."""
    import folder_paths

    folders = {kind: tmp_path_factory.mktemp(kind) for kind in FILES}
    files = [folders[kind] / name for kind, names in FILES.items() for name in names]
    pictures = [host.base / "input" / name for name in PICTURES]
    for file in (*files, *pictures):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    for kind, folder in folders.items():
        folder_paths.add_model_folder_path(kind, str(folder))
    yield
    for kind, folder in folders.items():
        folder_paths.folder_names_and_paths[kind][0].remove(str(folder))
        folder_paths.filename_list_cache.pop(kind, None)
    for picture in pictures:
        picture.unlink()


def inputs_of(node_class):
    """name -> (type or list of choices, options) of required and optional inputs, in order."""
    described = node_class.INPUT_TYPES()
    every = {**described.get("required", {}), **described.get("optional", {})}
    return {name: (kind, rest[0] if rest else {}) for name, (kind, *rest) in every.items()}


def widgets_of(node_class):
    """(name, type, options) of every widget in the order of the browser."""
    for name, (kind, options) in inputs_of(node_class).items():
        if isinstance(kind, list) or kind in {*WIDGETS, "COMBO"}:
            yield name, kind, options
            if options.get("control_after_generate"):
                modes = ["fixed", "increment", "decrement", "randomize"]
                yield "control_after_generate", modes, {}
            if options.get("image_upload"):
                yield "upload", ["image"], {}


def values_of(node, node_class):
    """Widget name -> value of a node in the browser's format."""
    widgets = list(widgets_of(node_class))
    return {name: value for (name, *_), value in zip(widgets, node.get("widgets_values", []), strict=True)}


def links_of(workflow):
    """(node, input name) -> (node, output number). Checks every link at both ends."""
    by_id = {node["id"]: node for node in workflow["nodes"]}
    sources = {}
    for number, source, output, target, slot, kind in workflow["links"]:
        sender, receiver = by_id[source]["outputs"][output], by_id[target]["inputs"][slot]
        assert number in sender["links"], f"link {number} is unknown to node {source}"
        assert receiver["link"] == number, f"link {number} is unknown to node {target}"
        assert kind == sender["type"] and receiver["type"] in (kind, "*"), f"link {number} joins different types"
        sources[target, receiver["name"]] = (source, output)
    ends = [i["link"] for node in workflow["nodes"] for i in node["inputs"] if i["link"] is not None]
    starts = [link for node in workflow["nodes"] for output in node["outputs"] for link in output["links"] or ()]
    assert sorted(ends) == sorted(starts) == sorted(link[0] for link in workflow["links"])
    return sources


def real_nodes(workflow):
    return [node for node in workflow["nodes"] if node["type"] not in NOTES]


def test_all_workflows_are_here_in_both_formats_and_have_a_thumbnail():
    assert NAMES == sorted([*REAL, *map(demo, REAL), DID, BOTH, *STORYMAKER, demo(PHOTO), PHOTOMAKER])
    assert NAMES == sorted(path.stem for path in (WORKFLOWS / "api").glob("*.json"))
    for name in NAMES:
        picture = WORKFLOWS / f"{name}.jpg"
        assert picture.read_bytes()[:3] == b"\xff\xd8\xff" and picture.stat().st_size <= 150_000


@pytest.mark.parametrize("name", NAMES)
def test_nodes_exist_and_their_slots_are_those_of_the_schema(classes, name):
    for node in real_nodes(read(name)):
        assert node["type"] in classes
        node_class = classes[node["type"]]
        widgets = {widget for widget, *_ in widgets_of(node_class)}
        slots = {key: kind for key, (kind, _) in inputs_of(node_class).items() if key not in widgets}
        assert {i["name"]: i["type"] for i in node["inputs"]} == slots
        kinds = list(node_class.RETURN_TYPES)
        used = [output for output in node["outputs"] if output["links"]]
        assert [output["type"] for output in node["outputs"]][: len(kinds)] == kinds
        assert all(node["outputs"].index(output) < len(kinds) for output in used)


@pytest.mark.parametrize("name", NAMES)
def test_widget_values_fit_the_schema(classes, checkpoints, name):
    for node in real_nodes(read(name)):
        node_class = classes[node["type"]]
        values = values_of(node, node_class)
        assert node.get("widgets_values_named", {}) == values
        for key, kind, options in widgets_of(node_class):
            value = values[key]
            choices = kind if isinstance(kind, list) else options.get("options") if kind == "COMBO" else None
            if choices is not None:
                assert value in choices, f"{node['type']}.{key}"
            else:
                assert isinstance(value, WIDGETS[kind]) and isinstance(value, bool) == (kind == "BOOLEAN")
            if kind in ("INT", "FLOAT"):
                assert options.get("min", value) <= value <= options.get("max", value), f"{node['type']}.{key}"


@pytest.mark.parametrize("name", NAMES)
def test_every_link_agrees_at_both_ends_and_no_required_input_is_open(classes, name):
    workflow = read(name)
    links = links_of(workflow)
    for node in real_nodes(workflow):
        node_class = classes[node["type"]]
        widgets = {key for key, *_ in widgets_of(node_class)}
        for key in {} if node["mode"] == BYPASSED else node_class.INPUT_TYPES().get("required", {}):
            assert key in widgets or (node["id"], key) in links, f"{node['type']}.{key} is not connected"


SLOT, WIDGET = 20, 24
"""Height of a socket and of a widget in a node."""


@pytest.mark.parametrize("name", NAMES)
def test_no_node_lies_on_another_and_groups_hold_whole_nodes(name):
    workflow = read(name)
    boxes = {}
    for node in workflow["nodes"]:
        (x, y), (width, height) = node["pos"], node["size"]
        sockets = max(len(node["inputs"]), len(node["outputs"]))
        assert height >= SLOT * sockets + WIDGET * len(node.get("widgets_values", ())), f"{node['type']} will grow"
        boxes[node["id"], node["type"]] = (x, y - TITLE, x + width, y + height)
    assert len(boxes) == len(workflow["nodes"])
    groups = [(x, y, x + w, y + h) for x, y, w, h in (group["bounding"] for group in workflow["groups"])]

    def apart(a, b):
        return a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]

    def inside(a, b):
        return b[0] <= a[0] and b[1] <= a[1] and a[2] <= b[2] and a[3] <= b[3]

    for (one, a), (other, b) in combinations(boxes.items(), 2):
        assert apart(a, b), f"{one} and {other} overlap"
    assert all(apart(a, b) for a, b in combinations(groups, 2))
    assert all(apart(a, b) or inside(a, b) for a in boxes.values() for b in groups)


def source(workflow, links, number, name):
    """(node, output) whose value an input receives, or None. Passes through bypassed nodes as the browser does."""
    link = links.get((number, name))
    if link is None:
        return None
    node = next(node for node in workflow["nodes"] if node["id"] == link[0])
    if node["mode"] != BYPASSED:
        return link
    kind = node["outputs"][link[1]]["type"]
    through = (i["name"] for i in node["inputs"] if i["type"] == kind and i["link"] is not None)
    name = next(through, None)
    return None if name is None else source(workflow, links, node["id"], name)


@pytest.mark.parametrize("name", NAMES)
def test_both_formats_describe_the_same_graph(classes, name):
    workflow, prompt = read(name), api(name)
    links = links_of(workflow)
    expected = {}
    for node in real_nodes(workflow):
        if node["mode"] == BYPASSED:
            continue
        values = values_of(node, classes[node["type"]])
        for added in ("control_after_generate", "upload"):  # by the browser
            values.pop(added, None)
        linked = {i["name"]: source(workflow, links, node["id"], i["name"]) for i in node["inputs"]}
        joined = {key: [str(link[0]), link[1]] for key, link in linked.items() if link}
        expected[str(node["id"])] = (node["type"], {**values, **joined})
    assert {number: (node["class_type"], node["inputs"]) for number, node in prompt.items()} == expected


@pytest.mark.parametrize("name", NAMES)
def test_comfyui_accepts_it(host, classes, checkpoints, name):
    outputs = host.validate(api(name))
    kinds = {api(name)[number]["class_type"] for number in outputs}
    shown = dict.fromkeys((TWO, demo(TWO), PEOPLE), {"PreviewImage"})
    shown |= dict.fromkeys((BOTH, DID), {"PreviewAny", "StoryLoom_Consistency", "SaveImage"})
    saved = "SaveImage" if name == OUTFIT else "StoryLoom_SavePage"
    assert kinds == {saved} | shown.get(name, {"PreviewImage", "PreviewAny"})


@pytest.mark.parametrize("name", [*REAL, DID, PHOTOMAKER])
def test_the_real_ones_name_their_checkpoint_and_have_the_published_settings(name):
    loader = next(node for node in read(name)["nodes"] if node["type"] == "CheckpointLoaderSimple")
    (model,) = loader["properties"]["models"]
    assert loader["widgets_values"] == [model["name"]] and model["url"].endswith("/" + model["name"])
    assert model["directory"] == "checkpoints"
    by_kind = {node["class_type"]: node["inputs"] for node in api(name).values()}
    sampler = {key: by_kind["KSampler"][key] for key in ("steps", "cfg", "sampler_name", "scheduler", "denoise")}
    published = {"steps": 50, "cfg": 5.0, "sampler_name": "euler", "scheduler": "ddim_uniform", "denoise": 1.0}
    assert sampler == published
    assert (by_kind["StoryLoom_EmptyLatent"]["width"], by_kind["StoryLoom_EmptyLatent"]["height"]) == (1024, 1024)
    drawn_from = by_kind["StoryLoom_SplitBatches" if name == LONG else "KSampler"]
    assert api(name)[drawn_from["negative"][0]]["class_type"] == "ConditioningZeroOut"


@pytest.mark.parametrize("name", REAL)
def test_a_demo_is_the_same_graph_with_the_demo_model(name):
    real, played = (sorted(node["class_type"] for node in api(file).values()) for file in (name, demo(name)))
    exchanged = {"CheckpointLoaderSimple": "StoryLoom_DemoModel"}
    assert sorted(exchanged.get(kind, kind) for kind in real if kind != "StoryLoom_FreeU") == played


def test_did_it_work_measures_with_the_published_encoders_what_the_demo_reads():
    real, played = ([node["class_type"] for node in api(name).values()] for name in (DID, BOTH))
    exchanged = {"CheckpointLoaderSimple": "StoryLoom_DemoModel", "StoryLoom_LoadOpenCLIP": "StoryLoom_DemoSimilarity"}
    assert sorted(exchanged.get(kind, kind) for kind in real) == sorted([*played, "StoryLoom_DemoSimilarity"])
    prompt = api(DID)
    for node in prompt.values():
        if node["class_type"] == "StoryLoom_Consistency":
            clips = [prompt[node["inputs"][name][0]]["inputs"] for name in ("clip", "clip_image")]
            assert [clip["architecture"] for clip in clips] == ["ViT-B-32-quickgelu", "ViT-B-16-quickgelu"]
            assert all((clip["weights"], clip["download"]) == ("cached: openai", False) for clip in clips)


@pytest.mark.parametrize("name", STORYMAKER)
def test_those_with_storymaker_name_their_files_and_have_the_published_settings(name):
    models = [model for node in real_nodes(read(name)) for model in node["properties"].get("models", ())]
    expected = {(kind, file) for kind in ("checkpoints", "storymaker", "clip_vision") for file in FILES[kind]}
    if name == OUTFIT:
        expected |= {("controlnet", file) for file in FILES["controlnet"]}
    assert {(model["directory"], model["name"]) for model in models} == expected
    assert all(
        model["url"].startswith("https://huggingface.co/") and "/resolve/main/" in model["url"] for model in models
    )
    loaders = [node for node in real_nodes(read(name)) if node["properties"].get("models")]
    assert all(node["widgets_values"][0] == node["properties"]["models"][0]["name"] for node in loaders)
    by_kind = {node["class_type"]: node["inputs"] for node in api(name).values()}
    sampler = {key: by_kind["KSampler"][key] for key in ("steps", "cfg", "sampler_name", "denoise")}
    assert sampler == {"steps": 25, "cfg": 7.5, "sampler_name": "uni_pc_bh2", "denoise": 1.0}
    apply = by_kind["StoryLoom_ApplyStoryMaker"]
    assert (apply["token_strength"], apply["lora_strength"]) == (0.8, 0.8)
    latent = by_kind["EmptyLatentImage" if name == OUTFIT else "StoryLoom_EmptyLatent"]
    assert (latent["width"], latent["height"]) == (960, 1280)


def test_the_one_with_photomaker_names_its_file_and_marks_a_noun_of_its_identity():
    prompt, (loader,) = api(PHOTOMAKER), [n for n in real_nodes(read(PHOTOMAKER)) if n["type"] == "PhotoMakerLoader"]
    (model,) = loader["properties"]["models"]
    assert (model["directory"], [model["name"]]) == ("photomaker", loader["widgets_values"])
    assert (model["name"],) == FILES["photomaker"] and model["url"].endswith("/resolve/main/photomaker-v1.bin")
    kinds = {node["class_type"]: node["inputs"] for node in prompt.values()}
    sources = [prompt[kinds["StoryLoom_EncodeOnePrompt"][key][0]]["class_type"] for key in ("photomaker", "photo")]
    assert sources == ["PhotoMakerLoader", "LoadImage"]
    assert kinds["StoryLoom_Script"]["identity"].split().count("photomaker") == 1


@pytest.mark.parametrize("name", STORYMAKER)
def test_face_analysis_waits_bypassed_so_that_they_run_without_it(name):
    modes = {node["type"]: node["mode"] for node in real_nodes(read(name))}
    assert modes["StoryLoom_LoadFaceAnalysis"] == BYPASSED
    ready = [node["inputs"] for node in api(name).values() if node["class_type"] == "StoryLoom_Character"]
    assert ready and not any("face_analysis" in inputs for inputs in ready)


def test_the_photo_s_bypassed_nodes_hand_its_character_on():
    prompt = api(PHOTO)
    kinds = {node["class_type"]: node["inputs"] for node in prompt.values()}
    assert prompt[kinds["StoryLoom_ApplyStoryMaker"]["character_1"][0]]["class_type"] == "StoryLoom_Character"
    bypassed = {node["type"] for node in real_nodes(read(PHOTO)) if node["mode"] == BYPASSED}
    assert {"StoryLoom_BlendCharacters", "StoryLoom_SaveCharacter", "StoryLoom_LoadCharacter"} <= bypassed


def test_two_people_bear_the_names_of_the_script():
    nodes = api(PEOPLE).values()
    script = next(node["inputs"] for node in nodes if node["class_type"] == "StoryLoom_Script")
    people = [node["inputs"]["name"] for node in nodes if node["class_type"] == "StoryLoom_Character"]
    assert len(people) == 2 and all(f"[{name}]" in script["identity"] for name in people)
    assert any(all(f"[{name}]" in line for name in people) for line in script["frames"].splitlines())


def test_the_demo_of_the_photo_has_the_same_way_from_character_to_page():
    """It draws its own photo and needs no file."""
    real, played = (sorted(node["class_type"] for node in api(file).values()) for file in (PHOTO, demo(PHOTO)))
    exchanged = {
        "CheckpointLoaderSimple": "StoryLoom_DemoModel",
        "StoryLoom_LoadStoryMaker": "StoryLoom_DemoStoryMaker",
    }
    kept = {exchanged.get(kind, kind) for kind in real} - {"LoadImage", "CLIPVisionLoader"}
    photo = {"CLIPTextEncode", "EmptyLatentImage", "ConditioningZeroOut"}
    assert set(played) == kept | photo
    note = next(node for node in read(demo(PHOTO))["nodes"] if node["type"] == "MarkdownNote")
    assert "**The adapter and the image encoder are not trained**" in note["widgets_values"][0]


def test_every_node_of_the_pack_has_a_place_in_a_workflow(classes):
    used = {node["type"] for name in NAMES for node in real_nodes(read(name))}
    assert {kind for kind in classes if kind.startswith("StoryLoom_")} <= used


def quick(prompt, side=PANEL):
    """Two steps, and frames of this width and height."""
    for node in prompt.values():
        if node["class_type"] == "KSampler":
            node["inputs"]["steps"] = 2
        if {"width", "height"} <= set(node["inputs"]):
            node["inputs"] |= {"width": side, "height": side}


@pytest.mark.parametrize("name", [demo(ONE), demo(TOGETHER), demo(TWO), demo(PHOTO)])
def test_a_demo_draws_one_page_of_four_frames(host, classes, loaded_once, name):
    import folder_paths
    from PIL import Image

    prompt = api(name)
    kinds = {node["class_type"]: node["inputs"] for node in prompt.values()}
    quick(prompt)
    folder = Path(folder_paths.get_output_directory()) / "StoryLoom"
    before = set(folder.glob("*"))
    graph = type("Prompt", (dict,), {})(prompt)
    host.run(graph, fresh=True)
    (page,) = set(folder.glob("*")) - before
    panel, gap = kinds["StoryLoom_EmptyLatent"]["width"], kinds["StoryLoom_Page"]["gap"]
    with Image.open(page) as image:
        width, height = image.size
        colours = len(image.convert("RGB").resize((64, 64)).getcolors(64 * 64))
    assert width == 2 * panel + 5 * gap, "two panels, a gap between them and margins of two gaps"
    assert 2 * panel + 5 * gap < height < 3 * panel + 5 * gap, "captions below the panels"
    assert colours > 50, "the panels are pictures"


def painted(place, seed):
    """A picture whose middle was painted in the mask editor, which makes it transparent."""
    from PIL import Image

    pixels = torch.randint(0, 256, (96, 64, 4), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    pixels[..., 3] = 255
    pixels[16:80, 16:48, 3] = 0
    Image.fromarray(pixels.numpy(), "RGBA").save(place)


@pytest.mark.parametrize("name", STORYMAKER)
def test_those_with_storymaker_run_with_the_demo_s_models(host, classes, checkpoints, loaded_once, name):
    import folder_paths

    for seed, picture in enumerate(PICTURES):
        painted(host.base / "input" / picture, seed)
    prompt = api(name)
    number = {node["class_type"]: key for key, node in prompt.items()}
    prompt[number["CheckpointLoaderSimple"]] = {"class_type": "StoryLoom_DemoModel", "inputs": {}}
    prompt[number["StoryLoom_LoadStoryMaker"]] = {"class_type": "StoryLoom_DemoStoryMaker", "inputs": {}}
    control = prompt.pop(number["ControlNetApplyAdvanced"])["inputs"] if name == OUTFIT else {}
    for node in prompt.values():
        inputs = node["inputs"]
        if node["class_type"] == "StoryLoom_Character":
            inputs["clip_vision"] = [number["StoryLoom_LoadStoryMaker"], 1]
        if node["class_type"] == "KSampler":
            inputs |= {"steps": 1, **{key: control.get(key, inputs[key]) for key in ("positive", "negative")}}
        if {"width", "height"} <= set(inputs):
            inputs |= {"width": 64, "height": 64}
    folder = Path(folder_paths.get_output_directory()) / "StoryLoom"
    before = set(folder.glob("*"))
    host.run(type("Prompt", (dict,), {})(prompt), fresh=True)
    (new,) = set(folder.glob("*")) - before
    assert new.name.startswith("outfit" if name == OUTFIT else "page")


def test_the_long_demo_draws_its_batches_with_the_same_anchors_and_joins_them(host, classes, loaded_once):
    prompt = api(demo(LONG))
    kinds = {node["class_type"]: (number, node["inputs"]) for number, node in prompt.items()}
    quick(prompt, 64)
    assert kinds["StoryLoom_SplitBatches"][1]["anchors"] == 2
    assert kinds["StoryLoom_ConsistentSelfAttention"][1]["anchors"] == 0, "as the story is split"
    drawn, seen = host.function(lambda latent: seen.append(latent["samples"]) or latent), []
    prompt["watch"] = {"class_type": "TestCall", "inputs": {"value": [kinds["KSampler"][0], 0], "name": drawn}}
    kinds["VAEDecode"][1]["samples"] = ["watch", 0]
    prompt["page"] = {
        "class_type": "TestCapture",
        "inputs": {"value": [kinds["StoryLoom_JoinBatches"][0], 1], "name": "x"},
    }
    joined = host.run(type("Prompt", (dict,), {})(prompt), fresh=True).x
    assert joined.shape[0] == 10 and [batch.shape[0] for batch in seen] == [4] * 4
    assert all(torch.equal(batch[:2], seen[0][:2]) for batch in seen)
    assert not any(torch.equal(batch[2:], seen[0][2:]) for batch in seen[1:])


def test_the_demo_with_and_without_draws_two_rows_from_the_same_noise_on_one_page(host, classes, loaded_once):
    import folder_paths
    from PIL import Image

    prompt = api(BOTH)
    samplers = [node["inputs"] for node in prompt.values() if node["class_type"] == "KSampler"]
    assert len(samplers) == 2
    differ = {key for key in samplers[0] if samplers[0][key] != samplers[1][key]}
    assert differ == {"model", "positive", "negative"}, "seed, noise and settings are the same"
    quick(prompt)
    kinds = [[prompt[inputs[key][0]]["class_type"] for key in ("model", "positive")] for inputs in samplers]
    assert kinds == [
        ["StoryLoom_DemoModel", "StoryLoom_EncodePerFrame"],
        ["StoryLoom_IPCA", "StoryLoom_EncodeOnePrompt"],
    ]
    folder = Path(folder_paths.get_output_directory()) / "StoryLoom"
    before = set(folder.glob("*"))
    host.run(type("Prompt", (dict,), {})(prompt), fresh=True)
    new = set(folder.glob("*")) - before
    pictures = sorted(path.name.partition("_")[0] for path in new if path.suffix == ".png")
    assert pictures == ["page", *["with"] * 4, *["without"] * 4]
    measures = {path.name.partition("_")[0]: json.loads(path.read_text()) for path in new if path.suffix == ".json"}
    assert {key: measure["frames"] for key, measure in measures.items()} == {"with": 4, "without": 4}
    (page,) = set(folder.glob("page_*")) - before
    with Image.open(page) as image:
        width, height = image.size
        inside = PANEL - 42
        tops = (height - 2 * PANEL - 136, height - PANEL - 38)
        rows = [image.convert("RGB").crop((0, top, width, top + inside)) for top in tops]
    assert width == 4 * PANEL + 3 * 12 + 2 * 24, "rows of four panels"
    assert 2 * (PANEL + 2 * 24) < height < 2 * (PANEL + 208), "labels, captions, and what changed above both rows"
    assert rows[0].tobytes() != rows[1].tobytes()


class Schemas(dict):
    """A node's part of `/object_info` that the scripts read, from its class."""

    def __init__(self, classes):
        super().__init__()
        self.classes = classes

    def __missing__(self, kind):
        import nodes

        node_class = self.classes[kind]
        own = kind.startswith("StoryLoom_")
        named = node_class.GET_SCHEMA().display_name if own else nodes.NODE_DISPLAY_NAME_MAPPINGS.get(kind, kind)
        return {
            "input": node_class.INPUT_TYPES(),
            "output": list(node_class.RETURN_TYPES),
            "output_name": list(getattr(node_class, "RETURN_NAMES", None) or node_class.RETURN_TYPES),
            "display_name": named,
            "python_module": "custom_nodes.storyloom" if own else "nodes",
        }


@pytest.fixture
def script(monkeypatch):
    """Imports a module of scripts/."""
    monkeypatch.syspath_prepend(str(PACK / "scripts"))
    return importlib.import_module


def test_the_files_are_what_the_script_writes(classes, script):
    """When this fails, run scripts/workflows.py."""
    comfyui, catalogue, boxes = (script(name) for name in ("comfyui", "graphs.catalogue", "graphs.blueprints"))
    graphs = (*catalogue.workflows(), *(blueprint.graph for blueprint in boxes.blueprints()))
    schemas = Schemas(classes)
    kinds = {node.kind for graph in graphs for node in graph.nodes.values()} - NOTES
    schemas |= {kind: schemas[kind] for kind in kinds}
    pinned = comfyui.version_text(Path(os.environ["COMFYUI_PATH"])) == comfyui.PINNED
    for path, text in catalogue.texts(schemas).items():
        file, written = json.loads(path.read_text(encoding="utf-8")), json.loads(text)
        if pinned:
            assert file == written, path.name
        elif path.parent.name == "api":  # other versions give stock nodes other titles and outputs
            assert graph_of(file) == graph_of(written), path.name


def graph_of(prompt):
    """Classes and inputs of an API-format prompt, without its titles."""
    return {number: (node["class_type"], node["inputs"]) for number, node in prompt.items()}


# ---- blueprints ------------------------------------------------------------------------------------------------------

BLUEPRINTS = PACK / "subgraphs"
PROMPT_BOX, PHOTO_BOX, LONG_BOX = BOXES = ("Story from a prompt", "Story from a photo", "Long story")
INPUTS, OUTPUTS = -10, -20
"""Ids of the two nodes that hold a definition's inputs and outputs."""


def blueprint(name):
    """(the box, its definition) of a subgraph blueprint."""
    file = read(name, BLUEPRINTS)
    (node,), (definition,) = file["nodes"], file["definitions"]["subgraphs"]
    assert node["type"] == definition["id"] and file["extra"]["BlueprintSearchAliases"]
    assert definition["name"] == name and definition["category"] == "StoryLoom" and definition["description"]
    return node, definition


def test_the_usual_jobs_have_a_blueprint_each():
    assert sorted(path.stem for path in BLUEPRINTS.iterdir()) == sorted(BOXES)
    kinds = [blueprint(name)[0]["type"] for name in BOXES]
    assert len(set(kinds)) == len(BOXES)


@pytest.mark.parametrize("name", BOXES)
def test_a_blueprint_holds_nodes_as_the_front_end_saves_them(classes, checkpoints, name):
    box, definition = blueprint(name)
    for node in definition["nodes"]:
        node_class = classes[node["type"]]
        widgets = {key: (kind, options) for key, kind, options in widgets_of(node_class)}
        widgets.pop("control_after_generate", None)
        sockets = [key for key in inputs_of(node_class) if key not in widgets]
        assert [slot["name"] for slot in node["inputs"]] == [*sockets, *widgets]
        assert all(("widget" in slot) == (slot["name"] in widgets) for slot in node["inputs"])
        for key, value in values_of(node, node_class).items():
            kind, options = widgets.get(key, (["fixed"], {}))
            choices = kind if isinstance(kind, list) else options.get("options")
            assert choices is None or value in choices, f"{node['type']}.{key}"
            if kind in ("INT", "FLOAT"):
                assert options["min"] <= value <= options["max"]


@pytest.mark.parametrize("name", BOXES)
def test_a_blueprint_s_links_agree_within_and_with_the_box(classes, name):
    box, definition = blueprint(name)
    nodes = {node["id"]: node for node in definition["nodes"]}
    assert len(nodes) == len(definition["nodes"]) and box["id"] not in nodes
    for link in definition["links"]:
        source, target = link["origin_id"], link["target_id"]
        sender = definition["inputs"] if source == INPUTS else nodes[source]["outputs"]
        receiver = definition["outputs"] if target == OUTPUTS else nodes[target]["inputs"]
        left, right = sender[link["origin_slot"]], receiver[link["target_slot"]]
        assert link["id"] in left["linkIds" if source == INPUTS else "links"]
        assert link["id"] in right["linkIds"] if target == OUTPUTS else link["id"] == right["link"]
        assert left["type"] == link["type"] and right["type"] in (link["type"], "*")
    counted = [slot["linkIds"] for slot in (*definition["inputs"], *definition["outputs"])]
    counted += [[slot["link"]] for node in nodes.values() for slot in node["inputs"] if slot["link"]]
    counted += [output["links"] for node in nodes.values() for output in node["outputs"]]
    assert sum(map(len, counted)) == 2 * len(definition["links"])
    for side in ("inputs", "outputs"):
        assert [(s["name"], s["type"]) for s in box[side]] == [(s["name"], s["type"]) for s in definition[side]]
    for node in nodes.values():
        required = classes[node["type"]].INPUT_TYPES().get("required", {})
        open_ones = {slot["name"] for slot in node["inputs"] if slot["link"] is None and "widget" not in slot}
        assert not open_ones & required.keys(), node["type"]
    promoted = [slot["name"] for slot in box["inputs"] if "widget" in slot]
    assert len(promoted) == len(box["properties"]["proxyWidgets"])
    for number, widget in box["properties"]["proxyWidgets"]:
        assert widget in values_of(nodes[int(number)], classes[nodes[int(number)]["type"]])


def test_the_pictures_of_the_help_pages_can_be_drawn_and_are_all_there(host, classes, script):
    """When this fails, run scripts/help_pictures.py."""
    from PIL import Image

    prompt, comparisons, pictures = (script(f"graphs.help.{name}") for name in ("prompt", "comparisons", "pictures"))
    schemas = Schemas(classes)
    graph = prompt.Graph(schemas)
    comparisons.add_comparisons(graph)
    host.validate(graph)
    drawn = {name: [Image.new("RGB", (192, 192), "red")] * 12 for name in graph.shown}
    written = pictures.pictures(drawn, schemas)
    folder = PACK / "web" / "docs" / "images"
    assert {f"{name}.png" for name in written} == {path.name for path in folder.iterdir()}
    for name in comparisons.EFFECTS:
        with Image.open(folder / f"{name}.png") as image:
            assert image.height == written[name].height, f"{name} has other rows now"


def unpacked(name, classes, outside, **values):
    """An API prompt of the nodes in a box, and its outputs. outside: links for its sockets; values: of its widgets."""
    _, definition = blueprint(name)
    links, prompt = {link["id"]: link for link in definition["links"]}, {}
    names = [slot["name"] for slot in definition["inputs"]]
    for node in definition["nodes"]:
        inputs = values_of(node, classes[node["type"]])
        inputs.pop("control_after_generate", None)
        for slot in node["inputs"]:
            if slot["link"] is None:
                continue
            link = links[slot["link"]]
            if link["origin_id"] != INPUTS:
                inputs[slot["name"]] = [str(link["origin_id"]), link["origin_slot"]]
            else:
                outer = names[link["origin_slot"]]
                if outer in outside or outer in values:
                    inputs[slot["name"]] = outside.get(outer, values.get(outer))
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    leaving = {link["target_slot"]: link for link in links.values() if link["target_id"] == OUTPUTS}
    outputs = {
        slot["name"]: [str(leaving[number]["origin_id"]), leaving[number]["origin_slot"]]
        for number, slot in enumerate(definition["outputs"])
    }
    return prompt, outputs


def test_the_widget_of_the_long_box_sets_the_anchors_of_the_split_which_tells_them(classes):
    prompt, _ = unpacked(LONG_BOX, classes, {}, anchors=1)
    kinds = {node["class_type"]: node["inputs"] for node in prompt.values()}
    assert kinds["StoryLoom_SplitBatches"]["anchors"] == 1
    assert kinds["StoryLoom_ConsistentSelfAttention"]["anchors"] == 0


@pytest.mark.parametrize("name", BOXES)
def test_a_box_draws_its_story_with_the_demo_model(host, classes, name):
    model = {key: ["demo", number] for number, key in enumerate(("model", "clip", "vae"))}
    frames = "asleep in the snow\njumping on the beach # Hop!\nreading a book on a train"
    small = {"width": 64, "height": 64, "steps": 1, "frames": frames, "style": "", "scheduler": "normal"}
    if name == LONG_BOX:
        small |= {"batch_size": 2, "anchors": 1}
    prompt, outputs = unpacked(name, classes, {**model, "image": ["picture", 0]}, **small)
    prompt["demo"] = {"class_type": "StoryLoom_DemoModel", "inputs": {}}
    if name == PHOTO_BOX:
        size = {"width": 64, "height": 64, "batch_size": 1, "color": 255}
        prompt["picture"] = {"class_type": "EmptyImage", "inputs": size}
        number = {node["class_type"]: key for key, node in prompt.items()}
        prompt[number["StoryLoom_LoadStoryMaker"]] = {"class_type": "StoryLoom_DemoStoryMaker", "inputs": {}}
        prompt[number["StoryLoom_Character"]]["inputs"]["clip_vision"] = [number["StoryLoom_LoadStoryMaker"], 1]
        del prompt[number["CLIPVisionLoader"]]
    for key in ("page", "frames"):
        prompt[f"kept {key}"] = {"class_type": "TestCapture", "inputs": {"value": outputs[key], "name": key}}
    drawn = host.run(type("Prompt", (dict,), {})(prompt))
    assert drawn.frames.shape == (3, 64, 64, 3) and drawn.frames.std() > 0.01
    assert drawn.page.shape[0] == 1 and drawn.page.shape[2] > 3 * 64, "three panels side by side"
