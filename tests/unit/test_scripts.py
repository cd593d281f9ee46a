"""The parts of scripts/ that need neither a network nor ComfyUI, and the packaging."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from waiting import LIMIT

from storyloom.models import files
from storyloom.world.draw import draw
from storyloom.world.parsing import parse_error
from storyloom.world.scene import Figure, Scene

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "scripts"
WORKFLOWS = ROOT / "workflows" / "api"


IMPORTED = ("browser", "environment", "progress", "settings", "comfyui")
"""Scripts that others import."""


def load(name):
    """Load a script as a module, under its own name if other scripts import it."""
    alias = name if name in IMPORTED else f"storyloom_script_{name}"
    package = SCRIPTS / name / "__init__.py"
    spec = importlib.util.spec_from_file_location(alias, package if package.exists() else SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[alias] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def scripts():
    names = (*IMPORTED, "demo", "test")
    before = {name: module for name, module in sys.modules.items() if name.partition(".")[0] in names}
    for name in before:
        del sys.modules[name]
    loaded = {name: load(name) for name in names}
    yield loaded
    ours = {*IMPORTED, "storyloom_script_demo", "storyloom_script_test"}
    for name in [name for name in sys.modules if name.partition(".")[0] in ours]:
        del sys.modules[name]
    sys.modules.update(before)


@pytest.fixture
def comfyui(scripts):
    return scripts["comfyui"]


@pytest.fixture
def environment(scripts):
    return scripts["environment"]


@pytest.fixture
def runner(scripts):
    return scripts["test"]


@pytest.fixture
def home(comfyui, tmp_path, monkeypatch):
    """An empty home folder, no COMFYUI_PATH, and a checkout outside any ComfyUI."""
    monkeypatch.setattr(comfyui.find, "ROOT", tmp_path / "checkout")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    return tmp_path / "home"


def make_comfyui(folder, version):
    folder.mkdir(parents=True)
    (folder / "main.py").touch()
    (folder / "comfyui_version.py").write_text(f'# made by the build\n__version__ = "{version}"\n')
    return folder


def cached(home, version):
    return make_comfyui(home / ".cache" / "storyloom" / "comfyui" / version, version)


def refuse_to_clone(monkeypatch, comfyui, reason="no network"):
    monkeypatch.setattr(comfyui.find, "run_limited", lambda command, seconds: reason)


class TestFinding:
    def test_versions_are_compared_as_numbers(self, comfyui, home):
        paths = [cached(home, version) for version in ("0.19.3", "0.100.0", "0.33.0", "0.9.1", "1.0")]
        order = [paths[4], paths[1], paths[2], paths[0]]
        assert comfyui.cached_comfyuis() == order  # 0.9.1 is too old

    def test_version_comes_from_the_file(self, comfyui, tmp_path):
        assert comfyui.read_version(make_comfyui(tmp_path / "any name", "0.20.1rc1")) == (0, 20, 1)
        assert comfyui.read_version(tmp_path) is None

    def test_named_folder_comes_first_then_the_surrounding_one_then_the_cache(
        self, comfyui, home, tmp_path, monkeypatch
    ):
        newest = cached(home, "0.33.0")
        cached(home, "0.19.3")
        assert comfyui.find_comfyui() == newest

        around = make_comfyui(tmp_path / "around", "0.20.0")
        monkeypatch.setattr(comfyui.find, "ROOT", around / "custom_nodes" / "storyloom")
        assert comfyui.find_comfyui() == around

        named = make_comfyui(tmp_path / "named", "0.19.0")
        monkeypatch.setenv("COMFYUI_PATH", str(named))
        assert comfyui.find_comfyui() == named
        assert [path.name for path in comfyui.find_all_comfyui()] == ["named", "around", "0.33.0", "0.19.3"]

    def test_each_comfyui_is_listed_once(self, comfyui, home, monkeypatch):
        monkeypatch.setenv("COMFYUI_PATH", str(cached(home, "0.33.0")))
        assert len(comfyui.find_all_comfyui()) == 1

    def test_a_broken_path_is_not_passed_over(self, comfyui, home, tmp_path, monkeypatch):
        cached(home, "0.33.0")
        monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
        with pytest.raises(comfyui.ComfyUIError, match="COMFYUI_PATH is .* holds no ComfyUI"):
            comfyui.find_comfyui()

    def test_an_old_version_is_refused_by_number(self, comfyui, home, tmp_path, monkeypatch):
        monkeypatch.setenv("COMFYUI_PATH", str(make_comfyui(tmp_path / "old", "0.18.9")))
        with pytest.raises(comfyui.ComfyUIError, match="0.18.9.*0.19 or newer"):
            comfyui.find_comfyui()

    def test_a_failed_clone_says_how_to_provide_one_and_leaves_nothing(self, comfyui, home, monkeypatch):
        refuse_to_clone(monkeypatch, comfyui)
        with pytest.raises(comfyui.NoComfyUIError, match="no network.*COMFYUI_PATH.*custom_nodes"):
            comfyui.find_comfyui()
        assert not [path for path in home.rglob("*") if path.is_file()]

    def test_a_clone_appears_in_the_cache_only_when_complete(self, comfyui, home, monkeypatch):
        def clone(command, seconds):
            make_comfyui(Path(command[-1]), "0.33.0")

        monkeypatch.setattr(comfyui.find, "run_limited", clone)
        assert comfyui.find_comfyui() == home / ".cache/storyloom/comfyui/0.33.0"
        assert not list((home / ".cache/storyloom/tmp").iterdir())

    def test_commands_are_limited_in_time(self, comfyui):
        endless = [sys.executable, "-c", "import threading; threading.Event().wait()"]
        assert comfyui.processes.run_limited(endless, 0.2) == "no answer within 0 seconds"
        assert comfyui.processes.run_limited(["no-such-program-here"], LIMIT) == "no-such-program-here is not installed"
        assert (
            comfyui.processes.run_limited([sys.executable, "-c", "print('why'); raise SystemExit(3)"], LIMIT) == "why"
        )
        assert comfyui.processes.run_limited([sys.executable, "-c", ""], LIMIT) is None


class TestServerParts:
    def test_base_has_the_pack_and_survives_being_made_twice(self, comfyui, tmp_path):
        pack = tmp_path / "checkout of any name"
        pack.mkdir()
        (pack / "__init__.py").touch()
        for _ in range(2):
            base = comfyui.pack_base(tmp_path / "base", pack)
        assert (base / "custom_nodes" / "storyloom" / "__init__.py").exists()
        assert (base / "front" / "index.html").exists()

    def test_pack_is_copied_where_links_are_not_allowed(self, comfyui, tmp_path, monkeypatch):
        pack = tmp_path / "pack"
        (pack / ".venv").mkdir(parents=True)
        (pack / "__init__.py").touch()

        def refuse(*args, **kwargs):
            raise OSError("links are not allowed")

        monkeypatch.setattr(Path, "symlink_to", refuse)
        for _ in range(2):
            comfyui.pack_base(tmp_path / "base", pack)
        copied = tmp_path / "base" / "custom_nodes" / "storyloom"
        assert [path.name for path in copied.iterdir()] == ["__init__.py"]

    def test_outputs_are_saved_images_and_no_previews(self, comfyui, tmp_path):
        server = comfyui.Server(tmp_path, tmp_path / "base", sys.executable)
        image = {"filename": "page.png", "subfolder": "story", "type": "output"}
        preview = {"filename": "preview.png", "subfolder": "", "type": "temp"}
        history = {"outputs": {"1": {"text": ["a"]}, "2": {"images": [image]}, "3": {"images": [preview]}}}
        assert server.outputs(history) == [(tmp_path / "base").resolve() / "output" / "story" / "page.png"]

    def test_a_server_that_dies_shows_the_end_of_its_log(self, comfyui, tmp_path):
        host = make_comfyui(tmp_path / "host", "0.33.0")
        (host / "main.py").write_text("raise SystemExit('the reason')")
        with pytest.raises(comfyui.ComfyUIError, match=r"ended while it started \(code 1\)(?s:.*)the reason"):
            with comfyui.Server(host, comfyui.pack_base(tmp_path / "base", tmp_path / "host"), sys.executable):
                pass

    def test_a_refused_workflow_is_one_sentence(self, comfyui):
        fault = {"message": "Value 0 smaller than min of 1", "details": "width"}
        errors = {
            "error": {"message": "Prompt outputs failed validation", "details": ""},
            "node_errors": {"5": {"class_type": "StoryLoom_Script", "errors": [fault, fault]}},
        }
        sentence = "ComfyUI refused the workflow: node 5 (StoryLoom_Script): Value 0 smaller than min of 1: width"
        assert str(comfyui.PromptRefused(errors)) == sentence
        assert "no outputs" in comfyui.errors.describe_refusal(
            {"error": {"message": "Prompt has no outputs"}, "node_errors": []}
        )
        assert "plain" in comfyui.errors.describe_refusal({"error": "plain", "node_errors": {}})

    def test_a_failed_workflow_is_one_sentence(self, comfyui):
        data = {"node_id": "3", "node_type": "KSampler", "exception_message": "The batch\n  does not fit.\n"}
        messages = [["execution_start", {}], ["execution_error", data]]
        sentence = "The workflow failed at node 3 (KSampler): The batch does not fit."
        assert comfyui.errors.describe_failure(messages) == sentence
        assert "no reason" in comfyui.errors.describe_failure([])


REPORT = """<testsuites><testsuite errors="1" failures="1" skipped="1" tests="5">
<testcase classname="tests.unit.a" name="one"/>
<testcase classname="tests.unit.a" name="two"><failure/></testcase>
<testcase classname="tests.unit.a" name="two"><error/></testcase>
<testcase classname="tests.unit.b" name="one"><skipped/></testcase>
<testcase classname="" name="tests.unit.c"><error/></testcase>
</testsuite></testsuites>"""


class TestCounting:
    def test_a_test_that_fails_and_errors_counts_once(self, runner, tmp_path):
        (tmp_path / "r.xml").write_text(REPORT)
        result = runner.read_counts("unit", tmp_path / "r.xml")
        assert (result.passed, result.failed, result.skipped) == (1, 2, 1)

    def test_a_real_report_of_pytest_is_understood(self, runner, tmp_path):
        (tmp_path / "test_it.py").write_text(
            "import pytest\n"
            "def test_a(): pass\n"
            "def test_b(): assert 0\n"
            "def test_c(): pytest.skip('no')\n"
            "@pytest.mark.xfail\ndef test_d(): assert 0\n"
            "@pytest.fixture\ndef broken():\n    yield\n    assert 0\n"
            "def test_e(broken): pass\n"
        )
        report = tmp_path / "r.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-c", "/dev/null", f"--rootdir={tmp_path}"]
        subprocess.run([*command, "-p", "no:cacheprovider", f"--junitxml={report}"], cwd=tmp_path, capture_output=True)
        result = runner.read_counts("unit", report)
        assert (result.passed, result.failed, result.skipped) == (1, 2, 2)

    def test_a_pass_in_which_nothing_ran_is_a_problem_unless_tests_were_chosen(self, runner):
        nothing = runner.Result("host", skipped=4)
        assert runner.judge(nothing, 0, selected=False).problem == "no test ran"
        assert runner.judge(nothing, 5, selected=True).problem == ""

    def test_a_crash_of_pytest_is_a_problem(self, runner):
        assert "code 3" in runner.judge(runner.Result("unit", passed=5), 3, selected=True).problem

    def test_the_totals_are_the_last_line(self, runner):
        lines = runner.summary([runner.Result("no host", 3, 1, 2)], [runner.Result("ComfyUI 0.33.0", 4, 0, 1)])
        assert lines[-2:] == ["host tests run: 4", "7 passed, 1 failed, 3 skipped"]

    def test_the_host_without_comfyui_has_a_pass_of_its_own_and_no_test_runs_twice(self, runner):
        rest, standalone = runner.plain_passes()
        assert standalone.arguments == (str(runner.STANDALONE_TESTS),) and standalone.comfyui is None
        apart = ("standalone", "host", "browser")
        assert {f"--ignore={runner.TESTS / folder}" for folder in apart} < set(rest.arguments)

    def test_the_browser_pass_takes_the_newest_comfyui_or_says_loudly_why_there_is_none(
        self, runner, environment, tmp_path, monkeypatch
    ):
        hosts = [make_comfyui(tmp_path / version, version) for version in ("0.19.3", "0.100.0", "0.33.0")]

        def answers(text):
            monkeypatch.setattr(environment, "run", lambda command: SimpleNamespace(stdout=text))

        def refuse(folder):
            raise environment.SetupError("no network")

        answers("ready\n")
        monkeypatch.setattr(environment, "newer_front_end", refuse)
        (only,), sentence = runner.browser_pass(hosts)
        assert (only.comfyui, only.arguments, only.variables) == (hosts[1], (str(runner.BROWSER_TESTS),), ())
        assert sentence.startswith("NO TESTS ON THE NEWER FRONT END") and sentence.endswith("(no network)")
        assert runner.browser_pass([])[0] == [] and "no ComfyUI was found" in runner.browser_pass([])[1]
        answers("Playwright is not installed\n")
        none, sentence = runner.browser_pass(hosts)
        assert none == [] and "\n" not in sentence
        assert (
            sentence.startswith("NO BROWSER TESTS")
            and "Playwright is not installed; run 'make browser-test'" in sentence
        )

    @pytest.mark.parametrize("whole", [False, True])
    def test_a_newer_front_end_has_a_pass_of_its_own(self, runner, environment, tmp_path, monkeypatch, whole):
        monkeypatch.setattr(environment, "run", lambda command: SimpleNamespace(stdout="ready\n"))
        monkeypatch.setattr(environment, "newer_front_end", lambda folder: tmp_path / "static")
        hosts = [make_comfyui(tmp_path / "0.33.0", "0.33.0")]
        (pinned, newer), sentence = runner.browser_pass(hosts, whole)
        assert newer.comfyui == pinned.comfyui == hosts[0] and sentence == ""
        assert newer.variables == (("STORYLOOM_FRONT_END", str(tmp_path / "static")),)
        assert newer.arguments == (pinned.arguments if whole else runner.ON_BOTH)
        for file, _, test in (one.partition("::") for one in runner.ON_BOTH):
            assert f"def {test or 'test_'}" in Path(file).read_text(encoding="utf-8")

    @pytest.mark.parametrize(
        "arguments, ran, passed_on",
        [(["browser", "-x"], ["browser"], ["-x"]), (["-x"], ["no host", "standalone", "browser", "ComfyUI 9"], ["-x"])],
    )
    def test_browser_as_first_argument_runs_these_tests_alone(
        self, runner, environment, monkeypatch, capsys, arguments, ran, passed_on
    ):
        calls = []
        browsers = [runner.Pass("browser", ()), runner.Pass("ComfyUI 9", ())]
        monkeypatch.setattr(environment, "ensure", lambda: None)
        monkeypatch.setattr(environment, "add_browser", lambda: calls.append("install"))
        monkeypatch.setattr(runner, "available_hosts", lambda: ([], ""))
        monkeypatch.setattr(runner, "browser_pass", lambda hosts, whole: (browsers[:1], "loud"))
        monkeypatch.setattr(runner, "host_passes", lambda hosts: browsers[1:])
        monkeypatch.setattr(
            runner,
            "run_passes",
            lambda passes, folder, extra, setting: (
                calls.append(extra) or [runner.Result(one.name, 1) for one in passes]
            ),
        )
        assert runner.main(arguments) == 0
        assert calls == [*(["install"] if len(ran) == 1 else []), passed_on]
        printed = capsys.readouterr().out.splitlines()
        assert "loud" in printed and [line.split("  ")[0] for line in printed[3:-2]] == ran
        assert printed[-2] == f"host tests run: {int('ComfyUI 9' in ran)}"

    def test_without_comfyui_there_is_one_loud_line(self, runner, comfyui, home, monkeypatch):
        refuse_to_clone(monkeypatch, comfyui)
        hosts, sentence = runner.available_hosts()
        assert hosts == [] and sentence.startswith("NO COMFYUI WAS FOUND: all host tests are skipped")
        assert "COMFYUI_PATH" in sentence and "\n" not in sentence


class TestSettings:
    @pytest.fixture
    def settings(self, scripts):
        return scripts["settings"]

    def test_each_has_its_variables_and_no_other_s(self, settings):
        environment = {"PATH": "x", "ATEN_CPU_CAPABILITY": "avx512", "ONEDNN_MAX_CPU_ISA": "AVX2"}
        variables = {name: settings.environment_in(one, environment) for name, one in settings.SETTINGS.items()}
        assert variables == {
            "plain": {"PATH": "x"},
            "default-isa": {"PATH": "x", "ATEN_CPU_CAPABILITY": "default"},
            "avx2": {"PATH": "x", "ATEN_CPU_CAPABILITY": "avx2"},
            "lowest-onednn": {"PATH": "x", "ONEDNN_MAX_CPU_ISA": "SSE41"},
            "two-threads": {"PATH": "x", "OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2", "GOMP_SPINCOUNT": "100"},
            "busy": {"PATH": "x"},
        }
        assert settings.environment_in(None, environment) == environment

    @pytest.mark.parametrize(
        "machine, flags, there",
        [
            ("x86_64", "flags : sse4_1 avx avx2 bmi1", True),
            ("AMD64", "flags : avx2", True),
            ("x86_64", "flags : sse4_1 avx", False),
            ("x86_64", None, False),
            ("aarch64", "Features : avx2", False),
        ],
    )
    def test_avx2_is_left_out_loudly_where_it_is_not_known(
        self, settings, tmp_path, monkeypatch, machine, flags, there
    ):
        file = tmp_path / "cpuinfo"
        if flags:
            file.write_text(flags + "\n")
        monkeypatch.setattr(settings, "CPU_FLAGS", file)
        monkeypatch.setattr(settings.platform, "machine", lambda: machine)
        setting, about = settings.chosen("avx2")
        assert (setting is not None) == there
        assert about.startswith("SETTING=avx2: PyTorch with AVX2" if there else "SETTING=avx2 IS LEFT OUT: ")

    def test_names_that_there_are_not_are_told_with_those_that_there_are(self, settings):
        assert settings.chosen("") == (None, "")
        with pytest.raises(settings.UnknownSettingError, match="no SETTING=avx512: choose one of plain, default-isa, "):
            settings.chosen("avx512")

    def test_busy_processes_run_beside_the_tests_and_always_end(self, settings):
        with pytest.raises(ZeroDivisionError), settings.busy(2) as processes:
            assert [process.poll() for process in processes] == [None, None]
            raise ZeroDivisionError
        assert len(processes) == 2 and None not in [process.poll() for process in processes]

    def test_busy_processes_end_when_the_one_that_started_them_is_killed(self, settings):
        code = "import os, subprocess, sys\nprint(subprocess.Popen([sys.executable, '-c', {!r}, str(os.getpid())]).pid)"
        command = [sys.executable, "-c", code.format(settings.RESTLESS)]
        other = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
        assert other.stdout.strip().isdecimal(), "its pipe is closed, so that the restless one has ended as well"

    def test_a_pass_has_the_setting_s_variables_and_the_run_says_which(
        self, scripts, settings, environment, tmp_path, monkeypatch, capsys
    ):
        runner, seen = scripts["test"], []

        def run(command, env, **options):
            seen.append(env)
            Path(command[[part.startswith("--junitxml") for part in command].index(True)].partition("=")[2]).write_text(
                '<testsuite><testcase classname="a" name="b"/></testsuite>'
            )
            return SimpleNamespace(returncode=0, stdout="")

        monkeypatch.setattr(runner.subprocess, "run", run)
        monkeypatch.setattr(environment, "ensure", lambda: None)
        monkeypatch.setattr(runner, "available_hosts", lambda: ([], ""))
        monkeypatch.setattr(runner, "browser_pass", lambda hosts, whole: ([], ""))
        monkeypatch.setattr(runner, "plain_passes", lambda: [runner.Pass("one", ())])
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        for name, threads in (("two-threads", "2"), ("lowest-onednn", "1"), ("", "1")):
            assert runner.main([], name) == 0
            assert seen[-1]["OMP_NUM_THREADS"] == threads
            assert (f"SETTING={name}: " in capsys.readouterr().out) == bool(name)
        assert seen[1]["ONEDNN_MAX_CPU_ISA"] == "SSE41"

    @pytest.mark.skipif(not Path("/bin/bash").exists(), reason="needs bash")
    def test_ci_takes_one_by_turn_and_a_user_s_own_wins(self, settings, tmp_path):
        for name, line in (("make", 'echo "$* in $SETTING"'), ("date", 'echo "$DAY"')):
            (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
            (tmp_path / name).chmod(0o755)
        base = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": sys.executable}

        def made(**variables):
            command = ["/bin/bash", str(ROOT / ".ci" / "run")]
            return subprocess.run(command, env=base | variables, capture_output=True, text=True).stdout

        names = list(settings.SETTINGS)
        for day in ("006", "007", "008", "009", "010", "011", "366"):
            name = names[int(day) % len(names)]
            assert made(DAY=day).splitlines() == [
                f"Setting: {name} (day {day} of the year; repeat it with: make test SETTING={name})",
                f"test in {name}",
            ]
        assert made(DAY="001", SETTING="busy").endswith("test in busy\n")


class TestThreads:
    @pytest.fixture
    def chosen(self, comfyui):
        return comfyui.threads.thread_settings

    @pytest.mark.parametrize(
        "cores, load, processes, threads",
        [
            (2, 0.0, 1, None),
            (2, 0.4, 1, None),
            (64, 0.2, 1, None),
            (1, 0.0, 1, 1),
            (2, 1.0, 1, 1),
            (2, 9.0, 1, 1),
            (8, 1.0, 1, 3),
            (8, 0.0, 2, 2),
            (8, 0.0, 16, 1),
        ],
    )
    def test_threads_are_as_many_as_pytorch_takes_or_half_of_the_free_cores(
        self, chosen, cores, load, processes, threads
    ):
        added = chosen({}, cores, load, processes)
        assert added.pop("GOMP_SPINCOUNT") == "4000"
        assert added == ({} if threads is None else dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads)))

    @pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"])
    def test_what_a_user_has_set_wins(self, chosen, name):
        assert chosen({name: "7"}, 2, 5.0) == {}

    def test_this_machine_is_asked_where_nothing_is_given(self, comfyui, chosen, monkeypatch):
        threads = comfyui.threads
        monkeypatch.setattr(threads, "cores_here", lambda: 8)
        monkeypatch.setattr(threads, "load_now", lambda: 2.0)
        assert chosen({})["OMP_NUM_THREADS"] == "3"
        monkeypatch.undo()
        assert threads.cores_here() >= 1 and threads.load_now() >= 0

    @pytest.mark.parametrize("cpu", [True, False])
    def test_a_server_starts_with_them_on_a_cpu_alone(self, comfyui, tmp_path, monkeypatch, cpu):
        started = []
        monkeypatch.setattr(comfyui.server.subprocess, "Popen", lambda command, env, **options: started.append(env))
        monkeypatch.setattr(
            comfyui.server, "thread_settings", lambda environment, processes: {"THREADS": f"{processes}"}
        )
        comfyui.Server(tmp_path, tmp_path, "python", cpu=cpu, processes=3)._start()
        assert started[0].get("THREADS") == ("3" if cpu else None)


class TestEnvironment:
    def test_an_old_python_is_refused_in_a_sentence(self, environment):
        with pytest.raises(environment.SetupError, match="needs Python 3.10 or newer, and .* is 3.9.18"):
            environment.require_python((3, 9, 18))
        environment.require_python((3, 10, 0))

    def test_pip_failures_become_sentences(self, environment):
        assert "disk is full" in environment.pip_failure("ERROR: [Errno 28] No space left on device")
        assert "network" in environment.pip_failure(
            "NewConnectionError(...)\nERROR: No matching distribution found for a"
        )
        assert "found for xyz" in environment.pip_failure("ERROR: No matching distribution found for xyz")

    def test_the_environment_is_made_again_when_its_inputs_change(self, environment, tmp_path, monkeypatch):
        for name in environment.INPUTS:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text("a")
        monkeypatch.setattr(environment, "ROOT", tmp_path)
        before = environment.fingerprint()
        assert before == environment.fingerprint()
        (tmp_path / environment.INPUTS[-1]).write_text("b")
        assert before != environment.fingerprint()

    def test_the_newer_front_end_is_installed_once_and_found_by_the_tests(self, environment, tmp_path, monkeypatch):
        """Also after an installation that was interrupted."""
        calls = []
        (tmp_path / "1.2.3" / "comfyui_frontend_package").mkdir(parents=True)

        def pip(*arguments):
            calls.append(arguments)
            static = Path(arguments[arguments.index("--target") + 1]) / "comfyui_frontend_package" / "static"
            static.mkdir(parents=True)
            (static / "index.html").touch()

        monkeypatch.setattr(environment, "pip", pip)
        monkeypatch.setattr(environment.browser, "NEWER", "1.2.3")
        static = {environment.newer_front_end(tmp_path) for _ in range(2)}
        assert len(calls) == 1 and calls[0][-1] == "comfyui_frontend_package==1.2.3"
        monkeypatch.setenv("STORYLOOM_FRONT_END", str(*static))
        assert environment.browser.front_end() == tmp_path / "1.2.3" / "comfyui_frontend_package" / "static"

    def test_what_browser_tests_need_is_installed_where_a_browser_is_found(self, environment, monkeypatch):
        browser = environment.browser
        monkeypatch.setenv("CHROMIUM", sys.executable)
        assert browser.system_browser() == sys.executable and environment.optional_extras() == ["faces", "browser"]
        before = environment.fingerprint()
        monkeypatch.setenv("CHROMIUM", "no-such-program-here")
        assert browser.system_browser() is None and environment.optional_extras() == ["faces"]
        assert environment.fingerprint() != before

    @pytest.mark.parametrize(
        "works, root, tried",
        [("playwright", True, 1), ("apt-get", True, 3), ("", True, 3), ("apt-get", False, 1), ("", False, 1)],
    )
    def test_a_browser_comes_from_playwright_or_the_system(self, environment, monkeypatch, works, root, tried):
        commands = []

        def run(command):
            text = " ".join(map(str, command))
            if not text.endswith("browser.py"):
                commands.append(text)
            there = any(works and works in one and one.endswith("chromium") for one in commands)
            return subprocess.CompletedProcess(command, 0, "ready\n" if there else "no Chromium was found\n")

        monkeypatch.setattr(environment, "run", run)
        monkeypatch.setattr(environment, "import_problem", lambda modules: "")
        monkeypatch.setattr(environment.shutil, "which", lambda name: f"/usr/bin/{name}")
        monkeypatch.setattr(environment.os, "geteuid", lambda: 0 if root else 1000, raising=False)
        if works and (root or works == "playwright"):
            environment.add_browser()
        else:
            with pytest.raises(environment.SetupError, match="apt-get install chromium.*CHROMIUM"):
                environment.add_browser()
        assert len(commands) == tried and "playwright install chromium" in commands[0]


FOX = Figure("fox", "red", "blue", "green", "none")
FOXES = [
    FOX,
    Figure("fox", "brown", "blue", "red", "cap"),
    Figure("fox", "grey", "blue", "yellow", "crown"),
    Figure("fox", "white", "blue", "white", "top hat"),
]
"""They share only the coat."""


def painted(figures, places=("snow", "train", "city", "beach")):
    """The demo story as a perfect model would draw it, in floats [192, 192, 3]."""
    random = np.random.default_rng(0)
    doing = (("sleeping", "none"), ("standing", "book"), ("standing", "umbrella"), ("jumping", "none"))
    scenes = [Scene(place, *what, (who,)) for place, what, who in zip(places, doing, figures, strict=True)]
    return [draw(scene, random).repeat(8, 0).repeat(8, 1) / 255.0 for scene in scenes]


class TestDemo:
    @pytest.fixture
    def demo(self, scripts, tmp_path, monkeypatch):
        monkeypatch.setattr(scripts["demo"], "OUT", tmp_path / "out")
        return scripts["demo"]

    @pytest.fixture
    def prompt(self, demo):
        return demo.read_workflow(demo.WORKFLOW)

    def options(self, demo, **chosen):
        return Namespace(**{"host": None, "comfyui": None, "workflow": demo.WORKFLOW, **chosen})

    def test_what_is_no_api_workflow_is_refused(self, demo, tmp_path):
        (tmp_path / "ui.json").write_text('{"nodes": [], "links": []}')
        with pytest.raises(demo.DemoError, match="API format"):
            demo.read_workflow(tmp_path / "ui.json")
        with pytest.raises(demo.DemoError, match="does not exist"):
            demo.read_workflow(tmp_path / "missing.json")

    def test_a_comfyui_that_is_found_draws_and_is_named(self, demo, home):
        folder = cached(home, "0.33.0")
        assert demo.choose_host(self.options(demo)) == (folder, f"Host: ComfyUI 0.33.0 in {folder}")
        assert demo.choose_host(self.options(demo, host="comfyui"))[0] == folder

    def test_without_comfyui_the_own_host_draws_and_says_why(self, demo, comfyui, home, monkeypatch):
        refuse_to_clone(monkeypatch, comfyui)
        host, line = demo.choose_host(self.options(demo))
        assert host is None and "own" in line and "no network" in line and "\n" not in line

    def test_the_own_host_can_be_asked_for(self, demo, home):
        cached(home, "0.33.0")
        assert demo.choose_host(self.options(demo, host="standalone"))[0] is None

    def test_who_asks_for_comfyui_or_another_workflow_gets_no_substitute(self, demo, comfyui, home, monkeypatch):
        refuse_to_clone(monkeypatch, comfyui)
        for chosen in ({"host": "comfyui"}, {"workflow": Path("mine.json")}):
            with pytest.raises(comfyui.NoComfyUIError):
                demo.choose_host(self.options(demo, **chosen))

    def test_a_wrong_folder_is_not_passed_over(self, demo, comfyui, home, tmp_path):
        with pytest.raises(comfyui.ComfyUIError, match="--comfyui is .* holds no ComfyUI"):
            demo.choose_host(self.options(demo, comfyui=tmp_path))

    @pytest.mark.parametrize("more", [["--workflow", "mine.json"], ["--comfyui", "folder"]])
    def test_options_that_contradict_each_other_are_refused(self, demo, monkeypatch, capsys, more):
        monkeypatch.setattr(sys, "argv", ["demo.py", "--host", "standalone", *more])
        with pytest.raises(SystemExit):
            demo.main()
        assert "need ComfyUI" in capsys.readouterr().err

    def test_both_rows_are_measured_by_what_their_pictures_show(self, demo, prompt):
        without, with_ = demo.rows_of(prompt).values()
        wrong = painted(FOXES, ("snow", "train", "city", "desert"))
        lines = demo.measured(prompt, {without: wrong, with_: painted([FOX] * 4)})
        assert without.startswith("Without StoryLoom") and with_.startswith("With StoryLoom")
        (first,), (second,) = ([line for line in lines if title in line] for title in (without, with_))
        assert "alignment 3/4 frames, same looks   0%" in first
        assert "alignment 4/4 frames, same looks 100%" in second
        assert first.index("alignment") == second.index("alignment"), "a table"
        assert "this one story" in "".join(lines) and "docs/effect.md" in "".join(lines)

    def test_a_look_that_is_told_and_not_drawn_is_not_aligned(self, demo, prompt):
        red = Figure("fox", "red", "red", "green", "none")
        assert "alignment 2/4" in "".join(demo.measured(prompt, {"row": painted([FOX, red, red, FOX])}))

    def test_a_story_that_leaves_nothing_open_has_no_same_looks(self, demo, prompt):
        for node in demo.nodes_of(prompt, "StoryLoom_Script").values():
            node["inputs"]["identity"] = "a red fox in a blue coat and green trousers without a hat"
        assert "4/4 frames, no look left open" in "".join(demo.measured(prompt, {"row": painted([FOX] * 4)}))

    def test_other_workflows_with_the_demo_model_are_measured_too(self, demo):
        prompt = demo.read_workflow(WORKFLOWS / "Demo - One Prompt One Story.json")
        (title,) = demo.rows_of(prompt).values()
        assert title == "Frames"
        assert "alignment 4/4" in "".join(demo.measured(prompt, {title: painted([FOX] * 4)}))

    def test_two_characters_are_heard(self, demo):
        story = demo.world_story(demo.read_workflow(WORKFLOWS / "Demo - Two Characters.json"))
        assert [who.species for who in story.identities] == ["fox", "bear"]
        assert story.shown == ((0,), (1,), (0, 1), (0, 1))

    @pytest.mark.parametrize(
        ("kind", "inputs", "reason"),
        [
            ("StoryLoom_Script", {"identity": "a crow"}, '"a crow" is not one of cat'),
            ("StoryLoom_Script", {"frames": "drinking tea by the sea"}, 'Frame 1, "drinking tea by the sea"'),
            ("StoryLoom_Script", {"frames": ["7", 0]}, "come from other nodes"),
            ("StoryLoom_Script", {"identity": ""}, "identity: it is empty"),
            ("StoryLoom_Encode", {"story": None}, "the story of one Story script"),
        ],
    )
    def test_a_workflow_whose_story_is_not_heard_says_why_in_one_line(self, demo, prompt, kind, inputs, reason):
        for node in demo.nodes_of(prompt, kind).values():
            node["inputs"] |= inputs
        (line,) = demo.measured(prompt, {"row": painted([FOX] * 4)})
        assert line.startswith("Not measured: ") and reason in line and "\n" not in line

    def test_pictures_that_cannot_be_read_say_why(self, demo, prompt):
        real = demo.read_workflow(WORKFLOWS / "One Prompt One Story.json")
        pictures = painted([FOX] * 4)
        for workflow, rows, reason in (
            (real, {"row": pictures}, "only the demo model's pictures"),
            (prompt, {}, "no frames straight from VAE Decode"),
            (prompt, {"row": pictures[:3]}, "4 frames and 3 pictures"),
            (prompt, {"row": [picture[:100, :100] for picture in pictures]}, "multiple of 24"),
        ):
            (line,) = demo.measured(workflow, rows)
            assert reason in line

    def test_comfyui_s_frames_become_rows_and_everything_saved_lies_in_out(
        self, demo, comfyui, prompt, tmp_path, monkeypatch
    ):
        save, rows = {}, list(demo.rows_of(prompt))
        for node in (*demo.nodes_of(prompt, "SaveImage"), *demo.nodes_of(prompt, "StoryLoom_SavePage")):
            name = Path(prompt[node]["inputs"]["filename_prefix"]).name
            save[node] = [f"{name}_{i}.png" for i in range(4 if node in rows else 1)]
        folder = tmp_path / "base" / "output" / "StoryLoom"

        class Server(comfyui.Server):
            def __enter__(self):
                folder.mkdir(parents=True)
                for names in save.values():
                    for name, picture in zip(names, painted([FOX] * 4), strict=False):
                        Image.fromarray((picture * 255).round().astype(np.uint8)).save(folder / name)
                return self

            def submit(self, prompt):
                return "id"

            def wait(self, prompt_id, on_progress):
                images = {"subfolder": "StoryLoom", "type": "output"}
                outputs = {node: {"images": [{**images, "filename": n} for n in names]} for node, names in save.items()}
                return {"outputs": outputs}

        monkeypatch.setattr(comfyui, "Server", Server)
        drawn = demo.draw(tmp_path, prompt, tmp_path / "base")
        assert [page.name for page in drawn.pages] == ["page_0.png"]
        assert sorted(path.name for path in demo.OUT.iterdir()) == sorted(
            name for names in save.values() for name in names
        )
        assert list(drawn.rows) == list(demo.rows_of(prompt).values())
        assert "".join(demo.measured(prompt, drawn.rows)).count("alignment 4/4 frames, same looks 100%") == 2

    def test_the_own_host_draws_the_workflow_s_story_with_its_settings(self, demo, prompt, monkeypatch):
        calls = []

        def pipeline(identity, frames, **settings):
            calls.append((identity, len(frames), settings))
            pictures = [Image.fromarray((picture * 255).round().astype(np.uint8)) for picture in painted([FOX] * 4)]
            return SimpleNamespace(frames=pictures)

        fake = SimpleNamespace(StoryPipeline=lambda model: pipeline, demo_model=lambda: None)
        monkeypatch.setitem(sys.modules, "storyloom.standalone", fake)
        whole, write = [], files.write_whole
        monkeypatch.setattr(files, "write_whole", lambda path, content: (whole.append(path), write(path, content)))
        drawn = demo.draw_standalone(prompt)
        assert sorted(whole) == sorted(demo.OUT.iterdir()), "nothing is written in place"
        settings = {"seed": 7, "steps": 16, "cfg": 5.0}
        expected = [("a fox in a blue coat", 4, {"method": method, **settings}) for method in ("frames", "svr+ipca")]
        assert calls == expected
        assert list(drawn.rows) == list(demo.rows_of(prompt).values())
        assert len(list(demo.OUT.glob("without_*.png"))) == len(list(demo.OUT.glob("with_*.png"))) == 4
        with Image.open(*drawn.pages) as page:
            assert page.width == 4 * 192 + 3 * 12 + 2 * 24 and page.height > 2 * 192
        assert "".join(demo.measured(prompt, drawn.rows)).count("alignment 4/4") == 2


DEMOS = sorted(path.stem for path in WORKFLOWS.glob("Demo*.json"))


class TestDemoWorkflows:
    @pytest.mark.parametrize("name", DEMOS)
    def test_they_are_told_in_words_that_the_demo_model_knows(self, name):
        prompt = json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))
        scripts = [node["inputs"] for node in prompt.values() if node["class_type"] == "StoryLoom_Script"]
        assert scripts and not any(parse_error(texts["identity"], texts["frames"].splitlines()) for texts in scripts)

    @pytest.mark.parametrize("name", DEMOS)
    def test_they_draw_as_the_demo_model_has_learnt(self, name):
        prompt = json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))
        (size,) = [node["inputs"] for node in prompt.values() if node["class_type"] == "StoryLoom_EmptyLatent"]
        assert (size["width"], size["height"]) == (192, 192)
        samplers = [node["inputs"] for node in prompt.values() if node["class_type"] == "KSampler"]
        home = {"steps": 16, "cfg": 5.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
        assert samplers and all(home.items() <= inputs.items() for inputs in samplers)

    @pytest.mark.parametrize("name", DEMOS)
    def test_their_notes_say_what_the_demo_model_draws(self, name):
        workflow = json.loads((WORKFLOWS.parent / f"{name}.json").read_text(encoding="utf-8"))
        (note,) = [node["widgets_values"][0] for node in workflow["nodes"] if node["type"] == "MarkdownNote"]
        assert "pixel-art" in note and "random weights" not in note and "coloured noise" not in note


class TestPackaging:
    @pytest.fixture
    def project(self):
        tomllib = pytest.importorskip("tomllib")
        return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

    def test_every_package_folder_is_listed(self, project):
        listed = set(project["tool"]["setuptools"]["packages"])
        roots = {package.split(".")[1] for package in listed - {"storyloom"}}
        files = [path.relative_to(ROOT) for root in roots for path in (ROOT / root).rglob("*.py")]
        assert listed == {"storyloom", *(".".join(["storyloom", *file.parent.parts]) for file in files)}
        assert roots == {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests"}

    def test_requirements_txt_matches_the_project(self, project):
        assert (ROOT / "requirements.txt").read_text().split() == project["project"]["dependencies"]

    @pytest.mark.parametrize("extra", ["dev", "standalone"])
    def test_the_environment_holds_the_test_tools_and_the_host_without_comfyui(self, project, environment, extra):
        assert extra in environment.EXTRAS
        assert environment.requirements(extra) == project["project"]["optional-dependencies"][extra]

    def test_an_extra_that_is_not_there_is_reported(self, environment):
        with pytest.raises(environment.SetupError, match="no line 'magic = "):
            environment.requirements("magic")

    def test_every_dependency_is_part_of_the_environment(self, project):
        listed = (SCRIPTS / "requirements-host.txt").read_text().splitlines()
        names = {re.split(r"[<>=~]", line)[0] for line in listed}
        assert set(project["project"]["dependencies"]) <= names

    def test_the_registry_gets_what_it_asks_for(self, project):
        comfy, about = project["tool"]["comfy"], project["project"]
        assert comfy["PublisherId"] and comfy["DisplayName"] and comfy["requires-comfyui"] == ">=0.19.0"
        assert about["name"] == "storyloom" and re.fullmatch(r"\d+\.\d+\.\d+", about["version"])
        assert (ROOT / about["license"]["file"]).read_text().lstrip().startswith("Apache License")
        repository = about["urls"]["Repository"].removeprefix("https://github.com/")
        for name, fits in (("Icon", lambda w, h: w == h <= 400), ("Banner", lambda w, h: 9 * w == 21 * h)):
            folder = f"https://raw.githubusercontent.com/{repository}/main/"
            with Image.open(ROOT / comfy[name].removeprefix(folder)) as image:
                assert fits(*image.size)
        owner = repository.split("/")[0]
        publish = (ROOT / ".github" / "workflows" / "publish.yml").read_text(encoding="utf-8")
        assert f"github.repository_owner == '{owner}'" in publish and "Comfy-Org/publish-node-action@" in publish

    def test_the_public_tests_run_on_the_oldest_and_newest_python_and_comfyui(self, comfyui, environment):
        yaml = pytest.importorskip("yaml")
        workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text(encoding="utf-8"))
        assert workflow["permissions"] == {"contents": "read"} and workflow["concurrency"]["cancel-in-progress"]
        assert workflow["env"]["PIP_EXTRA_INDEX_URL"] == "${{ vars.CPU_WHEELS_INDEX }}"
        commands = {name: [step.get("run") for step in job["steps"]] for name, job in workflow["jobs"].items()}
        assert {"ruff check .", "ruff format --check ."} < set(commands["lint"])
        python = [".".join(map(str, environment.MINIMUM)), "3.13"]
        oldest, newest = "v0.19.3", f"v{comfyui.find.PINNED}"
        assert oldest.startswith("v{}.{}.".format(*comfyui.find.MINIMUM))
        for name, folders, matrix in (
            ("unit", ("unit", "standalone"), {"python": python}),
            ("host", ("host",), {"python": python, "comfyui": [oldest, newest]}),
        ):
            assert workflow["jobs"][name]["strategy"]["matrix"] == matrix
            assert {f".venv/bin/python -m pytest tests/{folder}" for folder in folders} < set(commands[name])
            assert all((ROOT / "tests" / folder).is_dir() for folder in folders)
        (tests,) = [step for step in workflow["jobs"]["host"]["steps"] if "tests/host" in step.get("run", "")]
        assert tests["env"]["COMFYUI_PATH"] == "${{ runner.temp }}/ComfyUI"

    def test_the_changelog_has_the_version(self, project):
        assert f"\n## {project['project']['version']}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")

    def test_the_archive_has_what_users_need_and_no_more(self):
        """.comfyignore has the syntax of .gitignore, so git evaluates it here."""
        rules = f"core.excludesFile={ROOT / '.comfyignore'}"
        command = ["git", "-c", rules, "check-ignore", "--no-index", "-z", "--stdin"]
        files = [
            path.relative_to(ROOT).as_posix()
            for path in ROOT.rglob("*")
            if path.is_file() and path.relative_to(ROOT).parts[0] not in (".git", ".venv", ".venv-validate", "out")
        ]
        ignored = subprocess.run(command, cwd=ROOT, input="\0".join(files), capture_output=True, text=True)
        if ignored.returncode > 1:
            pytest.skip("no git, or no checkout")
        kept = {file for file in files if "__pycache__" not in file} - set(ignored.stdout.split("\0"))
        folders = {file.split("/")[0] for file in kept if "/" in file}
        assert not {"tests", "benchmarks", "docs", "training", ".github"} & folders
        assert {"nodes", "web", "workflows", "subgraphs", "locales", "models"} <= folders
        assert {"web/docs/StoryLoom_IPCA.md", "models/demo/demo.safetensors"} <= kept
        assert "models/demo/demo-training.csv" not in kept
        assert {file for file in kept if file.startswith("scripts/")} == {"scripts/convert_storymaker.py"}
        pages = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "web" / "docs").glob("*.md"))
        named = re.findall(r"\b(\w+/\w+\.py)\b", pages)
        assert set(named) <= kept, "scripts that the help pages name"
