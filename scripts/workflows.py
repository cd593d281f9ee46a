"""Writes the example workflows, in the format of the browser interface and in that of POST /prompt, from one text each.

The subgraph blueprints, which `blueprints.py` cuts from the same graphs, are written with them.

`python scripts/workflows.py` after a change here or of a node's inputs. It asks a real ComfyUI for the nodes' schemas
(`/object_info`), so everything that is not said here has the schema's default. After a change of the demo model:
`python scripts/workflows.py --thumbnails` draws the demos too.
"""

from __future__ import annotations

import argparse
import contextlib
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
BYPASSED = 4
"""A bypassed node's mode in the browser's format."""
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
    bypassed: bool = False
    """Whether it is there to be switched on: the browser interface shows it bypassed, POST /prompt does not get it."""


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
[{CHECKPOINT}]({SOURCE}) (6.9 GB). LoRA, ControlNet, another sampler: put them in as usual. Turbo, Lightning or LCM: \
give KSampler the steps, cfg and sampler of that checkpoint."""

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
every frame looks at the anchors, whose number it takes from the split."""
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

MEASURED = """\
**Story consistency** measures each row, **Compare stories** puts both on one page and says above them what changed. \
Bypass a method, or put another in, and run again with the same seed: the page tells whether it worked."""
BOTH_NOTE = f"""## What this is
One story, drawn twice from the same noise by the demo model, a tiny SDXL that has learnt small pixel-art scenes.

**Above, without**: every frame is its own prompt. What the text leaves open, here the fox's fur, trousers and hat, \
changes from frame to frame.

**Below, with**: one prompt for the whole story (SVR), and the identity's words count more (IPCA).

## Did it work?
{MEASURED}

**Demo similarity** reads the demo model's pictures exactly. *Same figures*: in how many looks the frames agree. \
*Shown as told*: how much of the text is in the picture. For other models take the template *Did It Work*.

## Change this first
**Story script**: *identity* is who the story is about, *frames* has one line per picture; a blue coat is only blue \
because the identity says so.

{DEMO_WORDS}

{NEGATIVE}"""

DID_NOTE = f"""## What this is
One story, drawn twice from the same noise: every frame its own prompt, and with StoryLoom (SVR + IPCA). {MEASURED}

## Files
`pip install open_clip_torch` with ComfyUI's own Python. **Load OpenCLIP** then needs OpenAI's weights for \
ViT-B-32 (CLIP-T) and ViT-B-16 (CLIP-I), 0.6 GB each: switch *download* on once, or put \
[this file](https://huggingface.co/timm/vit_base_patch32_clip_224.openai/resolve/main/open_clip_model.safetensors) and \
[this one](https://huggingface.co/timm/vit_base_patch16_clip_224.openai/resolve/main/open_clip_model.safetensors), \
renamed, into `models/open_clip` and choose them.

{YOUR_CHECKPOINT}

## What the numbers say
**CLIP-I**: how alike all frames are, up to 1. **CLIP-T** (*clip_score*): how well each frame shows its text, 2.5 x \
cosine. A method that works raises CLIP-I and leaves CLIP-T where it was. Published for 192 stories, with the \
background taken away (*masks*): SDXL 0.817 and 0.907, the method 0.912 and 0.894.

One story proves little: a difference of one or two hundredths may be chance.

## Change this first
{ONE_STORY}

{IDENTITY_WEIGHT}

{NEGATIVE}"""

PHOTO, PEOPLE, OUTFIT = "Character from a Photo", "Two People", "Change the Outfit"
ADAPTER, ADAPTER_PAGE = "mask.bin", "https://huggingface.co/RED-AIGC/StoryMaker"
ENCODER = "CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors"
ENCODER_SOURCE = "https://huggingface.co/h94/IP-Adapter/resolve/main/models/image_encoder/model.safetensors"
POSE_NET = "controlnet-openpose-sdxl-1.0.safetensors"
POSE_SOURCE = (
    "https://huggingface.co/xinsir/controlnet-openpose-sdxl-1.0/resolve/main/diffusion_pytorch_model.safetensors"
)
NO_GOOD = "bad quality, NSFW, low quality, ugly, disfigured, deformed"
"""StoryMaker's published negative."""
PORTRAIT = (960, 1280)

ADAPTER_FILES = f"""## Files
* Any SDXL checkpoint, in `models/checkpoints`. This one is [{CHECKPOINT}]({SOURCE}) (6.9 GB).
* StoryMaker's `{ADAPTER}` from [RED-AIGC/StoryMaker]({ADAPTER_PAGE}), in `models/storymaker`. Look there for its \
terms: StoryMaker's published code has no licence.
* The image encoder `{ENCODER}`, in `models/clip_vision`. It is [model.safetensors]({ENCODER_SOURCE}) of \
h94/IP-Adapter, renamed (2.5 GB)."""
PAINT = """**Load Image**: choose a picture, right-click it, *Open in MaskEditor*, and paint the character. Without \
paint the mask is empty and the run stops; to take the whole picture instead, pull the link off *mask*."""
LIKENESS = """## The face
**Load face analysis** is bypassed: without it a character goes by appearance, of which the face is a small part. For \
the likeness: `pip install insightface onnxruntime` with ComfyUI's own Python, the `.onnx` files of the pack \
`buffalo_l` into `models/insightface/models/buffalo_l`, restart, and switch the node on (Ctrl+B). The packs that \
InsightFace offers are for **non-commercial research only**."""
STRENGTHS = """**token_strength**, **lora_strength**: how strongly the picture speaks. Less leaves more to the words. \
**appearance_strength** 0 keeps the face only, **face_strength** 0 the clothes only."""
AS_STORYMAKER = """## Settings
960 x 1280, 25 steps, uni_pc_bh2, cfg 7.5, both strengths 0.8 and the negative: as published, as far as ComfyUI's own \
nodes have it."""

PHOTO_NOTE = f"""## What this is
The person of a photo, in every frame of a story (StoryMaker). **Character from image** reads who it is, **Apply \
StoryMaker** tells the model. *What the adapter sees* shows what is taken from the photo.

## Change this first
{PAINT}

**Story script**: in *identity* a few words on who it is, in *frames* one line per picture.

{STRENGTHS}

{ADAPTER_FILES}

{LIKENESS}

## More photos, and files
The group below is bypassed. A second photo of the same person, mixed with the first, makes the character steadier: \
switch on its nodes, except Load character. **Save character** keeps the result. In the next story, **Load character** \
stands in for photos and encoder: drag its output to Apply StoryMaker.

{AS_STORYMAKER}"""

PEOPLE_NOTE = f"""## What this is
Two people from two photos in one story (StoryMaker). Every frame gets those whom its line names.

## Change this first
{PAINT}

**Story script** and **Character from image**: the *name* is what ties them together. In *identity* one person per \
line, with the name in brackets; in *frames*, `[Name]` puts that person into the picture, `[NC]` nobody.

One photo with both of them will do: load it twice, and paint one of them in each.

{STRENGTHS}

**region_1**, **region_2**: masks that say where in the picture each of them may act. They are open here: everywhere.

{ADAPTER_FILES}

{LIKENESS}

{AS_STORYMAKER}"""

OUTFIT_NOTE = f"""## What this is
The person of one picture in the clothes of another and the pose of a third: StoryMaker and a ControlNet. There is no \
story here, just a prompt: any prompt will do.

## Change this first
**The person**: choose a photo. With *clothing* connected, only the face is taken from it, which needs face analysis, \
see below; without that, hair and face are left to the prompt.

**The clothes**: a picture that shows little else. It is taken whole.

**The pose**: a drawn skeleton (OpenPose), of the size of the picture to draw. For none, bypass Apply ControlNet.

{STRENGTHS}

{ADAPTER_FILES}
* A ControlNet for SDXL that knows skeletons, in `models/controlnet`. This one is \
[diffusion_pytorch_model.safetensors]({POSE_SOURCE}) of xinsir/controlnet-openpose-sdxl-1.0, renamed to `{POSE_NET}` \
(2.5 GB).

{LIKENESS}

{AS_STORYMAKER}"""

PHOTO_DEMO_NOTE = f"""## What this is
The graph of *{PHOTO}* at work, without a download. **The adapter and the image encoder are random numbers that mean \
nothing**: the pictures change with them, but they do not come to resemble the picture at the left. What a story with \
a real adapter looks like, only StoryMaker's own weights show.

The photo is drawn here too, by the demo model, so that no file is needed.

{DEMO_WHAT}

## Change this first
Bypass **Apply StoryMaker** (Ctrl+B) and run again: that is the story without it. **token_strength** and \
**lora_strength**: how much of it there is; 0 is nothing.

{DEMO_WORDS}

## With your own model
Open the template *{PHOTO}*."""

PERSON_FRAMES = """reading a book on a train # The train was slow,
walking through a snowy forest # the forest quiet,
with an umbrella in the city at night # the city wet.
laughing on a beach # And then: the sea."""
COUPLE = """[Woman] a woman
[Man] a man"""
COUPLE_FRAMES = """[Woman] waiting on a railway platform # She was early,
[Man] asleep on a train # he was late,
[Woman] and [Man] walking on a beach # the sea was there all the time.
[Man] and [Woman] drinking tea in a garden # And so was tea."""


def one_prompt_one_story(
    name: str, note: str, loader: Node, script: dict, size: int, steps: int, scheduler: str
) -> Workflow:
    """One-Prompt-One-Story at its published settings: SVR on the words, IPCA on the model, a zero negative."""
    nodes = {
        "note": Node("MarkdownNote", (-460, 0), (380, 560), {"": note}, title="Read me"),
        "script": Node("StoryLoom_Script", (0, 0), (420, 560), script),
        "loader": loader,
        "latent": Node(
            "StoryLoom_EmptyLatent", (480, 0), (380, 130), {"width": size, "height": size}, {"story": ("script", 0)}
        ),
        "words": Node(
            "StoryLoom_EncodeOnePrompt", (480, 190), (380, 260), links={"clip": ("loader", 1), "story": ("script", 0)}
        ),
        "negative": zeros((480, 510), "words"),
        "report": Node("PreviewAny", (980, 880), (320, 200), links={"source": ("words", 1)}, title="Report"),
        "ipca": Node("StoryLoom_IPCA", (480, 690), (380, 130), links={"model": ("loader", 0)}),
        "sampler": sampler((980, 0), steps, scheduler, model="ipca", positive="words", negative="negative"),
        "decode": Node("VAEDecode", (980, 330), (320, 50), links={"samples": ("sampler", 0), "vae": ("loader", 2)}),
        "frames": Node("PreviewImage", (980, 440), (320, 380), links={"images": ("decode", 0)}, title="Frames"),
        "page": Node("StoryLoom_Page", (1420, 0), (480, 440), links={"images": ("decode", 0), "story": ("script", 0)}),
        "save": Node("StoryLoom_SavePage", (1420, 500), (480, 480), links={"images": ("page", 0)}),
    }
    groups = {
        "Story": ("script", "latent", "words", "negative"),
        "Model": ("loader", "ipca"),
        "Draw": ("sampler", "decode", "frames", "report"),
        "Page": ("page", "save"),
    }
    return Workflow(name, nodes, groups)


def zeros(place: tuple[int, int], words: str) -> Node:
    """The published negative."""
    links = {"conditioning": (words, 0)}
    return Node("ConditioningZeroOut", place, (380, 50), links=links, title="Negative: all zeros")


def sampler(
    place: tuple[int, int],
    steps: int,
    scheduler: str,
    title: str = "",
    cfg: float = 5.0,
    solver: str = "euler",
    **sources: str,
) -> Node:
    """A KSampler; sources: input -> key of the node whose first output goes there."""
    values = {"seed": 7, "steps": steps, "cfg": cfg, "sampler_name": solver, "scheduler": scheduler}
    links = {name: (key, 0) for name, key in {**sources, "latent_image": sources.get("latent_image", "latent")}.items()}
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
    story = {"story": ("script", 0)}
    split = {"latent": ("latent", 0), "positive": ("words", 0), "negative": ("negative", 0)}
    batch = {"latent_image": ("split", 0), "positive": ("split", 1), "negative": ("split", 2)}
    lower = 260
    changed = {
        "script": replace(whole.nodes["script"], size=(420, 560 + lower)),
        "report": moved(whole.nodes["report"], 140),
        "split": Node("StoryLoom_SplitBatches", (480, 630), (380, 180), {"batch_size": 4, "anchors": 2}, split),
        "loader": moved(loader, lower),
        "ipca": moved(whole.nodes["ipca"], lower),
        "attention": moved(whole.nodes["attention"], lower),
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
        "words": Node(
            "StoryLoom_EncodePerFrame", (480, 190), (380, 110), links={"clip": ("loader", 1), "story": ("script", 0)}
        ),
    }
    nodes = {key: changed.get(key, node) for key, node in whole.nodes.items() if key != "report"}
    draw = tuple(key for key in whole.groups["Draw"] if key != "report")
    return Workflow(name, nodes, {**whole.groups, "Draw": draw})


def with_and_without(
    name: str,
    note: str,
    loader: Node,
    script: dict,
    encoders: dict[str, Node],
    size: int,
    steps: int,
    scheduler: str,
    caption_size: int = 0,
) -> Workflow:
    """A story twice from the same noise, every frame its own prompt and One-Prompt-One-Story, measured and compared.

    encoders: by the input of Story consistency.
    """
    story = {"story": ("script", 0)}
    nodes = {
        "note": read_me(note),
        "script": Node("StoryLoom_Script", (0, 0), (420, 300), script),
        "loader": replace(loader, place=(0, 440)),
        "latent": Node("StoryLoom_EmptyLatent", (0, 630), (420, 130), {"width": size, "height": size}, story),
        **encoders,
    }
    branches = {
        "without": (0, "StoryLoom_EncodePerFrame", "loader", "Without StoryLoom (each frame its own prompt)"),
        "with": (600, "StoryLoom_EncodeOnePrompt", "with ipca", "With StoryLoom (one prompt, SVR + IPCA)"),
    }
    groups = {"Story": ("script",), "Model": ("loader", "latent")}
    for key, (top, encode, model, title) in branches.items():
        pictures = {"images": (f"{key} decode", 0)}
        parts = {
            f"{key} words": Node(encode, (540, top), (380, 260), links={"clip": ("loader", 1), **story}),
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
                "SaveImage", (1340, top), (380, 380), {"filename_prefix": f"StoryLoom/{key}"}, pictures, title
            ),
        }
        if model == "with ipca":
            parts[model] = Node("StoryLoom_IPCA", (540, top + 440), (380, 130), links={"model": ("loader", 0)})
        nodes |= parts
        groups[title] = tuple(parts)
        nodes[f"{key} measures"] = Node(
            "StoryLoom_Consistency",
            (1860, top + 340),
            (480, 540),
            {"filename_prefix": f"StoryLoom/{key}_consistency"},
            {**pictures, **story, **{encoder: (encoder, 0) for encoder in encoders}},
            f"Story consistency, {key}",
        )
        nodes[f"{key} report"] = Node(
            "PreviewAny",
            (2400, top + 340),
            (480, 540),
            links={"source": (f"{key} measures", 0)},
            title=f"Report, {key}",
        )
    both = {
        f"{what}_{side}": (f"{key} {node}", output)
        for side, key in zip("ab", branches, strict=True)
        for what, node, output in (("images", "decode", 0), ("measures", "measures", 3))
    }
    nodes["compare"] = Node(
        "StoryLoom_Compare", (3000, 0), (480, 300), {"caption_size": caption_size}, {**both, **story}
    )
    nodes["save"] = Node("StoryLoom_SavePage", (3000, 360), (480, 640), links={"images": ("compare", 0)})
    groups["Measure"] = (*encoders, *(f"{key} {part}" for key in branches for part in ("measures", "report")))
    groups["Page"] = ("compare", "save")
    return Workflow(name, nodes, groups)


def model_property(name: str, url: str, directory: str) -> dict:
    """What the browser interface offers to download where a file is missing."""
    return {"models": [{"name": name, "url": url, "directory": directory}]}


def prompt_text(place: tuple[int, int], text: str, title: str) -> Node:
    return Node("CLIPTextEncode", place, (420, 110), {"text": text}, {"clip": ("loader", 1)}, title)


def real_models(loader: Node) -> dict[str, Node]:
    """What loads files for a character from a photo."""
    return {
        "loader": replace(loader, place=(0, 0), size=(340, 110)),
        "storymaker": Node(
            "StoryLoom_LoadStoryMaker",
            (0, 170),
            (340, 60),
            {"file": ADAPTER},
            properties=model_property(ADAPTER, f"{ADAPTER_PAGE}/resolve/main/{ADAPTER}", "storymaker"),
        ),
        "vision": Node(
            "CLIPVisionLoader",
            (0, 290),
            (340, 60),
            {"clip_name": ENCODER},
            properties=model_property(ENCODER, ENCODER_SOURCE, "clip_vision"),
        ),
        "faces": Node(
            "StoryLoom_LoadFaceAnalysis",
            (0, 410),
            (340, 90),
            {"pack": "buffalo_l", "provider": "CPU"},
            title="Load face analysis (switch on)",
            bypassed=True,
        ),
    }


def photo(place: tuple[int, int], file: str, title: str, bypassed: bool = False) -> Node:
    return Node("LoadImage", place, (340, 340), {"image": file}, title=title, bypassed=bypassed)


def person(place: tuple[int, int], image: str, name: str = "", bypassed: bool = False) -> Node:
    """A character from a painted photo. image: key of its Load Image."""
    links = {
        "clip_vision": ("vision", 0),
        "image": (image, 0),
        "mask": (image, 1),
        "face_analysis": ("faces", 0),
    }
    return Node("StoryLoom_Character", place, (400, 240), {"name": name}, links, bypassed=bypassed)


def seen(place: tuple[int, int], character: str, height: int = 260) -> Node:
    title = "What the adapter sees"
    return Node("PreviewImage", place, (400, height), links={"images": (character, 1)}, title=title)


def applied(place: tuple[int, int], *characters: str) -> Node:
    """StoryMaker on the loader's model. characters: keys of the nodes that give them."""
    people = {f"character_{number}": (key, 0) for number, key in enumerate(characters, start=1)}
    links = {"model": ("loader", 0), "storymaker": ("storymaker", 0), **people}
    return Node("StoryLoom_ApplyStoryMaker", place, (420, 340), links=links)


def drawn_story(script: dict, size: tuple[int, int], negative: Node, settings: dict) -> dict[str, Node]:
    """A story on the model `apply`, frame by frame, from the script to the page."""
    width, height = size
    story = {"story": ("script", 0)}
    return {
        "script": Node("StoryLoom_Script", (900, 0), (420, 300), script),
        "words": Node("StoryLoom_EncodePerFrame", (900, 360), (420, 110), links={"clip": ("loader", 1), **story}),
        "negative": negative,
        "latent": Node("StoryLoom_EmptyLatent", (900, 700), (420, 130), {"width": width, "height": height}, story),
        "sampler": sampler((1400, 0), model="apply", positive="words", negative="negative", **settings),
        "decode": Node("VAEDecode", (1400, 330), (320, 50), links={"samples": ("sampler", 0), "vae": ("loader", 2)}),
        "frames": Node("PreviewImage", (1400, 440), (320, 380), links={"images": ("decode", 0)}, title="Frames"),
        "page": Node("StoryLoom_Page", (1800, 0), (480, 440), links={"images": ("decode", 0), **story}),
        "save": Node("StoryLoom_SavePage", (1800, 500), (480, 480), links={"images": ("page", 0)}),
    }


STORY_GROUPS = {
    "Story": ("script", "words", "negative", "latent"),
    "StoryMaker": ("apply",),
    "Draw": ("sampler", "decode", "frames"),
    "Page": ("page", "save"),
}


def read_me(note: str) -> Node:
    return Node("MarkdownNote", (-460, 0), (380, 640), {"": note}, title="Read me")


def character_from_photo(loader: Node, settings: dict) -> Workflow:
    """A story about the person of a photo. Bypassed: face analysis, a second photo, and a file for the result."""
    nodes = {
        "note": read_me(PHOTO_NOTE),
        **real_models(loader),
        "photo": photo((0, 640), "photo.png", "The photo"),
        "character": person((420, 0), "photo"),
        "seen": seen((420, 300), "character"),
        "report": Node("PreviewAny", (420, 620), (400, 130), links={"source": ("character", 2)}, title="Report"),
        "photo 2": photo((0, 1100), "photo 2.png", "A second photo", bypassed=True),
        "character 2": person((420, 1100), "photo 2", bypassed=True),
        "blend": Node(
            "StoryLoom_BlendCharacters",
            (420, 1410),
            (400, 110),
            links={"first": ("character", 0), "second": ("character 2", 0)},
            bypassed=True,
        ),
        "keep": Node(
            "StoryLoom_SaveCharacter",
            (420, 1580),
            (400, 110),
            {"file_name": "person"},
            {"character": ("blend", 0)},
            bypassed=True,
        ),
        "kept": Node(
            "StoryLoom_LoadCharacter",
            (0, 1580),
            (340, 80),
            {"file": "person.safetensors"},
            title="Load character (in place of photos)",
            bypassed=True,
        ),
        "apply": applied((900, 960), "blend"),
        **drawn_story(
            {"identity": "a person", "frames": PERSON_FRAMES},
            PORTRAIT,
            prompt_text((900, 530), NO_GOOD, "Negative"),
            settings,
        ),
    }
    groups = {
        "Model": ("loader", "storymaker", "vision", "faces"),
        "Photo": ("photo",),
        "Character": ("character", "seen", "report"),
        "More photos, and files (bypassed)": ("photo 2", "character 2", "blend", "keep", "kept"),
        **STORY_GROUPS,
    }
    return Workflow(PHOTO, nodes, groups)


def character_from_photo_demo(demo: Node, settings: dict) -> Workflow:
    """The same with the demo model and random numbers for StoryMaker; the demo model draws the photo."""
    photo_sampler = {"positive": "photo words", "negative": "photo negative", "latent_image": "photo latent"}
    size = (DEMO_SIZE, DEMO_SIZE)
    nodes = {
        "note": read_me(PHOTO_DEMO_NOTE),
        "loader": replace(demo, place=(0, 0), size=(340, 110)),
        "storymaker": Node("StoryLoom_DemoStoryMaker", (0, 170), (340, 60)),
        "photo words": replace(prompt_text((0, 380), f"{DEMO_IDENTITY} in the meadow", "Who"), size=(340, 110)),
        "photo negative": replace(zeros((0, 550), "photo words"), size=(340, 50)),
        "photo latent": Node(
            "EmptyLatentImage", (0, 660), (340, 110), dict(zip(("width", "height"), size, strict=True))
        ),
        "photo sampler": replace(
            sampler((0, 830), title="The photo", model="loader", **photo_sampler, **settings), size=(340, 270)
        ),
        "photo": Node("VAEDecode", (0, 1160), (340, 50), links={"samples": ("photo sampler", 0), "vae": ("loader", 2)}),
        "character": Node(
            "StoryLoom_Character",
            (420, 0),
            (400, 240),
            links={"clip_vision": ("storymaker", 1), "image": ("photo", 0)},
        ),
        "seen": seen((420, 300), "character"),
        "report": Node("PreviewAny", (420, 620), (400, 130), links={"source": ("character", 2)}, title="Report"),
        "apply": applied((900, 960), "character"),
        **drawn_story(
            {"identity": DEMO_IDENTITY, "frames": DEMO_FRAMES},
            size,
            replace(zeros((900, 530), "words"), size=(420, 50)),
            settings,
        ),
    }
    groups = {
        "Model": ("loader", "storymaker"),
        "Photo": ("photo words", "photo negative", "photo latent", "photo sampler", "photo"),
        "Character": ("character", "seen", "report"),
        **STORY_GROUPS,
    }
    return Workflow(f"{DEMO}{PHOTO}", nodes, groups)


def two_people(loader: Node, settings: dict) -> Workflow:
    """A story about the people of two photos, each in the frames that name them."""
    nodes = {
        "note": read_me(PEOPLE_NOTE),
        **real_models(loader),
        "photo 1": photo((0, 640), "woman.png", "Photo of the woman"),
        "photo 2": photo((0, 1050), "man.png", "Photo of the man"),
        "character 1": person((420, 0), "photo 1", "Woman"),
        "seen 1": seen((420, 300), "character 1"),
        "character 2": person((420, 680), "photo 2", "Man"),
        "seen 2": seen((420, 980), "character 2"),
        "apply": applied((900, 960), "character 1", "character 2"),
        **drawn_story(
            {"identity": COUPLE, "frames": COUPLE_FRAMES},
            PORTRAIT,
            prompt_text((900, 530), NO_GOOD, "Negative"),
            settings,
        ),
    }
    groups = {
        "Model": ("loader", "storymaker", "vision", "faces"),
        "Photos": ("photo 1", "photo 2"),
        "Characters": ("character 1", "seen 1", "character 2", "seen 2"),
        **STORY_GROUPS,
    }
    return Workflow(PEOPLE, nodes, groups)


def change_the_outfit(loader: Node, settings: dict) -> Workflow:
    """One picture of a person in other clothes, in the pose of a skeleton: an ordinary prompt and a ControlNet."""
    dressed = person((420, 0), "photo")
    links = {name: source for name, source in dressed.links.items() if name != "mask"}
    width, height = PORTRAIT
    hint = {
        "positive": ("positive", 0),
        "negative": ("negative", 0),
        "control_net": ("pose net", 0),
        "image": ("pose", 0),
    }
    nodes = {
        "note": read_me(OUTFIT_NOTE),
        **real_models(loader),
        "pose net": Node(
            "ControlNetLoader",
            (420, 900),
            (400, 60),
            {"control_net_name": POSE_NET},
            properties=model_property(POSE_NET, POSE_SOURCE, "controlnet"),
        ),
        "photo": photo((0, 760), "photo.png", "The person"),
        "clothing": photo((0, 1160), "clothing.png", "The clothes"),
        "pose": replace(photo((420, 1020), "pose.png", "The pose"), size=(400, 340)),
        "character": replace(dressed, links={**links, "clothing": ("clothing", 0)}),
        "seen": seen((420, 300), "character"),
        "report": Node("PreviewAny", (420, 620), (400, 130), links={"source": ("character", 2)}, title="Report"),
        "positive": prompt_text((900, 0), "a person standing in a garden, full body, natural light", "Prompt"),
        "negative": prompt_text((900, 170), NO_GOOD, "Negative"),
        "control": Node("ControlNetApplyAdvanced", (900, 340), (420, 190), {"strength": 0.8}, hint),
        "latent": Node("EmptyLatentImage", (900, 590), (420, 110), {"width": width, "height": height}),
        "apply": applied((900, 830), "character"),
        "sampler": replace(
            sampler((1400, 0), model="apply", **settings),
            links={
                "model": ("apply", 0),
                "positive": ("control", 0),
                "negative": ("control", 1),
                "latent_image": ("latent", 0),
            },
        ),
        "decode": Node("VAEDecode", (1400, 330), (320, 50), links={"samples": ("sampler", 0), "vae": ("loader", 2)}),
        "save": Node(
            "SaveImage", (1800, 0), (480, 640), {"filename_prefix": "StoryLoom/outfit"}, {"images": ("decode", 0)}
        ),
    }
    groups = {
        "Model": ("loader", "storymaker", "vision", "faces"),
        "Pictures": ("photo", "clothing"),
        "Character": ("character", "seen", "report"),
        "Pose": ("pose net", "pose"),
        "Prompt": ("positive", "negative", "control", "latent"),
        "StoryMaker": ("apply",),
        "Draw": ("sampler", "decode"),
        "Picture": ("save",),
    }
    return Workflow(OUTFIT, nodes, groups)


def workflows() -> list[Workflow]:
    """Every example workflow."""
    model = model_property(CHECKPOINT, SOURCE, "checkpoints")
    checkpoint = Node("CheckpointLoaderSimple", (0, 690), (420, 130), {"ckpt_name": CHECKPOINT}, properties=model)
    demo = Node("StoryLoom_DemoModel", (0, 690), (420, 130))
    style = {"style": "watercolor illustration of {prompt}, soft light"}
    demo_story = {"identity": DEMO_IDENTITY, "frames": DEMO_FRAMES}
    long_script = {"identity": DEMO_IDENTITY, "frames": LONG_FRAMES}
    at_home = {"size": DEMO_SIZE, "steps": DEMO_STEPS, "scheduler": DEMO_SCHEDULER}
    published = {"size": 1024, "steps": 50, "scheduler": "ddim_uniform"}
    demo_reader = {"clip": Node("StoryLoom_DemoSimilarity", (1860, 0), (480, 60))}
    clips = {
        key: Node("StoryLoom_LoadOpenCLIP", (1860, top), (480, 110), {"architecture": architecture}, title=title)
        for key, top, architecture, title in (
            ("clip", 0, "ViT-B-32-quickgelu", "Load OpenCLIP (for CLIP-T)"),
            ("clip_image", 170, "ViT-B-16-quickgelu", "Load OpenCLIP (for CLIP-I)"),
        )
    }
    as_storymaker = {"steps": 25, "scheduler": "normal", "cfg": 7.5, "solver": "uni_pc_bh2"}
    return [
        one_prompt_one_story("One Prompt One Story", REAL_NOTE, checkpoint, style, **published),
        consistent("Consistent Characters", CONSISTENT_NOTE, checkpoint, style, **published, free_u=True),
        two_characters("Two Characters", TWO_NOTE, checkpoint, **published),
        long_story("Long Story", LONG_NOTE, checkpoint, {**long_script, **style}, **published),
        character_from_photo(checkpoint, as_storymaker),
        two_people(checkpoint, as_storymaker),
        change_the_outfit(checkpoint, as_storymaker),
        with_and_without("Did It Work", DID_NOTE, checkpoint, style, clips, **published),
        with_and_without(
            f"{DEMO}With and Without", BOTH_NOTE, demo, demo_story, demo_reader, **at_home, caption_size=12
        ),
        one_prompt_one_story(f"{DEMO}One Prompt One Story", DEMO_NOTE, demo, demo_story, **at_home),
        consistent(f"{DEMO}Consistent Characters", CONSISTENT_DEMO_NOTE, demo, demo_story, **at_home),
        two_characters(f"{DEMO}Two Characters", TWO_DEMO_NOTE, demo, **at_home),
        long_story(f"{DEMO}Long Story", LONG_DEMO_NOTE, demo, long_script, **at_home),
        character_from_photo_demo(demo, {"steps": DEMO_STEPS, "scheduler": DEMO_SCHEDULER}),
    ]


# ---- the two formats -------------------------------------------------------------------------------------------------


def api_form(workflow: Workflow, schemas: dict) -> dict:
    """A workflow as POST /prompt takes it. schemas: the answer of `/object_info`."""
    numbers = {key: number for number, key in enumerate(workflow.nodes, start=1)}
    prompt = {}
    for key, node in workflow.nodes.items():
        if node.kind not in schemas or node.bypassed:  # a note, or not in use
            continue
        inputs = {}
        for name, kind, options in inputs_of(schemas[node.kind]):
            if name in node.links:
                found = source_of(workflow, schemas, *node.links[name])
                if found:
                    inputs[name] = [str(numbers[found[0]]), found[1]]
            elif kind in WIDGETS:
                inputs[name] = value_of(node, name, options)
        title = node.title or schemas[node.kind]["display_name"]
        prompt[str(numbers[key])] = {"class_type": node.kind, "inputs": inputs, "_meta": {"title": title}}
    return prompt


def source_of(workflow: Workflow, schemas: dict, key: str, output: int) -> tuple[str, int] | None:
    """Where a link comes from, as the browser interface sends it.

    A bypassed node hands on the first linked input of the output's type; None where there is none.
    """
    node = workflow.nodes[key]
    if not node.bypassed:
        return key, output
    wanted = schemas[node.kind]["output"][output]
    for name, kind, _ in inputs_of(schemas[node.kind]):
        if kind == wanted and name in node.links:
            return source_of(workflow, schemas, *node.links[name])
    return None


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
        "mode": BYPASSED if node.bypassed else 0,
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


BORROWED = {PHOTO: (PEOPLE, OUTFIT), "With and Without": ("Did It Work",)}
"""Workflows that have no demo, by the one whose picture they take."""


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
            real = workflow.name.removeprefix(DEMO)
            for name in {workflow.name, real, *BORROWED.get(real, ())} & names:
                thumbnail = WORKFLOWS / f"{name}.jpg"
                with Image.open(page) as image:
                    image.convert("RGB").save(thumbnail, quality=90)
                yield thumbnail


@contextlib.contextmanager
def running(name: str) -> Iterator[tuple[comfyui.Server, dict]]:
    """A server with the pack in a scratch folder of this name, and its nodes' schemas."""
    with (
        comfyui.scratch(name) as base,
        comfyui.Server(comfyui.find_comfyui(), comfyui.pack_base(base), sys.executable) as server,
        urllib.request.urlopen(f"{server.url}/object_info") as answer,
    ):
        yield server, json.load(answer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--thumbnails", action="store_true", help="also draw the demos and write their thumbnails")
    options = parser.parse_args()
    environment.enter()
    import blueprints

    with running("workflows") as (server, schemas):
        files = {**texts(schemas), **blueprints.texts(schemas)}
        for path, text in files.items():
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
            environment.say(f"Written: {path}")
        for path in draw_thumbnails(server) if options.thumbnails else ():
            environment.say(f"Written: {path}")


if __name__ == "__main__":
    try:
        main()
    except (environment.SetupError, *comfyui.FAILURES, KeyboardInterrupt) as reason:
        environment.exit_with(reason)
