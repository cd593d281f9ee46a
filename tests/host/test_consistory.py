"""The ConsiStory+ benchmark on real servers: a run killed in the middle ends with the same files."""

import os
import signal
import subprocess
import sys
from collections import Counter

import pytest
from rounding import rounding
from waiting import wait_until

from storyloom.benchmarks.consistory import __main__ as command
from storyloom.benchmarks.consistory.graph import DEMO_SETTINGS, Settings, graph_of, parse_method
from storyloom.benchmarks.consistory.prompts import PromptSet
from storyloom.benchmarks.consistory.store import STATE, Store
from storyloom.scripts.comfyui import Client

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
            known = {*inputs.get("required", {}), *inputs.get("optional", {})} - {"photomaker", "photo"}
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

    def levels(cumulative):
        euler.alphas_cumprod = cumulative
        euler.set_timesteps(DEMO_SETTINGS.steps)
        return euler.sigmas[1:-1].log()

    bound = rounding(levels, euler.alphas_cumprod)
    assert ours[-1] == euler.sigmas[-1] == 0
    assert (ours[1:-1].log() - euler.sigmas[1:-1].log()).abs().max() < bound < 1e-2
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
    contents = {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
    return {name: content for name, content in contents.items() if not name.startswith(STATE)}


@pytest.fixture(scope="module")
def whole(server, prompts, tmp_path_factory):
    """The files of an undisturbed run."""
    out = tmp_path_factory.mktemp("whole")
    assert command.main(arguments(prompts, out, server)) == 0
    return tree(out)


def drawn(out):
    return len(list(out.glob("*/*/set.json")))


def test_pictures_measures_and_tables(whole):
    assert len([name for name in whole if name.endswith(".png")]) == 8
    assert len({content for name, content in whole.items() if name.endswith(".png")}) == 8
    assert len([name for name in whole if name.endswith("metrics.json")]) == 4
    text = whole["table.md"].decode()
    assert "2 sets with vanilla, 2 sets with csa+svr-eot+ipca" in text
    assert "What the pictures show" in text and "1Prompt1Story" in text


DYING = """import itertools, os, signal, sys
from storyloom.benchmarks.consistory import __main__ as command
from storyloom.scripts.comfyui import Client

name, last, *arguments = sys.argv[1:]
work, calls = getattr(Client, name), itertools.count(1)

def dying(*args):
    done = work(*args)
    if next(calls) == int(last):
        os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))
    return done

setattr(Client, name, dying)
command.main(arguments)"""
"""The command, killed after its client has made the call `name` `last` times."""


@pytest.mark.parametrize("call, times", [("submit", 2), ("view", 3)], ids=["a set is queued", "half a set is fetched"])
def test_a_run_killed_in_the_middle_ends_with_the_same_files(whole, server, prompts, tmp_path, call, times):
    out = tmp_path / "killed"
    line = arguments(prompts, out, server)
    ended = subprocess.run([sys.executable, "-c", DYING, call, str(times), *line]).returncode
    assert ended == -getattr(signal, "SIGKILL", -1) and drawn(out) == 1
    assert command.main(line) == 0
    assert tree(out) == whole
    run = Store(out).run
    marks = [entry["prompt"][3].get("storyloom", {}) for entry in server.request("/history").values()]
    times = Counter(mark["job"] for mark in marks if mark.get("run") == run)
    assert len(times) == 4 and set(times.values()) == {1}, "nothing is drawn twice"


def test_when_one_of_two_servers_is_killed_the_files_are_the_same(
    whole, server, start_server, prompts, tmp_path, monkeypatch
):
    out = tmp_path / "two"
    with start_server() as second:
        submit, name, queued = Client.submit, second.url.removeprefix("http://"), []

        def submitted(client, *args):
            """The first server waits until the second has been killed while drawing its second set."""
            if client.url != second.url:
                wait_until(lambda: len(queued) == 2)
                return submit(client, *args)
            prompt_id = submit(client, *args)
            if queued:
                os.kill(second.pid, getattr(signal, "SIGKILL", signal.SIGTERM))
            queued.append(prompt_id)
            return prompt_id

        monkeypatch.setattr(Client, "submit", submitted)
        assert command.main(arguments(prompts, out, server, second)) == 0
    assert tree(out) == whole
    log = (out / STATE / "log.txt").read_text()
    assert f"{name} lost" in log
    (taken_over,) = [line.split()[4] for line in log.splitlines() if f"{name} lost" in line and "/" in line.split()[4]]
    assert f"drawn {taken_over}" in log
