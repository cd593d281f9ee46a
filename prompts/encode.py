"""Encode a story as one batched conditioning with a row per frame: with shared prompts, or frame by frame.

The host's tokenizer and text encoders are passed in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from .conditioning import TAG, StoryCond, StoryRow, batch_contexts, per_encoder
from .lengths import Length, check_lengths
from .options import StoryOptions
from .script import Story
from .svr import NPR, NPRSettings, SVRSettings, express_frame, express_frame_naively
from .tag import tag_text
from .tokens import StoryTokens, Tokenize, Tokens, count_words, locate_frame
from .windows import FramePrompt

Entry = tuple[Tensor, dict[str, Any]]
"""A conditioning: context [rows, T, 2048] and its info, with `pooled_output` [rows, 1280]."""

Encode = Callable[[Sequence[Tokens]], Sequence[Sequence[Entry]]]
"""encode(prompts) -> for each prompt its entries of one row: one, or several if the encoders vary over the schedule."""

Fuse = Callable[[int, Tensor], Tensor]
"""fuse(frame, context [1, T, 2048]) -> the context with the photos of a character (PhotoMaker); frame: from 0."""

Reweighting = Literal["svr", "svr_eot", "npr", "none"]
PUBLISHED = SVRSettings()


def without_photos(frame: int, context: Tensor) -> Tensor:
    """The `Fuse` of a story without photos: every context unchanged."""
    return context


def one_prompt(
    tokenize: Tokenize,
    encode: Encode,
    prompts: Sequence[FramePrompt],
    reweighting: Reweighting,
    settings: SVRSettings = PUBLISHED,
    pooled: Literal["full", "zero", "frame"] = "full",
    npr: NPRSettings = NPR,
    fuse: Fuse = without_photos,
) -> list[Entry]:
    """Encode every frame with the prompt that it shares with others of its cast; each row expresses its own frame.

    prompts: of all frames, from `frame_prompts`. reweighting, settings, npr: as in `expressed`; frames without a
    character are not reweighted. pooled: the pooled output of the row's whole prompt, zeros, or that of the identity
    with the row's own frame only. fuse: applied to the encoders' own contexts, before the reweighting. Raises
    ValueError as `expressed` and `check_lengths` do, and when an encoder returns another number of rows than the prompt
    has.
    """
    check_lengths([Length(prompt.frame, prompt.used, prompt.tokens.length) for prompt in prompts])
    summarised = [prompt.alone if pooled == "frame" else prompt.text for prompt in prompts]
    texts = dict.fromkeys([*(prompt.text for prompt in prompts), *summarised])
    encoded = dict(zip(texts, encode([tokenize(text) for text in texts]), strict=True))
    rows = tuple(StoryRow(p.frame, p.characters, p.tokens, p.descriptions) for p in prompts)
    entries = []
    for number, (_, info) in enumerate(encoded[prompts[0].text]):
        fused = [fuse(p.frame, _with_known_rows(encoded[p.text][number][0], p.tokens)) for p in prompts]
        contexts = [
            expressed(context, p.tokens, p.index, reweighting if p.characters else "none", settings, npr)
            for p, context in zip(prompts, fused, strict=True)
        ]
        summary = torch.cat([encoded[text][number][1]["pooled_output"] for text in summarised])
        entries.append(_tagged(contexts, info, torch.zeros_like(summary) if pooled == "zero" else summary, rows))
    return entries


def frame_by_frame(
    tokenize: Tokenize, encode: Encode, story: Story, *, weights: bool = True, fuse: Fuse = without_photos
) -> list[Entry]:
    """Encode every frame's own prompt.

    weights: as in `frame_prompts`. Raises ValueError as `locate_frame` and `check_lengths` do, and when an encoder
    returns another number of rows than the prompt has.
    """
    located = [
        locate_frame(tokenize, frame, story.style_around, f"frame {number}", weights=weights)
        for number, frame in enumerate(story.frames, start=1)
    ]
    check_lengths([Length(i, count_words(tokens), spans.tokens.length) for i, (spans, tokens) in enumerate(located)])
    rows = tuple(
        StoryRow(i, frame.characters, spans.tokens, spans.descriptions)
        for i, (frame, (spans, _)) in enumerate(zip(story.frames, located, strict=True))
    )
    entries = []
    for together in zip(*encode([tokens for _, tokens in located]), strict=True):
        summary = torch.cat([info["pooled_output"] for _, info in together])
        contexts = [
            fuse(frame, _with_known_rows(context, row.tokens))
            for frame, ((context, _), row) in enumerate(zip(together, rows, strict=True))
        ]
        entries.append(_tagged(contexts, together[0][1], summary, rows))
    return entries


def expressed(
    context: Tensor,
    tokens: StoryTokens,
    frame: int,
    reweighting: Reweighting,
    settings: SVRSettings,
    npr: NPRSettings = NPR,
) -> Tensor:
    """A prompt's context [1, T, 2048] in which one frame is expressed.

    frame: index into `tokens.frames`.
    reweighting: "svr" with `settings`, "svr_eot" the same with `eot` "scale", "npr" naive with `npr`, "none"
    unchanged.
    Raises ValueError when the result is not finite.
    """
    if reweighting == "none":
        out = context
    elif reweighting == "npr":
        out = per_encoder(context[0], partial(express_frame_naively, tokens=tokens, frame=frame, settings=npr))[None]
    else:
        settings = replace(settings, eot="scale") if reweighting == "svr_eot" else settings
        out = per_encoder(context[0], partial(express_frame, tokens=tokens, frame=frame, settings=settings))[None]
    if not torch.isfinite(out).all():
        raise ValueError(
            "Reweighting produced values that are not finite. Set the constants closer to the published ones: "
            "weaken 0.01 and 0.05, enhance -0.01 and 1."
        )
    return out


def _with_known_rows(context: Tensor, tokens: StoryTokens) -> Tensor:
    """The context [1, T, D] of a prompt. Raises ValueError when its rows are not those of the prompt's tokens."""
    if context.shape[1] != tokens.length:
        raise ValueError(
            f"The input clip encodes the {tokens.length} tokens of a prompt as {context.shape[1]} rows, so it is "
            "unknown which rows belong to which words. A node between the checkpoint and this one changes the "
            "encoding, such as CLIP NegPip. Connect the checkpoint's CLIP."
        )
    return context


def _tagged(contexts: list[Tensor], info: dict[str, Any], summary: Tensor, rows: tuple[StoryRow, ...]) -> Entry:
    """A story's conditioning, batched over frames."""
    batch = batch_contexts(contexts)
    cast = tuple(dict.fromkeys(name for row in rows for name in row.characters))
    story = StoryCond(rows, batch.shape[1], cast)
    return batch, StoryOptions({**info, "pooled_output": summary, TAG: tag_text(story)})
