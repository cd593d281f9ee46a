"""The real server: a story through POST /prompt, and the same pixels whenever the same seed is asked for again."""

import importlib.util
import json
import os
import sys
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from story_graphs import CSA
from story_makers import APPLY
from test_storymaker_files import hostile, not_finite

PACK = Path(__file__).resolve().parents[2]
WORKFLOW = PACK / "workflows" / "api" / "Demo - One Prompt One Story.json"


@pytest.fixture(scope="module")
def server_module():
    spec = importlib.util.spec_from_file_location("storyloom_scripts_comfyui", PACK / "scripts" / "comfyui.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def server(server_module, tmp_path_factory):
    base = server_module.pack_base(tmp_path_factory.mktemp("server"), PACK)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # as the ComfyUI of this process: sums depend on it in their last digits
        with server_module.Server(Path(os.environ["COMFYUI_PATH"]), base, sys.executable) as running:
            yield running


def demo(seed, **script):
    """The demo workflow, small, quick and with two frames that look at each other."""
    prompt = json.loads(WORKFLOW.read_text(encoding="utf-8"))
    for node in list(prompt.values()):
        if node["class_type"] == "KSampler":
            settings = CSA | {"model": node["inputs"]["model"]}
            prompt["csa"] = {"class_type": "StoryLoom_ConsistentSelfAttention", "inputs": settings}
            node["inputs"] |= {"seed": seed, "steps": 2, "model": ["csa", 0]}
        if node["class_type"] == "StoryLoom_EmptyLatent":
            node["inputs"] |= {"width": 128, "height": 64}
        if node["class_type"] == "StoryLoom_Script":
            first_two = "\n".join(node["inputs"]["frames"].split("\n")[:2])
            node["inputs"] |= {"frames": first_two, **script}
    return prompt


def page(server, prompt):
    entry = server.wait(server.submit(prompt), timeout=300)
    (path,) = server.outputs(entry)
    return np.asarray(Image.open(path))


def page_here(host, prompt):
    """The page as the ComfyUI of this process draws it, in the pixels that are saved."""
    prompt = {key: node for key, node in prompt.items() if node["class_type"] != "PreviewAny"}
    (save,) = (node for node in prompt.values() if node["class_type"] == "StoryLoom_SavePage")
    seen = {"class_type": "TestCapture", "inputs": {"value": save["inputs"]["images"], "name": "page"}}
    images = host.run(prompt | {save["inputs"]["images"][0] + " seen": seen}, fresh=True).page
    return (255 * images[0].numpy()).clip(0, 255).astype(np.uint8)


def test_a_story_has_the_same_pixels_again_and_in_another_process(server, host):
    first, other, again = (page(server, demo(seed)) for seed in (1, 2, 1))
    fresh = page_here(host, demo(1))
    assert first.ndim == 3 and first.std() > 5
    assert not np.array_equal(first, other)
    assert np.array_equal(first, again)
    assert np.array_equal(first, fresh)


def test_hostile_files_are_refused_and_the_server_goes_on(server, server_module, host):
    """Of StoryMaker, and then of a character."""
    characters, models = host.pack("models.characters"), server.base / "models"
    for name in ("storymaker", "storyloom_characters"):
        (models / name).mkdir()
    face = (torch.ones(512) / 512**0.5, torch.ones(257, 1280))
    someone = characters.Character("", ((characters.features_of(face, None), 1.0),), torch.zeros(8, 8, 3))
    characters.save_character(models / "storyloom_characters" / "good.safetensors", someone)
    face[1][3, 3] = torch.nan
    characters.save_character(models / "storyloom_characters" / "nan.safetensors", someone)
    hostile(models / "storymaker" / "hostile.bin", host)
    save_file({"pos_embed": torch.zeros(100, 100)}, models / "storymaker" / "half.safetensors")
    os.truncate(models / "storymaker" / "half.safetensors", 5000)
    not_finite(models / "storymaker" / "nan.bin", host)
    (models / "storymaker" / "empty.bin").touch()

    def pictured(adapter, character="good.safetensors"):
        prompt = demo(4)
        prompt["adapter"] = {"class_type": "StoryLoom_DemoStoryMaker", "inputs": {}}
        if adapter:
            prompt["adapter"] = {"class_type": "StoryLoom_LoadStoryMaker", "inputs": {"file": adapter}}
        prompt["who"] = {"class_type": "StoryLoom_LoadCharacter", "inputs": {"file": character}}
        links = {"storymaker": ["adapter", 0], "character_1": ["who", 0], "model": prompt["csa"]["inputs"]["model"]}
        prompt["apply"] = {"class_type": "StoryLoom_ApplyStoryMaker", "inputs": APPLY | links}
        prompt["csa"]["inputs"]["model"] = ["apply", 0]
        return prompt

    for prompt, said in (
        (pictured("hostile.bin"), "asks for"),
        (pictured("half.safetensors"), "is damaged or incomplete"),
        (pictured("nan.bin"), "1 not finite: ip_adapter.7.to_k_ip.weight"),
        (pictured("empty.bin"), "is empty"),
        (pictured(None, "nan.safetensors"), "0.face holds NaN or infinity"),
    ):
        with pytest.raises(server_module.PromptFailed, match=said):
            page(server, prompt)
    assert not Path("/tmp/storyloom-was-here").exists()
    assert page(server, pictured(None)).std() > 5


def test_a_faulty_script_is_refused_before_anything_runs_and_the_server_goes_on(server, server_module):
    with pytest.raises(server_module.PromptRefused) as refused:
        server.submit(demo(3, frames="asleep\n# only a caption"))
    errors = [e for node in refused.value.errors["node_errors"].values() for e in node["errors"]]
    assert len(errors) == 1
    assert errors[0]["details"] == (
        "Story script, frames, line 2: the frame is only a caption. Write what it shows before the #."
    )
    assert page(server, demo(3)).size


def test_the_blueprints_are_served_as_they_lie_in_the_pack(server):
    def ask(path=""):
        with urllib.request.urlopen(f"{server.url}/global_subgraphs{path}") as answer:
            return json.load(answer)

    ours = {key: entry for key, entry in ask().items() if entry["info"]["node_pack"] == "custom_nodes.storyloom"}
    files = {path.stem: path for path in (PACK / "subgraphs").glob("*.json")}
    assert sorted(entry["name"] for entry in ours.values()) == sorted(files) and files
    for key, entry in ours.items():
        assert ask(f"/{key}")["data"] == files[entry["name"]].read_text(encoding="utf-8")
