"""A story from text to page, without ComfyUI.

story = StoryPipeline(StableDiffusionXLPipeline.from_pretrained(...))
drawn = story("a red fox in a blue coat", ["asleep in the snow", "reading on a train"], seed=7)
drawn.page.save("page.png")
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from ..attention.consistent import ConsistentAttention
from ..attention.identity import IdentityPreserving
from ..pages.comic import PageStyle, comic_pages
from ..prompts.encode import PUBLISHED, Entry, Reweighting
from ..prompts.script import Story, parse_story
from ..prompts.svr import NPR, NPRSettings, SVRSettings
from ..prompts.windows import WINDOW_KINDS, WindowKind
from ..runtime.patch import check_percents
from ..runtime.sampling import with_patch
from .conditioning import frame_by_frame, one_prompt
from .layers import attend, blocks_of
from .model import StoryModel, model_of
from .patcher import UNetPatcher
from .sampling import ModelSampling, Progress, sample_euler, story_noise
from .storymaker import Characters, with_characters
from .text import TextEncoders, tokenize


class Method(NamedTuple):
    """reweighting: of the story as one prompt, None for one prompt per frame. The flags turn on IPCA and CSA."""

    reweighting: Reweighting | None
    preserves_identity: bool = False
    shares_attention: bool = False


METHODS = {
    "svr+ipca": Method("svr", preserves_identity=True),
    "svr": Method("svr"),
    "svr-eot+ipca": Method("svr_eot", preserves_identity=True),
    "svr-eot": Method("svr_eot"),
    "ipca": Method(None, preserves_identity=True),
    "csa": Method(None, shares_attention=True),
    "csa+svr+ipca": Method("svr", preserves_identity=True, shares_attention=True),
    "npr": Method("npr"),
    "none": Method("none"),
    "frames": Method(None),
}


@dataclass(frozen=True, eq=False)
class DrawnStory:
    """A story's pictures in order and its pages. latents: [frames, 4, height / 8, width / 8]."""

    story: Story
    frames: tuple[Image.Image, ...]
    pages: tuple[Image.Image, ...]
    latents: Tensor

    @property
    def page(self) -> Image.Image:
        """The first page; there are more only if the page style splits the story."""
        return self.pages[0]


class StoryPipeline:
    """Draws stories with an SDXL pipeline of diffusers, which is not changed.

    pipeline: a `diffusers.StableDiffusionXLPipeline`, or a StoryModel such as `demo_model()`.
    """

    def __init__(self, pipeline):
        self.model = pipeline if isinstance(pipeline, StoryModel) else model_of(pipeline)
        self.patcher = UNetPatcher(self.model.unet, ModelSampling(self.model.scheduler))
        self.encode = TextEncoders(self.model.text_encoder, self.model.text_encoder_2, self.model.device)

    def __call__(
        self,
        identity: str,
        frames: Sequence[str],
        style: str = "",
        *,
        method: str = "svr+ipca",
        steps: int = 30,
        cfg: float = 5.0,
        seed: int = 0,
        width: int | None = None,
        height: int | None = None,
        identity_weight: float = 2.0,
        start_percent: float = 0.0,
        end_percent: float = 1.0,
        blocks: str = "all",
        sampling_rate: float = 0.5,
        anchors: int = 0,
        skip_first_steps: int = 1,
        sharing_blocks: str = "output",
        negative: str | None = None,
        shared_noise: bool = True,
        window: WindowKind = "circular",
        svr: SVRSettings = PUBLISHED,
        npr: NPRSettings = NPR,
        captions: bool = True,
        page_style: PageStyle | None = None,
        progress: Progress | None = None,
        characters: Characters | None = None,
    ) -> DrawnStory:
        """Draw a story.

        identity, frames, style: as in the Story script node, one frame per item. method: a key of METHODS. width,
        height: pixels, None for the model's own. identity_weight, start_percent, end_percent, blocks: for IPCA.
        sampling_rate, anchors, skip_first_steps, sharing_blocks: for CSA, which samples tokens with the same seed.
        negative: None for the published all-zero one. window: which frames share a prompt when the story is too long
        for one, as in the node Encode story as one prompt. svr, npr: constants and variants of the reweighting.
        captions: whether the pages have captions. page_style: their look. progress: called as progress(steps done,
        total steps), None for a progress bar. characters: StoryMaker's, from reference images. Raises ValueError
        (StoryScriptError, StoryTooLongError) for invalid input, before drawing starts.
        """
        width, height = width or self.model.width, height or self.model.height
        percents = (start_percent, end_percent)
        sharing = (sampling_rate, anchors, skip_first_steps)
        check_settings(method, steps, width, height, identity_weight, *percents, window, *sharing)
        story = parse_story(identity, "\n".join(frames), style)
        check_page(story, width, height, captions, page_style)
        reweighting, preserves_identity, shares_attention = METHODS[method]
        model = self.patcher
        if preserves_identity:
            model = with_patch(
                model, IdentityPreserving(identity_weight, *percents, blocks_of(self.model.unet, blocks)), attend
            )
        if shares_attention:
            where = blocks_of(self.model.unet, sharing_blocks)
            model = with_patch(model, ConsistentAttention(*sharing, 0.0, 1.0, where, seed), attend)
        if characters is not None:
            model = with_characters(model, characters)
        positive = self.conditioning(story, reweighting, window, svr, npr)
        self.model.on_story(story)
        latents = sample_euler(
            model,
            [positive],
            [self._negative(positive, negative)],
            story_noise(len(story.frames), height, width, seed, shared_noise).to(self.model.device),
            self.model.scheduler,
            steps,
            cfg,
            progress or ProgressBar(),
        )
        pictures = (self.model.decode(latents).float().cpu() * 255).round().to(torch.uint8)
        images = tuple(Image.fromarray(picture.numpy()) for picture in pictures)
        return DrawnStory(story, images, pages_of(story, images, captions, page_style), latents)

    def conditioning(
        self,
        story: Story,
        reweighting: Reweighting | None,
        window: WindowKind = "circular",
        svr: SVRSettings = PUBLISHED,
        npr: NPRSettings = NPR,
    ) -> Entry:
        """The tagged conditioning of a story: as one reweighted prompt, or frame by frame if `reweighting` is None."""
        if reweighting is None:
            return frame_by_frame(tokenize, self.encode, story)
        return one_prompt(tokenize, self.encode, story, reweighting, window, svr, npr)

    def _negative(self, positive: Entry, text: str | None) -> Entry:
        if text is not None:
            return self.encode(tokenize(text))
        context, info = positive
        return torch.zeros_like(context[:1]), {"pooled_output": torch.zeros_like(info["pooled_output"][:1])}


class ProgressBar:
    """A progress bar on the terminal; callable as progress(steps done, total steps)."""

    def __init__(self):
        self.bar = None

    def __call__(self, done: int, steps: int) -> None:
        if self.bar is None:
            from tqdm import tqdm

            self.bar = tqdm(total=steps, unit="step", desc="drawing")
        self.bar.update(done - self.bar.n)
        if done == steps:
            self.bar.close()


def pages_of(
    story: Story, pictures: Sequence[Image.Image], captions: bool, style: PageStyle | None
) -> tuple[Image.Image, ...]:
    """The pages of a story's pictures. style: None for the default."""
    return tuple(comic_pages(pictures, [frame.caption for frame in story.frames] if captions else [], style))


def check_page(story: Story, width: int, height: int, captions: bool, style: PageStyle | None) -> None:
    """Raise ValueError if the pages cannot be laid out, before drawing starts."""
    pages_of(story, [Image.new("RGB", (width, height))] * len(story.frames), captions, style)


def check_settings(
    method: str,
    steps: int,
    width: int,
    height: int,
    identity_weight: float,
    start_percent: float,
    end_percent: float,
    window: str,
    sampling_rate: float,
    anchors: int,
    skip_first_steps: int = 1,
) -> None:
    """Raise ValueError for a setting out of range; the message names the allowed values."""
    if method not in METHODS:
        raise ValueError(f'There is no method "{method}". Choose one of {", ".join(METHODS)}.')
    if steps < 1:
        raise ValueError(f"A picture needs at least 1 step, got {steps}.")
    for name, pixels in (("width", width), ("height", height)):
        if pixels < 64 or pixels % 8:
            raise ValueError(f"The {name} must be at least 64 pixels and a multiple of 8, got {pixels}.")
    if identity_weight < 1:
        raise ValueError(f"identity_weight must be at least 1, got {identity_weight:g}; 1 is off, 2 is published.")
    if not 0 <= sampling_rate <= 1:
        raise ValueError(f"sampling_rate must be from 0 to 1, got {sampling_rate:g}; 0 is off, 0.5 is published.")
    if anchors < 0:
        raise ValueError(f"anchors must be 0 or more, got {anchors}; 0 makes every frame attend to every other.")
    if skip_first_steps < 0:
        raise ValueError(f"skip_first_steps must be 0 or more, got {skip_first_steps}; 1 is published.")
    check_percents(start_percent, end_percent)
    if window not in WINDOW_KINDS:
        raise ValueError(f'There is no window "{window}". Choose one of {", ".join(WINDOW_KINDS)}.')
