"""The ConsiStory+ benchmark through real servers: what is killed in the middle ends with the same files."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter

import pytest
import torch

from storyloom.benchmarks.consistory import __main__ as command
from storyloom.benchmarks.consistory.graph import DEMO_SETTINGS, Settings, graph_of, parse_method
from storyloom.benchmarks.consistory.prompts import PromptSet
from storyloom.benchmarks.consistory.store import STATE, Store

yaml = pytest.importorskip("yaml")
SETS = {
    "animals": [
        {"concept_token": "fox", "style": "a drawing of", "subject": "a fox in a blue coat"},
        {"concept_token": "bear", "style": "", "subject": "a bear"},
    ]
}
SETTINGS = ["asleep in the snow", "reading a book on a train"]
METHODS = ("vanilla", "csa+svr-eot+ipca")
ARGUMENTS = ["--checkpoint", "demo", "--steps", "2", "--width", "96", "--height", "96", "--no-ray", "--retries", "1"]


@pytest.mark.parametrize("method", ["vanilla", "none", "npr", "svr", "svr-eot+ipca", "csa", "csa+svr+ipca"])
def test_workflows_have_all_inputs_of_their_nodes_and_no_others(host, method):
    import nodes

    one = PromptSet(1, "animals", "fox", "A drawing of", "a [fox] #1", ("asleep", "(jumping:1.2)"))
    for settings in (Settings(), DEMO_SETTINGS):
        for node in graph_of(one, parse_method(method), settings).values():
            inputs = nodes.NODE_CLASS_MAPPINGS[node["class_type"]].INPUT_TYPES()
            known = {*inputs.get("required", {}), *inputs.get("optional", {})}
            assert node["inputs"].keys() == known, node["class_type"]
    host.validate(graph_of(one, parse_method(method), DEMO_SETTINGS))


def test_demo_settings_have_the_steps_of_the_effect_page(host):
    diffusers = pytest.importorskip("diffusers")
    from comfy.samplers import calculate_sigmas

    from storyloom.standalone.checkpoint import schedule

    euler = diffusers.EulerDiscreteScheduler(**schedule({"v_pred", "ztsnr"}))
    euler.set_timesteps(DEMO_SETTINGS.steps)
    sampling = host.pack("nodes.demo").build_model().get_model_object("model_sampling")
    ours = calculate_sigmas(sampling, DEMO_SETTINGS.scheduler, DEMO_SETTINGS.steps)
    assert torch.allclose(ours[1:].float(), euler.sigmas[1:], rtol=1e-4)
    assert min(ours[0], euler.sigmas[0]) > 4000, "the first is pure noise, for which the hosts have other large numbers"


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    file = tmp_path_factory.mktemp("prompts") / "sets.yaml"
    sets = {superclass: [{**one, "settings": SETTINGS} for one in sets] for superclass, sets in SETS.items()}
    file.write_text(yaml.safe_dump(sets))
    return file


def arguments(prompts, out, *servers):
    named = [text for server in servers for text in ("--server", server.url)]
    methods = [text for method in METHODS for text in ("--method", method)]
    return ["--prompts", str(prompts), "--out", str(out), *named, *methods, *ARGUMENTS]


def tree(folder):
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
    return {name: content for name, content in found.items() if not name.startswith(STATE)}


@pytest.fixture(scope="module")
def whole(server, prompts, tmp_path_factory):
    """The files of a run that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole")
    assert command.main(arguments(prompts, out, server)) == 0
    return tree(out)


def wait_until(true, seconds=120):
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.01)


def drawn(out):
    return len(list(out.glob("*/*/set.json")))


def test_pictures_measures_and_tables(whole):
    assert len([name for name in whole if name.endswith(".png")]) == 8
    assert len({content for name, content in whole.items() if name.endswith(".png")}) == 8
    assert len([name for name in whole if name.endswith("metrics.json")]) == 4
    text = whole["table.md"].decode()
    assert "2 sets with vanilla, 2 sets with csa+svr-eot+ipca" in text
    assert "What the pictures show" in text and "1Prompt1Story" in text


def test_a_run_killed_in_the_middle_ends_with_the_same_files(whole, server, prompts, tmp_path):
    out = tmp_path / "killed"
    asked = arguments(prompts, out, server)
    process = subprocess.Popen([sys.executable, "-m", "storyloom.benchmarks.consistory", *asked])
    wait_until(lambda: drawn(out) and server.queue()[0])
    process.send_signal(getattr(signal, "SIGKILL", signal.SIGTERM))
    process.wait()
    assert 0 < drawn(out) < 4
    assert command.main(asked) == 0
    assert tree(out) == whole
    run = Store(out).run
    marks = [entry["prompt"][3].get("storyloom", {}) for entry in server.request("/history").values()]
    times = Counter(mark["job"] for mark in marks if mark.get("run") == run)
    assert len(times) == 4 and set(times.values()) == {1}, "nothing is drawn twice"


def test_when_one_of_two_servers_is_killed_the_files_are_the_same(whole, server, start_server, prompts, tmp_path):
    out = tmp_path / "two"
    with start_server() as second:
        name = second.url.removeprefix("http://")

        def kill_half_way():
            wait_until(lambda: drawn(out) >= 1 and second.queue()[0])
            os.kill(second.pid, getattr(signal, "SIGKILL", signal.SIGTERM))

        watcher = threading.Thread(target=kill_half_way)
        watcher.start()
        assert command.main(arguments(prompts, out, server, second)) == 0
        watcher.join()
    assert tree(out) == whole
    told = (out / STATE / "log.txt").read_text()
    assert f"{name} lost" in told
    (taken_over,) = [line.split()[4] for line in told.splitlines() if f"{name} lost" in line and "/" in line.split()[4]]
    assert f"drawn {taken_over}" in told
