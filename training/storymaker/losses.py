"""StoryMaker's losses (arXiv 2409.12576): of diffusion, of attention (equations 9 to 12), and of identity."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .batch import places


def diffusion_loss(predicted: Tensor, target: Tensor, masks: Tensor, foreground: float = 0.0) -> Tensor:
    """Mean squared error, weighted by 1 + foreground * m, where m is 1 on the characters. At least float32.

    predicted, target: [B, 4, h, w]; masks: [B, 3, H, W], averaged to h x w. The paper has no weight, StoryMaker's
    program has 5.
    """
    error = (_precise(predicted) - _precise(target)).square()
    if foreground:
        error = error * (1 + foreground * resized(union(masks), error.shape[-2:]))
    return error.mean()


def attention_loss(maps: Sequence[Tensor], masks: Tensor, counts: Sequence[int], per_layer: bool = True) -> Tensor:
    """How far the image tokens' attention is from the characters' masks; mean over the pictures.

    maps: [B, 4, h, w] of each layer, probabilities summed over the tokens of the background and of each character;
    masks: [B, 3, H, W] of each character; counts: number of characters N in each picture. A picture's loss is the sum
    over its characters and its background of the mean squared difference between map and mask; the background's mask
    is what the characters leave.

    per_layer: the paper's form (equations 9 to 12): each layer's loss at its own size, divided by N + 1, and the mean
    over all layers. Otherwise the published program's: the mean map of the layers with the fewest pixels (H/32 of
    SDXL's pictures) at twice their size, and the sum divided by N.
    """
    precise = torch.promote_types(masks.dtype, torch.float32)
    masks = masks.to(precise)
    targets = torch.cat([1 - union(masks), masks], 1)
    count = torch.tensor(counts, device=masks.device)
    present = torch.arange(targets.shape[1], device=masks.device) <= count[:, None]
    divisor = (count + 1 if per_layer else count).to(precise)

    def error(of_layer: Tensor, wanted: Tensor) -> Tensor:
        each = (of_layer.to(precise) - wanted).square().mean((-2, -1))
        return ((each * present).sum(1) / divisor).mean()

    if per_layer:
        sized = {size: resized(targets, size) for size in {each.shape[-2:] for each in maps}}
        return torch.stack([error(each, sized[each.shape[-2:]]) for each in maps]).mean()
    height, width = min((each.shape[-2:] for each in maps), key=lambda size: size[0] * size[1])
    coarse = [each.to(precise) for each in maps if each.shape[-2:] == (height, width)]
    mean = bilinear(torch.stack(coarse).mean(0), (2 * height, 2 * width))
    return error(mean, bilinear(resized(targets, (4 * height, 4 * width)), (2 * height, 2 * width)))


def identity_loss(
    latents: Tensor,
    decode: Callable[[Tensor], Tensor],
    id_embeds: Tensor,
    crops: Tensor,
    counts: Sequence[int],
    t: Tensor,
    network: Callable[[Tensor], Tensor],
    latest: int = 250,
    side: int = 112,
) -> Tensor:
    """Mean of 1 - cos between the identity of each drawn face and that of its reference; 0 if there is none to compare.

    latents: [B, 4, h, w], the clean ones that the prediction implies; decode: from latents to pictures [K, 3, H, W] in
    -1..1, differentiable; id_embeds: [M, D] of the references; crops: [M, 2, 3] matrices for `affine_grid` from an
    aligned face crop to its picture, zeros where no face is visible; counts: number of characters in each picture; t:
    [B] timesteps, of which only those up to `latest` count, because noisier latents imply no face; network: from
    aligned crops [K, 3, side, side] in -1..1 to [K, D], differentiable (ArcFace). The paper mentions this loss without
    an equation; the form is the published program's.
    """
    late, visible = (t <= latest).tolist(), crops.flatten(1).any(1).tolist()
    chosen = [(m, b) for m, (b, _) in enumerate(places(counts)) if late[b] and visible[m]]
    if not chosen:
        return latents.new_zeros(())
    needed = sorted({b for _, b in chosen})
    rows = torch.tensor([needed.index(b) for _, b in chosen], device=latents.device)
    characters = torch.tensor([m for m, _ in chosen], device=latents.device)
    pictures = _precise(decode(latents[needed]))[rows]
    sampled = F.affine_grid(crops[characters].to(pictures), (len(chosen), 3, side, side), align_corners=False)
    faces = F.grid_sample(pictures, sampled, align_corners=False)
    likeness = F.cosine_similarity(_precise(network(faces)), id_embeds[characters].to(pictures), dim=-1)
    return (1 - likeness).mean()


def union(masks: Tensor) -> Tensor:
    """Where any character is: [B, 3, H, W] -> [B, 1, H, W] in 0..1."""
    return masks.sum(1, keepdim=True).clamp(0, 1)


def resized(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Masks at another size: means of the areas that each new pixel covers."""
    return F.interpolate(masks, tuple(size), mode="area")


def bilinear(maps: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(maps, size, mode="bilinear", align_corners=False)


def _precise(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
