"""Drives ComfyUI's page as an artist does: opens templates, types, presses Run, looks."""

import contextlib
import json
import os
from pathlib import Path

WORKFLOWS = Path(__file__).resolve().parents[2] / "workflows"
NAMES = sorted(path.stem for path in WORKFLOWS.glob("*.json"))
EMPTY = {"nodes": [], "links": [], "groups": [], "version": 0.4}
"""A workflow without anything."""
SECONDS = 90_000
"""Milliseconds that anything may take: a busy machine is slow."""
LISTEN = """() => {
  window.storyloomEvents = [];
  for (const kind of ["execution_success", "execution_error", "execution_interrupted"])
    app.api.addEventListener(kind, (event) => storyloomEvents.push({ kind, ...event.detail }));
}"""
READY = "() => window.app?.extensionManager?.setting && app.isGraphReady && !document.querySelector('#splash-loader')"
PICTURES = """(id) => {
  const node = app.graph.getNodeById(id);
  const shown = node.imgs ?? [];
  return shown.length && shown.every((one) => one.complete && one.naturalWidth > 0) ? shown.length : 0;
}"""


def saved(name):
    """A template as it lies in workflows/."""
    return json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))


class Desk:
    """ComfyUI's page. `faults`: errors of JavaScript that nothing caught."""

    def __init__(self, page, server):
        self.page, self.server, self.faults = page, server, []
        page.set_default_timeout(SECONDS)
        page.on("pageerror", lambda error: self.faults.append(str(error)))
        page.goto(server.url)
        page.wait_for_function(READY)
        page.evaluate(LISTEN)

    def renderer(self, kind):
        """Show the classic nodes or the new ones."""
        wanted = kind == "new"
        if self.page.evaluate("() => app.extensionManager.setting.get('Comfy.VueNodes.Enabled')") != wanted:
            self.page.evaluate("(on) => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', on)", wanted)

    def load(self, workflow):
        """Open a workflow, as when its file is dropped on the page."""
        self.page.evaluate("(workflow) => app.loadGraphData(workflow)", workflow)
        self._wait_for(workflow)

    def open_template(self, name):
        """Open a template from the list of templates."""
        self.page.get_by_role("button", name="Templates").click()
        self.choose_template(name)

    def choose_template(self, name):
        """Two clicks in the list of templates: the pack, and the template.

        Thumbnails that arrive late move the list, so that a click may miss: then once more.
        """
        from playwright.sync_api import TimeoutError  # what has no browser reads this file too

        self.page.get_by_role("dialog").get_by_text("storyloom", exact=True).click()
        for patience in (SECONDS // 4, SECONDS):
            self.page.get_by_test_id(f"template-workflow-{name}").click()
            with contextlib.suppress(TimeoutError if patience < SECONDS else ()):
                self.page.get_by_test_id("template-workflows-content").wait_for(state="hidden", timeout=patience)
                break
        self._wait_for(saved(name))

    def _wait_for(self, workflow):
        kinds = [node["type"] for node in workflow["nodes"]]
        self.page.wait_for_function(
            "(kinds) => app.graph.nodes.map((node) => node.type).sort().join() === kinds", arg=",".join(sorted(kinds))
        )

    def run(self):
        """Press Run and wait for the end. Returns the event that tells of it, None when the graph was refused."""
        self._stop()
        self.page.evaluate("() => { storyloomEvents.length = 0; app.extensionManager.lastNodeErrors = null; }")
        self.page.get_by_test_id("queue-button").click()
        ended = "() => storyloomEvents.length || app.extensionManager.lastNodeErrors"
        self.page.wait_for_function(ended, timeout=5 * SECONDS)
        return self.page.evaluate("() => storyloomEvents[0] ?? null")

    def _stop(self):
        """End what still runs: ComfyUI draws those pictures of a refused graph that it can."""
        self.page.evaluate("async () => { await app.api.clearItems('queue'); await app.api.interrupt(null); }")
        running = "async () => (await (await app.api.fetchApi('/queue')).json()).queue_running.length"
        while self.page.evaluate(running):
            self.page.wait_for_timeout(200)
        self.page.wait_for_timeout(100)

    def node(self, kind, title=None):
        """The number of the only node of this kind, or of the one with this title."""
        (number,) = self.page.evaluate(
            "([kind, title]) => app.graph.nodes"
            ".filter((node) => node.type === kind && (!title || node.title === title)).map((node) => node.id)",
            [kind, title],
        )
        return number

    def pictures(self, number):
        """Wait until a node shows its pictures, and return how many."""
        return self.page.wait_for_function(PICTURES, arg=number).json_value()

    def set(self, number, **values):
        """Set widgets of a node."""
        self.page.evaluate(
            "([id, values]) => { const node = app.graph.getNodeById(id);"
            " for (const [name, value] of Object.entries(values))"
            " node.widgets.find((widget) => widget.name === name).value = value; }",
            [number, values],
        )

    def values(self, number):
        """Widget name -> value of a node, of those that are saved."""
        return self.page.evaluate(
            "(id) => Object.fromEntries(app.graph.getNodeById(id).widgets"
            ".filter((widget) => widget.serialize !== false).map((widget) => [widget.name, widget.value]))",
            number,
        )

    def add(self, kind, **values):
        """Add a node at the left of the graph, as the menu does, and return its number."""
        number = self.page.evaluate(
            "(kind) => { const node = LiteGraph.createNode(kind); node.pos = [-1000, -700]; app.graph.add(node);"
            " return node.id; }",
            kind,
        )
        self.set(number, **values)
        return number

    def connect(self, source, output, target, name):
        self.page.evaluate(
            "([source, output, target, name]) => { const node = app.graph.getNodeById(target);"
            " app.graph.getNodeById(source)"
            ".connect(output, node, node.inputs.findIndex((input) => input.name === name)); }",
            [source, output, target, name],
        )

    def search(self, words):
        """Open the search for nodes with a double click on an empty place, and type. Returns what is found.

        On a busy machine two clicks may come too far apart: then once more.
        """
        from playwright.sync_api import TimeoutError  # what has no browser reads this file too

        for patience in (SECONDS // 20, SECONDS // 20, SECONDS // 20, SECONDS):
            self.page.mouse.click(400, 700)  # the keyboard is on the canvas, and this click is not the first of two
            self.page.wait_for_timeout(600)
            self.page.mouse.dblclick(700, 500)
            with contextlib.suppress(TimeoutError if patience < SECONDS else ()):
                self.page.wait_for_function("() => document.activeElement.tagName === 'INPUT'", timeout=patience)
                break
        self.page.keyboard.type(words)
        return self.page.get_by_role("option")

    def look_at(self, number, scale=1.2):
        """Bring a node to the middle of the view."""
        self.page.evaluate(
            "([id, scale]) => { const { pos } = app.graph.getNodeById(id); const { ds } = app.canvas; ds.scale = scale;"
            " ds.offset = [350 / scale - pos[0], 130 / scale - pos[1]]; app.canvas.setDirty(true, true); }",
            [number, scale],
        )
        self.page.wait_for_timeout(300)

    def look(self, name):
        """Save a picture of the page where SCREENSHOTS says."""
        folder = os.environ.get("SCREENSHOTS")
        if folder:
            self.page.wait_for_timeout(500)
            self.page.screenshot(path=Path(folder) / f"{name}.png")
