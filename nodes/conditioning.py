"""Encode a story as one batched conditioning with a row per frame."""

from collections.abc import Sequence
from functools import partial

import comfy.utils
from comfy_api.latest import io

from ..prompts.encode import frame_by_frame, one_prompt, without_photos
from ..prompts.photomaker import photo_report, rows_frame_by_frame, rows_in_one_prompt
from ..prompts.report import one_prompt_report
from ..prompts.svr import SVRSettings
from ..prompts.tokens import Tokens, without_word_ids
from ..prompts.windows import WINDOW_KINDS, frame_prompts
from .photomaker import fuse_photos, photo_inputs, with_photos
from .ranges import in_range
from .types import Story

CONSTANT = {"step": 0.001, "advanced": True}


class EncodeOnePrompt(io.ComfyNode):
    """One-Prompt-One-Story (arXiv 2501.13554): prompt consolidation and singular-value reweighting."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="StoryLoom_EncodeOnePrompt",
            display_name="Encode story as one prompt (SVR)",
            category="StoryLoom/conditioning",
            description=(
                "Encodes the whole story as one prompt, so that all frames share its context, then strengthens each "
                "frame's own words and suppresses those of the others (One-Prompt-One-Story, singular-value "
                "reweighting). Frames with the same characters share a prompt; above 75 tokens they are split into "
                "windows. The published negative is all zeros: use ConditioningZeroOut, not an empty prompt."
            ),
            search_aliases=[
                "SVR",
                "One-Prompt-One-Story",
                "1Prompt1Story",
                "NPR",
                "singular value reweighting",
                "prompt reweighting",
                "story prompt",
                "PhotoMaker",
            ],
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoders of an SDXL checkpoint."),
                Story.Input("story", tooltip="The story to encode, with any number of characters and frames."),
                io.Combo.Input(
                    "reweighting",
                    options=["svr", "svr_eot", "npr", "none"],
                    default="svr",
                    tooltip=(
                        "svr: the published method. svr_eot: the variant of the published benchmark, gentler on the "
                        "end-of-text tokens. npr: the paper's naive baseline, factors 2 and 0.5. none: no "
                        "reweighting; every frame uses its whole prompt unchanged."
                    ),
                ),
                io.Combo.Input(
                    "pooled",
                    options=["full", "zero", "frame"],
                    default="full",
                    tooltip=(
                        "SDXL's pooled embedding, a summary of the prompt. full: of the whole prompt (published). "
                        "zero: all zeros. frame: of the identity and this frame's words only, which helps when frames "
                        "look too similar."
                    ),
                ),
                io.Boolean.Input(
                    "literal",
                    default=False,
                    advanced=True,
                    tooltip="On: (word:1.2) is read as plain text, as in the published method. Off: as a weight.",
                ),
                io.Combo.Input(
                    "order",
                    options=["weaken_first", "enhance_first"],
                    default="weaken_first",
                    advanced=True,
                    tooltip="weaken_first: as in the published code. enhance_first: as in the paper; stronger.",
                ),
                io.Float.Input(
                    "weaken_alpha",
                    default=0.01,
                    min=-0.1,
                    max=1.0,
                    tooltip="How steeply the dominant directions of suppressed frames fall off. Published: 0.01.",
                    **CONSTANT,
                ),
                io.Float.Input(
                    "weaken_beta",
                    default=0.05,
                    min=0.0,
                    max=4.0,
                    tooltip="Strength that suppressed frames keep: 0 none, 1 all. Published: 0.05.",
                    **CONSTANT,
                ),
                io.Float.Input(
                    "enhance_alpha",
                    default=-0.01,
                    min=-0.1,
                    max=1.0,
                    tooltip="How steeply the dominant directions of the expressed frame rise. Published: -0.01.",
                    **CONSTANT,
                ),
                io.Float.Input(
                    "enhance_beta",
                    default=1.0,
                    min=0.0,
                    max=4.0,
                    tooltip="Overall factor for the expressed frame. Published: 1.",
                    **CONSTANT,
                ),
                io.Combo.Input(
                    "window",
                    options=list(WINDOW_KINDS),
                    default="circular",
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "Which frames share a prompt when a story takes more than 75 tokens. circular: the frame and "
                        "those after it, wrapping around at the end (published code). trailing: the frame and those "
                        "before it (paper). The report lists the windows."
                    ),
                ),
                io.Boolean.Input(
                    "enhance_identity",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "On: svr and svr_eot strengthen the identity together with the frame's own words. In the "
                        "paper this keeps the character more alike but varies it less. Off: the identity stays as it "
                        "is (published)."
                    ),
                ),
                *photo_inputs(),
            ],
            outputs=[
                io.Conditioning.Output(
                    "conditioning",
                    display_name="CONDITIONING",
                    tooltip="One row per frame, for the positive input of KSampler. The latent batch needs one "
                    "image per frame.",
                ),
                io.String.Output(
                    "report",
                    display_name="report",
                    tooltip="For every frame: its window, the tokens used, and which frames are expressed and "
                    "suppressed.",
                ),
            ],
        )

    @classmethod
    @in_range
    def execute(
        cls,
        clip,
        story,
        reweighting,
        pooled,
        literal,
        order,
        weaken_alpha,
        weaken_beta,
        enhance_alpha,
        enhance_beta,
        window="circular",
        enhance_identity=False,
        photomaker=None,
        photo=None,
    ) -> io.NodeOutput:
        story, person = with_photos(story, photomaker, photo)
        tokenize = sdxl_tokenizer(clip, literal)
        settings = SVRSettings(
            weaken_alpha, weaken_beta, enhance_alpha, enhance_beta, order, enhance_identity=enhance_identity
        )
        prompts = frame_prompts(tokenize, story, window, weights=not literal)
        report, fuse = one_prompt_report(story, prompts, reweighting, enhance_identity), without_photos
        if person:
            rows = rows_in_one_prompt(tokenize, story, person, prompts, weights=not literal)
            fuse = fuse_photos(photomaker, photo, rows)
            report += "\n" + photo_report(person, rows)
        encode = partial(encode_prompts, clip)
        entries = one_prompt(tokenize, encode, prompts, reweighting, settings, pooled, fuse=fuse)
        return io.NodeOutput([[*entry] for entry in entries], report)


class EncodePerFrame(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="StoryLoom_EncodePerFrame",
            display_name="Encode story frame by frame",
            category="StoryLoom/conditioning",
            description=(
                "Encodes every frame separately: identity, then the frame's words, with the style around them. "
                "Supports prompts of any length, several characters and [NC] frames. The text alone does not keep the "
                "character consistent, so add an attention node."
            ),
            search_aliases=[
                "prompt list",
                "multiple prompts",
                "batch prompts",
                "prompt per image",
                "story frames",
                "StoryDiffusion",
                "PhotoMaker",
            ],
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoders of an SDXL checkpoint."),
                Story.Input("story", tooltip="The story to encode."),
                io.Boolean.Input(
                    "literal",
                    default=False,
                    advanced=True,
                    tooltip="On: (word:1.2) is read as plain text. Off: as a weight, as in CLIP Text Encode.",
                ),
                *photo_inputs(),
            ],
            outputs=[
                io.Conditioning.Output(
                    "conditioning",
                    display_name="CONDITIONING",
                    tooltip="One row per frame, for the positive input of KSampler. The latent batch needs one "
                    "image per frame.",
                )
            ],
        )

    @classmethod
    def execute(cls, clip, story, literal, photomaker=None, photo=None) -> io.NodeOutput:
        story, person = with_photos(story, photomaker, photo)
        tokenize = sdxl_tokenizer(clip, literal)
        fuse = without_photos
        if person:
            rows = rows_frame_by_frame(tokenize, story, person, weights=not literal)
            fuse = fuse_photos(photomaker, photo, rows)
        entries = frame_by_frame(tokenize, partial(encode_prompts, clip), story, weights=not literal, fuse=fuse)
        return io.NodeOutput([[*entry] for entry in entries])


def sdxl_tokenizer(clip, literal: bool):
    """The tokenizer of a CLIP, with word ids. Raises ValueError if the CLIP is not SDXL's pair of encoders."""
    encoders = sorted(clip.tokenize(""))
    if encoders != ["g", "l"]:
        raise ValueError(
            f"The story needs the two text encoders of SDXL (l and g), but this CLIP has {', '.join(encoders)}. "
            "Connect the CLIP of an SDXL checkpoint."
        )
    return partial(clip.tokenize, return_word_ids=True, **({"disable_weights": True} if literal else {}))


def encode_prompts(clip, prompts: Sequence[Tokens]) -> list[list]:
    """Encode prompts one by one like the stock node, with a progress bar.

    Returns the entries [context [1, T, 2048], info] of each prompt: one, or several if hooks change the CLIP over the
    schedule.
    """
    progress = comfy.utils.ProgressBar(len(prompts))
    encoded = []
    for tokens in prompts:
        encoded.append(clip.encode_from_tokens_scheduled(without_word_ids(tokens), show_pbar=False))
        progress.update(1)
    return encoded
