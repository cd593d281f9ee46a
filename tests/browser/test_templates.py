"""Every template opens as an app, its graph is whole, and the demos draw their picture at the press of Run."""

from itertools import combinations

import pytest
from front_end import NAMES, PAGE, saved

DEMOS = [name for name in NAMES if name.startswith("Demo - ")]
STATE = """() => ({
  nodes: app.graph.nodes.map((node) => [
    Number(node.id), node.type, !!LiteGraph.registered_node_types[node.type], !!node.has_errors,
    Array.from(node.pos), node.mode,
  ]),
  links: [...app.graph.links.values()].map(
    (link) => [Number(link.origin_id), link.origin_slot, Number(link.target_id),
      app.graph.getNodeById(link.target_id).inputs[link.target_slot].name],
  ),
  groups: app.graph.groups.map((group) => group.title),
  boxes: app.graph.nodes.map((node) => [node.type, ...node.boundingRect]),
  named: app.graph.serialize().nodes.map((node) => [Number(node.id), node.widgets_values_named ?? {}]),
})"""
CANVAS = "() => app.canvas.canvas.checkVisibility()"


@pytest.mark.parametrize("name", NAMES)
def test_it_opens_as_an_app_and_its_graph_is_whole(front_end, name):
    front_end.open_app(name)
    workflow = saved(name)
    assert not front_end.page.evaluate(CANVAS)
    shown = front_end.page.get_by_test_id("app-mode-widget-item")
    inputs = workflow["extra"]["linearData"]["inputs"]
    shown.nth(len(inputs) - 1).wait_for()
    assert [one.get_attribute("data-widget-key").split(":")[1:] for one in shown.all()] == [one[:2] for one in inputs]
    front_end.look(f"{name}, app")
    front_end.app_mode(False)
    assert front_end.page.evaluate(CANVAS)
    state = front_end.page.evaluate(STATE)
    nodes = [[n["id"], n["type"], True, False, n["pos"], n["mode"]] for n in workflow["nodes"]]
    assert sorted(state["nodes"]) == sorted(nodes), "known, not red, and where it was"
    inputs = {node["id"]: node["inputs"] for node in workflow["nodes"]}
    assert sorted(state["links"]) == sorted(
        [a, out, b, inputs[b][slot]["name"]] for _, a, out, b, slot, _ in workflow["links"]
    )
    named = [[node["id"], node.get("widgets_values_named", {})] for node in workflow["nodes"]]
    assert sorted(state["named"], key=lambda one: one[0]) == sorted(named, key=lambda one: one[0])
    assert state["groups"] == [group["title"] for group in workflow["groups"]]
    assert not front_end.page.get_by_test_id("error-overlay").is_visible()
    for (one, *a), (other, *b) in combinations(state["boxes"], 2):
        apart = any(a[i] + a[i + 2] <= b[i] or b[i] + b[i + 2] <= a[i] for i in (0, 1))
        assert apart, f"{one} and {other} overlap as they are drawn"
    front_end.page.keyboard.press(".")
    front_end.look(name)


@pytest.mark.parametrize("name", DEMOS)
def test_a_demo_draws_its_picture(front_end, name):
    """With two steps, so that the suite is quick; `test_first_story.py` runs one as it is."""
    front_end.open_template(name)
    for node in saved(name)["nodes"]:
        if node["type"] == "KSampler":
            front_end.set(node["id"], steps=2)
    event = front_end.run()
    assert event and event["kind"] == "execution_success", event
    showing = ("SaveImage", "StoryLoom_SavePage", "PreviewImage")
    shown = [node["id"] for node in saved(name)["nodes"] if node["type"] in showing]
    assert shown and all(front_end.pictures(number) for number in shown)


def test_an_app_draws_the_page_of_what_is_typed(front_end):
    name = "Demo - Consistent Characters"
    front_end.open_app(name)
    front_end.set(front_end.node("KSampler"), steps=2)
    frames = front_end.page.get_by_test_id("app-mode-widget-item").nth(1).get_by_role("textbox")
    frames.fill("asleep in the snow\nwaving in a cave")
    event = front_end.run(front_end.run_button)
    assert event and event["kind"] == "execution_success", event
    front_end.page.wait_for_function(PAGE)
    front_end.look(f"{name}, drawn in app mode")
    front_end.app_mode(False)
    assert front_end.values(front_end.node("StoryLoom_Script"))["frames"] == "asleep in the snow\nwaving in a cave"
    assert front_end.pictures(front_end.node("PreviewImage")) == 2
