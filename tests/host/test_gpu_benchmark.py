"""The device benchmark on the CPU: its command runs, and its published forms compute the same as ours."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from precision import CLOSE, kept_double

PACK = Path(__file__).resolve().parents[2]
MEASURED = {"ms_per_step", "ratio", "operations", "operations_ratio", "change_from_unpatched"}


def test_the_command_measures_every_row_and_writes_a_table(tmp_path):
    file = tmp_path / "results" / "tiny.json"
    command = [sys.executable, "benchmarks/gpu.py", "--comfyui", os.environ["COMFYUI_PATH"], "--json", str(file)]
    options = ["--tiny", "--rounds", "1", "--minutes", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *options], cwd=PACK, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr

    results, page = json.loads(file.read_text()), file.with_suffix(".md").read_text()
    assert sorted(path.name for path in file.parent.iterdir()) == ["tiny.json", "tiny.md"]
    assert results["complete"] and list(results["dtypes"]) == ["float32"]
    rows = results["dtypes"]["float32"]["rows"]
    assert len(rows) == 10 and all(f"| {name} |" in page for name in rows)
    for name, row in rows.items():
        assert row["finite"] and row["error"] is None, name
        assert all(row[key] is not None for key in MEASURED) and len(row["runs"]) == 1, name
        assert row["attention"] == ["flash"], name
        assert row["change_from_unpatched"] > 1e-5 or name == "unpatched"
    assert rows["unpatched"]["ratio"] == rows["unpatched"]["operations_ratio"] == 1
    ratios = {name: row["operations_ratio"] for name, row in rows.items()}
    assert 1 < ratios["CSA 0.5, 2 anchors"] < ratios["CSA 0.5"] < ratios["published CSA: dense mask"]
    assert ratios["published IPCA: stored K and V"] > 1.2 > 1.01 > ratios["IPCA 2 + SVR"] > 1
    met = {goal["met"] for goal in results["dtypes"]["float32"]["goals"]}
    assert len(results["dtypes"]["float32"]["goals"]) == 5 and None in met


@pytest.fixture(scope="module")
def parts(host):
    return {name: host.pack(f"benchmarks.card.{name}") for name in ("model", "rows", "run", "table", "measure")}


@pytest.fixture(scope="module")
def networks(parts):
    """The networks in double precision, which the sampler keeps too: see `drawn`."""
    model, cpu = parts["model"], torch.device("cpu")
    unet = model.sdxl(model.TINY, torch.float64, cpu)
    return unet, model.storymaker(unet, model.TINY, torch.float64, cpu)


@pytest.fixture(scope="module")
def rows(parts, networks):
    story = parts["model"].random_story(4)
    return {row.name: row for row in parts["rows"].rows_of(*networks, story, parts["model"].TINY)}


def apart(drawn, reference):
    return ((drawn - reference).double().norm() / reference.double().norm()).item()


@pytest.fixture(scope="module")
def drawn(host, rows):
    """A function that returns a row's latents by its name, drawn once, with the kernels of graphics cards."""
    known = {}

    def latents(name):
        if name not in known:
            with torch.inference_mode(), kept_double(), host.pack("benchmarks.common").fused_attention():
                known[name] = rows[name].draw()
        return known[name]

    return latents


@pytest.mark.parametrize(
    "name", ["published CSA: dense mask", "published CSA: bank of 2", "published IPCA: stored K and V"]
)
def test_a_published_form_computes_what_ours_does(rows, drawn, name):
    ours, plain = drawn(rows[name].like), drawn("unpatched")
    assert apart(drawn(name), ours) < CLOSE
    assert apart(plain, ours) > 20 * CLOSE


def test_a_column_too_many_in_the_published_form_is_seen(host, parts, networks, rows, drawn):
    story = parts["model"].random_story(4)
    wrong = parts["rows"].Sampling.of(story, parts["model"].TINY)
    stored = host.pack("benchmarks.published").StoredIdentity(range(story.tokens.identity.stop + 1))
    model = networks[0]
    with torch.inference_mode(), kept_double(), host.pack("benchmarks.common").fused_attention():
        wrong.run(stored.stored_by(model), story.plain(story.identity), slice(1))(lambda step: None)
        latents = wrong.run(stored.used_by(model), story.plain(story.contexts))(lambda step: None)
    assert apart(latents, drawn("IPCA 2 + SVR")) > 20 * CLOSE


def test_a_row_that_fails_is_named_and_the_others_go_on(parts, tmp_path, monkeypatch):
    run, cpu = parts["run"], torch.device("cpu")

    def broken(step):
        raise torch.OutOfMemoryError("no room for the mask\nand more")

    def fine(at_step):
        for step in range(4):
            at_step(step)
        return torch.ones(4, 4, 8, 8)

    made = [
        parts["rows"].Row(name, (sample,)) for name, sample in (("unpatched", fine), ("bad", broken), ("good", fine))
    ]
    monkeypatch.setattr(run, "rows_of", lambda *arguments: made)
    for network in ("sdxl", "storymaker"):
        monkeypatch.setattr(run, network, lambda *arguments: parts["table"].Measured())
    monkeypatch.setattr(parts["measure"], "settle", lambda model, device: 0)
    measuring = run.Run(tmp_path / "t.json", {"device": "none"}, cpu, parts["model"].TINY, 4)
    measuring.measure(torch.float32, end=0.0, rounds=3)
    rows = json.loads((tmp_path / "t.json").read_text())["dtypes"]["float32"]["rows"]
    assert measuring.failed and rows["bad"]["error"] == "OutOfMemoryError: no room for the mask"
    assert len(rows["good"]["runs"]) == len(rows["unpatched"]["runs"]) == 1
    assert "bad failed: OutOfMemoryError" in (tmp_path / "t.md").read_text()


def test_goals_are_met_missed_or_open(parts):
    table = parts["table"]

    def row(ms, left=0, operations=0):
        return table.Measured([ms], left=left, operations=table.Counter(mm=operations))

    rows = {
        "unpatched": row(100, operations=1000),
        "IPCA 2 + SVR": row(100.5),
        "CSA 0.5": row(121, operations=1093),
        "published CSA: dense mask": row(200, left=10**9),
        "all together": row(112, left=512),
    }
    assert [goal["met"] for goal in table.goals(rows)] == [True, False, True, True, False]
    rows["all together"].left = rows["unpatched"].left = 0
    rows["CSA 0.5"] = row(120, operations=1093)
    assert [goal["met"] for goal in table.goals(rows)] == [True] * 5
    assert [goal["met"] for goal in table.goals({"unpatched": row(1)})] == [None] * 5
