"""Runs all tests, those that need ComfyUI once on each version found: `make test`. Extra arguments go to pytest.

`tests/standalone` runs on the pack's own host, which the environment always contains; `tests/browser` runs on the
newest ComfyUI if there is a browser, some of it also with a newer front end. With `browser` as the first argument, only
these run, all of them with both front ends, and what they need is installed. $SETTING selects one of the processor
settings in settings.py.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import browser
import comfyui
import environment
import settings

ROOT = Path(__file__).absolute().parent.parent
TESTS = ROOT / "tests"
HOST_TESTS = TESTS / "host"
MATRIX = HOST_TESTS / "test_matrix.py"
"""A separate pass on the newest ComfyUI, so that the passes take about equally long."""
NEWEST_ONLY = tuple(
    HOST_TESTS / f"test_{name}.py" for name in ("consistory", "standalone_fidelity", "gpu_benchmark", "cost")
)
"""Comparisons of the pack's other hosts with ComfyUI, and counts of operations: they run on the newest version only."""
STANDALONE_TESTS = TESTS / "standalone"
BROWSER_TESTS = TESTS / "browser"
ON_BOTH = tuple(
    f"{BROWSER_TESTS}/test_{name}"
    for name in ("script_editor.py", "dynamic_prompts.py", "templates.py::test_an_app_draws_the_page_of_what_is_typed")
)
"""What `make test` runs on the newer front end too: the pack's own JavaScript, and an app."""
APART = (HOST_TESTS, STANDALONE_TESTS, BROWSER_TESTS)
"""Test folders with separate passes."""
NOTHING_COLLECTED = 5
# The tests' models are tiny and several passes run at once: more threads only wait for each other.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Pass:
    """One run of pytest."""

    name: str
    arguments: tuple[str, ...]
    seconds: int = 0
    """Approximate duration on one free core; the longest passes start first."""
    comfyui: Path | None = None
    patient: bool = False
    """Whether the pass runs at a lower priority, so that the longest passes are not delayed."""
    variables: tuple[tuple[str, str], ...] = ()
    """Environment variables of the pass."""
    newer_too: bool = False
    """Whether the same tests also run on a newer ComfyUI, which runs the whole matrix."""


@dataclass(frozen=True)
class Result:
    """The counts of a pass. `failed` includes errors; `problem` is the reason why the pass failed as a whole."""

    name: str
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    problem: str = ""

    @property
    def ran(self) -> int:
        return self.passed + self.failed


def read_counts(name: str, report: Path) -> Result:
    """Count the test cases of a JUnit report. A test that fails and errors counts as one failure.

    Raises OSError or ElementTree.ParseError if the report is missing or incomplete.
    """
    outcomes: dict[tuple[str, str], str] = {}
    rank = ("passed", "skipped", "failed")
    for case in ElementTree.parse(report).iter("testcase"):
        key = (case.get("classname", ""), case.get("name", ""))
        tags = {child.tag for child in case}
        outcome = "failed" if tags & {"failure", "error"} else "skipped" if "skipped" in tags else "passed"
        outcomes[key] = max(outcomes.get(key, "passed"), outcome, key=rank.index)
    counts = list(outcomes.values())
    return Result(name, counts.count("passed"), counts.count("failed"), counts.count("skipped"))


def judge(result: Result, code: int, selected: bool) -> Result:
    """Add the reason if a pass failed as a whole. selected: the user selected tests, so a pass may have none to run."""
    if result.ran == 0 and code in (0, NOTHING_COLLECTED) and not selected:
        return replace(result, problem="no test ran")
    if code not in (0, NOTHING_COLLECTED) and result.failed == 0:
        return replace(result, problem=f"pytest ended with code {code}")
    return result


def run_pass(
    one: Pass, folder: Path, extra: Sequence[str], capture: bool, setting: settings.Setting | None = None
) -> tuple[Result, str]:
    """Run pytest for a pass in a setting. Returns its result and, with `capture`, its output."""
    slug = one.name.replace(" ", "-")
    report = folder / f"{slug}.xml"
    command = [str(environment.PYTHON), str(environment.PYTHON.with_name("pytest")), *one.arguments]
    command += [f"--junitxml={report}", f"--basetemp={folder / slug}", "-o", f"cache_dir={ROOT}/.pytest_cache/{slug}"]
    variables = {**ONE_THREAD, **settings.environment_in(setting, os.environ), **dict(one.variables)}
    if one.comfyui:
        variables["COMFYUI_PATH"] = str(one.comfyui)
        variables["STORYLOOM_NEWER_COMFYUI_TOO"] = str(int(one.newer_too))
    if one.patient and shutil.which("nice"):
        command = ["nice", "-n", "5", *command]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True} if capture else {}
    began = time.monotonic()
    done = subprocess.run([*command, *extra], cwd=ROOT, env=variables, stdin=subprocess.DEVNULL, **streams)
    try:
        result = judge(read_counts(one.name, report), done.returncode, selected=bool(extra))
    except (OSError, ElementTree.ParseError):
        result = Result(one.name, problem=f"pytest ended with code {done.returncode} and without a report")
        if done.returncode == NOTHING_COLLECTED and extra:
            result = Result(one.name)
    return replace(result, seconds=time.monotonic() - began), done.stdout or ""


def run_passes(
    passes: Sequence[Pass], folder: Path, extra: Sequence[str], setting: settings.Setting | None = None
) -> list[Result]:
    """Run the passes, several at once, and print the output of each when it is done.

    With more than one core, two more passes than cores run at once, because some wait for servers and a browser.
    """
    at_once = min(len(passes), (os.cpu_count() or 1) + 2)
    if len(passes) < 2 or os.cpu_count() == 1:
        return [_run_and_show(one, folder, extra, False, setting) for one in passes]
    names = ", ".join(one.name for one in passes)
    environment.say(f"\nRunning {at_once} passes at a time; each prints its output when it is done: {names}.")
    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(lambda one: _run_and_show(one, folder, extra, True, setting), passes))


def _run_and_show(
    one: Pass, folder: Path, extra: Sequence[str], capture: bool, setting: settings.Setting | None
) -> Result:
    title = f"\n==== {one.name} ===="
    if not capture:
        environment.say(title)
    result, output = run_pass(one, folder, extra, capture, setting)
    if capture:
        environment.say(f"{title}\n{output.rstrip()}")
    return result


def plain_passes() -> list[Pass]:
    """The passes that need no ComfyUI. The standalone host has a separate pass, which must not be empty."""
    if not TESTS.is_dir():
        return []
    return [
        Pass("no host", (str(TESTS), *(f"--ignore={folder}" for folder in APART)), 110, patient=True),
        *([Pass("standalone", (str(STANDALONE_TESTS),), 80, patient=True)] if STANDALONE_TESTS.is_dir() else []),
    ]


def host_passes(hosts: Sequence[Path]) -> list[Pass]:
    """The passes of the host tests, for each ComfyUI."""
    if not HOST_TESTS.is_dir():
        return []
    versions = [comfyui.version_text(host) for host in hosts]
    names = [
        f"ComfyUI {version}" + (f" #{number}" if versions.count(version) > 1 else "")
        for number, version in enumerate(versions, 1)
    ]
    newest = max(map(comfyui.read_version, hosts), default=None)
    passes = []
    for name, host in zip(names, hosts, strict=True):
        older = comfyui.read_version(host) < newest
        apart = [f"--ignore={file}" for file in (NEWEST_ONLY if older else (MATRIX,)) if file.is_file()]
        passes.append(Pass(name, (str(HOST_TESTS), *apart), 300, host, newer_too=older))
        passes += [Pass(f"{name} matrix", (str(MATRIX),), 100, host)] if apart and not older else []
    return passes


def browser_pass(hosts: Sequence[Path], whole: bool = False) -> tuple[list[Pass], str]:
    """The passes of the browser tests on the newest ComfyUI, or the reason why they cannot run.

    The second pass is on a newer front end, if it can be installed: the tests in `ON_BOTH`, or all of them (whole).
    """
    reason = environment.last_line(environment.run([environment.PYTHON, environment.SCRIPTS / "browser.py"]).stdout)
    if not hosts:
        reason = "no ComfyUI was found"
    if reason != browser.READY:
        return [], f"NO BROWSER TESTS: all of them are skipped ({reason}; {browser.HOW_TO_PROVIDE})"
    newest = max(hosts, key=comfyui.read_version)
    passes = [Pass("browser", (str(BROWSER_TESTS),), 240, newest, patient=True)]
    try:
        front_end = environment.newer_front_end(comfyui.storyloom_cache() / "front-end")
    except environment.SetupError as error:
        return passes, f"NO TESTS ON THE NEWER FRONT END {browser.NEWER}: it could not be installed ({error})"
    tests = (str(BROWSER_TESTS),) if whole else ON_BOTH
    variables = ((browser.FRONT_END, str(front_end)),)
    name = f"browser, front end {browser.NEWER}"
    return [*passes, Pass(name, tests, 240 if whole else 100, newest, patient=True, variables=variables)], ""


def summary(plain: Sequence[Result], host: Sequence[Result]) -> list[str]:
    """The table, the number of host tests run, and the totals as the last line."""
    results = [*plain, *host]
    width = max([len(result.name) for result in results] + [4])
    lines = [f"{'pass':<{width}}  passed  failed  skipped  seconds"]
    for one in results:
        row = f"{one.name:<{width}}  {one.passed:>6}  {one.failed:>6}  {one.skipped:>7}  {one.seconds:>7.1f}"
        lines.append(f"{row}  {one.problem}".rstrip())
    lines.append(f"host tests run: {sum(one.ran for one in host)}")
    totals = (sum(getattr(one, kind) for one in results) for kind in ("passed", "failed", "skipped"))
    return [*lines, "{} passed, {} failed, {} skipped".format(*totals)]


def available_hosts() -> tuple[list[Path], str]:
    """Every ComfyUI, and a message if there is none."""
    try:
        return comfyui.find_all_comfyui(), ""
    except comfyui.NoComfyUIError as error:
        help_text = comfyui.how_to_provide()
        return [], f"NO COMFYUI WAS FOUND: all host tests are skipped (cloning it failed: {error.reason}; {help_text})"


def main(extra: Sequence[str], name: str = "") -> int:
    """Run all tests, or only the browser tests, in the named setting. Returns the exit code."""
    setting, about = settings.chosen(name)
    environment.ensure()
    alone = extra[:1] == ["browser"]
    if alone:
        environment.add_browser()
        extra = extra[1:]
    hosts, no_host = available_hosts()
    browsers, no_browser = browser_pass(hosts, whole=alone)
    plain_ones, host_ones = ([], []) if alone else (plain_passes(), host_passes(hosts))
    plain_ones += browsers
    passes = sorted([*host_ones, *plain_ones], key=lambda one: one.seconds, reverse=True)
    if about:
        environment.say(f"\n{about}")
    with comfyui.scratch("test") as folder, settings.busy(setting.busy if setting else 0):
        results = dict(zip(passes, run_passes(passes, folder, extra, setting), strict=True))
    host, plain = ([results[one] for one in ones] for ones in (host_ones, plain_ones))
    missing = [about, no_host, no_browser] if results else [about, no_host, no_browser, f"No test was run: {TESTS}."]
    print("\n" + "\n".join([*filter(None, missing), *summary(plain, host)]), flush=True)
    return 1 if not results or any(one.failed or one.problem for one in results.values()) else 0


if __name__ == "__main__":
    try:
        environment.require_python(sys.version_info)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the child processes too
        sys.exit(main(sys.argv[1:], os.environ.get("SETTING", "")))
    except (environment.SetupError, comfyui.ComfyUIError, settings.UnknownSettingError, KeyboardInterrupt) as reason:
        environment.exit_with(reason)
