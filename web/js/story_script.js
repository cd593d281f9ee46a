// The editor of the node "Story script": a panel below its boxes that shows, line by line, the results of the server's
// own parser and tokenizer, and keys that move and add frames. The boxes remain ComfyUI's; nothing here is saved.

import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";

const NODE = "StoryLoom_Script";
const BOXES = ["identity", "frames", "style"];
const PAUSE = 250; // milliseconds without a key press before a request is sent to the server
const NEW_SIZE = [420, 560];
const KEYS = "Alt+↑ and Alt+↓ move a frame, Alt+Enter adds one";
const [FAULT, WARNING] = ["✗", "⚠"];
const STYLE = `
.storyloom-check { box-sizing: border-box; position: relative; contain: size; min-height: 0; overflow: hidden auto; padding: 0 2px;
  border: 1px solid var(--border-color, #4e4e4e); border-radius: 4px; background: var(--comfy-input-bg, #222);
  color: var(--input-text, #ddd); font: 11px/1.4 sans-serif; }
.storyloom-check ol { list-style: none; margin: 0; padding: 0; }
.storyloom-check button { display: grid; grid-template-columns: 1.6em 4.5em 5.5em 1fr; gap: 0 6px; align-items: center;
  width: 100%; padding: 1px 4px; border: 0; border-radius: 3px; background: none; color: inherit; font: inherit;
  text-align: left; cursor: pointer; }
.storyloom-check button:hover { background: var(--comfy-menu-bg, #353535); }
.storyloom-check button:focus-visible { outline: 2px solid var(--p-primary-color, #4a9eff); outline-offset: -2px; }
.storyloom-check .number { text-align: right; opacity: 0.75; }
.storyloom-check .bar { height: 6px; border: 1px solid currentColor; border-radius: 3px; overflow: hidden; }
.storyloom-check .bar i { display: block; height: 100%; background: #3a8f5c; }
.storyloom-check .over .bar i { background: #c2410c; }
.storyloom-check .chip { display: inline-block; margin: 0 3px 1px 0; padding: 0 5px; border: 1px solid currentColor;
  border-radius: 8px; }
.storyloom-check .message { grid-column: 2 / -1; white-space: normal; }
.storyloom-check .message b { color: var(--error-text, #ff6666); }
.storyloom-check .sum { position: sticky; top: 0; padding: 2px 4px 1px; background: inherit; }
.storyloom-check .keys { padding: 1px 4px; opacity: 0.75; }
`;

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function widgetOf(node, name) {
  return node.widgets?.find((widget) => widget.name === name);
}

function isLinked(node, name) {
  return node.inputs?.some((input) => input.widget?.name === name && input.link != null);
}

/** The text area that edits a box: the widget's own, or the one that the new node renderer shows for it. */
function areaOf(node, name) {
  const widget = widgetOf(node, name);
  if (widget?.element?.isConnected) return widget.element;
  const areas = document.querySelectorAll(`[data-node-id="${node.id}"] textarea`);
  return [...areas].find((area) => area.labels?.[0]?.textContent.trim() === (widget?.label || name));
}

/** Replace a part of a text area in a way that its own undo includes, then select [from, to]. */
function replace(area, start, end, text, from, to) {
  area.focus();
  area.setSelectionRange(start, end);
  if (!document.execCommand("insertText", false, text)) {
    area.setRangeText(text, start, end, "end");
    area.dispatchEvent(new InputEvent("input", { bubbles: true }));
  }
  area.setSelectionRange(from, to);
}

/** Start of the first and end of the last line that a selection touches. */
function linesAt(text, start, end) {
  const stop = text.indexOf("\n", end);
  return [text.lastIndexOf("\n", start - 1) + 1, stop < 0 ? text.length : stop];
}

function moveLines(area, up) {
  const { value, selectionStart, selectionEnd } = area;
  const [start, end] = linesAt(value, selectionStart, selectionEnd);
  if (up ? start === 0 : end === value.length) return;
  const lines = value.slice(start, end);
  if (up) {
    const [before] = linesAt(value, start - 1, start - 1);
    const shift = before - start;
    const swapped = `${lines}\n${value.slice(before, start - 1)}`;
    replace(area, before, end, swapped, selectionStart + shift, selectionEnd + shift);
  } else {
    const [, after] = linesAt(value, end + 1, end + 1);
    const shift = after - end;
    const swapped = `${value.slice(end + 1, after)}\n${lines}`;
    replace(area, start, after, swapped, selectionStart + shift, selectionEnd + shift);
  }
}

function addLine(area) {
  const [, end] = linesAt(area.value, area.selectionStart, area.selectionEnd);
  replace(area, end, end, "\n", end + 1, end + 1);
}

function selectLine(area, number) {
  const lines = area.value.split("\n");
  const start = lines.slice(0, number - 1).join("\n").length + (number > 1 ? 1 : 0);
  area.focus();
  area.setSelectionRange(start, start + (lines[number - 1] ?? "").length);
}

/** Handle a key event on a text area of frames. Returns whether it was a key that edits frames. */
function edit(area, event) {
  if (!event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return false;
  if (event.key === "ArrowUp" || event.key === "ArrowDown") moveLines(area, event.key === "ArrowUp");
  else if (event.key === "Enter") addLine(area);
  else return false;
  event.preventDefault();
  event.stopPropagation();
  return true;
}

function tokensOf(line, room) {
  if (line.used !== null) return `${line.used} of ${room}`;
  return line.own === null ? "" : `${line.own} own`;
}

function showRow(line, room, select) {
  const row = element("button");
  row.type = "button";
  const tokens = tokensOf(line, room);
  const over = line.used > room;
  row.classList.toggle("over", over);
  const bar = element("span", "bar");
  bar.append(element("i"));
  bar.firstChild.style.width = `${Math.min(100, (100 * (line.used ?? 0)) / room)}%`;
  const cast = element("span");
  const names = line.characters.filter((name) => name);
  cast.append(...names.map((name) => element("span", "chip", name)));
  row.append(element("span", "number", line.number), bar, element("span", "tokens", tokens), cast);
  const problem = line.fault || line.warning;
  if (problem) {
    const message = element("span", "message");
    message.append(element("b", "", `${line.fault ? FAULT : WARNING} `), problem);
    row.append(message);
  }
  row.title = line.used === null ? line.caption : `${line.own} tokens of its own, ${line.used} with identity and style`;
  const about = [tokens && `${tokens} tokens`, names.join(", "), problem].filter((text) => text);
  row.setAttribute("aria-label", `Frame ${line.number}: ${about.join("; ")}`);
  row.addEventListener("click", () => select(line.line));
  const item = element("li");
  item.append(row);
  return item;
}

function totalText(total, room, alone) {
  const frames = `frame${total.frames.length > 1 ? "s" : ""} ${total.frames.join(", ")}`;
  const whose = alone ? "" : `${total.characters.join(" and ")}, ${frames}: `;
  if (total.prompts === 1) return `${whose}${total.tokens} of ${room} tokens together`;
  return `${whose}${total.tokens} tokens together, encoded in ${total.prompts} windows of ${room}`;
}

function problemText(sign, text) {
  const message = element("div", "message");
  message.append(element("b", "", `${sign} `), text);
  return message;
}

/** The summary above the rows: errors in other boxes, frames with problems, and the tokens of all frames together. */
function sumRows(answer, linked) {
  const numbers = (kind) => answer.lines.filter((line) => line[kind]).map((line) => line.number);
  const list = (frames) => `frame${frames.length > 1 ? "s" : ""} ${frames.join(", ")}`;
  const [faulty, doubtful] = [numbers("fault"), numbers("warning")];
  return [
    ...answer.faults.map(({ box, line, message }) =>
      problemText(FAULT, `${box}${line ? `, line ${line}` : ""}: ${message}`),
    ),
    ...(faulty.length ? [problemText(FAULT, `the story cannot run: see ${list(faulty)}`)] : []),
    ...(doubtful.length ? [problemText(WARNING, `see ${list(doubtful)}`)] : []),
    ...answer.totals.map((total) => element("div", "", totalText(total, answer.room, answer.totals.length === 1))),
    ...(linked.length ? [element("div", "", `Checked during the run: ${linked.join(", ")} (linked)`)] : []),
  ];
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
  root.append(sum, rows, element("div", "keys", KEYS));

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
    sum.replaceChildren(...sumRows(answer, BOXES.filter((name) => isLinked(node, name))));
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
    const texts = BOXES.map((name) => [name, isLinked(node, name) ? null : String(widgetOf(node, name)?.value ?? "")]);
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
  name: "StoryLoom.StoryScript",

  setup() {
    document.head.append(element("style", "", STYLE));
    document.addEventListener(
      "keydown",
      (event) => {
        if (!event.altKey || event.target?.tagName !== "TEXTAREA") return;
        const scripts = (app.canvas?.graph?.nodes ?? []).filter((node) => node.comfyClass === NODE);
        if (scripts.some((node) => areaOf(node, "frames") === event.target)) edit(event.target, event);
      },
      true,
    );
  },

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
    after(node, "onRemoved", panel.stop);
    node.setSize(NEW_SIZE.map((size, side) => Math.max(size, node.size[side])));
    panel.later();
  },
});
