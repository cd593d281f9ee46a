"""Placeholders in a prefix are filled in as for Save Image."""

import re

DEMO = "Demo - One Prompt One Story"
SENT = "async (id) => (await app.graphToPrompt()).output[id].inputs.filename_prefix"


def test_dates_and_values_of_other_nodes_come_into_a_file_name(desk):
    desk.open_template(DEMO)
    save, sampler = desk.node("StoryLoom_SavePage"), desk.node("KSampler")
    desk.set(sampler, seed=1234, steps=2)
    desk.set(save, filename_prefix="StoryLoom/%date:yyyy-MM-dd%/%KSampler.seed%-%width%")
    sent = desk.page.evaluate(SENT, str(save))
    assert re.fullmatch(r"StoryLoom/\d{4}-\d\d-\d\d/1234-%width%", sent)
    assert desk.values(save)["filename_prefix"].startswith("StoryLoom/%date"), "what is saved stays as it was typed"
    event = desk.run()
    assert event and event["kind"] == "execution_success", event
    assert desk.pictures(save) == 1
    (file,) = (desk.server.base / "output" / "StoryLoom").glob("*/1234-*.png")
    assert re.fullmatch(r"1234-\d{3,}_00001_\.png", file.name)
    measures = desk.add("StoryLoom_Consistency", filename_prefix="%date:yyyy%/x")
    desk.connect(desk.node("VAEDecode"), 0, measures, "images")
    assert re.fullmatch(r"\d{4}/x", desk.page.evaluate(SENT, str(measures)))


def test_a_pdf_shows_its_pages_and_a_saved_page_opens_the_graph_again(desk):
    desk.open_template(DEMO)
    save = desk.node("StoryLoom_SavePage")
    desk.set(desk.node("KSampler"), steps=2, seed=77)
    desk.set(save, filename_prefix="StoryLoom/dropped")
    for kind in ("pdf", "png", "webp"):
        desk.set(save, format=kind)
        event = desk.run()
        assert event and event["kind"] == "execution_success", event
        assert desk.pictures(save) == 1
        desk.look(f"Save story page {kind}")
    folder = desk.server.base / "output" / "StoryLoom"
    assert (folder / "dropped_00001_.pdf").read_bytes().startswith(b"%PDF-")
    for name in ("dropped_00002_.png", "dropped_00003_.webp"):
        desk.page.evaluate("() => app.graph.clear()")
        desk.page.evaluate(
            "async (name) => { const query = `filename=${name}&subfolder=StoryLoom&type=output`;"
            " const blob = await (await app.api.fetchApi(`/view?${query}`)).blob();"
            " await app.handleFile(new File([blob], name, { type: blob.type })); }",
            name,
        )
        desk.page.wait_for_function("() => app.graph.nodes.some(({ type }) => type === 'StoryLoom_SavePage')")
        assert desk.values(desk.node("KSampler"))["seed"] == 77
        assert desk.values(desk.node("StoryLoom_SavePage"))["filename_prefix"] == "StoryLoom/dropped"
