"""Decoupled cross-attention: how StoryMaker (arXiv 2409.12576) adds image tokens to a UNet's text tokens.

Text and images have separate keys and values; the layer adds the results of the two attentions to the same queries.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

Attend = Callable[..., Tensor]


def decoupled_cross_attention(
    text_out: Tensor,
    q: Tensor,
    k_image: Tensor,
    v_image: Tensor,
    heads: int,
    scale: float | Tensor,
    attend: Attend,
) -> Tensor:
    """text_out + scale * attention of q to the image tokens, before the layer's output projection.

    text_out, q: [B, N, C], the text attention and its queries; k_image, v_image: [B, M, C], or [1, M, C] for all
    rows; scale: a number, or a tensor that broadcasts to [B, N, 1], such as a mask of the region in which the tokens
    act; attend(q, k, v, heads) -> [B, N, C]. The number 0 returns text_out itself and calls nothing. StoryMaker
    (arXiv 2409.12576), equation 8, as in its published code: K and V from full matrices of their own.
    """
    if not isinstance(scale, Tensor) and scale == 0:
        return text_out
    k, v = (part.expand(q.shape[0], -1, -1) for part in (k_image, v_image))
    if isinstance(scale, Tensor):
        scale = scale.to(text_out)
    return text_out + scale * attend(q, k, v, heads)
