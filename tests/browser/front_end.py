"""Drives ComfyUI's page as an artist does: opens templates, types, presses Run, looks."""

import json
import os
from pathlib import Path

WORKFLOWS = Path(__file__).resolve().parents[2] / "workflows"
NAMES = sorted(path.stem for path in WORKFLOWS.glob("*.json"))
EMPTY = {"nodes": [], "links": [], "groups": [], "version": 0.4}
"""A workflow without anything."""
PAGE = """() => [...document.querySelectorAll("[data-testid=linear-center-panel] img")].some(
  (one) => one.src.includes("filename=page_") && one.complete && one.naturalWidth > 0)"""
"""App mode shows a page that was drawn."""
SECONDS = 90_000
"""Milliseconds that anything may take: a busy machine is slow."""
ENDS = ("execution_success", "execution_error", "execution_interrupted")
"""Events that end a run."""
WARNED = """(() => {
  const warn = console.warn;
  window.storyloomWarnings = [];
  Error.stackTraceLimit = 50;
  console.warn = (...texts) => {
    if (new Error().stack.includes("/extensions/storyloom/")) storyloomWarnings.push(String(texts[0]));
    warn.apply(console, texts);
  };
})()"""
"""Keeps the warnings of ComfyUI that a file of the pack causes."""
LISTEN = """(kinds) => {
  LiteGraph.alwaysRepeatWarnings = true;
  window.storyloomEvents = [];
  for (const kind of kinds)
    app.api.addEventListener(kind, (event) => storyloomEvents.push({ kind, ...event.detail }));
  window.storyloomGraphs = 0;
  const load = app.loadGraphData;
  app.loadGraphData = async (...values) => {
    const loaded = await load.apply(app, values);
    storyloomGraphs++;
    return loaded;
  };
}"""
APP_MODE = """async (on) => {
  const { activeMode, initialMode } = app.extensionManager.workflow.activeWorkflow;
  if (((activeMode ?? initialMode) === "app") !== on) await app.extensionManager.command.execute("Comfy.ToggleLinear");
}"""
EVENT = """([id, kinds]) => storyloomEvents.find(({ kind, prompt_id }) => prompt_id === id && kinds.includes(kind))"""
DRAWN = """() => (!app.canvas.canvas.checkVisibility() || !(app.canvas.dirty_canvas || app.canvas.dirty_bgcanvas))
  && new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done(true))))"""
"""Nothing is left to draw on the canvas, if it is shown, and what follows it had two frames to come after it."""
LOOKS_WHOLE = """() => document.fonts.status === "loaded" && [...document.images].every(
  (one) => one.complete || !one.checkVisibility() || one.loading === "lazy")"""
THUMBNAILS = """() => [...document.querySelectorAll("[data-testid=template-workflows-content] img")].every(
  (one) => one.complete)"""
FREE = """(places) => places.every(([x, y]) => document.elementFromPoint(x, y) === app.canvas.canvas)"""
READY = "() => window.app?.extensionManager?.setting && app.isGraphReady && !document.querySelector('#splash-loader')"
PICTURES = """(id) => {
  const node = app.graph.getNodeById(id);
  const shown = node.imgs ?? [];
  return shown.length && shown.every((one) => one.complete && one.naturalWidth > 0) ? shown.length : 0;
}"""


def saved(name):
    """A template as it lies in workflows/."""
    return json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))


class FrontEnd:
    """ComfyUI's page. `faults`: errors of JavaScript that nothing caught."""

    def __init__(self, page, server):
        self.page, self.server, self.faults = page, server, []
        page.set_default_timeout(SECONDS)
        page.on("pageerror", lambda error: self.faults.append(str(error)))
        page.add_init_script(WARNED)
        page.goto(server.url)
        page.wait_for_function(READY)
        page.evaluate(LISTEN, ["execution_start", *ENDS])

    def warnings(self):
        """The warnings that files of the pack have caused since the last call, for example of a deprecated property."""
        return self.page.evaluate("() => storyloomWarnings.splice(0)")

    def renderer(self, kind):
        """Show the classic nodes or the new ones."""
        wanted = kind == "new"
        if self.page.evaluate("() => app.extensionManager.setting.get('Comfy.VueNodes.Enabled')") != wanted:
            self.page.evaluate("(on) => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', on)", wanted)

    def load(self, workflow):
        """Open a workflow, as when its file is dropped on the page, and show its graph."""
        self.page.evaluate("(workflow) => app.loadGraphData(workflow)", workflow)
        self._wait_for(workflow)
        self.app_mode(False)

    @property
    def run_button(self):
        """The button Run of app mode."""
        return self.page.get_by_test_id("linear-run-button").get_by_role("button", name="Run")

    def app_mode(self, on):
        """Show the open workflow in app mode, or its graph, as the command of the menu does."""
        self.page.evaluate(APP_MODE, on)
        self.page.get_by_test_id("linear-widgets").wait_for(state="visible" if on else "hidden")

    def open_template(self, name):
        """Open a template from the list of templates, and show its graph."""
        self._open(name)
        self.app_mode(False)

    def open_app(self, name):
        """Open a template from the list of templates, and wait until it is shown in app mode."""
        self._open(name)
        self.page.get_by_test_id("linear-widgets").wait_for()

    def _open(self, name):
        self.app_mode(False)
        self.page.get_by_role("button", name="Templates").click()
        self.choose_template(name)

    def choose_template(self, name):
        """Two clicks in the list of templates: the pack, and the template, when thumbnails no longer move the list."""
        before = self.page.evaluate("() => storyloomGraphs")
        self.page.get_by_role("dialog").get_by_text("storyloom", exact=True).click()
        template = self.page.get_by_test_id(f"template-workflow-{name}")
        template.scroll_into_view_if_needed()
        self.page.wait_for_function(THUMBNAILS)
        template.click()
        self.page.get_by_test_id("template-workflows-content").wait_for(state="hidden")
        self.page.wait_for_function("(before) => storyloomGraphs > before", arg=before)
        self._wait_for(saved(name))

    def _wait_for(self, workflow):
        kinds = [node["type"] for node in workflow["nodes"]]
        self.page.wait_for_function(
            "(kinds) => app.graph.nodes.map((node) => node.type).sort().join() === kinds", arg=",".join(sorted(kinds))
        )

    def run(self, button=None):
        """Press Run and wait for the end. Returns the event of the end, None if the graph was refused.

        button: by default that of the graph.
        """
        with self.page.expect_response(_answers_run) as response:
            (button or self.page.get_by_test_id("queue-button")).click()
        answer = response.value.json()
        if "prompt_id" in answer and not answer["node_errors"]:
            return self._event(answer["prompt_id"], ENDS)
        if "prompt_id" in answer:
            self._stop(answer["prompt_id"])
        if answer["node_errors"]:
            self.page.wait_for_function("() => app.extensionManager.lastNodeErrors")
        return None

    def _event(self, prompt, kinds):
        """Wait for an event of one of these kinds from this run, and return it."""
        return self.page.wait_for_function(EVENT, arg=[prompt, kinds], timeout=5 * SECONDS).json_value()

    def _stop(self, prompt):
        """End a run: ComfyUI draws those pictures of a refused graph that it can. Nothing stands before it."""
        self._event(prompt, ("execution_start",))
        self.page.evaluate("(prompt) => app.api.interrupt(prompt)", prompt)
        self._event(prompt, ENDS)

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

        Two clicks are a double click however far apart they come on a busy machine.
        """
        away, here = (400, 700), (700, 500)
        self.page.wait_for_function(FREE, arg=[away, here])
        usual = self.page.evaluate("() => app.canvas.pointer.constructor.doubleClickTime")
        self._double_click_time(60 * SECONDS)
        self.page.mouse.click(*away)  # the keyboard is on the canvas
        self.page.mouse.dblclick(*here)
        self.page.wait_for_function("() => document.activeElement.tagName === 'INPUT'")
        self._double_click_time(usual)
        self.page.keyboard.type(words)
        return self.page.get_by_role("option")

    def _double_click_time(self, milliseconds):
        self.page.evaluate("(time) => { app.canvas.pointer.constructor.doubleClickTime = time; }", milliseconds)

    def look_at(self, number, scale=1.2):
        """Bring a node to the middle of the view."""
        self.page.evaluate(
            "([id, scale]) => { const { pos } = app.graph.getNodeById(id); const { ds } = app.canvas; ds.scale = scale;"
            " ds.offset = [350 / scale - pos[0], 130 / scale - pos[1]]; app.canvas.setDirty(true, true); }",
            [number, scale],
        )
        self.page.wait_for_function(DRAWN)

    def look(self, name):
        """Save a picture of the page where SCREENSHOTS says."""
        folder = os.environ.get("SCREENSHOTS")
        if folder:
            self.page.wait_for_function(LOOKS_WHOLE)
            self.page.wait_for_function(DRAWN)
            self.page.screenshot(path=Path(folder) / f"{name}.png", animations="disabled")


def _answers_run(response):
    return response.request.method == "POST" and response.url.endswith("/api/prompt")
