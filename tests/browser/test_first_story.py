"""A newcomer's way to a first story."""

DEMO = "Demo - One Prompt One Story"


def test_three_clicks_from_the_first_page_to_a_drawn_story(new_desk):
    """ComfyUI shows its templates to whoever opens it for the first time."""
    desk = new_desk(newcomer=True)
    desk.page.get_by_role("dialog").get_by_text("storyloom", exact=True).wait_for()
    clicks = "() => { window.clicks = 0; addEventListener('click', (event) => { clicks += event.isTrusted; }, true); }"
    desk.page.evaluate(clicks)
    desk.look("First page")
    desk.choose_template(DEMO)
    event = desk.run()
    assert event and event["kind"] == "execution_success", event
    assert desk.pictures(desk.node("StoryLoom_SavePage")) == 1 and desk.pictures(desk.node("PreviewImage")) == 4
    assert desk.page.evaluate("() => clicks") == 3
    desk.look("First story")
    assert not desk.faults
    desk.page.close()
