"""Creates the development environment `.venv`: the requirements of both hosts, test tools and the pack itself.

Runs with any Python from 3.10 and needs no other package. `ensure()` returns at once if nothing has changed since the
last complete run, and continues or repairs an interrupted one.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import browser

ROOT = Path(__file__).absolute().parent.parent
SCRIPTS = ROOT / "scripts"
VENV = ROOT / ".venv"
WINDOWS = os.name == "nt"
PYTHON = VENV / ("Scripts/python.exe" if WINDOWS else "bin/python")
STAMP = VENV / ".storyloom-complete"
UNFINISHED = VENV / ".storyloom-unfinished"
INPUTS = (
    "pyproject.toml",
    "scripts/browser.py",
    "scripts/constraints.txt",
    "scripts/environment.py",
    "scripts/requirements-host.txt",
    "scripts/torchvision_shim.py",
)
MINIMUM = (3, 10)
DISK_NEEDED = 4 * 1024**3
EXTRAS = ("dev", "standalone")
"""Extras of pyproject.toml that are always installed."""
OPTIONAL = ("faces", "browser")
"""Extras that are installed where possible; tests that need a missing one are skipped.

"browser" is installed only if there is a browser, or by `make browser-test`.
"""
CHECKED_IMPORTS = (
    "torch, torchvision, torchaudio, transformers, aiohttp, av, diffusers, open_clip, tqdm, "
    "pytest, hypothesis, storyloom"
)


class SetupError(Exception):
    """The environment cannot be set up; the message is one sentence for the user."""


def ensure() -> Path:
    """Bring `.venv` up to date and return its Python. Raises SetupError with a sentence on what to do."""
    require_python(sys.version_info)
    if STAMP.exists() and PYTHON.exists() and STAMP.read_text() == fingerprint():
        return PYTHON
    was_unfinished = UNFINISHED.exists()
    create_venv()
    STAMP.unlink(missing_ok=True)
    UNFINISHED.touch()
    try:
        install()
    except SetupError:
        if not was_unfinished:
            raise
        say("The last installation was interrupted: starting over with a new .venv")
        shutil.rmtree(VENV, ignore_errors=True)
        create_venv()
        UNFINISHED.touch()
        install()
    STAMP.write_text(fingerprint())
    UNFINISHED.unlink(missing_ok=True)
    return PYTHON


def enter() -> None:
    """Restart the running script inside `.venv`; returns at once if it already runs there."""
    python = ensure()
    if Path(sys.prefix).resolve() == VENV.resolve():
        return
    command = [str(python), *sys.argv]
    sys.stdout.flush()
    if WINDOWS:
        sys.exit(subprocess.call(command))
    os.execv(command[0], command)


def require_python(version) -> None:
    """Raise SetupError if the version (major, minor, ...) is too old."""
    if tuple(version[:2]) < MINIMUM:
        present, needed = (".".join(map(str, parts)) for parts in (version[:3], MINIMUM))
        raise SetupError(
            f"StoryLoom needs Python {needed} or newer, and {sys.executable} is {present}: "
            "install a newer one or name it with 'make PYTHON=/path/to/python3'."
        )


def fingerprint() -> str:
    """Hash of everything that determines the contents of the environment, and of its path."""
    digest = hashlib.sha256(str(ROOT).encode())
    for name in INPUTS:
        digest.update((ROOT / name).read_bytes())
    digest.update(" ".join(optional_extras()).encode())
    return digest.hexdigest()


def optional_extras() -> list[str]:
    """The optional extras to install on this machine."""
    return [extra for extra in OPTIONAL if extra != "browser" or browser.system_browser()]


def add_browser() -> None:
    """Install whatever the browser tests need and the environment lacks. Raises SetupError with the reason."""
    if import_problem("playwright, comfyui_frontend_package"):
        say(f"Installing {', '.join(requirements('browser'))} (60 MB, up to a minute)")
        pip("-c", str(SCRIPTS / "constraints.txt"), *requirements("browser"))
    if not lacks_chromium():
        return
    say("Downloading a Chromium for Playwright (150 MB)")
    run([PYTHON, "-m", "playwright", "install", "chromium"])
    if not lacks_chromium():
        return
    apt = shutil.which("apt-get")
    if apt and os.geteuid() == 0:
        say("That failed: installing the system's package chromium instead (100 MB)")
        run([apt, "update"])
        run([apt, "install", "--yes", "--no-install-recommends", "chromium"])
    if lacks_chromium():
        raise SetupError(
            "No Chromium was found, and Playwright could not download one: install your system's Chromium package "
            "(on Debian 'apt-get install chromium') or set $CHROMIUM to its path, and try again."
        )


def newer_front_end(folder: Path) -> Path:
    """Install the newer browser interface below `folder`, once, and return its static folder. Raises SetupError."""
    static = folder / browser.NEWER / browser.PACKAGE / "static"
    if not (static / "index.html").exists():
        requirement = f"{browser.PACKAGE}=={browser.NEWER}"
        say(f"Installing {requirement} beside the one in .venv (30 MB, up to a minute)")
        unfinished = folder / f"{browser.NEWER}.{os.getpid()}"
        pip("--no-deps", "--target", str(unfinished), requirement)
        shutil.rmtree(folder / browser.NEWER, ignore_errors=True)
        unfinished.rename(folder / browser.NEWER)
    return static


def lacks_chromium() -> bool:
    """Whether the environment's Python finds no Chromium."""
    return last_line(run([PYTHON, SCRIPTS / "browser.py"]).stdout).startswith("no Chromium")


def create_venv() -> None:
    """Create `.venv`, unless there is a working one with a new enough Python."""
    if VENV.exists() and venv_version() is not None:
        require_venv_python()
        return
    free = shutil.disk_usage(ROOT).free
    if free < DISK_NEEDED:
        raise SetupError(
            f"The environment needs about 2.5 GB, and up to {DISK_NEEDED / 1e9:.0f} GB while it installs, but only "
            f"{free / 1e9:.1f} GB are free at {ROOT}: free some space and try again."
        )
    if VENV.exists() and not (VENV / "pyvenv.cfg").exists() and any(VENV.iterdir()):
        raise SetupError(f"{VENV} exists but is not a Python environment: move it and try again.")
    say("Creating the environment .venv (a few seconds)")
    shutil.rmtree(VENV, ignore_errors=True)
    done = run([sys.executable, "-m", "venv", str(VENV)])
    if done.returncode:
        raise SetupError(
            f"Python's venv module could not create {VENV}: {last_line(done.stdout)} "
            "(on Debian and Ubuntu, install the package python3-venv)."
        )


def venv_version() -> list[int] | None:
    """The version of `.venv`'s Python, or None if it does not run or has no pip."""
    if not PYTHON.exists():
        return None
    done = run([PYTHON, "-c", "import sys, pip; print(*sys.version_info[:3])"])
    return [int(part) for part in done.stdout.split()] if done.returncode == 0 else None


def require_venv_python() -> None:
    """Raise SetupError if `.venv` has a Python that is too old."""
    version = venv_version()
    if version is None or tuple(version[:2]) < MINIMUM:
        raise SetupError(f"{VENV} holds a Python older than 3.10: remove it with 'make clean' and try again.")


def install() -> None:
    """Run pip, install the shim if torchvision needs it, and check the imports."""
    fresh = not any((VENV / path).exists() for path in site_paths("torch"))
    say(
        "Installing torch, diffusers, InsightFace, ComfyUI's requirements and the test tools (2.5 GB, 1 to 5 minutes)"
        if fresh
        else "Checking torch, diffusers, ComfyUI's requirements and the test tools (up to a minute)"
    )
    constraints = ["-c", str(SCRIPTS / "constraints.txt")]
    extras = [requirement for extra in EXTRAS for requirement in requirements(extra)]
    pip(*constraints, "-r", str(SCRIPTS / "requirements-host.txt"), *extras)
    for extra in optional_extras():
        try:
            pip(*constraints, *requirements(extra))
        except SetupError as reason:
            say(f"NOT INSTALLED: {', '.join(requirements(extra))} ({reason})")
    say("Installing StoryLoom into the environment (a few seconds)")
    pip("--no-build-isolation", "--no-deps", "-e", str(ROOT))
    say("Checking that everything imports (a few seconds)")
    install_shim_if_needed()
    set_audio_library_aside_if_needed()
    problem = import_problem(CHECKED_IMPORTS)
    if problem:
        raise SetupError(f"The environment is damaged ({problem}): remove it with 'make clean' and try again.")


def requirements(extra: str) -> list[str]:
    """The requirements of an extra in pyproject.toml (parsed here, because Python 3.10 has no TOML parser)."""
    for line in (ROOT / "pyproject.toml").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{extra} = ["):
            return [item.strip().strip("\"'") for item in line.split("[", 1)[1].rstrip("] ").split(",")]
    raise SetupError(f"pyproject.toml has no line '{extra} = [...]' with the requirements of that extra.")


def pip(*arguments: str) -> None:
    """Run `pip install` quietly. On failure, prints the tail of pip's output and raises SetupError with the reason."""
    command = [PYTHON, "-m", "pip", "install", "--no-input", "--disable-pip-version-check", "--no-warn-script-location"]
    done = run([*command, *arguments])
    if done.returncode:
        print("\n".join(done.stdout.strip().splitlines()[-15:]), file=sys.stderr)
        raise SetupError(pip_failure(done.stdout))


def pip_failure(output: str) -> str:
    """Summarise pip's output in one sentence for the user."""
    if "No space left on device" in output:
        return "pip failed because the disk is full: free about 4 GB and try again."
    if any(sign in output for sign in ("NewConnectionError", "Temporary failure in name resolution", "timed out")):
        return "pip could not reach the package index: check the network (or pip's configuration) and try again."
    if "No matching distribution found" in output:
        return f"pip found no matching package: {last_line(output)}"
    return f"pip failed: {last_line(output)}"


def install_shim_if_needed() -> None:
    """Copy torchvision_shim.py into site-packages if torchvision cannot be imported without it."""
    site = VENV / site_paths("")[0]
    module, hook = site / "storyloom_torchvision_shim.py", site / "storyloom_torchvision_shim.pth"
    source = SCRIPTS / "torchvision_shim.py"
    if hook.exists() and module.exists() and module.read_bytes() == source.read_bytes():
        return
    hook.unlink(missing_ok=True)
    if "torchvision::nms" not in (import_problem("torchvision") or ""):
        return
    shutil.copyfile(source, module)
    hook.write_text("import storyloom_torchvision_shim\n")


def set_audio_library_aside_if_needed() -> None:
    """Rename torchaudio's compiled part if it needs CUDA libraries; torchaudio can then be imported without it.

    ComfyUI imports torchaudio at startup. The nodes that this project runs use only its pure Python part.
    """
    if "Could not load this library" not in (import_problem("torchaudio") or ""):
        return
    for library in (VENV / site_paths("torchaudio")[0] / "lib").glob("*.so"):
        library.replace(library.with_name(library.name + ".unused"))


def site_paths(name: str) -> list[Path]:
    """Possible paths of a module in site-packages, relative to `.venv`."""
    folders = [Path("Lib")] if WINDOWS else sorted(path.relative_to(VENV) for path in VENV.glob("lib/python3.*"))
    return [folder / "site-packages" / name for folder in folders]


def import_problem(names: str) -> str | None:
    """Import modules in `.venv`, outside the checkout. Returns the last line of the error, or None on success."""
    done = run([PYTHON, "-c", f"import {names}"], cwd=VENV)
    return last_line(done.stdout) if done.returncode else None


def run(command, cwd=ROOT) -> subprocess.CompletedProcess:
    """Run a command without input; stdout of the result holds both output streams."""
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )


def last_line(text: str) -> str:
    """The last line of a program's output, without pip's notices."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("[notice]")]
    return lines[-1] if lines else "no output"


def say(text: str) -> None:
    """Print a line at once."""
    print(text, flush=True)


def exit_with(error: BaseException) -> None:
    """Print the error and exit with code 1 (130 for Ctrl-C)."""
    if isinstance(error, KeyboardInterrupt):
        print("\nStopped.", file=sys.stderr)
        sys.exit(130)
    print(f"\n{error}", file=sys.stderr)
    sys.exit(1)


if __name__ == "__main__":
    try:
        ensure()
    except (SetupError, KeyboardInterrupt) as reason:
        exit_with(reason)
    say(f"The environment is ready: {PYTHON}")
