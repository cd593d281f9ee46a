"""A newcomer's way to a first story."""

DEMO = "Demo - One Prompt One Story"


def test_three_clicks_from_the_first_page_to_a_drawn_story(new_front_end):
    """ComfyUI shows its templates to whoever opens it for the first time."""
    front_end = new_front_end(newcomer=True)
    front_end.page.get_by_role("dialog").get_by_text("storyloom", exact=True).wait_for()
    clicks = "() => { window.clicks = 0; addEventListener('click', (event) => { clicks += event.isTrusted; }, true); }"
    front_end.page.evaluate(clicks)
    front_end.look("First page")
    front_end.choose_template(DEMO)
    event = front_end.run()
    assert event and event["kind"] == "execution_success", event
    assert (
        front_end.pictures(front_end.node("StoryLoom_SavePage")) == 1
        and front_end.pictures(front_end.node("PreviewImage")) == 4
    )
    assert front_end.page.evaluate("() => clicks") == 3
    front_end.look("First story")
    assert not front_end.faults
    front_end.page.close()
