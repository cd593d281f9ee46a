// The editor of the node "Story script": a panel below its boxes that shows, line by line, the results of the server's
// own parser and tokenizer, and keys that move and add frames. The boxes remain ComfyUI's; nothing here is saved.

import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";
import { edit, selectLine } from "./script_lines.js";
import { STYLE, element, showRow, sumRows } from "./script_rows.js";

const NODE = "StoryLoom_Script";
const BOXES = ["identity", "frames", "style"];
const DYNAMIC = ["identity", "frames"]; // boxes in which ComfyUI makes choices, by their schema
const PAUSE = 250; // milliseconds without a key press before a request is sent to the server
const NEW_SIZE = [420, 560];
const KEYS = "Alt+↑ and Alt+↓ move a frame, Alt+Enter adds one";

function widgetOf(node, name) {
  return node.widgets?.find((widget) => widget.name === name);
}

function textOf(node, name) {
  return String(widgetOf(node, name)?.value ?? "");
}

function isLinked(node, name) {
  const slot = node.inputs?.findIndex((input) => input.widget?.name === name) ?? -1;
  return slot >= 0 && node.isInputConnected(slot);
}

/** The text area that edits a box: the widget's own, or the one that the new node renderer shows for it. */
function areaOf(node, name) {
  const widget = widgetOf(node, name);
  if (widget?.element?.isConnected) return widget.element;
  const areas = document.querySelectorAll(`[data-node-id="${node.id}"] textarea`);
  return [...areas].find((area) => area.labels?.[0]?.textContent.trim() === (widget?.label || name));
}

/** Replace the panel left by the node's predecessor: the new node renderer keeps it when ComfyUI undoes an edit. */
function takePlace(node, root) {
  if (root.isConnected || node.graph !== app.canvas?.graph) return;
  document.querySelector(`[data-node-id="${node.id}"] .storyloom-check`)?.replaceWith(root);
}

/** The panel with the server's results for one node's texts. */
function panelOf(node) {
  const root = element("div", "storyloom-check");
  root.setAttribute("role", "group");
  root.setAttribute("aria-label", "Tokens per line of the story");
  root.dataset.captureWheel = "true";
  const rows = element("ol");
  const sum = element("div", "sum");
  sum.setAttribute("aria-live", "polite");
  root.append(element("style", "", STYLE), sum, rows, element("div", "keys", KEYS));

  let timer;
  let latest = 0; // number of the last request: answers to earlier ones are dropped
  const select = (number) => {
    const area = areaOf(node, "frames");
    if (area) selectLine(area, number);
  };
  rows.addEventListener("keydown", (event) => {
    const place = [...rows.querySelectorAll("button")].indexOf(event.target);
    const area = areaOf(node, "frames");
    if (place < 0 || !area || !event.altKey) return;
    select(measured.lines[place].line);
    edit(area, event);
  });

  let measured = { lines: [] };
  const show = (answer) => {
    measured = answer;
    rows.replaceChildren(...answer.lines.map((line) => showRow(line, answer.room, select)));
    const linked = BOXES.filter((name) => isLinked(node, name));
    const dynamic = DYNAMIC.filter((name) => !linked.includes(name)).map((name) => textOf(node, name));
    sum.replaceChildren(...sumRows(answer, linked, dynamic));
    const area = areaOf(node, "frames");
    if (area && area === document.activeElement) {
      const line = area.value.slice(0, area.selectionStart).split("\n").length;
      bringIntoView(root, sum, rows.children[answer.lines.findIndex((one) => one.line === line)]);
    }
  };
  const showError = (text) => sum.replaceChildren(element("div", "", text));

  const check = async () => {
    takePlace(node, root);
    const request = ++latest;
    const texts = BOXES.map((name) => [name, isLinked(node, name) ? null : textOf(node, name)]);
    let answer;
    try {
      const response = await api.fetchApi("/storyloom/script", {
        method: "POST",
        headers: { "Content-Type": "application/json" },
        body: JSON.stringify(Object.fromEntries(texts)),
      });
      answer = await response.json();
    } catch {
      answer = { error: "No answer from the server: lines are not checked." };
    }
    if (request !== latest) return;
    if (answer.error) showError(answer.error);
    else show(answer);
  };
  const later = () => {
    clearTimeout(timer);
    timer = setTimeout(check, PAUSE);
  };
  return { root, later, stop: () => clearTimeout(timer) };
}

/** Scroll only this panel until a row is visible below the sticky summary at its top. */
function bringIntoView(root, top, row) {
  if (!row) return;
  const [highest, lowest] = [row.offsetTop - top.offsetHeight, row.offsetTop + row.offsetHeight - root.clientHeight];
  root.scrollTop = Math.min(highest, Math.max(root.scrollTop, lowest));
}

/** Edit frames by keys. The classic nodes show the box's own text area, the new ones another in the panel's node. */
function listen(node, root) {
  const press = (event) => {
    if (event.target === areaOf(node, "frames")) edit(event.target, event);
  };
  widgetOf(node, "frames")?.element?.addEventListener("keydown", press, true);
  const found = () => root.closest("[data-node-id]")?.addEventListener("keydown", press, true);
  const shown = new ResizeObserver(found); // the panel gets a size whenever a node shows it
  shown.observe(root);
  return () => shown.disconnect();
}

/** Call `added` after a method of an object. */
function after(object, name, added) {
  const former = object[name];
  object[name] = function (...values) {
    const result = former?.apply(this, values);
    added();
    return result;
  };
}

app.registerExtension({
  name: "storyloom.StoryScript",

  nodeCreated(node) {
    if (node.comfyClass !== NODE) return;
    const panel = panelOf(node);
    const widget = node.addDOMWidget("check", "storyloom_check", panel.root, { serialize: false, getMinHeight: () => 0 });
    widget.serialize = false;
    for (const name of BOXES) {
      const box = widgetOf(node, name);
      if (box) after(box, "callback", panel.later);
    }
    for (const event of ["onConfigure", "onConnectionsChange"]) after(node, event, panel.later);
    const deafen = listen(node, panel.root);
    after(node, "onRemoved", () => {
      panel.stop();
      deafen();
    });
    node.setSize(NEW_SIZE.map((size, side) => Math.max(size, node.size[side])));
    panel.later();
  },
});
