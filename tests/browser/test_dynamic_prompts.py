"""Choices like {a|b} in the boxes of a story script: one is made per run, and the workflow keeps what was typed."""

import pytest
from front_end import saved

TYPED = {
    "identity": "a {fox|bear} in a {blue|blue} coat",
    "frames": "{asleep|waving} in the \\{snow\\} # \\# {Winter|Summer} came.\nrunning",
    "style": "drawing of {prompt}",
}
FIRST = {
    "identity": "a fox in a blue coat",
    "frames": "asleep in the {snow} # \\# Winter came.\nrunning",
    "style": "drawing of {prompt}",
}
LAST = {
    "identity": "a bear in a blue coat",
    "frames": "waving in the {snow} # \\# Summer came.\nrunning",
    "style": "drawing of {prompt}",
}
SENT = """async ([id, chance]) => {
  const usual = Math.random;
  Math.random = () => chance;
  try {
    return (await app.graphToPrompt()).output[id].inputs;
  } finally {
    Math.random = usual;
  }
}"""
"""What a run would send to the server for a node, with choices made by this number from 0 to 1."""
SAVED = "(id) => app.graph.serialize().nodes.find((node) => node.id == id).widgets_values"
SUM = ".storyloom-check .sum"


@pytest.fixture
def script(front_end, renderer):
    """The number of the story script in a demo, in view."""
    front_end.load(saved("Demo - One Prompt One Story"))
    number = front_end.node("StoryLoom_Script")
    front_end.look_at(number)
    front_end.page.locator(".storyloom-check li button").nth(3).wait_for()
    return number


def test_a_run_gets_one_choice_and_the_workflow_keeps_what_was_typed(front_end, script):
    front_end.set(script, **TYPED)
    for chance, choices in ((0, FIRST), (0.99, LAST)):
        assert front_end.page.evaluate(SENT, [script, chance]) == choices
    assert front_end.page.evaluate(SAVED, script)[:3] == list(TYPED.values())
    assert {name: front_end.values(script)[name] for name in TYPED} == TYPED


def test_the_editor_names_what_each_run_replaces(front_end, script):
    note = front_end.page.locator(f"{SUM} .replaced")
    front_end.set(script, frames="waving in the \\{snow\\}", style="drawing of {prompt}")
    front_end.page.locator(".storyloom-check li").nth(1).wait_for(state="detached")
    assert note.count() == 0
    front_end.set(script, frames="{asleep|waving} in the snow # See https://example.org")
    note.nth(1).wait_for()
    choice, comment = note.all_inner_texts()
    assert choice == "Each run makes one choice from {a|b}; tokens are counted as typed"
    assert comment == "Each run leaves out // and the rest of its line, and /* these comments */"
