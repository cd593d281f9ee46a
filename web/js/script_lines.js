// Keys that edit the lines of a text area, in a way that the browser's own undo includes.

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

export function selectLine(area, number) {
  const lines = area.value.split("\n");
  const start = lines.slice(0, number - 1).join("\n").length + (number > 1 ? 1 : 0);
  area.focus();
  area.setSelectionRange(start, start + (lines[number - 1] ?? "").length);
}

/** Handle a key event on a text area of frames. Returns whether it was a key that edits frames. */
export function edit(area, event) {
  if (!event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return false;
  if (event.key === "ArrowUp" || event.key === "ArrowDown") moveLines(area, event.key === "ArrowUp");
  else if (event.key === "Enter") addLine(area);
  else return false;
  event.preventDefault();
  event.stopPropagation();
  return true;
}
