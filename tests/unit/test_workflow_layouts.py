"""The layout of the templates: links run left to right, nodes are in titled groups, a note lists what to change."""

import json
from pathlib import Path

import pytest

WORKFLOWS = Path(__file__).resolve().parents[2] / "workflows"
TEMPLATES = sorted(WORKFLOWS.glob("*.json"))
TITLE = 30
"""Height of the title bar above a node's position."""


@pytest.fixture(params=TEMPLATES, ids=lambda path: path.stem)
def workflow(request):
    return json.loads(request.param.read_text(encoding="utf-8"))


def test_no_link_goes_to_the_left(workflow):
    left = {node["id"]: node["pos"][0] for node in workflow["nodes"]}
    back = [(source, target) for _, source, _, target, _, _ in workflow["links"] if left[target] < left[source]]
    assert not back


def test_one_note_stands_left_of_all_and_says_what_to_change_first(workflow):
    (note,) = (node for node in workflow["nodes"] if node["type"] == "MarkdownNote")
    others = [node for node in workflow["nodes"] if node is not note]
    assert note["title"] == "Read me" and note["pos"][0] + note["size"][0] < min(node["pos"][0] for node in others)
    assert note["pos"][1] == min(node["pos"][1] for node in others)
    assert "## Change this first" in note["widgets_values"][0]


def test_every_node_but_the_note_lies_in_a_titled_group(workflow):
    groups = workflow["groups"]
    assert groups and all(group["title"] for group in groups)

    def holds(group, node):
        (x, y, width, height), (left, top), (wide, high) = group["bounding"], node["pos"], node["size"]
        return x < left and y < top - TITLE and left + wide < x + width and top + high < y + height

    alone = [node["type"] for node in workflow["nodes"] if not any(holds(group, node) for group in groups)]
    assert alone == ["MarkdownNote"]
