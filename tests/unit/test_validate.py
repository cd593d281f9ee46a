"""The checks of ComfyUI's ecosystem: what is checked, how reports are read, and words that scanners refuse."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "scripts"
SHARED = ("browser", "comfyui", "environment", "storyloom_script_validate")


@pytest.fixture(scope="module")
def validate():
    """The script, with the scripts that it imports under their own names while the tests run."""
    before = {name: module for name, module in sys.modules.items() if name.partition(".")[0] in SHARED}
    for name in before:
        del sys.modules[name]
    sys.path.insert(0, str(SCRIPTS))
    try:
        spec = importlib.util.spec_from_file_location("storyloom_script_validate", SCRIPTS / "validate.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(SCRIPTS))
        for name in [name for name in sys.modules if name.partition(".")[0] in SHARED]:
            del sys.modules[name]
        sys.modules.update(before)


@pytest.fixture(scope="module")
def shipped(validate):
    if not (ROOT / ".git").exists():
        pytest.skip("no checkout")
    return validate.shipped_files()


def test_the_files_of_a_release_are_checked_and_no_others(shipped):
    folders = {file.split("/")[0] for file in shipped if "/" in file}
    assert {"nodes", "runtime", "web", "workflows", "subgraphs"} <= folders
    assert not {"tests", "benchmarks", "training", ".github"} & folders
    assert {"__init__.py", "pyproject.toml", "web/js/story_script.js"} <= set(shipped)


def test_shipped_code_has_no_word_that_scanners_take_for_the_execution_of_text(shipped):
    """comfy node validate and nodesafe search for these; the second also finds them inside longer names."""
    refused = re.compile(r"(eval|exec|compile)\(|bytes\.fromhex|subprocess\.|os\.system|importlib\.import_module")
    code = {file: (ROOT / file).read_text(encoding="utf-8") for file in shipped if file.endswith((".py", ".js"))}
    assert [(file, found[0]) for file, text in code.items() for found in refused.finditer(text)] == []


def test_shipped_python_prints_on_every_console(shipped):
    for file in shipped:
        if file.endswith(".py"):
            (ROOT / file).read_text(encoding="utf-8").encode("cp1252")


def test_every_tool_is_pinned_and_the_public_tests_run_them(validate):
    pins = [line for line in validate.PINS.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z-]+==\d+\.\d+\.\d+", pin) for pin in pins)
    tools = {pin.split("==")[0].removesuffix("-cli") for pin in pins}
    assert tools == {re.split(r"[ ,](?!test|guard)", name)[0] for name in validate.CHECKS}
    yaml = pytest.importorskip("yaml")
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text(encoding="utf-8"))
    assert "make validate" in [step.get("run") for step in workflow["jobs"]["validate"]["steps"]]


OUTPUTS = {
    (0, "Running security checks...\n✓ All validation checks passed successfully\n"): 0,
    (0, "Warning: Invalid requires-comfyui format: >=0.19\n✓ All validation checks passed successfully\n"): 1,
    (0, "Security warnings found:\nS307 Use of possibly insecure function\n"): 1,
    (1, "The node could not be read\n"): 1,
}


@pytest.mark.parametrize(("result", "faults"), OUTPUTS.items())
def test_warnings_of_the_registry_s_check_are_faults(validate, monkeypatch, tmp_path, result, faults):
    monkeypatch.setattr(validate, "_run", lambda *arguments, **options: result)
    assert len(validate.node_validate(validate.Place(tmp_path, tmp_path, tmp_path))) == faults


def test_reports_without_a_finding_pass_and_with_one_name_it(validate):
    safe = {"pack": "storyloom", "verdict": "SAFE", "note": ""}
    safe |= {kind: [] for kind in ("breaking", "soft", "unresolvable", "signature_drift", "unparseable")}
    assert validate.guard_findings({"packs": [safe]}) == []
    (line,) = validate.guard_findings({"packs": [safe | {"breaking": [{"symbol": "comfy.lora.load_lora"}]}]})
    assert "breaking" in line and "comfy.lora.load_lora" in line
    assert validate.guard_findings({"packs": [safe | {"verdict": "WARN"}]}) == ["storyloom: WARN "]

    finding = {"file": "js/a.js", "line": 3, "rule": "document-level-listener", "message": "on document"}
    passed = {"passed": True, "error": None, "details": None}
    assert validate.lint_findings({"results": {"syntax": passed, "javascript": passed | {"findings": []}}}) == []
    assert validate.lint_findings({"results": {"javascript": passed | {"findings": [finding]}}}) == [
        "js/a.js:3 document-level-listener: on document"
    ]
    failed = {"passed": False, "error": "Non-ASCII characters", "details": "pages/text.py"}
    assert validate.lint_findings({"results": {"syntax": failed}}) == ["Non-ASCII characters pages/text.py"]


def test_only_accepted_findings_in_code_pass(validate):
    finding = {"file": "nodes/page.py", "line": 1, "severity": "medium", "title": "text"}
    accepted = [
        finding | {"category": category, "file": file or "nodes/page.py"} for category, file in validate.ACCEPTED
    ]
    assert validate.code_findings({"findings": accepted}) == []
    pickles = finding | {"category": "unsafe_deserialization"}
    assert len(validate.code_findings({"findings": [*accepted, pickles]})) == 1


def test_a_tool_s_notices_before_its_report_are_skipped(validate):
    assert validate._parsed('A newer version is available.\n{"findings": []}') == {"findings": []}
    with pytest.raises(validate.SetupError, match="printed no report: killed"):
        validate._parsed("killed")


def test_a_host_is_copied_without_what_is_not_python(validate, tmp_path):
    (tmp_path / "models").mkdir()
    assert validate._no_python(str(tmp_path), ["models", "sd.py", "config.json"]) == ["config.json"]


def test_files_are_copied_with_their_folders(validate, tmp_path):
    assert validate.copied(["pyproject.toml", "nodes/page.py"], tmp_path) == tmp_path
    assert (tmp_path / "nodes" / "page.py").read_bytes() == (ROOT / "nodes" / "page.py").read_bytes()


def test_git_s_reason_is_shown(validate, tmp_path):
    with pytest.raises(validate.SetupError, match="git rev-parse failed in"):
        validate._git("rev-parse", "--verify", "no-such-name", folder=tmp_path)
