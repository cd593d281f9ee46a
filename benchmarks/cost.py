"""Floating-point operations of one sampling step of the full SDXL UNet, without and with StoryLoom's patches.

    python -m storyloom.benchmarks.cost

ComfyUI's own UNet class is built in SDXL's shape on the meta device: layers compute shapes only, so the count takes no
memory and is exact. PyTorch's FlopCounterMode counts matrix products, convolutions and attention
(a multiplication with its addition is two operations). One step is one UNet call with the negative and the story, one
row per frame each. The patched call runs the pack's own code, from the tag of a conditioning to the kernel.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..attention.consistent import ConsistentAttention
from ..attention.identity import COUNTED_DENOMINATOR, IdentityPreserving
from ..attention.storymaker import ImageConditioning
from ..models.demo import model as demo
from ..models.storymaker.adapter import StoryMakerAdapter
from ..models.storymaker.characters import CharacterReference, features_of
from ..models.storymaker.ppr import TOKENS, PositionalPerceiverResampler
from ..models.storymaker.weights import CONTEXT as WIDTH
from ..models.storymaker.weights import StoryMakerWeights
from ..prompts.conditioning import StoryCond, StoryRow
from ..prompts.tokens import StoryTokens
from ..runtime.call import KEY, Conditioning, SamplerCall
from ..runtime.patch import ScheduledPatch
from ..runtime.reading import read_call
from ..runtime.run import StoryRun
from .common import enter_comfyui, fused_attention, table

SDXL = {**demo.UNET, "model_channels": 320, "num_head_channels": 64}
"""The demo model has SDXL's shape except for its number of channels."""

BLOCKS = {
    **{("input", number): 2 for number in (4, 5)},
    **{("input", number): 10 for number in (7, 8)},
    ("middle", 0): 10,
    **{("output", number): 10 for number in (0, 1, 2)},
    **{("output", number): 2 for number in (3, 4, 5)},
}
"""SDXL's blocks with attention -> number of layers: 2 in the upper level (640 channels), 10 in the lower (1280)."""

OUTPUT = {block: depth for block, depth in BLOCKS.items() if block[0] == "output"}
"""The blocks with consistent self-attention."""

CHANNELS, HALVINGS = {2: 640, 10: 1280}, {2: 1, 10: 2}
"""Number of layers of a level -> its channels, and how often the latents are halved there."""

CONTEXT = 77
SIGMA = 1.0
POSITIVE, NEGATIVE = 0, 1
STORY_UUID, NEGATIVE_UUID = "uuid of the story", "uuid of the negative"


@dataclass(frozen=True)
class Size:
    """Batch of a step: `frames` images of `side` x `side` latent pixels (128 is 1024 pixels)."""

    frames: int = 4
    side: int = 128


@dataclass(frozen=True)
class Case:
    """One way to patch the UNet.

    weight    IPCA's identity_weight, or None for no IPCA
    identity  number of identity tokens
    owned     whether another node replaces attention in every cross-attention layer
    open      whether the step is inside the patch's window
    rate      CSA's sampling_rate, or None for no CSA
    anchors   CSA's anchors
    masked    CSA in the published form: all tokens of all images as keys, with a dense mask
    pictured  number of StoryMaker's characters, 0 for no StoryMaker
    """

    name: str
    weight: float | None = None
    identity: int = 12
    owned: bool = False
    open: bool = True
    rate: float | None = None
    anchors: int = 0
    masked: bool = False
    pictured: int = 0


CASES = (
    Case("IPCA weight 2, identity of 8 tokens", 2.0, 8),
    Case("IPCA weight 2, identity of 12 tokens", 2.0, 12),
    Case("IPCA weight 2, identity of 30 tokens", 2.0, 30),
    Case("IPCA weight 1.5", 1.5),
    Case("IPCA weight 3", 3.0),
    Case("IPCA weight 2 around another replacement", 2.0, owned=True),
    Case("IPCA weight 1.5 around another replacement", 1.5, owned=True),
    Case("IPCA weight 2, window closed", 2.0, open=False),
    Case("CSA rate 0.5", rate=0.5),
    Case("CSA rate 0.5, as a dense mask", rate=0.5, masked=True),
    Case("CSA rate 0.5, 2 anchors", rate=0.5, anchors=2),
    Case("CSA rate 0.3", rate=0.3),
    Case("CSA rate 1", rate=1.0),
    Case("CSA rate 0.5, window closed", rate=0.5, open=False),
    Case("CSA rate 0.5 and IPCA weight 2", 2.0, rate=0.5),
    Case("StoryMaker, 1 character", pictured=1),
    Case("StoryMaker, 2 characters", pictured=2),
    Case("StoryMaker, 2 characters, window closed", pictured=2, open=False),
    Case("StoryMaker, 1 character, CSA rate 0.5 and IPCA weight 2", 2.0, rate=0.5, pictured=1),
)


def sdxl_unet() -> nn.Module:
    """ComfyUI's UNet in SDXL's shape, in half precision on the meta device."""
    import comfy.ops
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    device = torch.device("meta")
    return UNetModel(**SDXL, dtype=torch.float16, device=device, operations=comfy.ops.disable_weight_init)


def count_step(unet: nn.Module, case: Case, size: Size) -> int:
    """Operations of one UNet call with rows [negative, story], after the first call of a run."""
    return count_run(unet, case, size)[-1]


def count_run(unet: nn.Module, case: Case, size: Size) -> list[int]:
    """Operations of the first calls of a run until they are constant: one call, two with StoryMaker."""
    rows = 2 * size.frames
    options = patched_options(case, size.frames)

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float16, device="meta")

    latents, context, adm = empty(rows, 4, size.side, size.side), empty(rows, CONTEXT, 2048), empty(rows, 2816)
    counts = []
    for _ in range(2 if case.pictured else 1):
        with torch.no_grad(), fused_attention(), FlopCounterMode(display=False) as counter:
            unet(latents, empty(rows), context=context, y=adm, transformer_options=options)
        counts.append(counter.get_total_flops())
    return counts


def patched_options(case: Case, frames: int) -> dict[str, Any]:
    """The host's transformer_options of a UNet call, with the patches of a case installed."""
    from ..nodes.patching import attend

    story = story_conditioning(case, frames)
    call = SamplerCall(SIGMA, {(POSITIVE, STORY_UUID): story}, tuple(range(frames)), step=1, steps=2, story=story.story)
    options = {"cond_or_uncond": [NEGATIVE, POSITIVE], "uuids": [NEGATIVE_UUID, STORY_UUID], KEY: call}
    if case.owned:
        options["patches_replace"] = {"attn2": dict.fromkeys(BLOCKS, plain_replacement)}
    if case.masked:
        options["patches_replace"] = {"attn1": dict.fromkeys(OUTPUT, masked_replacement)}
        return options
    patches = []
    if case.weight is not None:
        patches.append(IdentityPreserving(case.weight, 0.0, 1.0, dict.fromkeys(BLOCKS)))
    if case.rate is not None:
        patches.append(ConsistentAttention(case.rate, case.anchors, 1, 0.0, 1.0, dict.fromkeys(OUTPUT), seed=0))
    if case.pictured:
        character = CharacterReference("", ((features_of(None, torch.zeros(257, 1280)), 1.0),), torch.zeros(1, 1, 3))
        people, regions = (character,) * case.pictured, (None,) * case.pictured
        blocks = dict.fromkeys(BLOCKS)
        patches.append(ImageConditioning(sdxl_adapter(), people, regions, 0.8, 1.0, 1.0, 0.0, 1.0, blocks))
    window = (SIGMA, SIGMA) if case.open else (SIGMA / 2, SIGMA / 4)
    run = StoryRun(tuple(ScheduledPatch(patch, *window) for patch in patches), attend)
    return run.installed(options, read_call(options, torch.empty(2 * frames, 4, 0, 0)))


def sdxl_adapter() -> StoryMakerAdapter:
    """StoryMaker's networks at full size on the meta device."""
    import comfy.ops

    def matrix(depth: int) -> torch.Tensor:
        return torch.empty(CHANNELS[depth], WIDTH, dtype=torch.float16, device="meta")

    ppr = PositionalPerceiverResampler(dtype=torch.float16, device="meta").state_dict()
    layers = {(*block, j): (matrix(d), matrix(d)) for block, d in BLOCKS.items() for j in range(d)}
    return StoryMakerAdapter(StoryMakerWeights(ppr, {}, layers), comfy.ops.manual_cast)


def story_conditioning(case: Case, frames: int) -> Conditioning:
    """A story with `case.identity` identity tokens; the other tokens are split between the frames."""
    starts = torch.linspace(1 + case.identity, CONTEXT - 1, frames + 1).long().tolist()
    spans = tuple(range(a, b) for a, b in zip(starts, starts[1:], strict=False))
    tokens = StoryTokens(range(1, 1 + case.identity), spans, CONTEXT - 1, CONTEXT)
    rows = tuple(StoryRow(frame, ("",), tokens, (tokens.identity,)) for frame in range(frames))
    return Conditioning(StoryCond(rows, CONTEXT), CONTEXT)


def plain_replacement(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
    """Another node's replacement, with the cost of the host's own attention."""
    from ..nodes.patching import attend

    return attend(q, k, v, options["n_heads"], None, options)


def masked_replacement(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
    """Consistent self-attention with a dense mask over all images' tokens, separately for negative and story."""
    from ..nodes.patching import attend

    images = q.shape[0] // len(options["cond_or_uncond"])
    seen = q.new_zeros(images, 1, 1, images * k.shape[1])
    return torch.cat(
        [
            attend(rows, *(x.flatten(0, 1).expand(images, -1, -1) for x in keys), options["n_heads"], seen, options)
            for rows, *keys in zip(*(x.split(images) for x in (q, k, v)), strict=True)
        ]
    )


def expected_extra(case: Case, size: Size) -> int:
    """Operations that a case adds, by formula: 4 N C per query row and added key."""
    if not case.open:
        return 0
    return _extra_of_ipca(case, size) + _extra_of_csa(case, size) + _extra_of_storymaker(case, size)


def expected_once(case: Case) -> int:
    """Operations that StoryMaker adds to a run's first step: image tokens, and their keys and values in each layer."""
    tokens = TOKENS * (case.pictured + 1)
    with FlopCounterMode(display=False) as counter:
        sdxl_adapter().ppr.unconditional(case.pictured)
    projections = sum(2 * 2 * tokens * WIDTH * CHANNELS[d] * d for d in BLOCKS.values())
    return 2 * (counter.get_total_flops() + projections)


def tokens_of(depth: int, size: Size) -> int:
    """Number of tokens of an image in the level with `depth` layers."""
    return (size.side >> HALVINGS[depth]) ** 2


def _extra_of_ipca(case: Case, size: Size) -> int:
    """A weight p/q repeats the columns of start token and identity p times and all others q times in the story's rows,
    up to a denominator of 4; a finer weight is a mask and adds nothing. Around another replacement, attention runs
    again over the whole batch, with repeated columns for every denominator.
    """
    if case.weight is None:
        return 0
    counted = 1 + case.identity
    p, q = case.weight.as_integer_ratio()
    if case.owned:
        columns = 2 * (q * CONTEXT + (p - q) * counted)
    else:
        columns = (q - 1) * CONTEXT + (p - q) * counted if q <= COUNTED_DENOMINATOR else 0
    return sum(4 * size.frames * columns * d * tokens_of(d, size) * CHANNELS[d] for d in BLOCKS.values())


def _extra_of_csa(case: Case, size: Size) -> int:
    """Every image attends to floor(rate N) tokens (N with a mask) of each other image, or only of other anchors, in the
    negative and the story.
    """
    if case.rate is None:
        return 0
    anchors = case.anchors or size.frames
    pairs = sum(anchors - (image < anchors) for image in range(size.frames))
    rate = 1.0 if case.masked else case.rate
    seen = {depth: math.floor(rate * tokens_of(depth, size)) for depth in CHANNELS}
    return sum(4 * 2 * pairs * seen[d] * d * tokens_of(d, size) * CHANNELS[d] for d in OUTPUT.values())


def _extra_of_storymaker(case: Case, size: Size) -> int:
    """All rows of negative and story attend to 20 tokens of the background and of each character."""
    tokens = TOKENS * (case.pictured + 1) if case.pictured else 0
    return sum(4 * 2 * size.frames * tokens * d * tokens_of(d, size) * CHANNELS[d] for d in BLOCKS.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=4, help="images in the batch (default 4)")
    parser.add_argument("--pixels", type=int, default=1024, help="side of the square images (default 1024)")
    arguments = parser.parse_args()
    size = Size(arguments.frames, arguments.pixels // 8)
    version = enter_comfyui()

    unet = sdxl_unet()
    plain = {owned: count_step(unet, Case("", owned=owned), size) for owned in (False, True)}
    rows = [["unpatched", f"{plain[False] / 1e12:.4f}", "", "", "1"]]
    for case in CASES:
        flops = count_step(unet, case, size)
        extra, expected = flops - plain[case.owned], expected_extra(case, size)
        ratio = flops / plain[case.owned]
        rows.append([case.name, f"{flops / 1e12:.4f}", f"{extra / 1e9:.3f}", f"{expected / 1e9:.3f}", f"{ratio:.6f}"])
    print(f"SDXL, {arguments.pixels} x {arguments.pixels}, {size.frames} frames with negative, ComfyUI {version}\n")
    print(table(["one step", "TFLOP", "extra GFLOP", "expected", "ratio"], rows))


if __name__ == "__main__":
    main()
