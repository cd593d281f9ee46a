"""The benchmark of likeness: its rows, its results, and a small run with random weights."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch

from storyloom.benchmarks import likeness as benchmark
from storyloom.benchmarks.likeness import Drawn, Settings, as_json, frames_of, results_of, tables
from storyloom.benchmarks.likeness_rows import ROWS, blended, one, outfit, two
from storyloom.benchmarks.portraits import Portraits
from storyloom.models.demo.faces import DemoFaces
from storyloom.standalone.pipeline import METHODS
from storyloom.world.measures import StoryPictures
from storyloom.world.references import all_differ
from storyloom.world.scene import Scene

FIRST = 30_000
TABLE = [
    *("one", "off", "lora", "tokens", "two", "two-without-attention-loss", "one-without-pose", "outfit", "face-only"),
    *(f"blend {ratio}" for ratio in ("0", "0.25", "0.5", "0.75", "1")),
    "with-csa-ipca-svr",
]


@pytest.fixture(scope="module")
def portraits():
    return Portraits(DemoFaces())


def shown_as(case, figures):
    """The frames of a case as in its text, with these figures."""
    scenes = [Scene(frame.place, frame.action, frame.prop, figures) for frame in case.story.frames]
    return case.portrayal(StoryPictures(case.story, tuple(scenes)))


def perfect(case):
    return shown_as(case, case.expected[: len(case.story.identities)])


def estimates(drawn):
    """Row -> measure -> mean."""
    return {name: {measure: e.mean for measure, e in row.items()} for name, row in results_of(drawn).items()}


def test_all_rows_of_the_table_are_there():
    assert list(ROWS) == TABLE
    assert {row.method for row in ROWS.values()} <= METHODS.keys()
    assert (ROWS["off"].tokens, ROWS["off"].lora) == (0, 0)
    assert (ROWS["lora"].tokens, ROWS["lora"].lora) == (0, 1)
    assert (ROWS["tokens"].tokens, ROWS["tokens"].lora) == (1, 0)


def test_rows_about_one_character_have_the_same_references_and_stories():
    first, second = one(FIRST, 2), ROWS["face-only"].case(FIRST, 2)
    assert first.story == second.story and first.references[0].scene == second.references[0].scene
    assert two(FIRST, 2).expected[0] == first.expected[0]
    assert one(FIRST + 1, 2).expected != first.expected


def test_cases_have_the_characters_that_their_rows_need():
    for number in range(FIRST, FIRST + 20):
        fox, cat = two(number, 1).expected
        assert fox.species != cat.species and all_differ(fox, cat)
        first, second = blended(number, 1).expected
        assert first.species == second.species and all_differ(first, second)
        case = outfit(number, 1)
        (head, clothes), (worn,) = (reference.figure for reference in case.references), case.expected
        assert (worn.species, worn.fur, worn.hat) == (head.species, head.fur, head.hat)
        assert (worn.shirt, worn.trousers) == (clothes.shirt, clothes.trousers)


def test_perfect_pictures_get_perfect_results():
    drawn = {name: [perfect(row.case(FIRST + i, 2)) for i in range(6)] for name, row in ROWS.items()}
    rows = estimates(drawn)
    for name in ("one", "two", "with-csa-ipca-svr"):
        assert (rows[name]["looks"], rows[name]["aligned"], rows[name]["leak"]) == (1, 1, 0)
        assert rows[name]["chance"] < 0.5
    assert rows["two"]["swapped"] == 0
    assert (rows["outfit"]["head"], rows["outfit"]["clothes"]) == (1, 1)
    assert (rows["blend 0"]["first"], rows["blend 0"]["second"]) == (1, 0)
    assert rows["two-without-attention-loss"]["looks minus two"] == 0


def test_differences_are_case_by_case():
    cases = [one(FIRST + i, 1) for i in range(4)]
    right, wrong = [perfect(case) for case in cases], [shown_as(case, ()) for case in cases]
    results = results_of({"one": right[:2] + wrong[2:], "with-csa-ipca-svr": right})
    difference = results["with-csa-ipca-svr"]["looks minus one"]
    assert (difference.mean, difference.low, difference.high) == (0.5, 0, 1)


def test_blends_are_one_row_of_the_json_and_undefined_values_are_left_out():
    drawn = {name: [perfect(ROWS[name].case(FIRST, 1))] for name in ("one", "blend 0.25", "blend 1")}
    rows = as_json(results_of(drawn))
    assert rows.keys() == {"one", "blend"}
    assert rows["one"].keys() == {"looks", "aligned", "leak"}, "one reference has no others for the chance"
    assert rows["blend"].keys() == {f"{m} {r}" for m in ("first", "second", "aligned") for r in ("0.25", "1")}
    assert rows["one"]["looks"] == [1, 1, 1]


def test_the_tables_show_every_row():
    drawn = {name: [perfect(row.case(FIRST + i, 1)) for i in range(2)] for name, row in ROWS.items()}
    text = tables(results_of(drawn))
    assert all(f"| {name} | {row.title} |" in text for name, row in ROWS.items())
    assert "| one-without-pose | leak minus one |" in text


def test_a_character_has_the_face_and_the_appearance_of_its_reference(portraits):
    case = one(FIRST, 1)
    ((whole, _),) = portraits.whole(case.references[0]).parts
    ((face, _),) = portraits.face_only(case.references[0]).parts
    assert whole.has_face and whole.has_character and face.has_face and not face.has_character
    assert torch.equal(whole.face, face.face) and not torch.equal(whole.face, whole.character)
    assert whole.id_embed.norm() == pytest.approx(1, rel=1e-5)
    (first, second) = (reference.figure for reference in outfit(FIRST, 1).references)
    assert first != second


def test_a_dressed_character_has_one_head_and_another_s_clothes_without_its_head(portraits):
    first, second = outfit(FIRST, 1).references
    ((dressed, _),) = portraits.dressed(first, second).parts
    ((own, _),) = portraits.whole(first).parts
    ((other, _),) = portraits.whole(second).parts
    assert torch.equal(dressed.face, own.face) and torch.equal(dressed.id_embed, own.id_embed)
    assert not torch.equal(dressed.character, own.character) and not torch.equal(dressed.character, other.character)


def test_without_face_analysis_a_character_has_its_appearance_only():
    ((features_, _),) = Portraits().whole(one(FIRST, 1).references[0]).parts
    assert features_.has_character and not features_.has_face


def test_rows_that_need_another_adapter_are_left_out_with_a_sentence(capsys, monkeypatch):
    draw_nothing(monkeypatch)
    benchmark.main(["--references", "1", "--rows", "one", "one-without-pose", "--without-attention-loss", "other"])
    out = capsys.readouterr().out
    assert "one-without-pose is left out: name its adapter with --without-pose." in out
    assert "two-without-attention-loss" not in out, "a row that is not wanted is not missing"


def test_options_reach_the_settings(monkeypatch):
    seen = draw_nothing(monkeypatch)
    arguments = ["--guidance", "2.5", "--steps", "7", "--token-strength", "1.1", "--lora-strength", "0.9"]
    arguments += ["--frames", "3", "--story-frames", "5", "--seed", "8", "--adapter", "a", "--without-pose", "b"]
    benchmark.main([*arguments, "--references", "1", "--rows", "blend", "with-csa-ipca-svr"])
    keys, settings, options = seen[0]
    assert asdict(settings) == asdict(Settings(2.5, 7, 1.1, 0.9, 3, 5, 8))
    assert {name: str(path) for name, path in options.adapters.items()} == {"shipped": "a", "without-pose": "b"}
    assert [name for name, _ in keys] == TABLE[-6:]


def draw_nothing(monkeypatch):
    """Replace drawing by pictures that are as in the text. Returns the list of its arguments."""
    seen = []

    def draw_all(keys, settings, options):
        seen.append((keys, settings, options))
        drawn = {}
        for name, number in keys:
            scenes = perfect(ROWS[name].case(number, frames_of(ROWS[name], settings))).pictures.scenes
            drawn[name, number] = Drawn(np.zeros((len(scenes), 24, 24, 3), np.uint8), scenes)
        return drawn

    monkeypatch.setattr(benchmark, "draw_all", draw_all)
    return seen


def test_random_weights_show_no_likeness(tmp_path):
    """With few references the looks that agree by chance vary, but stay far from those that an adapter transfers."""
    path, drawn = tmp_path / "likeness.json", tmp_path / "likeness.png"
    options = ["--references", "2", "--frames", "1", "--steps", "2", "--story-frames", "2", "--jobs", "1"]
    options += ["--rows", "one", "two", "with-csa-ipca-svr"]
    benchmark.main([*options, "--json", str(path), "--picture", str(drawn)])
    rows = json.loads(path.read_text())
    assert rows.keys() == {"one", "two", "with-csa-ipca-svr"}
    assert all(rows[name]["looks"][0] < 0.6 for name in rows)
    for row in rows.values():
        assert all(low <= value <= high for value, low, high in row.values())
    assert drawn.stat().st_size > 0


def test_off_draws_what_the_model_draws_without_characters(portraits):
    studio = benchmark.Studio(benchmark.demo.FILE, {"shipped": None}, portraits)
    settings = Settings(steps=2, frames=1)
    off, on = (studio.draw(ROWS[name], FIRST, settings).pictures for name in ("off", "one"))
    case = one(FIRST, 1)
    plain = benchmark.pictures_of(
        studio.pipeline,
        case.story,
        method="frames",
        steps=2,
        cfg=settings.guidance,
        seed=settings.seed + FIRST,
        shared_noise=False,
    )
    assert np.array_equal(off, (plain * 255).round().astype(np.uint8))
    assert not np.array_equal(off, on)
