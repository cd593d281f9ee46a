"""Runs the checks of ComfyUI's ecosystem on the files of a release: `make validate`.

comfy node validate   the registry's check of pyproject.toml and of dangerous calls
comfy-import-guard    names and calls of ComfyUI that the nodes use, in the ComfyUI that `make test` finds first
comfy-test lint       scripts that could disturb other packs on the page, and characters that Windows cannot print
nodesafe              the shipped code, and every template and blueprint

The tools have an environment of their own, `.venv-validate`, because their requirements conflict with ComfyUI's. They
send no usage statistics and get an empty home folder. Needs git, and a network for the installation.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import environment
from comfyui import ComfyUIError, find_comfyui, scratch, version_text
from environment import ROOT, SetupError, say

PINS = ROOT / "scripts" / "requirements-validate.txt"
VENV = ROOT / ".venv-validate"
TOOLS = VENV / ("Scripts" if environment.WINDOWS else "bin")
STAMP = VENV / ".storyloom-complete"
HOME = ("HOME", "USERPROFILE", "APPDATA", "LOCALAPPDATA", "XDG_CONFIG_HOME", "XDG_CACHE_HOME")
"""Variables that name the home folder and those inside it."""
QUIET = {"DO_NOT_TRACK": "1", "COMFY_NO_TELEMETRY": "1", "PYTHONIOENCODING": "utf-8"}

ACCEPTED = {
    ("code_obfuscation_high_entropy", ""): "English sentences; it takes any long text for encoded data",
    ("dynamic_attribute_access", ""): "getattr with the names of fields, which are listed in the same file",
    ("unsafe_deserialization", "models/files.py"): "the class of an error; the file never unpickles by itself",
}
"""Findings of nodesafe that are none: (category, file or "" for every file) -> why."""


@dataclass(frozen=True)
class Place:
    """pack: the files of a release; host: a ComfyUI; scratch: an empty folder."""

    pack: Path
    host: Path
    scratch: Path


def shipped_files() -> list[str]:
    """Files of the checkout that a release contains: known to git or new, and not in .comfyignore."""
    known = _git("ls-files", "-z", "--cached", "--others", "--exclude-standard")
    ignored = _git("ls-files", "-z", "--cached", "--others", "--ignored", "--exclude-from=.comfyignore")
    return sorted(name for name in set(known) - set(ignored) if (ROOT / name).is_file())


def node_validate(place: Place) -> list[str]:
    """Faults found by `comfy node validate`. Its warnings count: the registry drops what it warns about."""
    code, output = _run("comfy", "--skip-prompt", "node", "validate", place=place, folder=place.pack)
    if code or "All validation checks passed" not in output:
        return [output]
    return [line for line in output.splitlines() if "warning" in line.lower() or "error" in line.lower()]


def import_guard(place: Place) -> list[str]:
    """Names, calls and replaced functions that this ComfyUI does not have, or has with other parameters."""
    clone = place.scratch / "clones" / "ComfyUI"
    for part in ("comfy", "comfy_api", "comfy_execution", "comfy_extras"):
        shutil.copytree(place.host / part, clone / part, ignore=_no_python)
    for file in place.host.glob("*.py"):
        shutil.copyfile(file, clone / file.name)
    author = ("-c", "user.name=StoryLoom", "-c", "user.email=storyloom@localhost", "-c", "commit.gpgsign=false")
    for command in (("init", "--quiet"), ("add", "--all"), (*author, "commit", "--quiet", "--message", "ComfyUI")):
        _git(*command, folder=clone)
    options = ("--cache-dir", str(clone.parent), "--offline", "--json", "--quiet")
    target = ("--comfy-dir", str(place.pack.parent.parent), "--target", "HEAD", "--strict")
    code, output = _run("comfy-import-guard", *options, "check", *target, place=place)
    return guard_findings(_parsed(output)) or ([] if code == 0 else [output])


def guard_findings(report: Mapping[str, Any]) -> list[str]:
    """What comfy-import-guard's JSON report does not call safe."""
    kinds = ("breaking", "soft", "unresolvable", "signature_drift", "unparseable")
    packs = report.get("packs", ())
    found = [f"{kind}: {json.dumps(each)}" for pack in packs for kind in kinds for each in pack[kind]]
    return found or [f"{pack['pack']}: {pack['verdict']} {pack['note']}" for pack in packs if pack["verdict"] != "SAFE"]


def lint(place: Place) -> list[str]:
    """Errors and warnings of `comfy-test lint`."""
    code, output = _run("comfy-test", "lint", "--strict", "--json", str(place.pack), place=place)
    return lint_findings(_parsed(output)) or ([] if code == 0 else [output])


def lint_findings(report: Mapping[str, Any]) -> list[str]:
    """Findings in comfy-test's JSON report."""
    found = []
    for result in report.get("results", {}).values():
        listed = result.get("findings", ())
        found += [f"{each['file']}:{each['line']} {each['rule']}: {each['message']}" for each in listed]
        if not result["passed"] and not listed:
            found.append(f"{result['error']} {result['details']}")
    return found


def safe_code(place: Place) -> list[str]:
    """Findings of nodesafe in the shipped code, without those in ACCEPTED."""
    return code_findings(_scan("scan", place.pack, place))


def code_findings(report: Mapping[str, Any]) -> list[str]:
    """Findings in nodesafe's JSON report that are not in ACCEPTED."""
    return [
        f"{each['file']}:{each['line']} {each['severity']} {each['category']}: {each['title']}"
        for each in report["findings"]
        if not {(each["category"], ""), (each["category"], each["file"])} & ACCEPTED.keys()
    ]


def safe_workflows(place: Place) -> list[str]:
    """Findings of nodesafe in templates, their API form and blueprints."""
    files = [file for folder in ("workflows", "subgraphs") for file in sorted((place.pack / folder).rglob("*.json"))]
    reports = ((file, _scan("scan-workflow", file, place)) for file in files)
    return [
        f"{file.relative_to(place.pack)}: {each['title']}" for file, report in reports for each in report["findings"]
    ]


CHECKS: Mapping[str, Callable[[Place], list[str]]] = {
    "comfy node validate": node_validate,
    "comfy-import-guard": import_guard,
    "comfy-test lint": lint,
    "nodesafe, code": safe_code,
    "nodesafe, workflows": safe_workflows,
}


def install() -> None:
    """Bring the tools' environment up to date. Raises SetupError with a sentence on what to do."""
    environment.require_python(sys.version_info)
    wanted = f"{sys.executable}\n{PINS.read_text(encoding='utf-8')}"
    if STAMP.exists() and STAMP.read_text(encoding="utf-8") == wanted:
        return
    say("Installing the checks into .venv-validate (400 MB, up to a minute)")
    shutil.rmtree(VENV, ignore_errors=True)
    for command in (
        (sys.executable, "-m", "venv", VENV),
        (TOOLS / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r", PINS),
    ):
        done = environment.run(command)
        if done.returncode:
            raise SetupError(environment.pip_failure(done.stdout))
    STAMP.write_text(wanted, encoding="utf-8")


def copied(files: Iterable[str], target: Path) -> Path:
    """Copy files of the checkout to a folder, and return it."""
    for name in files:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, target / name)
    return target


def _scan(command: str, target: Path, place: Place) -> Mapping[str, Any]:
    _, output = _run("nodesafe", command, str(target), "--format", "json", "--fail-on", "none", place=place)
    return _parsed(output)


def _parsed(output: str) -> Mapping[str, Any]:
    """The JSON object in a tool's output, after any notices. Raises SetupError without one."""
    try:
        return json.loads(output[output.index("{") :])
    except ValueError:
        raise SetupError(f"A check printed no report: {environment.last_line(output)}") from None


def _run(tool: str, *arguments: str, place: Place, folder: Path | None = None) -> tuple[int, str]:
    """Exit code and output of a tool, run with an empty home folder."""
    home = dict.fromkeys(HOME, str(place.scratch))
    done = subprocess.run(
        (str(TOOLS / tool), *arguments),
        cwd=folder or place.scratch,
        env={**os.environ, **home, **QUIET},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
    )
    return done.returncode, done.stdout


def _git(*arguments: str, folder: Path = ROOT) -> list[str]:
    done = environment.run(("git", *arguments), folder)
    if done.returncode:
        raise SetupError(f"git {arguments[0]} failed in {folder}: {environment.last_line(done.stdout)}")
    return [name for name in done.stdout.split("\0") if name]


def _no_python(folder: str, names: list[str]) -> list[str]:
    """Files in a folder that are not Python source."""
    return [name for name in names if not name.endswith(".py") and not Path(folder, name).is_dir()]


def main() -> int:
    install()
    host, failed = find_comfyui(), 0
    with scratch("validate") as folder:
        pack = copied(shipped_files(), folder / "ComfyUI" / "custom_nodes" / "storyloom")
        say(f"Checking the files of a release, with ComfyUI {version_text(host)}")
        for name, check in CHECKS.items():
            (folder / name).mkdir()
            found = check(Place(pack, host, folder / name))
            say(f"{'FAILED' if found else 'passed'}  {name}")
            for line in found:
                say(f"        {line}")
            failed += bool(found)
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (SetupError, ComfyUIError, KeyboardInterrupt) as reason:
        environment.exit_with(reason)
