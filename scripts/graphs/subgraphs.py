"""The front end's format of a subgraph blueprint."""

from __future__ import annotations

import uuid
from dataclasses import dataclass

from .model import WIDGETS, Node, Workflow, inputs_of, ui_group, ui_node

INPUTS, OUTPUTS = -10, -20
"""Ids of the two nodes that hold a subgraph's inputs and outputs."""
BORDER, ROW = 160, 20
"""Width of these two nodes, and height of a slot."""


@dataclass(frozen=True)
class Blueprint:
    """A box. graph: its nodes; links to keys that the graph lacks are the box's sockets.

    sockets: name -> the missing (key, output); widgets: name -> the widgets (key, input) that it sets; outputs: name ->
    (key, output) inside.
    """

    graph: Workflow
    description: str
    aliases: tuple[str, ...]
    sockets: dict[str, tuple[str, int]]
    widgets: dict[str, tuple[tuple[str, str], ...]]
    outputs: dict[str, tuple[str, int]]


def subgraph_form(blueprint: Blueprint, schemas: dict) -> dict:
    """A blueprint as the front end saves it: one node, whose type is the id of the subgraph's definition."""
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
            ui_group(number, title, [graph.nodes[name] for name in names])
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
    """A UUID that stays the same for the same name."""
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"storyloom/subgraphs/{name}"))


def border_slot(graph: str, key: str, name: str, links: list[dict], number: int) -> dict:
    """A slot of the box, seen from inside. links: those on the slot's side."""
    end = "origin_slot" if key.startswith("in ") else "target_slot"
    own = [link for link in links if link[end] == number]
    return {
        "id": identity(f"{graph}/{key}"),
        "name": name,
        "type": own[0]["type"],
        "linkIds": [link["id"] for link in own],
    }


def inner_slots(node: Node, schemas: dict) -> dict[str, tuple[int, str]]:
    """Input -> (slot, type): sockets first, then widgets, in the front end's order."""
    inputs = [(name, kind) for name, kind, _ in inputs_of(schemas[node.kind])]
    ordered = sorted(inputs, key=lambda entry: entry[1] in WIDGETS)
    return {name: (slot, kind) for slot, (name, kind) in enumerate(ordered)}


def inner_node(node: Node, number: int, order: int, schema: dict, links: list[dict]) -> dict:
    """A node of the definition. Unlike in a workflow, its widgets have slots."""
    saved = ui_node(node, number, order, schema, [])
    arriving = {link["target_slot"]: link["id"] for link in links if link["target_id"] == number}
    slots = inner_slots(node, {node.kind: schema})
    saved["inputs"] = [
        {
            "name": name,
            "type": kind,
            **({"widget": {"name": name}} if kind in WIDGETS else {}),
            "link": arriving.get(slot),
        }
        for name, (slot, kind) in slots.items()
    ]
    for output in saved["outputs"]:
        leaving = (link for link in links if link["origin_id"] == number)
        output["links"] = [link["id"] for link in leaving if link["origin_slot"] == output["slot_index"]]
    return saved


def box(blueprint: Blueprint, kind: str, numbers: dict[str, int], inputs: list[dict], outputs: list[dict]) -> dict:
    """The node that an artist adds. Its widgets are those of the nodes inside."""
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
