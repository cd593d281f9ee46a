"""Model patches: attention, and the inputs of output blocks."""

from comfy_api.latest import io

from ..attention.consistent import ConsistentAttention
from ..attention.freeu import FreeU, Stage
from ..attention.identity import IdentityPreserving
from ..runtime.blocks import check_blocks
from ..runtime.patch import check_percents
from ..runtime.sampling import with_patch
from .patching import attend, attention_levels, blocks_of, lowest_stages
from .ranges import in_range


def model_input() -> io.Input:
    return io.Model.Input(
        "model", tooltip="The SDXL model to patch. The node outputs a patched copy; the input is not changed."
    )


def percent_inputs() -> list[io.Input]:
    """The part of the schedule in which a patch is active."""
    return [
        io.Float.Input(
            "start_percent",
            default=0.0,
            min=0.0,
            max=1.0,
            step=0.001,
            advanced=True,
            tooltip="Where in the schedule the effect starts: 0 is the first step, 1 the last. Published: 0.",
        ),
        io.Float.Input(
            "end_percent",
            default=1.0,
            min=0.0,
            max=1.0,
            step=0.001,
            advanced=True,
            tooltip="Where in the schedule the effect ends. Published: 1. Lower values leave fine details unaffected.",
        ),
    ]


def blocks_input(published: str) -> io.Input:
    return io.String.Input(
        "blocks",
        default=published,
        advanced=True,
        tooltip=(
            f'Which attention blocks are patched. Published: "{published}". "all", "output", "input 4-5, middle", or '
            'single layers such as "output 0-2.0-3" (blocks 0 to 2, layers 0 to 3).'
        ),
    )


def model_output() -> io.Output:
    return io.Model.Output(
        "patched_model", display_name="MODEL", tooltip="The patched model, for KSampler or further patches."
    )


def valid_blocks(blocks: str | None) -> bool | str:
    """True, or an error message for an invalid block string. None: connected, not typed."""
    if blocks is not None:
        try:
            check_blocks(blocks)
        except ValueError as error:
            return str(error)
    return True


class IPCA(io.ComfyNode):
    """Identity-preserving cross-attention, One-Prompt-One-Story (arXiv 2501.13554)."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="StoryLoom_IPCA",
            display_name="Identity-preserving cross-attention",
            category="StoryLoom/attention",
            description=(
                "Makes every frame follow the identity text more closely, so that the character stays the same (IPCA "
                "of One-Prompt-One-Story). Place it anywhere between the checkpoint and KSampler, with a StoryLoom "
                "encode node as positive. The published method samples with an all-zero negative: "
                "ConditioningZeroOut."
            ),
            search_aliases=["IPCA", "One-Prompt-One-Story", "1Prompt1Story", "consistent character", "identity"],
            inputs=[
                model_input(),
                io.Float.Input(
                    "identity_weight",
                    default=2.0,
                    min=1.0,
                    max=8.0,
                    step=0.25,
                    tooltip=(
                        "Weight of the identity text in every frame. 1 is off, 2 is the published method. Higher "
                        "values keep the character more consistent, but follow the frame's own text less."
                    ),
                ),
                *percent_inputs(),
                blocks_input("all"),
            ],
            outputs=[model_output()],
        )

    @classmethod
    def validate_inputs(cls, blocks=None):
        return valid_blocks(blocks)

    @classmethod
    @in_range
    def execute(cls, model, identity_weight, start_percent, end_percent, blocks) -> io.NodeOutput:
        check_percents(start_percent, end_percent)
        patch = IdentityPreserving(identity_weight, start_percent, end_percent, blocks_of(model, blocks))
        return io.NodeOutput(with_patch(model, patch, attend))


class ConsistentSelfAttention(io.ComfyNode):
    """Consistent self-attention, StoryDiffusion (arXiv 2405.01434)."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="StoryLoom_ConsistentSelfAttention",
            display_name="Consistent self-attention",
            category="StoryLoom/attention",
            description=(
                "Lets the images of a batch attend to each other during sampling, so that faces, clothes and style "
                "agree (CSA of StoryDiffusion). Place it anywhere between the checkpoint and KSampler, with at least "
                "2 images in the latent batch. With a StoryLoom encode node, only frames that share a character "
                "attend to each other; with any other prompt, all images do."
            ),
            search_aliases=[
                "CSA",
                "StoryDiffusion",
                "consistent characters",
                "consistent self attention",
                "shared attention",
                "same character",
                "comic",
            ],
            inputs=[
                model_input(),
                io.Float.Input(
                    "sampling_rate",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip=(
                        "Fraction of each image's tokens that the other images attend to. 0 is off, 0.5 is the "
                        "published method, 0.3 is reported as too weak, 1 uses all tokens and costs the most time and "
                        "memory. Extra memory at 1024 x 1024 and 0.5: 100 MiB for 4 images, at most 256 MiB for up to "
                        "50, since images are then processed in slices."
                    ),
                ),
                io.Int.Input(
                    "anchors",
                    default=0,
                    min=0,
                    max=64,
                    tooltip=(
                        "Number of anchors: the first images, which attend only to each other, while every other "
                        "image attends to them and to itself. 0: use the anchors of Split a long story; without that "
                        "node, every image attends to every other. Useful: 1 to 4, for stories drawn in several "
                        "batches."
                    ),
                ),
                io.Int.Input(
                    "skip_first_steps",
                    default=1,
                    min=0,
                    max=1000,
                    advanced=True,
                    tooltip=(
                        "Number of steps in each sampling run before images attend to each other. Published: 1 or 5. "
                        "Higher values let every image keep its own composition."
                    ),
                ),
                *percent_inputs(),
                blocks_input("output"),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=False,
                    tooltip=(
                        "Selects which tokens are shared, anew at every step. The same seed gives the same images on "
                        "every device; it has little effect on the result."
                    ),
                ),
                io.Combo.Input(
                    "schedule",
                    options=["steady", "published"],
                    default="steady",
                    advanced=True,
                    tooltip=(
                        "steady: all selected blocks at every step, always with the same number of tokens. published: "
                        "as in the published program; each layer is skipped at random (30 % of the time in the first "
                        "40 % of the steps, then 10 %) and the number of tokens varies, which is slower."
                    ),
                ),
            ],
            outputs=[model_output()],
        )

    @classmethod
    def validate_inputs(cls, blocks=None):
        return valid_blocks(blocks)

    @classmethod
    @in_range
    def execute(
        cls, model, sampling_rate, anchors, skip_first_steps, start_percent, end_percent, blocks, seed, schedule
    ) -> io.NodeOutput:
        check_percents(start_percent, end_percent)
        chosen = blocks_of(model, blocks)
        patch = ConsistentAttention(
            sampling_rate,
            anchors,
            skip_first_steps,
            start_percent,
            end_percent,
            chosen,
            seed,
            schedule,
            attention_levels(model, chosen),
        )
        return io.NodeOutput(with_patch(model, patch, attend))


def factor_input(name: str, published: float, tooltip: str) -> io.Input:
    return io.Float.Input(name, default=published, min=0.0, max=10.0, step=0.01, tooltip=tooltip)


class StoryFreeU(io.ComfyNode):
    """FreeU by output block (arXiv 2309.11497), as in the published story programs."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="StoryLoom_FreeU",
            display_name="Story FreeU",
            category="StoryLoom/attention",
            description=(
                "Strengthens the backbone of the UNet and damps the lowest frequencies of its skip connections "
                "(FreeU), in the blocks and with the settings of the published story programs. It needs no extra UNet "
                "call. It makes images cleaner, not more consistent: combine it with the other nodes, anywhere "
                "between the checkpoint and KSampler."
            ),
            search_aliases=["FreeU", "FreeU by block", "FreeU SDXL", "StoryDiffusion", "backbone", "skip connections"],
            inputs=[
                model_input(),
                factor_input(
                    "b1",
                    1.1,
                    "Strength of the backbone in output blocks 0 to 2, the lowest resolution. 1 is off. "
                    "Published: 1.1. Higher values make the image simpler and smoother.",
                ),
                factor_input(
                    "b2",
                    1.2,
                    "Strength of the backbone in output blocks 3 to 5, the next resolution. 1 is off. "
                    "Published: 1.2. Higher values make the image simpler and smoother.",
                ),
                factor_input(
                    "s1",
                    0.6,
                    "Strength of the lowest frequencies in the skip connections to output blocks 0 to 2. 1 is off. "
                    "Published: 0.6. Lower values emphasise details, which offsets the smoothing by b1.",
                ),
                factor_input(
                    "s2",
                    0.4,
                    "Strength of the lowest frequencies in the skip connections to output blocks 3 to 5. 1 is off. "
                    "Published: 0.4. Lower values emphasise details, which offsets the smoothing by b2.",
                ),
                *percent_inputs(),
            ],
            outputs=[model_output()],
        )

    @classmethod
    @in_range
    def execute(cls, model, b1, b2, s1, s2, start_percent, end_percent) -> io.NodeOutput:
        check_percents(start_percent, end_percent)
        lowest, upper = lowest_stages(model)
        patch = FreeU((Stage(lowest, b1, s1), Stage(upper, b2, s2)), start_percent, end_percent)
        return io.NodeOutput(with_patch(model, patch, attend))
