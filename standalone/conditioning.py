"""A story as one batched conditioning of this host; prompts are plain text with one entry each."""

from __future__ import annotations

from collections.abc import Callable

from ..prompts import encode as stories
from ..prompts.encode import PUBLISHED, Encode, Entry, Reweighting
from ..prompts.script import Story
from ..prompts.svr import NPR, NPRSettings, SVRSettings
from ..prompts.tokens import Tokenize, Tokens
from ..prompts.windows import WindowKind, frame_prompts

EncodeText = Callable[[Tokens], Entry]
"""encode(tokens) -> context [1, T, 2048] and info with `pooled_output` [1, 1280]."""


def one_prompt(
    tokenize: Tokenize,
    encode: EncodeText,
    story: Story,
    reweighting: Reweighting,
    window: WindowKind = "circular",
    svr: SVRSettings = PUBLISHED,
    npr: NPRSettings = NPR,
) -> Entry:
    """`prompts.encode.one_prompt`; window: a kind of `prompts.windows.choose_windows`."""
    prompts = frame_prompts(tokenize, story, window, weights=False)
    (entry,) = stories.one_prompt(tokenize, _each(encode), prompts, reweighting, svr, npr=npr)
    return entry


def frame_by_frame(tokenize: Tokenize, encode: EncodeText, story: Story) -> Entry:
    """`prompts.encode.frame_by_frame`."""
    (entry,) = stories.frame_by_frame(tokenize, _each(encode), story, weights=False)
    return entry


def _each(encode: EncodeText) -> Encode:
    return lambda prompts: [[encode(tokens)] for tokens in prompts]
