"""The real server: a story through POST /prompt, and the same pixels whenever the same seed is asked for again."""

import gzip
import json
import os
import socket
import urllib.request
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from story_graphs import CSA, FREEU, IPCA, SAMPLER, SVR, distance
from story_makers import APPLY
from test_storymaker_files import hostile, not_finite
from tiny_models import tiny_lora
from waiting import LIMIT

from storyloom.scripts.comfyui import PromptFailed, PromptRefused

PACK = Path(__file__).resolve().parents[2]
WORKFLOW = PACK / "workflows" / "api" / "Demo - One Prompt One Story.json"


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
    entry = server.wait(server.submit(prompt), timeout=LIMIT)
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


LORA = "turns.safetensors"
EVERY_PATCH = {
    "csa": ("StoryLoom_ConsistentSelfAttention", CSA),
    "ipca": ("StoryLoom_IPCA", IPCA),
    "freeu": ("StoryLoom_FreeU", FREEU),
    "apply": ("StoryLoom_ApplyStoryMaker", APPLY | {"storymaker": ["adapter", 0], "character_1": ["who", 0]}),
}
NODES = {
    "loaded": ("StoryLoom_DemoModel", {}),
    "adapter": ("StoryLoom_DemoStoryMaker", {}),
    "picture": ("EmptyImage", {"width": 64, "height": 64, "batch_size": 1, "color": 0x3366CC}),
    "encoded": ("StoryLoom_EncodeOnePrompt", SVR | {"clip": ["loaded", 1], "story": ["script", 0]}),
    "nothing": ("ConditioningZeroOut", {"conditioning": ["encoded", 0]}),
    "latent": ("StoryLoom_EmptyLatent", {"width": 64, "height": 64, "story": ["script", 0], "shared_noise": True}),
    "saved": ("SaveLatent", {"samples": ["drawn", 0], "filename_prefix": "isolation"}),
}
STORIES = {
    "fox": {"seed": 1, "frames": "asleep\nreading", "lora": 0.0, "patches": list(EVERY_PATCH)},
    "another model": {"seed": 2, "frames": "jumping\nasleep\nreading", "lora": 1.0, "patches": list(EVERY_PATCH)},
    "bypassed": {"seed": 1, "frames": "asleep\nreading", "lora": 0.0, "patches": []},
}


def story(name, turn):
    """A story's prompt, which saves latents. turn: another one each time, so that no node's result is used again."""
    chosen, model = STORIES[name], ["loaded", 0]
    who = {"name": "", "clip_vision": ["adapter", 1], "image": ["picture", 0], "mode": "appearance only"}
    nodes = NODES | {
        "script": ("StoryLoom_Script", {"identity": "a fox", "frames": chosen["frames"] + "\n" * turn, "style": ""}),
        "who": ("StoryLoom_Character", who),
    }
    if chosen["lora"]:
        settings = {"lora_name": LORA, "strength_model": chosen["lora"], "model": model}
        nodes["lora"], model = ("LoraLoaderModelOnly", settings), ["lora", 0]
    for patch in chosen["patches"]:
        kind, settings = EVERY_PATCH[patch]
        nodes[patch], model = (kind, settings | {"model": model}), [patch, 0]
    ends = {"model": model, "positive": ["encoded", 0], "negative": ["nothing", 0], "latent_image": ["latent", 0]}
    nodes["drawn"] = ("KSampler", SAMPLER | {"seed": chosen["seed"]} | ends)
    return {key: {"class_type": kind, "inputs": inputs} for key, (kind, inputs) in nodes.items()}


def latents(server, prompts):
    """Queue all prompts, and return what each saved once all are drawn."""
    tensors = []
    for prompt_id in [server.submit(prompt) for prompt in prompts]:
        entry = server.wait(prompt_id, timeout=LIMIT)
        cached = [data["nodes"] for kind, data in entry["status"]["messages"] if kind == "execution_cached"]
        assert "drawn" not in sum(cached, [])
        (saved,) = entry["outputs"]["saved"]["latents"]
        tensors.append(load_file(server.base / "output" / saved["subfolder"] / saved["filename"])["latent_tensor"])
    return tensors


@pytest.fixture(scope="module")
def loras(server, host):
    """The LoRA of one of the stories, for the server and for the ComfyUI of this process."""
    for base in (server.base, host.base):
        folder = base / "models" / "loras"
        folder.mkdir(exist_ok=True)
        save_file(tiny_lora(width=128, context=2048), folder / LORA)


@pytest.fixture
def elsewhere(host, loras):
    """Each story as the ComfyUI of this process draws it, with nothing of an earlier one."""
    seen = {"class_type": "TestCapture", "inputs": {"value": ["drawn", 0], "name": "latent"}}
    return {name: host.run(story(name, 0) | {"saved": seen}, fresh=True).latent["samples"] for name in STORIES}


def test_stories_in_turns_are_as_another_process_draws_each(server, elsewhere):
    """Two models, two seeds, all patches; and without them: what is bypassed in a graph is not in its prompt."""
    order = ["fox", "another model", "bypassed", "fox", "another model"]
    tensors = latents(server, [story(name, turn) for turn, name in enumerate(order)])
    for name, latent in zip(order, tensors, strict=True):
        assert latent.isfinite().all() and torch.equal(latent, elsewhere[name]), name
    fox, other, bypassed = (elsewhere[name] for name in STORIES)
    assert distance(fox, bypassed) > 0.02 and distance(other[:2], fox) > 0.02


def test_hostile_files_are_refused_and_the_server_goes_on(server, host):
    """Of StoryMaker, and then of a character."""
    characters, models = host.pack("models.storymaker.characters"), server.base / "models"
    for name in ("storymaker", "storyloom_characters"):
        (models / name).mkdir()
    face = (torch.ones(512) / 512**0.5, torch.ones(257, 1280))
    someone = characters.CharacterReference("", ((characters.features_of(face, None), 1.0),), torch.zeros(8, 8, 3))
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

    for prompt, message in (
        (pictured("hostile.bin"), "which weights do not need"),
        (pictured("half.safetensors"), "is damaged or incomplete"),
        (pictured("nan.bin"), "1 not finite: ip_adapter.7.to_k_ip.weight"),
        (pictured("empty.bin"), "is empty"),
        (pictured(None, "nan.safetensors"), "0.face contains NaN or infinity"),
    ):
        with pytest.raises(PromptFailed, match=message):
            page(server, prompt)
    assert not Path("/tmp/storyloom-was-here").exists()
    assert page(server, pictured(None)).std() > 5


def test_a_faulty_script_is_refused_before_anything_runs_and_the_server_goes_on(server):
    with pytest.raises(PromptRefused) as refused:
        server.submit(demo(3, frames="asleep\n# only a caption"))
    errors = [e for node in refused.value.errors["node_errors"].values() for e in node["errors"]]
    assert len(errors) == 1
    assert errors[0]["details"] == (
        "Story script, frames, line 2: the frame is only a caption. Write what it shows before the #."
    )
    assert page(server, demo(3)).size


def request(server, body, *headers):
    """Send a body to the route of the script's editor as it is; returns the connection."""
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=LIMIT)
    lines = ["POST /storyloom/script HTTP/1.1", f"Host: 127.0.0.1:{server.port}", "Connection: close", *headers]
    connection.sendall("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
    return connection


def status(connection):
    with connection, connection.makefile("rb") as answer:
        return int(answer.readline().split()[1])


def test_the_route_refuses_what_is_no_script_and_the_server_goes_on(server):
    typed, cut = "Content-Type: application/json", "Transfer-Encoding: chunked"

    def length(body):
        return body, f"Content-Length: {len(body)}"

    good = json.dumps({"identity": "a fox", "frames": "asleep", "style": ""}).encode()
    slow = request(server, good[:9], typed, f"Content-Length: {len(good)}")
    for expected, sent in (
        (200, request(server, *length(good), typed)),
        (400, request(server, *length(b"[" * 90_000), typed)),
        (400, request(server, *length(b"\xff"), typed)),
        (413, request(server, b"%x\r\n" % (1 << 20) + b" " * (1 << 20), typed, cut)),
        (415, request(server, *length(gzip.compress(b" " * (64 << 20))), typed, "Content-Encoding: gzip")),
        (415, request(server, *length(good), "Content-Type: text/plain", "Origin: http://127.0.0.1")),
        (403, request(server, *length(good), typed, "Origin: http://example.com")),
    ):
        assert status(sent) == expected
    many = [request(server, *length(good), typed) for _ in range(100)]
    statuses = Counter(map(status, many))
    assert statuses.keys() <= {200, 503} and statuses[200] >= 8
    assert page(server, demo(3)).size
    assert status(slow) == 408
    assert status(request(server, *length(good), typed)) == 200
    log = server.log.read_text(encoding="utf-8", errors="replace")
    assert "routes.py" not in log


def test_the_blueprints_are_served_as_they_lie_in_the_pack(server):
    def get(path=""):
        with urllib.request.urlopen(f"{server.url}/global_subgraphs{path}") as answer:
            return json.load(answer)

    ours = {key: entry for key, entry in get().items() if entry["info"]["node_pack"] == "custom_nodes.storyloom"}
    files = {path.stem: path for path in (PACK / "subgraphs").glob("*.json")}
    assert sorted(entry["name"] for entry in ours.values()) == sorted(files) and files
    for key, entry in ours.items():
        assert get(f"/{key}")["data"] == files[entry["name"]].read_text(encoding="utf-8")
