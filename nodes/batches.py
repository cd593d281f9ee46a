"""Long stories: split into batches that one KSampler draws in turn, and join the results."""

from collections.abc import Callable
from functools import partial

from comfy_api.latest import io

from ..prompts.batches import (
    BatchPlan,
    join_latents,
    join_rows,
    plan_batches,
    split_conditioning,
    split_latent,
    split_rows,
)
from .ranges import in_range
from .types import Plan


class SplitBatches(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        listed = {"is_output_list": True}
        return io.Schema(
            node_id="StoryLoom_SplitBatches",
            display_name="Split a long story",
            category="StoryLoom/story",
            description=(
                "Splits a story of any length into batches of equal size that all begin with the same anchor frames. "
                "The KSampler after it runs once per batch. With Consistent self-attention, which reads the number of "
                "anchors from the positive, all batches share the character. Join story batches restores the order."
            ),
            search_aliases=[
                "long story",
                "batch size",
                "out of memory",
                "low VRAM",
                "many frames",
                "anchors",
                "split latents",
            ],
            inputs=[
                io.Latent.Input("latent", tooltip="One latent per frame, from Empty story latent."),
                io.Int.Input(
                    "batch_size",
                    default=4,
                    min=1,
                    max=64,
                    tooltip="Images per batch, including anchors. Larger batches share more and need more memory.",
                ),
                io.Int.Input(
                    "anchors",
                    default=2,
                    min=0,
                    max=63,
                    tooltip=(
                        "Number of first frames that begin every batch. They are drawn again in each, so that all "
                        "batches see the same character. Consistent self-attention uses this number: leave its own "
                        "anchors at 0. 0: the batches are independent."
                    ),
                ),
                io.Conditioning.Input(
                    "positive", optional=True, tooltip="The story's conditioning, one row per frame."
                ),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip="The negative. A single row applies to all frames and is passed on unchanged.",
                ),
                io.Image.Input(
                    "image",
                    optional=True,
                    tooltip="ControlNet hints or images to start from: one per frame, or one for all.",
                ),
                io.Mask.Input("mask", optional=True, tooltip="Masks: one per frame, or one for all."),
            ],
            outputs=[
                io.Latent.Output("latents", display_name="LATENT", tooltip="The latents of each batch.", **listed),
                io.Conditioning.Output(
                    "positives", display_name="positive", tooltip="The positive of each batch.", **listed
                ),
                io.Conditioning.Output(
                    "negatives", display_name="negative", tooltip="The negative of each batch.", **listed
                ),
                io.Image.Output("images", display_name="IMAGE", tooltip="The images of each batch.", **listed),
                io.Mask.Output("masks", display_name="MASK", tooltip="The masks of each batch.", **listed),
                Plan.Output(
                    "plan", display_name="plan", tooltip="Which frame is in which batch, for Join story batches."
                ),
            ],
        )

    @classmethod
    @in_range
    def execute(cls, latent, batch_size, anchors, positive=None, negative=None, image=None, mask=None) -> io.NodeOutput:
        count = latent["samples"].shape[0]
        plan = plan_batches(count, batch_size, anchors)
        conditioning = partial(split_conditioning, count=count, anchors=anchors)
        rows = partial(split_rows, count=count)
        return io.NodeOutput(
            cls._each(plan, "latent", latent, split_latent),
            cls._each(plan, "positive", positive, conditioning),
            cls._each(plan, "negative", negative, conditioning),
            cls._each(plan, "image", image, rows),
            cls._each(plan, "mask", mask if mask is None else mask.reshape(-1, *mask.shape[-2:]), rows),
            plan,
        )

    @staticmethod
    def _each(plan: BatchPlan, name: str, value, split: Callable) -> list:
        """The part of an input for each batch. Raises ValueError with the name of the input."""
        if value is None:
            return [None] * len(plan.batches)
        try:
            return [split(value, frames) for frames in plan.batches]
        except ValueError as error:
            raise ValueError(f"Split a long story: the input {name} {error}") from error


class JoinBatches(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="StoryLoom_JoinBatches",
            display_name="Join story batches",
            category="StoryLoom/story",
            description=(
                "Joins the batches of Split a long story: every frame once, in story order, without repeated anchors "
                "and padding. Takes latents or decoded images."
            ),
            search_aliases=["long story", "join batches", "merge batches", "rebatch"],
            is_input_list=True,
            inputs=[
                Plan.Input("plan", tooltip="The plan from Split a long story."),
                io.Latent.Input("latents", optional=True, tooltip="Sampled latent batches."),
                io.Image.Input("images", optional=True, tooltip="Decoded image batches."),
            ],
            outputs=[
                io.Latent.Output("latent", display_name="LATENT", tooltip="All frames in story order."),
                io.Image.Output("image", display_name="IMAGE", tooltip="All frames in story order, for Story page."),
            ],
        )

    @classmethod
    def execute(cls, plan, latents=None, images=None) -> io.NodeOutput:
        if not latents and not images:
            raise ValueError("Join story batches: connect latents from KSampler or images from VAE Decode.")
        (plan,) = plan
        return io.NodeOutput(
            join_latents(latents, plan) if latents else None, join_rows(images, plan) if images else None
        )
