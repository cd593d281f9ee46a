"""One box for a whole story: found by its name, dropped, connected, run."""

from pathlib import Path

import pytest
from desk import EMPTY

BLUEPRINTS = sorted(path.stem for path in (Path(__file__).parents[2] / "subgraphs").glob("*.json"))
INSIDE = """() => app.graph.nodes[0].subgraph.nodes.map(
  (node) => [node.type, node.type in LiteGraph.registered_node_types])"""


@pytest.fixture
def drop(desk):
    """Drops a blueprint on an empty graph, as an artist does, and returns the number of its box."""

    def drop(name):
        desk.load(EMPTY)
        desk.search(name).filter(has_text=name).first.click()
        desk.page.wait_for_function("(name) => app.graph.nodes.some((node) => node.title === name)", arg=name)
        (number,) = desk.page.evaluate("() => app.graph.nodes.map((node) => node.id)")
        return number

    return drop


@pytest.mark.parametrize("name", BLUEPRINTS)
def test_it_is_found_by_its_name_and_whole(desk, drop, name):
    drop(name)
    kinds = dict(desk.page.evaluate(INSIDE))
    assert "StoryLoom_Page" in kinds and all(kinds.values())
    assert desk.values(desk.page.evaluate("() => app.graph.nodes[0].id"))["frames"].count("\n") >= 3
    desk.page.keyboard.press(".")
    desk.look(f"Blueprint, {name}")


@pytest.mark.parametrize("name", ["Story from a prompt", "Long story"])
def test_it_draws_with_a_model_on_its_left_and_a_preview_on_its_right(desk, drop, name):
    box = drop(name)
    model = desk.add("StoryLoom_DemoModel")
    for output, slot in enumerate(("model", "clip", "vae")):
        desk.connect(model, output, box, slot)
    shown = [desk.add("PreviewImage") for _ in ("page", "frames")]
    for output, preview in enumerate(shown):
        desk.connect(box, output, preview, "images")
    desk.set(box, width=64, height=64, steps=1, frames="asleep in the snow\nrunning\non a train\nwaving\njumping")
    event = desk.run()
    assert event and event["kind"] == "execution_success", event
    for preview, number in zip(shown, (1, 5), strict=True):
        desk.look_at(preview)
        assert desk.pictures(preview) == number
