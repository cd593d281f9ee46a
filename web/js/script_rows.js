// The rows of the panel below a story script: one per frame, and a summary above them.

const [FAULT, WARNING] = ["✗", "⚠"];
export const STYLE = `
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

export function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function tokensOf(line, room) {
  if (line.used !== null) return `${line.used} of ${room}`;
  return line.own === null ? "" : `${line.own} own`;
}

export function showRow(line, room, select) {
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

/** What ComfyUI changes in these texts before every run, as in CLIP Text Encode. */
function replacedTexts(texts) {
  const choice = texts.some((text) => /(^|[^\\])\{/.test(text));
  const comment = texts.some((text) => /\/[/*]/.test(text));
  return [
    ...(choice ? ["Each run makes one choice from {a|b}; tokens are counted as typed"] : []),
    ...(comment ? ["Each run leaves out // and the rest of its line, and /* these comments */"] : []),
  ].map((text) => element("div", "replaced", text));
}

/**
 * The summary above the rows: errors in other boxes, frames with problems, and the tokens of all frames together.
 * linked: names of the boxes whose text comes through a link; dynamic: texts in which ComfyUI makes choices.
 */
export function sumRows(answer, linked, dynamic) {
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
    ...replacedTexts(dynamic),
    ...(linked.length ? [element("div", "", `Checked during the run: ${linked.join(", ")} (linked)`)] : []),
  ];
}
