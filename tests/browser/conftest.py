"""ComfyUI's own interface in a real browser: one server with the pack, one browser and one page for all tests.

SCREENSHOTS=folder also saves a picture of every template and of the editor there, for people to look at. After a
failure there is one in out/browser/.
"""

import json
import os
import sys
from pathlib import Path

import pytest
from front_end import NAMES, FrontEnd, saved
from PIL import Image

from storyloom.scripts import browser as browser_script
from storyloom.scripts import comfyui

PACK = Path(__file__).resolve().parents[2]
COMFYUI = os.environ.get("COMFYUI_PATH")
SETTINGS = {"Comfy.TutorialCompleted": True, "Comfy.OnboardingCoachmarks.Seen": ["appMode", "firstRun"]}
"""Without the tours for newcomers, which cover the page."""
FAILURES = PACK / "out" / "browser"


def pytest_collection_modifyitems(items):
    missing = browser_script.missing() if COMFYUI else "no ComfyUI: set COMFYUI_PATH or run make test"
    for item in items:
        if missing and Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=f"NO BROWSER TESTS: {missing}; {browser_script.HOW_TO_PROVIDE}"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    report = yield
    if report.when == "call" and report.failed and "front_end" in getattr(item, "funcargs", ()):
        FAILURES.mkdir(parents=True, exist_ok=True)
        picture = FAILURES / f"{''.join(sign if sign.isalnum() else '_' for sign in item.name)}.png"
        item.funcargs["front_end"].page.screenshot(path=picture)
        report.sections.append(("screenshot", str(picture)))
    return report


def named_files():
    """What the templates ask for, as paths in ComfyUI's base folder."""
    for node in (node for name in NAMES for node in saved(name)["nodes"]):
        first = next(iter(node.get("widgets_values", ())), None)
        yield from (f"models/{model['directory']}/{model['name']}" for model in node["properties"].get("models", ()))
        if node["type"] == "LoadImage":
            yield f"input/{first}"
        if node["type"] == "StoryLoom_LoadCharacter":
            yield f"models/storyloom_characters/{first}"
        if node["type"] == "StoryLoom_LoadFaceAnalysis":
            yield f"models/insightface/models/{first}/det.onnx"


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """A real ComfyUI with its own interface. The model files that templates name are empty: they are only listed."""
    base = comfyui.pack_base(tmp_path_factory.mktemp("browser"), PACK)
    for path in {base / name for name in named_files()}:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (96, 96), "grey").save(path) if path.suffix == ".png" else path.touch()
    user = base / "user" / "default"
    user.mkdir()
    (user / "comfy.settings.json").write_text(json.dumps(SETTINGS), encoding="utf-8")
    with comfyui.Server(Path(COMFYUI), base, sys.executable, front=browser_script.front_end()) as running:
        yield running


@pytest.fixture(scope="session")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        program = browser_script.find_browser()
        running = playwright.chromium.launch(executable_path=program, args=list(browser_script.FLAGS))
        yield running
        running.close()


@pytest.fixture(scope="session")
def new_front_end(server, browser):
    """Opens ComfyUI's page. newcomer: as for someone without any setting; blocked: addresses that get no answer."""

    def new_front_end(newcomer=False, blocked=()):
        page = browser.new_page(viewport={"width": 1600, "height": 900})
        for pattern in blocked:
            page.route(pattern, lambda route: route.abort())
        if newcomer:
            page.route("**/api/settings", lambda route: route.fulfill(json={}))
        return FrontEnd(page, server)

    return new_front_end


@pytest.fixture(scope="session")
def shared_front_end(new_front_end):
    return new_front_end()


@pytest.fixture
def front_end(shared_front_end):
    """The page, with the classic nodes. No test leaves an error of JavaScript, or a warning because of the pack."""
    shared_front_end.renderer("classic")
    shared_front_end.faults.clear()
    yield shared_front_end
    assert not shared_front_end.faults and not shared_front_end.warnings()


@pytest.fixture(params=["classic", "new"])
def renderer(request, front_end):
    """The page with each of the two kinds of nodes."""
    front_end.renderer(request.param)
    return request.param
