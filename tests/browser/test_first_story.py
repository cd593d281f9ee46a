"""A newcomer's way to a first story."""

from front_end import PAGE

DRAWN = "(id) => app.nodeOutputs[id].images.length"
DEMO = "Demo - One Prompt One Story"


def test_three_clicks_from_the_first_page_to_a_drawn_story(new_front_end):
    """ComfyUI shows its templates to whoever opens it for the first time, and a tour of app mode, which Esc ends."""
    front_end = new_front_end(newcomer=True)
    front_end.page.get_by_role("dialog").get_by_text("storyloom", exact=True).wait_for()
    clicks = "() => { window.clicks = 0; addEventListener('click', (event) => { clicks += event.isTrusted; }, true); }"
    front_end.page.evaluate(clicks)
    front_end.look("First page")
    front_end.choose_template(DEMO)
    front_end.page.get_by_test_id("coach-landing").wait_for()
    front_end.page.keyboard.press("Escape")
    event = front_end.run(front_end.run_button)
    assert event and event["kind"] == "execution_success", event
    front_end.page.wait_for_function(PAGE)
    front_end.look("First story")
    assert front_end.page.evaluate("() => clicks") == 3
    drawn = [front_end.page.evaluate(DRAWN, front_end.node(kind)) for kind in ("StoryLoom_SavePage", "PreviewImage")]
    assert drawn == [1, 4]
    assert not front_end.faults
    front_end.page.close()
