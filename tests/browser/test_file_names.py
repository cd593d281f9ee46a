"""Placeholders in a prefix are filled in as for Save Image."""

import re

DEMO = "Demo - One Prompt One Story"
SENT = "async (id) => (await app.graphToPrompt()).output[id].inputs.filename_prefix"


def test_dates_and_values_of_other_nodes_come_into_a_file_name(front_end):
    front_end.open_template(DEMO)
    save, sampler = front_end.node("StoryLoom_SavePage"), front_end.node("KSampler")
    front_end.set(sampler, seed=1234, steps=2)
    front_end.set(save, filename_prefix="StoryLoom/%date:yyyy-MM-dd%/%KSampler.seed%-%width%")
    sent = front_end.page.evaluate(SENT, str(save))
    assert re.fullmatch(r"StoryLoom/\d{4}-\d\d-\d\d/1234-%width%", sent)
    assert front_end.values(save)["filename_prefix"].startswith("StoryLoom/%date"), (
        "what is saved stays as it was typed"
    )
    event = front_end.run()
    assert event and event["kind"] == "execution_success", event
    assert front_end.pictures(save) == 1
    (file,) = (front_end.server.base / "output" / "StoryLoom").glob("*/1234-*.png")
    assert re.fullmatch(r"1234-\d{3,}_00001_\.png", file.name)
    measures = front_end.add("StoryLoom_Consistency", filename_prefix="%date:yyyy%/x")
    front_end.connect(front_end.node("VAEDecode"), 0, measures, "images")
    assert re.fullmatch(r"\d{4}/x", front_end.page.evaluate(SENT, str(measures)))


def test_a_pdf_shows_its_pages_and_a_saved_page_opens_the_graph_again(front_end):
    front_end.open_template(DEMO)
    save = front_end.node("StoryLoom_SavePage")
    front_end.set(front_end.node("KSampler"), steps=2, seed=77)
    front_end.set(save, filename_prefix="StoryLoom/dropped")
    for kind in ("pdf", "png", "webp"):
        front_end.set(save, format=kind)
        event = front_end.run()
        assert event and event["kind"] == "execution_success", event
        assert front_end.pictures(save) == 1
        front_end.look(f"Save story page {kind}")
    folder = front_end.server.base / "output" / "StoryLoom"
    assert (folder / "dropped_00001_.pdf").read_bytes().startswith(b"%PDF-")
    for name in ("dropped_00002_.png", "dropped_00003_.webp"):
        front_end.page.evaluate("() => app.graph.clear()")
        front_end.page.evaluate(
            "async (name) => { const query = `filename=${name}&subfolder=StoryLoom&type=output`;"
            " const blob = await (await app.api.fetchApi(`/view?${query}`)).blob();"
            " await app.handleFile(new File([blob], name, { type: blob.type })); }",
            name,
        )
        front_end.page.wait_for_function("() => app.graph.nodes.some(({ type }) => type === 'StoryLoom_SavePage')")
        assert front_end.values(front_end.node("KSampler"))["seed"] == 77
        assert front_end.values(front_end.node("StoryLoom_SavePage"))["filename_prefix"] == "StoryLoom/dropped"
