"""One box for a whole story: found by its name, dropped, connected, run."""

from pathlib import Path

import pytest
from front_end import EMPTY

BLUEPRINTS = sorted(path.stem for path in (Path(__file__).parents[2] / "subgraphs").glob("*.json"))
INSIDE = """() => app.graph.nodes[0].subgraph.nodes.map(
  (node) => [node.type, node.type in LiteGraph.registered_node_types])"""


@pytest.fixture
def drop(front_end):
    """Drops a blueprint on an empty graph, as an artist does, and returns the number of its box."""

    def drop(name):
        front_end.load(EMPTY)
        front_end.search(name).filter(has_text=name).first.click()
        front_end.page.wait_for_function("(name) => app.graph.nodes.some((node) => node.title === name)", arg=name)
        (number,) = front_end.page.evaluate("() => app.graph.nodes.map((node) => node.id)")
        return number

    return drop


@pytest.mark.parametrize("name", BLUEPRINTS)
def test_it_is_found_by_its_name_and_whole(front_end, drop, name):
    drop(name)
    kinds = dict(front_end.page.evaluate(INSIDE))
    assert "StoryLoom_Page" in kinds and all(kinds.values())
    assert front_end.values(front_end.page.evaluate("() => app.graph.nodes[0].id"))["frames"].count("\n") >= 3
    front_end.page.keyboard.press(".")
    front_end.look(f"Blueprint, {name}")


@pytest.mark.parametrize("name", ["Story from a prompt", "Long story"])
def test_it_draws_with_a_model_on_its_left_and_a_preview_on_its_right(front_end, drop, name):
    box = drop(name)
    model = front_end.add("StoryLoom_DemoModel")
    for output, slot in enumerate(("model", "clip", "vae")):
        front_end.connect(model, output, box, slot)
    shown = [front_end.add("PreviewImage") for _ in ("page", "frames")]
    for output, preview in enumerate(shown):
        front_end.connect(box, output, preview, "images")
    front_end.set(box, width=64, height=64, steps=1, frames="asleep in the snow\nrunning\non a train\nwaving\njumping")
    event = front_end.run()
    assert event and event["kind"] == "execution_success", event
    for preview, number in zip(shown, (1, 5), strict=True):
        front_end.look_at(preview)
        assert front_end.pictures(preview) == number
