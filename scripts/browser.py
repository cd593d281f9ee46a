"""Locates what the browser tests need: Chromium, Playwright, ComfyUI's browser interface. Standard library only."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking")
READY = "ready"
PACKAGE = "comfyui_frontend_package"
NEWER = "1.58.1"
"""Version of the package that the browser tests also run on, beside the one in the environment."""
FRONT_END = "STORYLOOM_FRONT_END"
"""Environment variable that names the folder of another version of ComfyUI's browser interface."""
HOW_TO_PROVIDE = "run 'make browser-test', which installs what is missing, or set $CHROMIUM to the path of a Chromium"


def system_browser() -> str | None:
    """The Chromium or Chrome named by $CHROMIUM, else the first one on the path."""
    named = os.environ.get("CHROMIUM")
    return shutil.which(named) if named else next(filter(None, map(shutil.which, NAMES)), None)


def front_end() -> Path:
    """The folder of ComfyUI's browser interface: $FRONT_END, else the one in the running environment."""
    named = os.environ.get(FRONT_END)
    if named:
        return Path(named)
    return Path(importlib.util.find_spec(PACKAGE).origin).parent / "static"


def find_browser() -> str | None:
    """The system's browser, else the one that Playwright has installed in the running environment."""
    system = system_browser()
    if system or not importlib.util.find_spec("playwright"):
        return system
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        own = playwright.chromium.executable_path
    return own if Path(own).exists() else None


def missing() -> str:
    """Why the browser tests cannot run in the running environment; "" if they can."""
    for module, what in (("playwright", "Playwright"), (PACKAGE, "ComfyUI's browser interface")):
        if not importlib.util.find_spec(module):
            return f"{what} is not installed"
    return "" if find_browser() else "no Chromium was found"


if __name__ == "__main__":
    print(missing() or READY)
