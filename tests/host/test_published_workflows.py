"""SDXL workflows of ComfyUI's own template package, with the demo model as the checkpoint and the pack's nodes between.

The package `comfyui-workflow-templates-json` (MIT) belongs to the environment of `make test`; nothing of it is copied.
"""

import importlib.util
import json
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from story_graphs import CSA, IPCA, STORY, SVR, distance
from test_workflows import NOTES, widgets_of
from tiny_models import SDXL, fill_, tiny_model

PACKAGE = importlib.util.find_spec("comfyui_workflow_templates_json")
pytestmark = pytest.mark.skipif(
    PACKAGE is None,
    reason="NOT RUN: ComfyUI's published SDXL workflows. Install scripts/requirements-host.txt for their package",
)

NAMES = (
    "image_sdxl_simple",
    "sdxl_simple_example",  # with the refiner
    "sdxl_refiner_prompt_example",
    "sdxlturbo_example",
    "sdxl_revision_text_prompts",
)
SIZE, FRAMES = 64, 3
SAMPLERS = ("KSampler", "KSamplerAdvanced", "SamplerCustom")
SHORT = {"steps": 3, "end_at_step": 2, "start_at_step": 2}
"""Settings of the samplers here, where a workflow has other ones. The refiner takes over after two of three steps."""
OFF = {"ipca": {"identity_weight": 1.0}, "csa": {"sampling_rate": 0.0}}
EFFECT = 0.02
"""Least effect of the patches, in units of the largest value."""
REFINER_MODEL = SDXL | {"context_dim": 1280, "adm_in_channels": 1280 + 5 * 256}
"""A UNet for the larger text encoder alone."""
WHOLE = 10000
"""What the workflows have as the end of the refiner's steps."""


@cache
def published(name):
    """A workflow as it is published, in the format of the browser interface."""
    file = Path(PACKAGE.origin).parent / "templates" / f"{name}.json"
    return json.loads(file.read_text(encoding="utf-8"))


def prompt_of(workflow, classes):
    """A workflow as an API prompt, as the browser converts it: primitives become the values of what they feed."""
    by_id = {node["id"]: node for node in workflow["nodes"] if node["type"] not in NOTES}
    links = {number: (by_id[source], output) for number, source, output, *_ in workflow["links"]}
    prompt = {}
    for number, node in by_id.items():
        if node["type"] == "PrimitiveNode":
            continue
        values = dict(zip(named_widgets(classes[node["type"]]), node.get("widgets_values") or (), strict=True))
        for entry in node["inputs"]:
            source, output = links.get(entry["link"], (None, None))
            if source is not None and source["type"] == "PrimitiveNode":
                values[entry["name"]] = source["widgets_values"][0]
            elif source is not None:
                values[entry["name"]] = [f"published {source['id']}", output]
        for extra in ("control_after_generate", "upload"):
            values.pop(extra, None)
        prompt[f"published {number}"] = {"class_type": node["type"], "inputs": values}
    return prompt


def named_widgets(node_class):
    """Names of a node's widgets in the order of their saved values."""
    return [name for name, *_ in widgets_of(node_class)]


def short(prompt):
    """The same with few steps, at a small size, without files: the demo model or a tiny refiner as every checkpoint."""
    for node in prompt.values():
        inputs = node["inputs"]
        if node["class_type"] == "CheckpointLoaderSimple":
            refines = "refiner" in inputs["ckpt_name"]
            node |= {"class_type": "TestRefiner" if refines else "StoryLoom_DemoModel", "inputs": {}}
        elif node["class_type"] == "CLIPVisionLoader":
            node |= {"class_type": "TestVision", "inputs": {}}
        elif node["class_type"] == "LoadImage":
            color = sum(inputs["image"].encode()) * 7919 % 0xFFFFFF
            node |= {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": color}}
        elif node["class_type"] == "EmptyLatentImage":
            inputs |= {"width": SIZE, "height": SIZE}
        elif node["class_type"] in SAMPLERS:
            inputs |= {key: value for key, value in SHORT.items() if inputs.get(key) not in (None, 0, WHOLE)}
    return prompt


def with_story(prompt, patches=None):
    """The same, telling a story: what a user would put between.

    patches: settings of IPCA and CSA, which go on the refiner as well; None: no patch.
    """
    story = add(prompt, "StoryLoom_Script", **STORY)
    latent = next(node for node in prompt.values() if node["class_type"] == "EmptyLatentImage")
    latent |= {
        "class_type": "StoryLoom_EmptyLatent",
        "inputs": {"width": SIZE, "height": SIZE, "story": story, "shared_noise": False},
    }
    for sampler in samplers(prompt):
        inputs = sampler["inputs"]
        text = prompt[origin(prompt, inputs["positive"], "CLIPTextEncode")]
        text |= {
            "class_type": "StoryLoom_EncodeOnePrompt",
            "inputs": {"clip": text["inputs"]["clip"], "story": story, **SVR},
        }
        if patches is not None:
            model = add(prompt, "StoryLoom_IPCA", model=inputs["model"], **IPCA | patches.get("ipca", {}))
            csa = CSA | patches.get("csa", {})
            inputs["model"] = add(prompt, "StoryLoom_ConsistentSelfAttention", model=model, **csa)
    return prompt


def samplers(prompt):
    return [node for node in prompt.values() if node["class_type"] in SAMPLERS]


def add(prompt, class_type, **inputs):
    """A link to a new node's first output."""
    number = f"new {len(prompt)}"
    prompt[number] = {"class_type": class_type, "inputs": inputs}
    return [number, 0]


def origin(prompt, link, class_type):
    """Number of the node of this class behind a link, through the first conditioning of what lies between."""
    node = prompt[link[0]]
    return link[0] if node["class_type"] == class_type else origin(prompt, node["inputs"]["conditioning"], class_type)


class Given:
    """A node without inputs, in place of one that reads files."""

    FUNCTION = "give"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}}


class Vision(Given):
    """Load CLIP Vision, with random weights that are as wide at their end as Revision's encoder."""

    RETURN_TYPES = ("CLIP_VISION",)
    LAYOUT = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 3}

    def give(self):
        import comfy.clip_vision

        layout = json.loads(Path(comfy.clip_vision.__file__).with_name("clip_vision_config_g.json").read_text())
        with TemporaryDirectory() as folder:  # ComfyUI 0.19 accepts the configuration only as a file
            file = Path(folder, "config.json")
            file.write_text(json.dumps(layout | self.LAYOUT))
            made = comfy.clip_vision.ClipVisionModel(str(file))
        fill_(made.model, 4)
        return (made,)


class Refiner(Given):
    """Load Checkpoint, with a tiny refiner of random weights; its pictures are decoded as the demo model's."""

    RETURN_TYPES = ("MODEL", "CLIP", "VAE")
    build_vae = None

    def give(self):
        return tiny_model("SDXLRefiner", REFINER_MODEL), refiner_clip(), Refiner.build_vae()


def refiner_clip():
    """A CLIP with SDXL's tokenizer and the larger of its encoders, as wide but shallow."""
    import comfy.sd
    import comfy.sdxl_clip
    import comfy.supported_models_base

    layout = {"num_hidden_layers": 3, "intermediate_size": 64, "hidden_size": 1280, "num_attention_heads": 20}
    target = comfy.supported_models_base.ClipTarget(comfy.sdxl_clip.SDXLTokenizer, comfy.sdxl_clip.SDXLRefinerClipModel)
    clip = comfy.sd.CLIP(target, model_options={"clip_g_model_config": layout}, parameters=0)
    fill_(clip.cond_stage_model, 1)
    return clip


@pytest.fixture(scope="module")
def classes(host):
    """NODE_CLASS_MAPPINGS with the nodes in place of those that read files; every model is loaded once."""
    import nodes

    demo = host.pack("nodes.demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Refiner, "build_vae", staticmethod(demo.build_vae))
        for name, node in {"TestVision": Vision, "TestRefiner": Refiner}.items():
            patch.setattr(node, "give", cache(node.give))
            patch.setitem(nodes.NODE_CLASS_MAPPINGS, name, node)
        made = cache(demo.DemoModel.execute)
        patch.setattr(demo.DemoModel, "execute", classmethod(lambda cls: made()))
        yield nodes.NODE_CLASS_MAPPINGS


def drawn(host, new_graph, prompt):
    """What the last sampler of a prompt draws, and its decoded images."""
    graph = new_graph(prompt)
    decode = next(node for node in graph.values() if node["class_type"] == "VAEDecode")
    shown = next(node for node in graph.values() if node["class_type"] == "SaveImage")
    graph.capture(latents=decode["inputs"]["samples"], images=shown["inputs"]["images"])
    return host.run(graph)


@pytest.mark.parametrize("name", NAMES)
def test_a_published_workflow_tells_a_story_with_the_packs_nodes_between(host, new_graph, classes, name):
    def story(patches):
        return drawn(host, new_graph, with_story(short(prompt_of(published(name), classes)), patches))

    plain, ours, off = story(None), story({}), story(OFF)
    latents, images = ours.latents["samples"], ours.images
    assert latents.shape[0] == images.shape[0] == FRAMES
    assert latents.isfinite().all() and images.isfinite().all()
    assert distance(latents, plain.latents["samples"]) > EFFECT
    assert torch.equal(off.latents["samples"], plain.latents["samples"])


@pytest.mark.parametrize("name", NAMES)
def test_without_a_story_it_draws_its_own_picture_and_the_patches_change_nothing(host, new_graph, classes, name):
    own = drawn(host, new_graph, short(prompt_of(published(name), classes)))
    assert own.latents["samples"].shape[0] == 1 and own.latents["samples"].isfinite().all()
    prompt = short(prompt_of(published(name), classes))
    for sampler in samplers(prompt):
        model = add(prompt, "StoryLoom_IPCA", model=sampler["inputs"]["model"], **IPCA)
        sampler["inputs"]["model"] = add(prompt, "StoryLoom_ConsistentSelfAttention", model=model, **CSA)
    patched = drawn(host, new_graph, prompt)
    assert torch.equal(patched.latents["samples"], own.latents["samples"])
