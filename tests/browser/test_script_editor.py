"""The editor of a story script, with the classic and with the new nodes."""

import re

import pytest
from desk import saved

DEMO = "Demo - One Prompt One Story"
PANEL = ".storyloom-check"
FRAMES = "asleep in the snow\nreading a book on a train\nwaving"
SEEN = """([id, text]) => app.extensionManager.workflow.activeWorkflow.changeTracker.activeState.nodes.some(
  (node) => node.id == id && node.widgets_values.includes(text))"""


@pytest.fixture
def script(desk, renderer):
    """The number of the story script in the demo, in view, its panel filled."""
    desk.load(saved(DEMO))
    number = desk.node("StoryLoom_Script")
    desk.page.evaluate("(id) => app.graph.getNodeById(id).setSize([420, 620])", number)
    desk.look_at(number)
    rows(desk).nth(3).wait_for()
    return number


@pytest.fixture
def area(desk, renderer, script):
    """The text area of the frames, on which the keyboard is."""
    found = desk.page.locator(
        f"[data-node-id='{script}'] textarea" if renderer == "new" else "textarea[placeholder]:visible"
    )
    found = found.nth(1)
    found.click()
    return found


def rows(desk):
    return desk.page.locator(f"{PANEL} li button")


def write(desk, text):
    """Type in place of what the text area holds."""
    desk.page.keyboard.press("Control+a")
    desk.page.keyboard.insert_text(text)


def frames_of(desk, script):
    return desk.values(script)["frames"]


def wait_for_frames(desk, script, text):
    desk.page.wait_for_function(
        "([id, text]) => app.graph.getNodeById(id).widgets.find((widget) => widget.name === 'frames').value === text",
        arg=[script, text],
    )


def wait_for_undo(desk, script, text):
    """Wait until ComfyUI's own undo has seen an edit of the frames."""
    desk.page.wait_for_function(SEEN, arg=[script, text])


def wait_for_rows(desk, number):
    desk.page.wait_for_function(f"() => document.querySelectorAll('{PANEL} li').length === {number}")


def test_typing_shows_what_the_encode_node_reports(desk, script, area):
    write(desk, FRAMES)
    rows(desk).nth(2).wait_for()
    wait_for_rows(desk, 3)
    for node in saved(DEMO)["nodes"]:
        if node["type"] == "KSampler":
            desk.set(node["id"], steps=1)
    assert desk.run()["kind"] == "execution_success"
    report = desk.page.evaluate("(id) => app.nodeOutputs[id].text[0]", desk.node("PreviewAny"))
    own = [rows(desk).nth(place).get_attribute("title") for place in range(3)]
    assert own == [
        f"{tokens} tokens of its own, {int(tokens) + 6} with identity and style"
        for tokens in re.findall(r"^Frame \d+: (\d+) token", report, re.MULTILINE)
    ]
    (together,) = set(re.findall(r"(\d+) of 75 tokens", report))
    assert f"{together} of 75 tokens together" in desk.page.locator(f"{PANEL} .sum").inner_text()


def test_faults_stand_at_their_lines(desk, renderer, script, area):
    write(desk, f"asleep\n[Wolf] runs\n{'very ' * 80}\nawake # at last")
    rows(desk).nth(1).get_by_text("[Wolf] is not known").wait_for()
    told = [rows(desk).nth(place).get_attribute("aria-label") for place in range(4)]
    assert told[0] == "Frame 1: 7 of 75 tokens" and told[3] == "Frame 4: 7 of 75 tokens"
    assert "too long for one prompt (86 of 75)" in told[2] and told[2].startswith("Frame 3: 86 of 75 tokens")
    assert "the story cannot run: see frame 2" in desk.page.locator(f"{PANEL} .sum").inner_text()
    desk.look(f"Editor with faults, {renderer} nodes")
    write(desk, "asleep\n[Fox runs")
    rows(desk).nth(1).get_by_text("is unmatched").wait_for()
    write(desk, "asleep")
    wait_for_rows(desk, 1)
    assert not desk.page.locator(f"{PANEL} b").count()


def test_who_is_in_a_frame_is_told(desk, renderer, script, area):
    desk.set(script, identity="[Fox] a red fox\n[Bear] a brown bear")
    write(desk, "[Fox] asleep\n[Bear] and [Fox] waving\n[NC] a beach")
    desk.page.wait_for_function("() => document.querySelectorAll('.storyloom-check .chip').length === 3")
    chips = [rows(desk).nth(place).locator(".chip").all_inner_texts() for place in range(3)]
    assert chips == [["Fox"], ["Bear", "Fox"], []]
    assert "Bear and Fox, frame 2:" in desk.page.locator(f"{PANEL} .sum").inner_text()
    desk.look(f"Editor, {renderer} nodes")


def test_lines_are_moved_and_added_with_the_keyboard_and_undone(desk, script, area):
    press = desk.page.keyboard.press
    write(desk, FRAMES)
    wait_for_frames(desk, script, FRAMES)
    press("Alt+ArrowUp")
    wait_for_frames(desk, script, "asleep in the snow\nwaving\nreading a book on a train")
    press("Alt+ArrowUp")
    press("Alt+ArrowUp")
    wait_for_frames(desk, script, "waving\nasleep in the snow\nreading a book on a train")
    press("Alt+ArrowDown")
    press("Alt+Enter")
    desk.page.keyboard.type("running")
    changed = "asleep in the snow\nwaving\nrunning\nreading a book on a train"
    wait_for_frames(desk, script, changed)
    for _ in range(len("running") + 5):
        press("Control+z")
        if area.input_value() == FRAMES:
            break
    wait_for_frames(desk, script, FRAMES)
    for _ in range(len("running") + 5):
        press("Control+Shift+z")
        if area.input_value() == changed:
            break
    wait_for_frames(desk, script, changed)


def test_the_undo_of_the_graph_takes_an_edit_back_and_the_panel_follows(desk, script, area):
    """As in ComfyUI's menu; on its keys the browser's own undo of the box acts as well, sooner or later."""
    before = frames_of(desk, script)
    write(desk, FRAMES)
    wait_for_rows(desk, 3)
    desk.page.mouse.click(290, 400)  # beside the node
    wait_for_undo(desk, script, FRAMES)
    for command, text, lines in (("Comfy.Undo", before, 4), ("Comfy.Redo", FRAMES, 3)):
        desk.page.evaluate("(command) => app.extensionManager.command.execute(command)", command)
        wait_for_frames(desk, script, text)
        wait_for_rows(desk, lines)


def test_a_row_goes_to_its_line_and_moves_it(desk, script, area):
    write(desk, FRAMES)
    wait_for_rows(desk, 3)
    rows(desk).nth(1).click()
    chosen = "({ value, selectionStart, selectionEnd }) => value?.slice(selectionStart, selectionEnd)"
    line = "reading a book on a train"
    desk.page.wait_for_function(f"(line) => ({chosen})(document.activeElement) === line", arg=line)
    rows(desk).nth(0).focus()
    desk.page.keyboard.press("Alt+ArrowDown")
    wait_for_frames(desk, script, "reading a book on a train\nasleep in the snow\nwaving")


def test_without_an_answer_the_box_goes_on(desk, script, area):
    desk.page.route("**/storyloom/script", lambda route: route.abort())
    try:
        write(desk, "running")
        desk.page.locator(PANEL).get_by_text("No answer from the server").wait_for()
        wait_for_frames(desk, script, "running")
    finally:
        desk.page.unroute("**/storyloom/script")
    desk.page.keyboard.type(" home")
    wait_for_rows(desk, 1)


def test_a_linked_box_is_not_measured(desk, script):
    text = desk.add("PrimitiveStringMultiline", value="a bear")
    desk.connect(text, 0, script, "identity")
    desk.page.locator(PANEL).get_by_text("Checked during the run: identity (linked)").wait_for()
    assert rows(desk).nth(0).get_attribute("aria-label") == "Frame 1: 4 own tokens"


OPENED = "async (workflow) => { await app.loadGraphData(workflow); return app.graph.serialize(); }"


def test_workflows_are_saved_as_without_the_editor_and_it_works_without(desk, new_desk):
    """A page in which the pack's JavaScript is blocked."""
    plain = new_desk(blocked=["**/extensions/storyloom/**/*.js"])
    try:
        for name in (DEMO, "Two Characters", "Character from a Photo"):
            edited, untouched = (one.page.evaluate(OPENED, saved(name)) for one in (desk, plain))
            assert edited == untouched, name
        plain.load(saved(DEMO))
        number = plain.node("StoryLoom_Script")
        plain.look_at(number)
        desk.look_at(desk.node("StoryLoom_Script"))
        desk.page.locator(PANEL).first.wait_for()
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
