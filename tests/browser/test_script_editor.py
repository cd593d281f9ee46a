"""The editor of a story script, with the classic and with the new nodes."""

import re

import pytest
from front_end import saved

DEMO = "Demo - One Prompt One Story"
PANEL = ".storyloom-check"
FRAMES = "asleep in the snow\nreading a book on a train\nwaving"
SEEN = """([id, text]) => app.extensionManager.workflow.activeWorkflow.changeTracker.activeState.nodes.some(
  (node) => node.id == id && node.widgets_values.includes(text))"""


@pytest.fixture
def script(front_end, renderer):
    """The number of the story script in the demo, in view, its panel filled."""
    front_end.load(saved(DEMO))
    number = front_end.node("StoryLoom_Script")
    front_end.page.evaluate("(id) => app.graph.getNodeById(id).setSize([420, 620])", number)
    front_end.look_at(number)
    rows(front_end).nth(3).wait_for()
    return number


@pytest.fixture
def area(front_end, renderer, script):
    """The text area of the frames, on which the keyboard is."""
    boxes = front_end.page.locator(
        f"[data-node-id='{script}'] textarea" if renderer == "new" else "textarea[placeholder]:visible"
    )
    box = boxes.nth(1)
    box.click()
    return box


def rows(front_end):
    return front_end.page.locator(f"{PANEL} li button")


def write(front_end, text):
    """Type in place of what the text area holds."""
    front_end.page.keyboard.press("Control+a")
    front_end.page.keyboard.insert_text(text)


def frames_of(front_end, script):
    return front_end.values(script)["frames"]


def wait_for_frames(front_end, script, text):
    front_end.page.wait_for_function(
        "([id, text]) => app.graph.getNodeById(id).widgets.find((widget) => widget.name === 'frames').value === text",
        arg=[script, text],
    )


def wait_for_undo(front_end, script, text):
    """Wait until ComfyUI's own undo has seen an edit of the frames."""
    front_end.page.wait_for_function(SEEN, arg=[script, text])


def wait_for_rows(front_end, number):
    front_end.page.wait_for_function(f"() => document.querySelectorAll('{PANEL} li').length === {number}")


def test_typing_shows_what_the_encode_node_reports(front_end, script, area):
    write(front_end, FRAMES)
    rows(front_end).nth(2).wait_for()
    wait_for_rows(front_end, 3)
    for node in saved(DEMO)["nodes"]:
        if node["type"] == "KSampler":
            front_end.set(node["id"], steps=1)
    assert front_end.run()["kind"] == "execution_success"
    report = front_end.page.evaluate("(id) => app.nodeOutputs[id].text[0]", front_end.node("PreviewAny"))
    own = [rows(front_end).nth(place).get_attribute("title") for place in range(3)]
    assert own == [
        f"{tokens} tokens of its own, {int(tokens) + 6} with identity and style"
        for tokens in re.findall(r"^Frame \d+: (\d+) token", report, re.MULTILINE)
    ]
    (together,) = set(re.findall(r"(\d+) of 75 tokens", report))
    assert f"{together} of 75 tokens together" in front_end.page.locator(f"{PANEL} .sum").inner_text()


def test_faults_stand_at_their_lines(front_end, renderer, script, area):
    write(front_end, f"asleep\n[Wolf] runs\n{'very ' * 80}\nawake # at last")
    rows(front_end).nth(1).get_by_text("[Wolf] is not known").wait_for()
    labels = [rows(front_end).nth(place).get_attribute("aria-label") for place in range(4)]
    assert labels[0] == "Frame 1: 7 of 75 tokens" and labels[3] == "Frame 4: 7 of 75 tokens"
    assert "too long for one prompt (86 of 75)" in labels[2] and labels[2].startswith("Frame 3: 86 of 75 tokens")
    assert "the story cannot run: see frame 2" in front_end.page.locator(f"{PANEL} .sum").inner_text()
    front_end.look(f"Editor with faults, {renderer} nodes")
    write(front_end, "asleep\n[Fox runs")
    rows(front_end).nth(1).get_by_text("is unmatched").wait_for()
    write(front_end, "asleep")
    wait_for_rows(front_end, 1)
    assert not front_end.page.locator(f"{PANEL} b").count()


def test_who_is_in_a_frame_is_told(front_end, renderer, script, area):
    front_end.set(script, identity="[Fox] a red fox\n[Bear] a brown bear")
    write(front_end, "[Fox] asleep\n[Bear] and [Fox] waving\n[NC] a beach")
    front_end.page.wait_for_function("() => document.querySelectorAll('.storyloom-check .chip').length === 3")
    chips = [rows(front_end).nth(place).locator(".chip").all_inner_texts() for place in range(3)]
    assert chips == [["Fox"], ["Bear", "Fox"], []]
    assert "Bear and Fox, frame 2:" in front_end.page.locator(f"{PANEL} .sum").inner_text()
    front_end.look(f"Editor, {renderer} nodes")


def test_lines_are_moved_and_added_with_the_keyboard_and_undone(front_end, script, area):
    press = front_end.page.keyboard.press
    write(front_end, FRAMES)
    wait_for_frames(front_end, script, FRAMES)
    press("Alt+ArrowUp")
    wait_for_frames(front_end, script, "asleep in the snow\nwaving\nreading a book on a train")
    press("Alt+ArrowUp")
    press("Alt+ArrowUp")
    wait_for_frames(front_end, script, "waving\nasleep in the snow\nreading a book on a train")
    press("Alt+ArrowDown")
    press("Alt+Enter")
    front_end.page.keyboard.type("running")
    changed = "asleep in the snow\nwaving\nrunning\nreading a book on a train"
    wait_for_frames(front_end, script, changed)
    for _ in range(len("running") + 5):
        press("Control+z")
        if area.input_value() == FRAMES:
            break
    wait_for_frames(front_end, script, FRAMES)
    for _ in range(len("running") + 5):
        press("Control+Shift+z")
        if area.input_value() == changed:
            break
    wait_for_frames(front_end, script, changed)


def test_the_undo_of_the_graph_takes_an_edit_back_and_the_panel_follows(front_end, script, area):
    """As in ComfyUI's menu; on its keys the browser's own undo of the box acts as well, sooner or later."""
    before = frames_of(front_end, script)
    write(front_end, FRAMES)
    wait_for_rows(front_end, 3)
    front_end.page.mouse.click(290, 400)  # beside the node
    wait_for_undo(front_end, script, FRAMES)
    for command, text, lines in (("Comfy.Undo", before, 4), ("Comfy.Redo", FRAMES, 3)):
        front_end.page.evaluate("(command) => app.extensionManager.command.execute(command)", command)
        wait_for_frames(front_end, script, text)
        wait_for_rows(front_end, lines)


def test_a_row_goes_to_its_line_and_moves_it(front_end, script, area):
    write(front_end, FRAMES)
    wait_for_rows(front_end, 3)
    rows(front_end).nth(1).click()
    chosen = "({ value, selectionStart, selectionEnd }) => value?.slice(selectionStart, selectionEnd)"
    line = "reading a book on a train"
    front_end.page.wait_for_function(f"(line) => ({chosen})(document.activeElement) === line", arg=line)
    rows(front_end).nth(0).focus()
    front_end.page.keyboard.press("Alt+ArrowDown")
    wait_for_frames(front_end, script, "reading a book on a train\nasleep in the snow\nwaving")


def test_without_an_answer_the_box_goes_on(front_end, script, area):
    front_end.page.route("**/storyloom/script", lambda route: route.abort())
    try:
        write(front_end, "running")
        front_end.page.locator(PANEL).get_by_text("No answer from the server").wait_for()
        wait_for_frames(front_end, script, "running")
    finally:
        front_end.page.unroute("**/storyloom/script")
    front_end.page.keyboard.type(" home")
    wait_for_rows(front_end, 1)


def test_a_linked_box_is_not_measured(front_end, script):
    text = front_end.add("PrimitiveStringMultiline", value="a bear")
    front_end.connect(text, 0, script, "identity")
    front_end.page.locator(PANEL).get_by_text("Checked during the run: identity (linked)").wait_for()
    assert rows(front_end).nth(0).get_attribute("aria-label") == "Frame 1: 4 own tokens"


OPENED = "async (workflow) => { await app.loadGraphData(workflow); return app.graph.serialize(); }"


def test_workflows_are_saved_as_without_the_editor_and_it_works_without(front_end, new_front_end):
    """A page in which the pack's JavaScript is blocked."""
    plain = new_front_end(blocked=["**/extensions/storyloom/**/*.js"])
    try:
        for name in (DEMO, "Two Characters", "Character from a Photo"):
            edited, untouched = (one.page.evaluate(OPENED, saved(name)) for one in (front_end, plain))
            assert edited == untouched, name
        plain.load(saved(DEMO))
        number = plain.node("StoryLoom_Script")
        plain.look_at(number)
        front_end.app_mode(False)
        front_end.look_at(front_end.node("StoryLoom_Script"))
        front_end.page.locator(PANEL).first.wait_for()
        assert plain.page.locator(PANEL).count() == 0
        plain.page.locator("textarea[placeholder]:visible").nth(1).click()
        write(plain, "asleep\nwaving")
        for node in saved(DEMO)["nodes"]:
            if node["type"] == "KSampler":
                plain.set(node["id"], steps=1)
        assert plain.run()["kind"] == "execution_success"
        assert plain.pictures(plain.node("PreviewImage")) == 2 and not plain.faults
    finally:
        plain.page.close()
