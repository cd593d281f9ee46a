"""A workflow as nodes, links and groups, and the two formats that ComfyUI reads.

`ui_form` is what the browser interface opens and saves, `api_form` is what POST /prompt takes. Both need the nodes'
schemas, the answer of `/object_info`: a widget that a node does not set has its schema's default.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field

WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
SEED_MODE = "fixed"
"""Value of the widget that the browser interface adds below a seed."""
UPLOAD = "image"
"""Value of the button for uploads that it adds below a picture."""
TITLE, PADDING, GROUP_TITLE = 30, 24, 44
"""Height of a node's title bar, margin around the nodes of a group, height of the group's title."""
BYPASSED = 4
"""Mode of a bypassed node in the browser's format."""
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
    """Shown bypassed in the browser interface, to be switched on by the artist; left out of the API format."""


@dataclass(frozen=True)
class AppInput:
    """A widget of a node that app mode shows, with a line of text and, for a text box, its height in pixels."""

    key: str
    widget: str
    description: str
    height: int = 0


@dataclass(frozen=True)
class App:
    """What the front end's app mode shows in place of the graph: widgets, and the keys of nodes with results."""

    inputs: tuple[AppInput, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Workflow:
    """nodes: by key; groups: title -> keys of the nodes inside; app: None for a blueprint, which is not an app."""

    name: str
    nodes: dict[str, Node]
    groups: dict[str, tuple[str, ...]]
    app: App | None = None


def api_form(workflow: Workflow, schemas: dict) -> dict:
    """A workflow as POST /prompt takes it. schemas: the answer of `/object_info`."""
    numbers = {key: number for number, key in enumerate(workflow.nodes, start=1)}
    prompt = {}
    for key, node in workflow.nodes.items():
        if node.kind not in schemas or node.bypassed:  # kinds without a schema are notes
            continue
        inputs = {}
        for name, kind, options in inputs_of(schemas[node.kind]):
            if name in node.links:
                source = source_of(workflow, schemas, *node.links[name])
                if source:
                    inputs[name] = [str(numbers[source[0]]), source[1]]
            elif kind in WIDGETS:
                inputs[name] = value_of(node, name, options)
        title = node.title or schemas[node.kind]["display_name"]
        prompt[str(numbers[key])] = {"class_type": node.kind, "inputs": inputs, "_meta": {"title": title}}
    return prompt


def source_of(workflow: Workflow, schemas: dict, key: str, output: int) -> tuple[str, int] | None:
    """The node and output that a link takes its value from, or None.

    As in the browser interface, a bypassed node passes on its first linked input of the output's type.
    """
    node = workflow.nodes[key]
    if not node.bypassed:
        return key, output
    type_ = schemas[node.kind]["output"][output]
    for name, kind, _ in inputs_of(schemas[node.kind]):
        if kind == type_ and name in node.links:
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
        "extra": app_form(workflow.app, numbers) if workflow.app else {},
        "version": 0.4,
    }


def app_form(app: App, numbers: dict[str, int]) -> dict:
    """The entries of a workflow's `extra` by which it opens in app mode. numbers: key -> node id.

    An input is saved with the id of its node, which every front end with an app mode reads.
    """
    inputs = []
    for one in app.inputs:
        height = {"height": one.height} if one.height else {}
        inputs.append([str(numbers[one.key]), one.widget, {"description": one.description, **height}])
    return {"linearMode": True, "linearData": {"inputs": inputs, "outputs": [str(numbers[key]) for key in app.outputs]}}


def ui_node(node: Node, number: int, order: int, schema: dict | None, links: list[list]) -> dict:
    """A node in the browser's format. links: those of the whole workflow; schema: None for a note."""
    arriving = {link[4]: link[0] for link in links if link[3] == number}
    slots = [(name, kind) for name, kind, _ in inputs_of(schema) if kind not in WIDGETS]
    values = dict(widget_values(node, schema))
    properties = dict(node.properties)
    if schema:
        of_pack = schema["python_module"].startswith("custom_nodes.")
        properties = {"Node name for S&R": node.kind, "cnr_id": "storyloom" if of_pack else "comfy-core", **properties}
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
        saved |= {"widgets_values": list(values.values()), "widgets_values_named": values}
    if node.title:
        saved["title"] = node.title
    if not schema:
        saved |= NOTE_COLORS
    return saved


def ui_group(number: int, title: str, members: list[Node]) -> dict:
    """A group in the browser's format, as large as its members and its title need."""
    left = min(node.place[0] for node in members) - PADDING
    top = min(node.place[1] for node in members) - TITLE - GROUP_TITLE
    right = max(node.place[0] + node.size[0] for node in members) + PADDING
    bottom = max(node.place[1] + node.size[1] for node in members) + PADDING
    box = [left, top, right - left, bottom - top]
    return {"id": number, "title": title, "bounding": box, "color": "#3f789e", "font_size": 24, "flags": {}}


def inputs_of(schema: dict | None) -> Iterator[tuple[str, str, dict]]:
    """(name, type, options) of every input of a node, in order; none for a note. A list of choices becomes COMBO."""
    for part in ("required", "optional"):
        for name, (kind, *options) in (schema["input"] if schema else {}).get(part, {}).items():
            options = options[0] if options else {}
            if isinstance(kind, list):
                kind, options = "COMBO", {"options": kind, **options}
            yield name, kind, options


def widget_values(node: Node, schema: dict | None) -> Iterator[tuple[str, object]]:
    """(name, value) of every widget in the order of the browser interface.

    It adds a widget below a seed, for its mode, and one below a picture, the button for uploads.
    """
    if schema is None:
        yield from node.values.items()
    for name, kind, options in inputs_of(schema):
        if kind in WIDGETS:
            yield name, value_of(node, name, options)
            if options.get("control_after_generate"):
                yield "control_after_generate", SEED_MODE
            if options.get("image_upload"):
                yield "upload", UPLOAD


def value_of(node: Node, name: str, options: dict) -> object:
    """A widget's value: the node's own, else the default, else the first choice."""
    if name in node.values:
        return node.values[name]
    return options["default"] if "default" in options else options["options"][0]
