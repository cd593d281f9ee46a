"""What an encode node tells the artist about a story: its tokens, and what every frame says and keeps quiet."""

from __future__ import annotations

from .script import Story
from .tokens import ROOM, StoryTokens, one_prompt_parts

EFFECTS = {
    "svr": "expressed by SVR, the others suppressed",
    "svr_eot": "expressed by SVR (end-of-text scaled), the others suppressed",
    "npr": "rows times 2, the others times 0.5",
    "none": "not reweighted: every frame is told the whole story",
}


def one_prompt_report(story: Story, tokens: StoryTokens, reweighting: str) -> str:
    """A report of a story encoded as one prompt, in plain text.

    tokens: its rows; reweighting: a key of EFFECTS.
    """
    parts = one_prompt_parts(story)
    used = tokens.eot - 1
    lines = [
        f"One prompt: {used} of {ROOM} tokens, {ROOM - used} free. Window: the whole story.",
        f"Every frame: {EFFECTS[reweighting]}.",
        f"Identity: {_rows(tokens.identity)}: {parts[0]}",
    ]
    numbers = range(1, len(story.frames) + 1)
    for number, rows, text in zip(numbers, tokens.frames, parts[1:], strict=True):
        others = ", ".join(str(other) for other in numbers if other != number) or "none"
        lines.append(f"Frame {number}: {_rows(rows)}: {text}")
        if reweighting != "none":
            lines.append(f"    expressed: {number}; suppressed: {others}")
    return "\n".join(lines)


def _rows(rows: range) -> str:
    count = f"{len(rows)} token{'s' if len(rows) != 1 else ''}"
    return f"{count} (row {rows.start})" if len(rows) == 1 else f"{count} (rows {rows.start}-{rows.stop - 1})"
