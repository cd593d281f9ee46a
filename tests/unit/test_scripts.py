"""The parts of scripts/ that need neither network nor ComfyUI, and the packaging."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "scripts"


def load(name):
    """A script as a module, under its own name as far as the scripts import each other."""
    alias = name if name in ("environment", "comfyui") else f"storyloom_script_{name}"
    spec = importlib.util.spec_from_file_location(alias, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[alias] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def scripts():
    names = ("environment", "comfyui", "demo", "test")
    before = {name: module for name, module in sys.modules.items() if name in names}
    loaded = {name: load(name) for name in names}
    yield loaded
    for name in ("environment", "comfyui", "storyloom_script_demo", "storyloom_script_test"):
        sys.modules.pop(name, None)
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
    """An empty home folder, no COMFYUI_PATH, and a checkout that lies in no ComfyUI."""
    monkeypatch.setattr(comfyui, "ROOT", tmp_path / "checkout")
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
    monkeypatch.setattr(comfyui, "run_limited", lambda command, seconds: reason)


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
        monkeypatch.setattr(comfyui, "ROOT", around / "custom_nodes" / "storyloom")
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

        monkeypatch.setattr(comfyui, "run_limited", clone)
        assert comfyui.find_comfyui() == home / ".cache/storyloom/comfyui/0.33.0"
        assert not list((home / ".cache/storyloom/tmp").iterdir())

    def test_commands_are_limited_in_time(self, comfyui):
        assert comfyui.run_limited([sys.executable, "-c", "import time; time.sleep(30)"], 0.2).startswith("no answer")
        assert comfyui.run_limited(["no-such-program-here"], 1) == "no-such-program-here is not installed"
        assert comfyui.run_limited([sys.executable, "-c", "print('why'); raise SystemExit(3)"], 20) == "why"
        assert comfyui.run_limited([sys.executable, "-c", ""], 20) is None


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
        assert "no outputs" in comfyui.describe_refusal(
            {"error": {"message": "Prompt has no outputs"}, "node_errors": []}
        )
        assert "plain" in comfyui.describe_refusal({"error": "plain", "node_errors": {}})

    def test_a_failed_workflow_is_one_sentence(self, comfyui):
        data = {"node_id": "3", "node_type": "KSampler", "exception_message": "The batch\n  does not fit.\n"}
        messages = [["execution_start", {}], ["execution_error", data]]
        sentence = "The workflow failed at node 3 (KSampler): The batch does not fit."
        assert comfyui.describe_failure(messages) == sentence
        assert "no reason" in comfyui.describe_failure([])


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

    def test_without_comfyui_there_is_one_loud_line(self, runner, comfyui, home, monkeypatch):
        refuse_to_clone(monkeypatch, comfyui)
        hosts, sentence = runner.available_hosts()
        assert hosts == [] and sentence.startswith("NO COMFYUI WAS FOUND: all host tests are skipped")
        assert "COMFYUI_PATH" in sentence and "\n" not in sentence


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

    def test_the_demo_refuses_what_is_no_api_workflow(self, scripts, tmp_path):
        demo = scripts["demo"]
        (tmp_path / "ui.json").write_text('{"nodes": [], "links": []}')
        with pytest.raises(demo.DemoError, match="API format"):
            demo.read_workflow(tmp_path / "ui.json")
        with pytest.raises(demo.DemoError, match="does not exist"):
            demo.read_workflow(tmp_path / "missing.json")


class TestPackaging:
    @pytest.fixture
    def project(self):
        tomllib = pytest.importorskip("tomllib")
        return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

    def test_every_package_folder_is_listed(self, project):
        folders = {f"storyloom.{path.parent.name}" for path in ROOT.glob("*/__init__.py")} - {"storyloom.tests"}
        assert set(project["tool"]["setuptools"]["packages"]) == folders | {"storyloom"}

    def test_requirements_txt_matches_the_project(self, project):
        assert (ROOT / "requirements.txt").read_text().split() == project["project"]["dependencies"]

    def test_test_tools_are_those_of_the_dev_extra(self, project, environment):
        assert environment.dev_tools() == project["project"]["optional-dependencies"]["dev"]

    def test_every_dependency_is_part_of_the_environment(self, project):
        listed = (SCRIPTS / "requirements-host.txt").read_text().splitlines()
        names = {re.split(r"[<>=~]", line)[0] for line in listed}
        assert set(project["project"]["dependencies"]) <= names
