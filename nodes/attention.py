"""Model patches on attention."""

from comfy_api.latest import io

from ..attention.blocks import check_blocks
from ..attention.identity import IdentityPreserving
from ..attention.sampling import check_window
from .patching import blocks_of, with_patch


class IPCA(io.ComfyNode):
    """Identity-preserving cross-attention, One-Prompt-One-Story (arXiv 2501.13554)."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="StoryLoom_IPCA",
            display_name="Identity-preserving cross-attention",
            category="StoryLoom/attention",
            description=(
                "Every frame listens more to the words of the identity, so that the character stays the same (IPCA of "
                "One-Prompt-One-Story). Place it anywhere between the checkpoint and KSampler, with a StoryLoom encode "
                "node as positive. The published method samples with an all-zero negative: ConditioningZeroOut."
            ),
            search_aliases=["IPCA", "One-Prompt-One-Story", "1Prompt1Story", "consistent character", "identity"],
            inputs=[
                io.Model.Input("model", tooltip="The SDXL model to patch. It stays as it is; a patched copy goes out."),
                io.Float.Input(
                    "identity_weight",
                    default=2.0,
                    min=1.0,
                    max=8.0,
                    step=0.25,
                    tooltip=(
                        "How many times the identity's words count in every frame. 1 is off, 2 is the published "
                        "method, higher holds the character tighter and leaves less room for the frame."
                    ),
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    advanced=True,
                    tooltip="Where in the schedule it begins to act: 0 is the first step, 1 the last. Published: 0.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    advanced=True,
                    tooltip="Where in the schedule it stops acting. Published: 1. Lower values free the details.",
                ),
                io.String.Input(
                    "blocks",
                    default="all",
                    advanced=True,
                    tooltip=(
                        'Which attention blocks it works in: "all" (published), "output", "input 4-5, middle", or '
                        'single layers as "output 0-2.0-3" (blocks 0 to 2, layers 0 to 3).'
                    ),
                ),
            ],
            outputs=[
                io.Model.Output(
                    "patched_model", display_name="MODEL", tooltip="The patched model, for KSampler or further patches."
                )
            ],
        )

    @classmethod
    def validate_inputs(cls, blocks=None):
        if blocks is not None:
            try:
                check_blocks(blocks)
            except ValueError as error:
                return str(error)
        return True

    @classmethod
    def execute(cls, model, identity_weight, start_percent, end_percent, blocks) -> io.NodeOutput:
        check_window(start_percent, end_percent)
        patch = IdentityPreserving(identity_weight, start_percent, end_percent, blocks_of(model, blocks))
        return io.NodeOutput(with_patch(model, patch))
