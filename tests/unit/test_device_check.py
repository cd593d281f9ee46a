"""scripts/device_check.sh, with a Python that only records its arguments."""

import os
import subprocess
import tarfile
from pathlib import Path

import pytest

import storyloom

ROOT = Path(storyloom.__file__).parent
SCRIPT = ROOT / "scripts" / "device_check.sh"
pytestmark = pytest.mark.skipif(os.name == "nt", reason="a shell script")


@pytest.fixture
def comfyui(tmp_path):
    folder = tmp_path / "ComfyUI"
    folder.mkdir()
    (folder / "main.py").touch()
    return folder


@pytest.fixture
def check(tmp_path):
    """Runs the script; the Python fails if its arguments contain `fails`. Returns (exit code, recorded calls)."""

    def check(*arguments, fails="nothing"):
        python, calls = tmp_path / "python", tmp_path / "calls"
        python.write_text(
            f'#!/bin/sh\necho "${{STORYLOOM_DEVICE:-cpu}} $COMFYUI_PATH $*" >> {calls}\n'
            f'case "$*" in *{fails}*) exit 3;; esac\n'
        )
        python.chmod(0o755)
        environment = {**os.environ, "PYTHON": str(python)}
        environment.pop("STORYLOOM_DEVICE", None)
        command = ["bash", str(SCRIPT), *map(str, arguments)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        return done.returncode, calls.read_text() if calls.exists() else ""

    return check


def test_all_stages_run_on_the_card(check, comfyui, tmp_path):
    code, calls = check("--comfyui", comfyui, "--out", tmp_path / "out", "--minutes", "6")
    assert code == 0
    assert "pytest -m gpu tests/host/test_on_a_card.py" in calls
    assert f"benchmarks/gpu.py --comfyui {comfyui} --json {tmp_path}/out/gpu.json --minutes 6" in calls
    assert f"cuda {comfyui} benchmarks" in calls and "--tiny" not in calls
    summary = (tmp_path / "out" / "summary.txt").read_text()
    assert [line.partition(":")[0] for line in summary.splitlines()][-3:] == ["machine", "tests", "benchmark"]


def test_the_benchmark_runs_though_tests_fail_and_the_end_says_so(check, comfyui, tmp_path):
    code, calls = check("--comfyui", comfyui, "--out", tmp_path / "out", "--tiny", fails="pytest")
    assert code == 1
    assert "benchmarks/gpu.py" in calls and "--tiny" in calls and f"cuda {comfyui}" not in calls
    assert "tests: exit code 3" in (tmp_path / "out" / "summary.txt").read_text()


def test_comfyui_may_be_an_archive_and_wheels_bring_nothing_along(check, comfyui, tmp_path):
    archive, wheels = tmp_path / "host.tar.gz", tmp_path / "wheels"
    with tarfile.open(archive, "w:gz") as file:
        file.add(comfyui, "ComfyUI-0.33")
    wheels.mkdir()
    (wheels / "av-19-none.whl").touch()
    code, calls = check("--comfyui", archive, "--out", tmp_path / "out", "--wheels", wheels)
    assert code == 0
    (install,) = [line for line in calls.splitlines() if "pip install" in line]
    assert "--no-index --no-deps" in install and install.endswith("av-19-none.whl")
    assert "/comfyui --json" in calls


def test_a_comfyui_that_is_not_there_is_reported_at_once(check, tmp_path):
    assert check("--comfyui", tmp_path / "none", "--out", tmp_path / "out") == (1, "")


def test_what_a_device_needs_never_brings_another_torch():
    lines = (ROOT / "scripts" / "requirements-device.txt").read_text().splitlines()
    names = {line.partition("=")[0].partition(">")[0] for line in lines if line and not line.startswith("#")}
    assert names == {"av", "comfy-aimdo", "comfy-kitchen", "torchsde", "trampoline"}
