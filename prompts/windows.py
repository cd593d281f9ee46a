"""Windows: which frames share a prompt when a story is too long for one.

One-Prompt-One-Story (arXiv 2501.13554) encodes long stories in windows of frames after the same identity. Here, each
cast of a story has its own windows; a frame without a character has a prompt of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Literal, get_args

from .casts import Cast, casts_of
from .script import Story
from .tokens import ROOM, StoryTokens, Tokenize, count_tokens, count_words, locate_frame, locate_story

WindowKind = Literal["circular", "trailing"]
WINDOW_KINDS: tuple[WindowKind, ...] = get_args(WindowKind)


@dataclass(frozen=True)
class FramePrompt:
    """The prompt of one frame, which may contain other frames of its cast.

    frame         number of the frame in the story, from 0
    characters    names of the characters in it
    window        numbers of the frames in the prompt, in its order
    text          the prompt
    alone         the same identity with this frame only
    used          number of tokens in the text
    tokens        token rows of the text; `tokens.frames`: those of the window, or the words of a frame without a
                  character
    descriptions  token rows that describe the characters, empty without any
    """

    frame: int
    characters: tuple[str, ...]
    window: tuple[int, ...]
    text: str
    alone: str
    used: int
    tokens: StoryTokens
    descriptions: tuple[range, ...]

    @property
    def index(self) -> int:
        """Index of the frame in its window."""
        return self.window.index(self.frame)


def frame_prompts(tokenize: Tokenize, story: Story, kind: WindowKind, *, weights: bool = True) -> list[FramePrompt]:
    """The prompt of every frame, in story order.

    weights: whether the tokenizer parses "(words:1.2)". Raises StoryTooLongError if an identity and a single frame do
    not fit into one prompt, ValueError as `casts_of` and `locate_story` do.
    """
    tokenize = cache(tokenize)
    prompts = [prompt for cast in casts_of(story) for prompt in _cast_prompts(tokenize, story, cast, kind, weights)]
    without = (number for number, frame in enumerate(story.frames) if not frame.characters)
    prompts += [_single_prompt(tokenize, story, number, weights) for number in without]
    return sorted(prompts, key=lambda prompt: prompt.frame)


def choose_windows(identity: int, frames: Sequence[int], kind: WindowKind) -> list[tuple[int, ...]]:
    """The window of every frame: the frames in its prompt, in the prompt's order.

    identity, frames: token counts, of one cast. If all fit into one prompt, every window contains all frames in story
    order. Otherwise its size is the number of first frames that fit, and it is

    circular  the frame and those after it, wrapping around at the end: the published code
    trailing  the first frames together; for later frames, the frame and those before it: appendix D.2

    The published code counts words between spaces, so the end of a window may be cut off, also when later frames are
    longer than the first, and it fails if not even one frame fits. Here tokens are counted, and a window that is too
    long drops the frames farthest from its own; a frame that does not fit alone keeps a window of its own, which
    `locate_story` rejects. The code's limit of 10 frames, a setting, is omitted.
    """
    count = len(frames)

    def fitting(order: Sequence[int]) -> tuple[int, ...]:
        ends = accumulate((frames[place] for place in order), initial=identity)
        return tuple(order[: max(1, sum(end <= ROOM for end in ends) - 1)])

    first = fitting(range(count))
    size = len(first)
    if size == count:
        return [first] * count
    if kind == "circular":
        return [fitting([(start + step) % count for step in range(size)]) for start in range(count)]
    later = (fitting(range(last, last - size, -1))[::-1] for last in range(size, count))
    return [first] * size + list(later)


def _cast_prompts(
    tokenize: Tokenize, story: Story, cast: Cast, kind: WindowKind, weights: bool
) -> Iterator[FramePrompt]:
    texts = [cast.identity, *cast.words]
    names = [cast.name, *(f"frame {frame + 1}" for frame in cast.frames)]
    identity, *frames = count_tokens(tokenize, texts, names, weights=weights)
    windows = choose_windows(identity, frames, kind)
    located = {}
    for window in dict.fromkeys(windows):
        chosen = [0, *(1 + place for place in window)]
        parts = [texts[i] for i in chosen]
        tokens, _ = locate_story(tokenize, parts, [names[i] for i in chosen], weights=weights)
        located[window] = (" ".join(parts), tokens)
    for frame, words, window in zip(cast.frames, cast.words, windows, strict=True):
        text, tokens = located[window]
        yield FramePrompt(
            frame=frame,
            characters=story.frames[frame].characters,
            window=tuple(cast.frames[place] for place in window),
            text=text,
            alone=f"{cast.identity} {words}",
            used=tokens.eot - 1,
            tokens=tokens,
            descriptions=(tokens.identity,),
        )


def _single_prompt(tokenize: Tokenize, story: Story, number: int, weights: bool) -> FramePrompt:
    """The prompt of a frame without a character."""
    before, after = story.style_around
    frame = story.frames[number]
    text = f"{before}{frame.text}{after}"
    spans, joined = locate_frame(tokenize, frame, (before, after), f"frame {number + 1}", weights=weights)
    used = count_words(joined)
    return FramePrompt(number, (), (number,), text, text, used, spans.tokens, spans.descriptions)
