"""The report of an encode node: the tokens of a story, and which frames are expressed and suppressed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .casts import casts_of
from .script import Story
from .tokens import ROOM, first_upper, in_tokens
from .windows import FramePrompt

EFFECTS = {
    "svr": "SVR expresses it and suppresses the other frames of its window",
    "svr_eot": "SVR (end-of-text scaled) expresses it and suppresses the other frames of its window",
    "npr": "its token rows are multiplied by 2, those of the other frames of its window by 0.5",
    "none": "it is not reweighted and uses the prompt of its whole window",
}
IDENTITY_ENHANCED = {name: ", and enhances the identity" for name in ("svr", "svr_eot")}


def one_prompt_report(
    story: Story, prompts: Sequence[FramePrompt], reweighting: str, enhance_identity: bool = False
) -> str:
    """The report of a story encoded as one prompt, as plain text.

    prompts: of all frames, from `frame_prompts`; reweighting: a key of EFFECTS; enhance_identity: as in SVRSettings.
    """
    identity = IDENTITY_ENHANCED.get(reweighting, "") if enhance_identity else ""
    lines = [f"Every frame: {EFFECTS[reweighting]}{identity}."]
    images = "1 image" if len(prompts) == 1 else f"{len(prompts)} images"
    own = {}
    for cast in casts_of(story):
        own |= zip(cast.frames, cast.words, strict=True)
        rows = _rows(prompts[cast.frames[0]].tokens.identity)
        lines.append(f"{first_upper(cast.name)} ({_frames(cast.frames)}): {rows}: {cast.identity}")
    for prompt in prompts:
        number = prompt.frame + 1
        if not prompt.characters:
            lines.append(f"Frame {number}: {in_tokens(prompt.used)}: {prompt.text}")
            lines.append("    no character: encoded alone, nothing suppressed")
            continue
        lines.append(f"Frame {number}: {_rows(prompt.tokens.frames[prompt.index])}: {own[prompt.frame]}")
        window = f"    window: {_frames(prompt.window)}; {prompt.used} of {ROOM} tokens, {ROOM - prompt.used} free"
        others = [frame for frame in prompt.window if frame != prompt.frame]
        effect = f"; expressed: {number}; suppressed: {_numbers(others) or 'none'}" if reweighting != "none" else ""
        lines.append(window + effect)
    lines.append(
        f"Latent batch: {images}, one per frame; sampling stops with another number. This is not checked for a "
        "conditioning that was saved and loaded, unless the model has a StoryLoom node."
    )
    return "\n".join(lines)


def _rows(rows: range) -> str:
    span = f"row {rows.start}" if len(rows) == 1 else f"rows {rows.start}-{rows.stop - 1}"
    return f"{in_tokens(len(rows))} ({span})"


def _frames(frames: Sequence[int]) -> str:
    return f"frame{'s' if len(frames) != 1 else ''} {_numbers(frames)}"


def _numbers(frames: Iterable[int]) -> str:
    return ", ".join(str(frame + 1) for frame in frames)
