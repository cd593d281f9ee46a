"""The subgraph blueprints: the usual jobs as one box each, in the front end's format.

`python scripts/workflows.py` writes them with the workflows, from whose graphs they are cut: what loads and what saves
stays outside, and links to it become sockets of the box.
"""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass, replace
from pathlib import Path

import workflows
from workflows import Node, Workflow

BLUEPRINTS = workflows.WORKFLOWS.parent / "subgraphs"
INPUTS, OUTPUTS = -10, -20
"""Numbers of the two nodes of a subgraph that stand for its outside."""
BORDER, ROW = 160, 20
"""Width of these, and height of a slot."""


@dataclass(frozen=True)
class Blueprint:
    """A box. graph: what is in it; its links to keys that it lacks are the sockets.

    sockets: name -> the missing output; widgets: name -> the widgets (key, input) that it sets; outputs: name -> what
    it shows.
    """

    graph: Workflow
    description: str
    aliases: tuple[str, ...]
    sockets: dict[str, tuple[str, int]]
    widgets: dict[str, tuple[tuple[str, str], ...]]
    outputs: dict[str, tuple[str, int]]


LOADED = {"model": ("loader", 0), "clip": ("loader", 1), "vae": ("loader", 2)}
ANY_MODEL = "MODEL, CLIP and VAE come from Load Checkpoint, with LoRAs between if you like."


def same_name(key: str, *names: str) -> dict[str, tuple[tuple[str, str], ...]]:
    return {name: ((key, name),) for name in names}


STORY = {**same_name("script", "identity", "frames", "style"), **same_name("latent", "width", "height")}
DRAWING = same_name("sampler", "seed", "steps", "cfg", "sampler_name", "scheduler")
CONSISTENCY = {**same_name("ipca", "identity_weight"), **same_name("attention", "sampling_rate")}
PAGE = {**same_name("page", "captions", "layout")}


def blueprints() -> list[Blueprint]:
    """Every blueprint."""
    loader = Node("CheckpointLoaderSimple", (0, 690), (420, 130))
    published = {"size": 1024, "steps": 50, "scheduler": "ddim_uniform"}
    script = {"style": "watercolor illustration of {prompt}, soft light"}
    story = workflows.consistent("Story from a prompt", "", loader, script, **published)
    long_script = {"identity": workflows.DEMO_IDENTITY, "frames": workflows.LONG_FRAMES, **script}
    long = workflows.long_story("Long story", "", loader, long_script, **published)
    return [
        Blueprint(
            inner(story),
            "A story as a comic page: one identity and a line per frame, the same character in all of them "
            f"(one prompt with SVR, IPCA, consistent self-attention). {ANY_MODEL}",
            ("StoryLoom", "comic", "same character", "consistent character", "one prompt one story", "StoryDiffusion"),
            LOADED,
            {**STORY, **CONSISTENCY, **DRAWING, **PAGE},
            {"page": ("page", 0), "frames": ("decode", 0), "report": ("words", 1)},
        ),
        Blueprint(
            from_a_photo(loader),
            "The person of a photo in every frame of a story, as a comic page (StoryMaker). Paint the person in the "
            f"mask editor, or leave mask open for the whole picture. {ANY_MODEL}",
            ("StoryLoom", "StoryMaker", "photo of a person", "face", "character from image", "comic"),
            {**LOADED, "image": ("photo", 0), "mask": ("photo", 1), "face_analysis": ("faces", 0)},
            {
                "storymaker": (("storymaker", "file"),),
                "clip_vision": (("vision", "clip_name"),),
                **STORY,
                **same_name("apply", "token_strength", "lora_strength"),
                **DRAWING,
                **PAGE,
            },
            {"page": ("page", 0), "frames": ("decode", 0), "preview": ("character", 1), "report": ("character", 2)},
        ),
        Blueprint(
            inner(long),
            "A story of any length on comic pages, drawn a few frames at a time, with the same character in all of "
            f"them: batches share their first frames, the anchors. {ANY_MODEL}",
            ("StoryLoom", "many frames", "comic", "low memory", "batches", "anchors", "same character"),
            LOADED,
            {
                **STORY,
                "batch_size": (("split", "batch_size"),),
                "anchors": (("split", "anchors"),),
                **CONSISTENCY,
                **DRAWING,
                **PAGE,
                **same_name("page", "panels_per_page"),
            },
            {"page": ("page", 0), "frames": ("join", 1), "report": ("words", 1)},
        ),
    ]


OUTSIDE = {"note", "loader", "photo", "faces", "frames", "report", "save"}
"""Keys of what loads, shows and saves."""


def inner(workflow: Workflow) -> Workflow:
    """A workflow without what loads, shows and saves."""
    groups = {title: tuple(key for key in keys if key not in OUTSIDE) for title, keys in workflow.groups.items()}
    nodes = {key: node for key, node in workflow.nodes.items() if key not in OUTSIDE}
    return Workflow(workflow.name, nodes, groups)


def from_a_photo(loader: Node) -> Workflow:
    """A story about the person of a photo."""
    settings = {"steps": 25, "scheduler": "normal", "cfg": 7.5, "solver": "uni_pc_bh2"}
    script = {"identity": "a person", "frames": workflows.PERSON_FRAMES}
    negative = workflows.prompt_text((900, 530), workflows.NO_GOOD, "Negative")
    nodes = {
        **workflows.real_models(loader),
        "character": workflows.person((420, 0), "photo"),
        "apply": replace(workflows.applied((420, 340), "character"), size=(400, 340)),
        **workflows.drawn_story(script, workflows.PORTRAIT, negative, settings),
    }
    groups = {"Model": ("loader", "storymaker", "vision", "faces"), "Character": ("character", "apply")}
    groups |= {title: keys for title, keys in workflows.STORY_GROUPS.items() if title != "StoryMaker"}
    return inner(Workflow("Story from a photo", nodes, groups))


def texts(schemas: dict) -> dict[Path, str]:
    """The text of every blueprint's file. schemas: the answer of `/object_info`."""
    return {
        BLUEPRINTS / f"{blueprint.graph.name}.json": json.dumps(form(blueprint, schemas), indent=2, ensure_ascii=False)
        + "\n"
        for blueprint in blueprints()
    }


def form(blueprint: Blueprint, schemas: dict) -> dict:
    """A blueprint as the front end saves it: one node, whose type is the definition of what is in it."""
    graph = blueprint.graph
    key = identity(graph.name)
    numbers = {key: number for number, key in enumerate(graph.nodes, start=1)}
    slots = {name: inner_slots(graph.nodes[name], schemas) for name in graph.nodes}
    links = []

    def join(source: int, output: int, target: int, slot: int, kind: str) -> None:
        names = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
        links.append(dict(zip(names, (len(links) + 1, source, output, target, slot, kind), strict=True)))

    sockets = {missing: number for number, missing in enumerate(blueprint.sockets.values())}
    for name, node in graph.nodes.items():
        for target, source in node.links.items():
            slot, kind = slots[name][target]
            if source in sockets:
                join(INPUTS, sockets[source], numbers[name], slot, kind)
            else:
                kind = schemas[graph.nodes[source[0]].kind]["output"][source[1]]
                join(numbers[source[0]], source[1], numbers[name], slot, kind)
    for number, targets in enumerate(blueprint.widgets.values(), start=len(sockets)):
        for name, target in targets:
            join(INPUTS, number, numbers[name], *slots[name][target])
    for number, (source, output) in enumerate(blueprint.outputs.values()):
        join(numbers[source], output, OUTPUTS, number, schemas[graph.nodes[source].kind]["output"][output])

    inputs = [
        border_slot(graph.name, f"in {name}", name, [link for link in links if link["origin_id"] == INPUTS], number)
        for number, name in enumerate((*blueprint.sockets, *blueprint.widgets))
    ]
    outputs = [
        border_slot(graph.name, f"out {name}", name, [link for link in links if link["target_id"] == OUTPUTS], number)
        for number, name in enumerate(blueprint.outputs)
    ]
    left = min(node.place[0] for node in graph.nodes.values()) - 2 * BORDER
    right = max(node.place[0] + node.size[0] for node in graph.nodes.values()) + BORDER
    definition = {
        "id": key,
        "version": 1,
        "state": {
            "lastGroupId": len(graph.groups),
            "lastNodeId": len(numbers),
            "lastLinkId": len(links),
            "lastRerouteId": 0,
        },
        "revision": 0,
        "config": {},
        "name": graph.name,
        "category": "StoryLoom",
        "description": blueprint.description,
        "inputNode": {"id": INPUTS, "bounding": [left, 0, BORDER, ROW * (len(inputs) + 2)]},
        "outputNode": {"id": OUTPUTS, "bounding": [right, 0, BORDER, ROW * (len(outputs) + 2)]},
        "inputs": inputs,
        "outputs": outputs,
        "widgets": [],
        "nodes": [
            inner_node(node, numbers[name], order, schemas[node.kind], links)
            for order, (name, node) in enumerate(graph.nodes.items())
        ],
        "groups": [
            workflows.ui_group(number, title, [graph.nodes[name] for name in names])
            for number, (title, names) in enumerate(((t, n) for t, n in graph.groups.items() if n), start=1)
        ],
        "links": links,
        "extra": {},
    }
    return {
        "id": identity(f"{graph.name}/blueprint"),
        "revision": 0,
        "last_node_id": len(numbers) + 1,
        "last_link_id": 0,
        "nodes": [box(blueprint, key, numbers, inputs, outputs)],
        "links": [],
        "definitions": {"subgraphs": [definition]},
        "extra": {"BlueprintDescription": blueprint.description, "BlueprintSearchAliases": list(blueprint.aliases)},
        "version": 0.4,
    }


def identity(name: str) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"storyloom/subgraphs/{name}"))


def border_slot(graph: str, key: str, name: str, links: list[dict], number: int) -> dict:
    """A slot of the box seen from within. links: those of its side."""
    end = "origin_slot" if key.startswith("in ") else "target_slot"
    own = [link for link in links if link[end] == number]
    return {
        "id": identity(f"{graph}/{key}"),
        "name": name,
        "type": own[0]["type"],
        "linkIds": [link["id"] for link in own],
    }


def inner_slots(node: Node, schemas: dict) -> dict[str, tuple[int, str]]:
    """Input -> its slot and type: sockets first, then widgets, as the front end orders them."""
    inputs = [(name, kind) for name, kind, _ in workflows.inputs_of(schemas[node.kind])]
    ordered = sorted(inputs, key=lambda entry: entry[1] in workflows.WIDGETS)
    return {name: (slot, kind) for slot, (name, kind) in enumerate(ordered)}


def inner_node(node: Node, number: int, order: int, schema: dict, links: list[dict]) -> dict:
    """A node of the definition; other than in a workflow, its widgets have slots."""
    saved = workflows.ui_node(node, number, order, schema, [])
    arriving = {link["target_slot"]: link["id"] for link in links if link["target_id"] == number}
    slots = inner_slots(node, {node.kind: schema})
    saved["inputs"] = [
        {
            "name": name,
            "type": kind,
            **({"widget": {"name": name}} if kind in workflows.WIDGETS else {}),
            "link": arriving.get(slot),
        }
        for name, (slot, kind) in slots.items()
    ]
    for output in saved["outputs"]:
        leaving = (link for link in links if link["origin_id"] == number)
        output["links"] = [link["id"] for link in leaving if link["origin_slot"] == output["slot_index"]]
    return saved


def box(blueprint: Blueprint, kind: str, numbers: dict[str, int], inputs: list[dict], outputs: list[dict]) -> dict:
    """The one node that an artist drops. Its widgets are those of the nodes within."""
    shown = [[str(numbers[key]), name] for ((key, name), *_) in blueprint.widgets.values()]
    return {
        "id": len(numbers) + 1,
        "type": kind,
        "pos": [0, 0],
        "size": [460, 200 + 40 * len(blueprint.widgets)],
        "flags": {},
        "order": 0,
        "mode": 0,
        "inputs": [
            {
                "name": slot["name"],
                "type": slot["type"],
                **({"widget": {"name": slot["name"]}} if slot["name"] in blueprint.widgets else {}),
                "link": None,
            }
            for slot in inputs
        ],
        "outputs": [{"name": slot["name"], "type": slot["type"], "links": []} for slot in outputs],
        "properties": {"proxyWidgets": shown},
        "widgets_values": [],
        "title": blueprint.graph.name,
    }
