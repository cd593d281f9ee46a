"""Writes the example workflows, in the format of the browser interface and in that of POST /prompt, from one text each.

`python scripts/workflows.py` after a change here or of a node's inputs. It asks a real ComfyUI for the nodes' schemas
(`/object_info`), so everything that is not said here has the schema's default. After a change of the demo model:
`python scripts/workflows.py --thumbnails` draws the demos too.
"""

from __future__ import annotations

import argparse
import json
import sys
import urllib.request
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import comfyui
import environment

WORKFLOWS = Path(__file__).absolute().parent.parent / "workflows"
WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
SEED_MODE = "fixed"
"""Value of the widget that the browser interface adds below a seed: the same picture until someone asks for another."""
TITLE, PADDING, GROUP_TITLE = 30, 24, 44
"""Height of a node's title bar, room around the nodes of a group, height of its title."""
NOTE_COLORS = {"color": "#432", "bgcolor": "#000"}


@dataclass(frozen=True)
class Node:
    """A node of a workflow. place: x, y below its title bar; links: input -> (key of the source node, its output)."""

    kind: str
    place: tuple[int, int]
    size: tuple[int, int]
    values: dict = field(default_factory=dict)
    links: dict[str, tuple[str, int]] = field(default_factory=dict)
    title: str = ""
    properties: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Workflow:
    """Nodes by key, and the groups around some of them: title -> keys."""

    name: str
    nodes: dict[str, Node]
    groups: dict[str, tuple[str, ...]]


# ---- the workflows ---------------------------------------------------------------------------------------------------

CHECKPOINT = "sd_xl_base_1.0.safetensors"
SOURCE = f"https://huggingface.co/stabilityai/stable-diffusion-xl-base-1.0/resolve/main/{CHECKPOINT}"
NEGATIVE = """## Negative
All zeros (ConditioningZeroOut), as published. An empty prompt is not the same: it gives another picture."""

ONE_STORY = """\
**Story script**: *identity* is who the story is about, *frames* has one line per picture. The text after \
`#` is the caption. *Report* shows how many of 75 tokens are taken; a longer story is told in windows of frames."""
IDENTITY_WEIGHT = """\
**identity_weight**: 1 is off, 2 is the published value. More holds the character tighter and \
leaves less room for the frame."""
YOUR_CHECKPOINT = f"""## Checkpoint
Any SDXL checkpoint, in `models/checkpoints`. This one is \
[{CHECKPOINT}]({SOURCE}) (6.9 GB). LoRA, ControlNet, another sampler: put them in as usual."""

REAL_NOTE = f"""## Change this first
{ONE_STORY}

{IDENTITY_WEIGHT}

{YOUR_CHECKPOINT}

{NEGATIVE}

## Settings
1024 x 1024, 50 steps, euler, ddim_uniform, cfg 5: as published. All frames are drawn in one batch and start from the \
same noise (*shared_noise*)."""

DEMO = "Demo - "
"""How the names of workflows with the demo model begin."""
DEMO_SIZE, DEMO_STEPS, DEMO_SCHEDULER = 192, 16, "normal"
"""What the demo model is at home at."""
DEMO_WHAT = """The demo model is a tiny SDXL that ships with the pack and has learnt to draw small pixel-art scenes. \
It needs no download and no graphics card."""
DEMO_WORDS = """**Its words**: cat, fox, rabbit, bear, robot, girl; coats, trousers, hats and their colours; asleep, \
running, jumping, sitting, waving; a balloon, an umbrella, a book, a lantern; the meadow, snow, beach, city, forest, \
desert, cave, bedroom, train; and more like these. It passes over other words."""

REAL_PICTURES = f"""## With your own model
1. Put an SDXL checkpoint, for example [{CHECKPOINT}]({SOURCE}), into `models/checkpoints`.
2. Add **Load Checkpoint** and drag its MODEL, CLIP and VAE to where the demo model's go. Delete the demo model.
3. **Empty story latent**: 1024 x 1024. **KSampler**: 50 steps, ddim_uniform. Write any story you like."""

DEMO_NOTE = f"""## What this is
{DEMO_WHAT}

{DEMO_WORDS}

## Change this first
{ONE_STORY}

{REAL_PICTURES}

{NEGATIVE}"""

DEMO_IDENTITY = "a fox in a blue coat"
DEMO_PICTURES = {
    "asleep in the snow": "Winter came early.",
    "reading a book on a train": "So he went south.",
    "with an umbrella in the city": "It rained in the city,",
    "jumping on the beach": "but not at the sea.",
}
"""The demo story, told by the demo model's words: frame -> caption. Fur, trousers and hat are left open."""
DEMO_FRAMES = "\n".join(f"{words} # {caption}" for words, caption in DEMO_PICTURES.items())

TOGETHER = """\
**One prompt** (SVR) ties the words of the story together, **IPCA** makes the identity's words count more, \
and with **consistent self-attention** the frames look at each other while they are drawn. To see what one of the \
last two does, bypass its node (Ctrl+B) and run again with the same seed."""
SHARING = """**sampling_rate**: how much of every frame the others see. 0 is off, 0.5 is the published value."""

CONSISTENT_NOTE = f"""## What this is
Everything that holds a character together, on one model. {TOGETHER}

## Change this first
{ONE_STORY}

{IDENTITY_WEIGHT}

{SHARING}

{YOUR_CHECKPOINT}

**Story FreeU** gives cleaner pictures with base SDXL, as all three papers used it. Many fine-tuned checkpoints look \
better without: bypass it.

{NEGATIVE}

## Memory
All frames are drawn in one batch. With more than four at 1024 x 1024, or less than 12 GB of graphics memory, take the \
template *Long Story*."""

CONSISTENT_DEMO_NOTE = f"""## What this is
Everything that holds a character together, on one model. {TOGETHER}

{DEMO_WHAT}

## Change this first
{ONE_STORY}

{SHARING}

{DEMO_WORDS}

{REAL_PICTURES}

{NEGATIVE}"""

TWO = """\
Every frame is encoded on its own here, so a story may be of any length, have several characters, and frames \
without anybody. **IPCA** makes the descriptions count more in the frames that have them; with **consistent \
self-attention** frames look at those that share a character with them."""
TWO_SCRIPT = """\
**Story script**: in *identity* one character per line, with its name in brackets. In *frames*, `[Name]` \
inserts that character's description; `[NC]` is a frame without any character."""
OR_ONE_PROMPT = """## One prompt or frame by frame?
*Encode story as one prompt* fits too: it tells the frames of the same characters together, and ties them closer."""

TWO_NOTE = f"""## What this is
A story with two characters. {TWO}

## Change this first
{TWO_SCRIPT}

{IDENTITY_WEIGHT}

{SHARING}

{YOUR_CHECKPOINT}

{NEGATIVE}

{OR_ONE_PROMPT}"""

TWO_DEMO_NOTE = f"""## What this is
A story with two characters. {TWO}

{DEMO_WHAT} It can draw one figure or two.

## Change this first
{TWO_SCRIPT} The demo model always draws somebody.

{DEMO_WORDS} Two figures can stand, jump, sit or wave.

{REAL_PICTURES}

{OR_ONE_PROMPT}"""

CAST = """[Fox] a red fox in a blue coat
[Bear] a brown bear in a yellow sweater and green pants"""
CAST_FRAMES = """[Fox] asleep in the snow # Winter came early.
[Bear] with a lantern in the forest # Someone was on the way.
[Fox] and [Bear] waving on the beach # They met at the sea
[Fox] and [Bear] sitting on a train # and went on together."""

LONG_FRAMES = "\n".join(
    [
        "waving in the meadow # Every journey begins at home.",
        "standing with a lantern in the forest # The forest was dark,",
        "running in the snow # the winter long,",
        "asleep in a cave # the cave warm.",
        "with an umbrella in the city # It rained in the city.",
        "reading a book on a train # The train was slow,",
        "jumping on the beach # but then: the sea!",
        "sitting in the desert # Not all of it was fun.",
        "with a balloon in the meadow # Back home with a balloon,",
        "asleep in the bedroom # and so to bed.",
    ]
)
LONG = """\
**Split a long story** makes a list of batches that all begin with the same two anchor frames, KSampler and VAE \
Decode run once per batch, and **Join story batches** puts the frames in order. With **consistent self-attention** \
every frame looks at the anchors: give it as many `anchors` as the split."""
LONG_SETTINGS = """\
**Story script**: as many frames as you like, memory stays that of one batch. The first two are the \
anchors: show the character well in them.

**batch_size** and **anchors** in Split a long story: more images at a time share more, and take more memory."""

LONG_NOTE = f"""## What this is
A story of any length, four frames at a time. {LONG}

## Change this first
{LONG_SETTINGS}

{IDENTITY_WEIGHT}

{YOUR_CHECKPOINT}

{NEGATIVE}"""

LONG_DEMO_NOTE = f"""## What this is
A story of ten frames, four at a time. {LONG}

{DEMO_WHAT}

## Change this first
{LONG_SETTINGS}

{DEMO_WORDS}

{REAL_PICTURES}"""

BOTH_NOTE = f"""## What this is
One story, drawn twice from the same noise by the demo model, a tiny SDXL that has learnt small pixel-art scenes.

**Above, without**: every frame is its own prompt. What the text leaves open, here the fox's fur, trousers and hat, \
changes from frame to frame.

**Below, with**: one prompt for the whole story (SVR), and the identity's words count more (IPCA).

## Change this first
**Story script**: *identity* is who the story is about, *frames* has one line per picture; a blue coat is only blue \
because the identity says so. **Captions above** holds the upper row's captions.

{DEMO_WORDS}

{NEGATIVE}"""


def one_prompt_one_story(
    name: str, note: str, loader: Node, script: dict, size: int, steps: int, scheduler: str
) -> Workflow:
    """One-Prompt-One-Story at its published settings: SVR on the words, IPCA on the model, a zero negative."""
    nodes = {
        "note": Node("MarkdownNote", (-460, 0), (380, 560), {"": note}, title="Read me"),
        "script": Node("StoryLoom_Script", (0, 0), (420, 300), script),
        "loader": loader,
        "latent": Node(
            "StoryLoom_EmptyLatent", (480, 0), (380, 130), {"width": size, "height": size}, {"story": ("script", 0)}
        ),
        "words": Node(
            "StoryLoom_EncodeOnePrompt", (480, 190), (380, 260), links={"clip": ("loader", 1), "story": ("script", 0)}
        ),
        "negative": zeros((480, 510), "words"),
        "report": Node("PreviewAny", (0, 360), (420, 200), links={"source": ("words", 1)}, title="Report"),
        "ipca": Node("StoryLoom_IPCA", (480, 690), (380, 130), links={"model": ("loader", 0)}),
        "sampler": sampler((980, 0), steps, scheduler, model="ipca", positive="words", negative="negative"),
        "decode": Node("VAEDecode", (980, 330), (320, 50), links={"samples": ("sampler", 0), "vae": ("loader", 2)}),
        "frames": Node("PreviewImage", (980, 440), (320, 380), links={"images": ("decode", 0)}, title="Frames"),
        "page": Node("StoryLoom_Page", (1420, 0), (480, 160), links={"images": ("decode", 0), "story": ("script", 0)}),
        "save": Node(
            "SaveImage", (1420, 220), (480, 600), {"filename_prefix": "StoryLoom/page"}, {"images": ("page", 0)}
        ),
    }
    groups = {
        "Story": ("script", "latent", "words", "negative", "report"),
        "Model": ("loader", "ipca"),
        "Draw": ("sampler", "decode", "frames"),
        "Page": ("page", "save"),
    }
    return Workflow(name, nodes, groups)


def zeros(place: tuple[int, int], words: str) -> Node:
    """The published negative."""
    links = {"conditioning": (words, 0)}
    return Node("ConditioningZeroOut", place, (380, 50), links=links, title="Negative: all zeros")


def sampler(place: tuple[int, int], steps: int, scheduler: str, title: str = "", **sources: str) -> Node:
    """A KSampler; sources: input -> key of the node whose first output goes there."""
    values = {"seed": 7, "steps": steps, "cfg": 5.0, "sampler_name": "euler", "scheduler": scheduler}
    links = {name: (key, 0) for name, key in {**sources, "latent_image": "latent"}.items()}
    return Node("KSampler", place, (320, 270), values, links, title)


def consistent(
    name: str, note: str, loader: Node, script: dict, size: int, steps: int, scheduler: str, free_u: bool = False
) -> Workflow:
    """One-Prompt-One-Story with consistent self-attention on the same model, and FreeU below them."""
    whole = one_prompt_one_story(name, note, loader, script, size, steps, scheduler)
    nodes = {
        **whole.nodes,
        "attention": Node("StoryLoom_ConsistentSelfAttention", (480, 880), (380, 260), links={"model": ("ipca", 0)}),
        "sampler": sampler((980, 0), steps, scheduler, model="attention", positive="words", negative="negative"),
    }
    model = (*whole.groups["Model"], "attention")
    if free_u:
        nodes["free_u"] = Node("StoryLoom_FreeU", (0, 880), (420, 230), links={"model": ("loader", 0)})
        nodes["ipca"] = replace(nodes["ipca"], links={"model": ("free_u", 0)})
        model = (*model, "free_u")
    return Workflow(name, nodes, {**whole.groups, "Model": model})


def long_story(name: str, note: str, loader: Node, script: dict, size: int, steps: int, scheduler: str) -> Workflow:
    """A story of any length in batches that share their first frames by consistent self-attention."""
    whole = consistent(name, note, loader, script, size, steps, scheduler)
    story, anchors = {"story": ("script", 0)}, {"anchors": 2}
    split = {"latent": ("latent", 0), "positive": ("words", 0), "negative": ("negative", 0)}
    batch = {"latent_image": ("split", 0), "positive": ("split", 1), "negative": ("split", 2)}
    lower = 230
    changed = {
        "script": replace(whole.nodes["script"], size=(420, 300 + lower)),
        "report": moved(whole.nodes["report"], lower),
        "split": Node("StoryLoom_SplitBatches", (480, 630), (380, 150), {"batch_size": 4, **anchors}, split),
        "loader": moved(loader, lower),
        "ipca": moved(whole.nodes["ipca"], lower),
        "attention": replace(moved(whole.nodes["attention"], lower), values=anchors),
        "sampler": replace(whole.nodes["sampler"], links={"model": ("attention", 0), **batch}),
        "join": Node(
            "StoryLoom_JoinBatches", (980, 880), (320, 70), links={"plan": ("split", 5), "images": ("decode", 0)}
        ),
        "page": replace(whole.nodes["page"], links={"images": ("join", 1), **story}),
    }
    groups = {
        **whole.groups,
        "Story": (*whole.groups["Story"], "split"),
        "Draw": (*whole.groups["Draw"], "join"),
    }
    return Workflow(name, {**whole.nodes, **changed}, groups)


def moved(node: Node, down: int) -> Node:
    return replace(node, place=(node.place[0], node.place[1] + down))


def two_characters(name: str, note: str, loader: Node, size: int, steps: int, scheduler: str) -> Workflow:
    """The same graph with every frame encoded alone, for a story of two characters."""
    script = {"identity": CAST, "frames": CAST_FRAMES}
    whole = consistent(name, note, loader, script, size, steps, scheduler)
    changed = {
        "script": replace(whole.nodes["script"], size=(420, 560)),
        "words": Node(
            "StoryLoom_EncodePerFrame", (480, 190), (380, 110), links={"clip": ("loader", 1), "story": ("script", 0)}
        ),
    }
    nodes = {key: changed.get(key, node) for key, node in whole.nodes.items() if key != "report"}
    story = tuple(key for key in whole.groups["Story"] if key != "report")
    return Workflow(name, nodes, {**whole.groups, "Story": story})


def with_and_without(name: str, note: str, loader: Node, size: int, steps: int, scheduler: str) -> Workflow:
    """The demo story twice from the same noise: every frame its own prompt, and One-Prompt-One-Story."""
    above = "\n".join(f"{words} # without: {caption}" for words, caption in DEMO_PICTURES.items())
    below = "\n".join(f"{words} # with: {caption}" for words, caption in DEMO_PICTURES.items())
    story = {"clip": ("loader", 1), "story": ("script", 0)}
    nodes = {
        "note": Node("MarkdownNote", (-460, 0), (380, 640), {"": note}, title="Read me"),
        "script": Node("StoryLoom_Script", (0, 0), (420, 300), {"identity": DEMO_IDENTITY, "frames": below}),
        "captions": Node(
            "StoryLoom_Script",
            (0, 360),
            (420, 300),
            {"identity": DEMO_IDENTITY, "frames": above},
            title="Captions above",
        ),
        "loader": replace(loader, place=(0, 800)),
        "latent": Node(
            "StoryLoom_EmptyLatent", (0, 990), (420, 130), {"width": size, "height": size}, {"story": ("script", 0)}
        ),
    }
    branches = {
        "without": (0, "StoryLoom_EncodePerFrame", "loader", "Without StoryLoom (each frame its own prompt)"),
        "with": (600, "StoryLoom_EncodeOnePrompt", "with ipca", "With StoryLoom (one prompt, SVR + IPCA)"),
    }
    groups = {"Story": ("script", "captions"), "Model": ("loader", "latent")}
    for key, (top, encode, model, title) in branches.items():
        parts = {
            f"{key} words": Node(encode, (540, top), (380, 260), links=story),
            f"{key} negative": zeros((540, top + 330), f"{key} words"),
            f"{key} sampler": sampler(
                (980, top),
                steps,
                scheduler,
                f"KSampler, {key}",
                model=model,
                positive=f"{key} words",
                negative=f"{key} negative",
            ),
            f"{key} decode": Node(
                "VAEDecode", (980, top + 330), (320, 50), links={"samples": (f"{key} sampler", 0), "vae": ("loader", 2)}
            ),
            f"{key} frames": Node(
                "SaveImage",
                (1340, top),
                (380, 380),
                {"filename_prefix": f"StoryLoom/{key}"},
                {"images": (f"{key} decode", 0)},
                title,
            ),
        }
        if model == "with ipca":
            parts[model] = Node("StoryLoom_IPCA", (540, top + 440), (380, 130), links={"model": ("loader", 0)})
        nodes |= parts
        groups[title] = tuple(parts)
    row = {"columns": 20, "caption_size": 12}
    for key, top, words in (("without", 0, "captions"), ("with", 240, "script")):
        links = {"images": (f"{key} decode", 0), "story": (words, 0)}
        nodes[f"{key} page"] = Node(
            "StoryLoom_Page", (1860, top), (480, 160), row, links, "Row above" if key == "without" else "Row below"
        )
    nodes["page"] = Node(
        "ImageStitch",
        (1860, 480),
        (480, 150),
        {"direction": "down", "match_image_size": False},
        {"image1": ("without page", 0), "image2": ("with page", 0)},
        "Both rows",
    )
    nodes["save"] = Node(
        "SaveImage", (1860, 710), (480, 460), {"filename_prefix": "StoryLoom/page"}, {"images": ("page", 0)}
    )
    groups["Page"] = ("without page", "with page", "page", "save")
    return Workflow(name, nodes, groups)


def workflows() -> list[Workflow]:
    """Every example workflow."""
    model = {"name": CHECKPOINT, "url": SOURCE, "directory": "checkpoints"}
    checkpoint = Node(
        "CheckpointLoaderSimple", (0, 690), (420, 130), {"ckpt_name": CHECKPOINT}, properties={"models": [model]}
    )
    demo = Node("StoryLoom_DemoModel", (0, 690), (420, 130))
    style = {"style": "watercolor illustration of {prompt}, soft light"}
    demo_story = {"identity": DEMO_IDENTITY, "frames": DEMO_FRAMES}
    long_script = {"identity": DEMO_IDENTITY, "frames": LONG_FRAMES}
    at_home = {"size": DEMO_SIZE, "steps": DEMO_STEPS, "scheduler": DEMO_SCHEDULER}
    published = {"size": 1024, "steps": 50, "scheduler": "ddim_uniform"}
    return [
        one_prompt_one_story("One Prompt One Story", REAL_NOTE, checkpoint, style, **published),
        consistent("Consistent Characters", CONSISTENT_NOTE, checkpoint, style, **published, free_u=True),
        two_characters("Two Characters", TWO_NOTE, checkpoint, **published),
        long_story("Long Story", LONG_NOTE, checkpoint, {**long_script, **style}, **published),
        with_and_without(f"{DEMO}With and Without", BOTH_NOTE, demo, **at_home),
        one_prompt_one_story(f"{DEMO}One Prompt One Story", DEMO_NOTE, demo, demo_story, **at_home),
        consistent(f"{DEMO}Consistent Characters", CONSISTENT_DEMO_NOTE, demo, demo_story, **at_home),
        two_characters(f"{DEMO}Two Characters", TWO_DEMO_NOTE, demo, **at_home),
        long_story(f"{DEMO}Long Story", LONG_DEMO_NOTE, demo, long_script, **at_home),
    ]


# ---- the two formats -------------------------------------------------------------------------------------------------


def api_form(workflow: Workflow, schemas: dict) -> dict:
    """A workflow as POST /prompt takes it. schemas: the answer of `/object_info`."""
    numbers = {key: number for number, key in enumerate(workflow.nodes, start=1)}
    prompt = {}
    for key, node in workflow.nodes.items():
        if node.kind not in schemas:  # a note
            continue
        inputs = {}
        for name, kind, options in inputs_of(schemas[node.kind]):
            if name in node.links:
                source, output = node.links[name]
                inputs[name] = [str(numbers[source]), output]
            elif kind in WIDGETS:
                inputs[name] = value_of(node, name, options)
        title = node.title or schemas[node.kind]["display_name"]
        prompt[str(numbers[key])] = {"class_type": node.kind, "inputs": inputs, "_meta": {"title": title}}
    return prompt


def ui_form(workflow: Workflow, schemas: dict) -> dict:
    """A workflow as the browser interface saves it. schemas: the answer of `/object_info`."""
    numbers = {key: number for number, key in enumerate(workflow.nodes, start=1)}
    links = []
    for key, node in workflow.nodes.items():
        slots = [name for name, kind, _ in inputs_of(schemas.get(node.kind)) if kind not in WIDGETS]
        for name, (source, output) in node.links.items():
            kind = schemas[workflow.nodes[source].kind]["output"][output]
            links.append([len(links) + 1, numbers[source], output, numbers[key], slots.index(name), kind])
    return {
        "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"storyloom/{workflow.name}")),
        "revision": 0,
        "last_node_id": len(numbers),
        "last_link_id": len(links),
        "nodes": [
            ui_node(node, numbers[key], order, schemas.get(node.kind), links)
            for order, (key, node) in enumerate(workflow.nodes.items())
        ],
        "links": links,
        "groups": [
            ui_group(number, title, [workflow.nodes[key] for key in keys])
            for number, (title, keys) in enumerate(workflow.groups.items(), start=1)
        ],
        "config": {},
        "extra": {},
        "version": 0.4,
    }


def ui_node(node: Node, number: int, order: int, schema: dict | None, links: list[list]) -> dict:
    arriving = {link[4]: link[0] for link in links if link[3] == number}
    slots = [(name, kind) for name, kind, _ in inputs_of(schema) if kind not in WIDGETS]
    values = [value for _, value in widget_values(node, schema)]
    properties = dict(node.properties)
    if schema:
        own = schema["python_module"].startswith("custom_nodes.")
        properties = {"Node name for S&R": node.kind, "cnr_id": "storyloom" if own else "comfy-core", **properties}
    saved = {
        "id": number,
        "type": node.kind,
        "pos": list(node.place),
        "size": list(node.size),
        "flags": {},
        "order": order,
        "mode": 0,
        "inputs": [{"name": name, "type": kind, "link": arriving.get(slot)} for slot, (name, kind) in enumerate(slots)],
        "outputs": [
            {
                "name": name,
                "type": kind,
                "slot_index": slot,
                "links": [link[0] for link in links if link[1:3] == [number, slot]],
            }
            for slot, (name, kind) in enumerate(
                zip(schema["output_name"], schema["output"], strict=True) if schema else ()
            )
        ],
        "properties": properties,
    }
    if values:
        saved["widgets_values"] = values
    if node.title:
        saved["title"] = node.title
    if not schema:
        saved |= NOTE_COLORS
    return saved


def ui_group(number: int, title: str, members: list[Node]) -> dict:
    left = min(node.place[0] for node in members) - PADDING
    top = min(node.place[1] for node in members) - TITLE - GROUP_TITLE
    right = max(node.place[0] + node.size[0] for node in members) + PADDING
    bottom = max(node.place[1] + node.size[1] for node in members) + PADDING
    box = [left, top, right - left, bottom - top]
    return {"id": number, "title": title, "bounding": box, "color": "#3f789e", "font_size": 24, "flags": {}}


def inputs_of(schema: dict | None) -> Iterator[tuple[str, str, dict]]:
    """(name, type, options) of every input of a node, in order; nothing for a note. Old lists of choices are COMBO."""
    for part in ("required", "optional"):
        for name, (kind, *options) in (schema["input"] if schema else {}).get(part, {}).items():
            options = options[0] if options else {}
            if isinstance(kind, list):
                kind, options = "COMBO", {"options": kind, **options}
            yield name, kind, options


def widget_values(node: Node, schema: dict | None) -> Iterator[tuple[str, object]]:
    """(name, value) of every widget as the browser interface counts them: a seed is followed by its mode."""
    if schema is None:
        yield from node.values.items()
    for name, kind, options in inputs_of(schema):
        if kind in WIDGETS:
            yield name, value_of(node, name, options)
            if options.get("control_after_generate"):
                yield "control_after_generate", SEED_MODE


def value_of(node: Node, name: str, options: dict) -> object:
    if name in node.values:
        return node.values[name]
    return options["default"] if "default" in options else options["options"][0]


# ---- writing ---------------------------------------------------------------------------------------------------------


def texts(schemas: dict) -> dict[Path, str]:
    """The text of every workflow file."""
    files = {}
    for workflow in workflows():
        for folder, form in ((WORKFLOWS, ui_form), (WORKFLOWS / "api", api_form)):
            text = json.dumps(form(workflow, schemas), indent=2, ensure_ascii=False)
            files[folder / f"{workflow.name}.json"] = text + "\n"
    return files


def draw_thumbnails(server: comfyui.Server) -> Iterator[Path]:
    """Run the demo workflows and write their pages as thumbnails, where the browser interface looks for these.

    A workflow for a checkpoint gets the picture of its demo.
    """
    from PIL import Image

    names = {workflow.name for workflow in workflows()}
    for workflow in workflows():
        if any(node.kind == "StoryLoom_DemoModel" for node in workflow.nodes.values()):
            prompt = json.loads((WORKFLOWS / "api" / f"{workflow.name}.json").read_text(encoding="utf-8"))
            environment.say(f"Drawing {workflow.name}")
            saved = server.outputs(server.wait(server.submit(prompt)))
            (page,) = (path for path in saved if path.name.startswith("page"))
            for name in {workflow.name, workflow.name.removeprefix(DEMO)} & names:
                thumbnail = WORKFLOWS / f"{name}.jpg"
                with Image.open(page) as image:
                    image.convert("RGB").save(thumbnail, quality=90)
                yield thumbnail


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--thumbnails", action="store_true", help="also draw the demos and write their thumbnails")
    options = parser.parse_args()
    environment.enter()
    with (
        comfyui.scratch("workflows") as base,
        comfyui.Server(comfyui.find_comfyui(), comfyui.pack_base(base), sys.executable) as server,
    ):
        with urllib.request.urlopen(f"{server.url}/object_info") as answer:
            files = texts(json.load(answer))
        for path, text in files.items():
            path.write_text(text, encoding="utf-8")
            environment.say(f"Written: {path}")
        for path in draw_thumbnails(server) if options.thumbnails else ():
            environment.say(f"Written: {path}")


if __name__ == "__main__":
    try:
        main()
    except (environment.SetupError, comfyui.ComfyUIError, comfyui.PromptRefused) as reason:
        environment.exit_with(reason)
    except (comfyui.PromptFailed, KeyboardInterrupt) as reason:
        environment.exit_with(reason)
