"""Help where an artist looks for it: in the search for nodes, and in the panel of a node."""

import re

import pytest
from front_end import EMPTY

NODES = {
    "One-Prompt-One-Story": "Encode story as one prompt (SVR)",
    "IPCA": "Identity-preserving cross-attention",
    "StoryDiffusion": "Consistent self-attention",
    "same character": "Consistent self-attention",
    "PPR": "Apply StoryMaker (PPR)",
    "face reference": "Character from image",
    "out of memory": "Split a long story",
    "export pdf": "Save story page",
    "CLIP score": "Story consistency",
}
"""What somebody may type: names of papers and methods, and plain words -> a node."""


@pytest.mark.parametrize("words", NODES)
def test_a_node_is_found_by_papers_methods_and_plain_words(front_end, words):
    front_end.load(EMPTY)
    front_end.search(words).filter(has_text=NODES[words]).first.wait_for()
    front_end.page.keyboard.press("Escape")


@pytest.mark.parametrize("kind", ["StoryLoom_Script", "StoryLoom_ConsistentSelfAttention"])
def test_its_page_is_shown_with_its_pictures(front_end, renderer, kind):
    front_end.load(EMPTY)
    number = front_end.add(kind)
    front_end.look_at(number)
    front_end.page.evaluate("(id) => app.canvas.selectNode(app.graph.getNodeById(id))", number)
    front_end.page.get_by_test_id("info-button").click()
    shown = front_end.page.locator(".node-help-content")
    shown.locator("h2", has_text="Inputs").wait_for()
    picture = shown.locator("img").first
    front_end.page.wait_for_function("(img) => img.complete && img.naturalWidth > 0", arg=picture.element_handle())
    assert re.search(r"/docs/.*images/\w+\.png", picture.get_attribute("src"))
    front_end.look(f"Help, {kind}, {renderer} nodes")
