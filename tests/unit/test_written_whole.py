"""Results that are written while their process is killed: the old ones or the whole new ones, never a half."""

import json

import numpy as np
from killing import can_be_killed, killed_at_every_point
from PIL import Image

from storyloom.benchmarks import effect
from storyloom.benchmarks.consistory.store import Store, as_json, set_files
from storyloom.standalone.__main__ import save_pages

pytestmark = can_be_killed
VERSIONS = [{"of": name, "scores": [number / 7 for number in range(3000)]} for name in ("old", "new")]


def test_a_file_of_a_benchmark(tmp_path):
    store = Store(tmp_path)
    with store.locked({"seed": 1}):
        file = tmp_path / "metrics.json"
        for _ in killed_at_every_point(lambda n: store.write(file, as_json(VERSIONS[n % 2])), tmp_path):
            assert json.loads(file.read_bytes()) in VERSIONS
    assert sorted(file.name for file in tmp_path.iterdir()) == [".state", "metrics.json", "run.json"]


def test_a_set_of_a_benchmark_is_there_with_all_its_files_or_not_at_all(tmp_path):
    store = Store(tmp_path)
    files = set_files([bytes([number]) * 50_000 for number in range(4)], {"seed": 1})
    with store.locked({"seed": 1}):
        for _ in killed_at_every_point(lambda n: store.save_set(f"svr/{n}", files), tmp_path):
            for folder in (tmp_path / "svr").glob("*"):
                assert {file.name: file.read_bytes() for file in folder.iterdir()} == files
    with store.locked({"seed": 1}):
        assert not list((tmp_path / ".state" / "unfinished").iterdir()), "what was left of the killed is cleared"


def test_pictures_and_readings_of_the_effect_page(tmp_path, monkeypatch):
    monkeypatch.setattr(effect, "OUT", tmp_path)
    weights = tmp_path / "weights"
    weights.write_bytes(b"x")
    results, key = effect.Results("x", weights, 10), ("svr", True, 0)
    pictures = [np.full((4, 24, 24, 3), number, np.uint8) for number in range(2)]
    for _ in killed_at_every_point(lambda n: results.save(pictures[n % 2], *key), tmp_path):
        assert any(np.array_equal(results.pictures(*key), version) for version in pictures)
    known = results.folder / "svr-same.json"
    known.write_text(json.dumps(VERSIONS))
    for _ in killed_at_every_point(lambda _: results.stories("svr", True, 0), tmp_path):
        assert json.loads(known.read_text()) == VERSIONS


def test_a_page_of_the_command_line(tmp_path):
    pages = [Image.effect_noise((300, 200), 50).convert("RGB") for _ in range(2)]
    for _ in killed_at_every_point(lambda n: save_pages([pages[n % 2]], tmp_path / "page.png"), tmp_path):
        with Image.open(tmp_path / "page.png") as page:
            assert any(page.tobytes() == version.tobytes() for version in pages)
