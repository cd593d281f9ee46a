"""Positional-aware Perceiver Resampler (PPR) of StoryMaker (arXiv 2409.12576): image tokens for characters.

The face's identity vector supplies queries over the face features (4 tokens), learned queries attend to the features of
the whole character (16 tokens), and a learned embedding per character keeps several of them apart. Background tokens
come first. Modules and parameters are named as in the part `image_proj_model` of StoryMaker's file.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

CHARACTERS = 3
"""Number of learned character embeddings; the paper shows one or two characters."""
FACE_TOKENS, APPEARANCE_TOKENS = 4, 16
TOKENS = FACE_TOKENS + APPEARANCE_TOKENS
"""Tokens per character, and for the background."""
FEATURES = 257
"""CLIP ViT-H/14's tokens per image: the class token and 16 x 16 patches."""


class PerceiverAttention(nn.Module):
    """Queries attend to a memory and to each other. [B, Q, width], [B, M, width] -> [B, Q, width]."""

    def __init__(self, width: int, head_width: int, operations: Any, **where: Any):
        super().__init__()
        self.head_width = head_width
        self.norm1 = operations.LayerNorm(width, **where)
        self.norm2 = operations.LayerNorm(width, **where)
        self.to_q = operations.Linear(width, width, bias=False, **where)
        self.to_kv = operations.Linear(width, 2 * width, bias=False, **where)
        self.to_out = operations.Linear(width, width, bias=False, **where)

    def forward(self, queries: Tensor, memory: Tensor) -> Tensor:
        queries, memory = self.norm2(queries), self.norm1(memory)
        q = self.to_q(queries)
        k, v = self.to_kv(torch.cat([memory, queries], dim=1)).chunk(2, dim=-1)
        q, k, v = (rearrange(part, "b n (h d) -> b h n d", d=self.head_width) for part in (q, k, v))
        scale = self.head_width**-0.25  # on both q and k, so that their product fits half precision
        precise = torch.promote_types(q.dtype, torch.float32)
        weights = torch.softmax((q * scale) @ (k * scale).mT, dim=-1, dtype=precise).to(v.dtype)
        return self.to_out(rearrange(weights @ v, "b h n d -> b n (h d)"))


class Resampler(nn.Module):
    """Perceiver resampler: a few queries attend to a memory. [B, Q, width], [B, M, memory_width] -> [B, Q, out_width].

    learned: number of learned queries in the parameter `latents` [1, learned, width], 0 for none.
    """

    def __init__(
        self,
        width: int,
        memory_width: int,
        out_width: int,
        depth: int,
        head_width: int,
        operations: Any,
        learned: int = 0,
        **where: Any,
    ):
        super().__init__()
        if learned:
            self.latents = nn.Parameter(torch.zeros(1, learned, width, **where))
        self.proj_in = operations.Linear(memory_width, width, **where)
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    PerceiverAttention(width, head_width, operations, **where),
                    nn.Sequential(
                        operations.LayerNorm(width, **where),
                        operations.Linear(width, 4 * width, bias=False, **where),
                        nn.GELU(),
                        operations.Linear(4 * width, width, bias=False, **where),
                    ),
                ]
            )
            for _ in range(depth)
        )
        self.proj_out = operations.Linear(width, out_width, **where)
        self.norm_out = operations.LayerNorm(out_width, **where)

    def forward(self, queries: Tensor, memory: Tensor) -> Tensor:
        memory = self.proj_in(memory)
        for attention, feed_forward in self.layers:
            queries = queries + attention(queries, memory)
            queries = queries + feed_forward(queries)
        return self.norm_out(self.proj_out(queries))


class PositionalPerceiverResampler(nn.Module):
    """StoryMaker's network from identity vectors and CLIP features to image tokens, 304.5 M parameters.

    Computes in the dtype of its inputs if `operations` (a namespace with Linear and LayerNorm, like torch.nn) casts
    weights; otherwise inputs must have the weights' dtype. A new instance is untrained; load weights from a file. The
    default sizes are StoryMaker's; tests use smaller ones, in which head_width divides width and image_width.
    """

    def __init__(
        self,
        *,
        width: int = 2048,
        image_width: int = 1280,
        id_width: int = 512,
        depth: int = 4,
        head_width: int = 64,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        operations: Any = nn,
    ):
        super().__init__()
        where = {"dtype": dtype, "device": device}
        sizes = {"out_width": width, "depth": depth, "head_width": head_width, "operations": operations, **where}
        self.id_width, self.image_width = id_width, image_width
        self.pos_embed = nn.Parameter(torch.zeros(CHARACTERS, TOKENS, width, **where))
        self.bg_embed = nn.Parameter(torch.zeros(1, TOKENS, width, **where))
        self.proj = nn.Sequential(
            operations.Linear(id_width, 2 * id_width, **where),
            nn.GELU(),
            operations.Linear(2 * id_width, FACE_TOKENS * width, **where),
        )
        self.norm = operations.LayerNorm(width, **where)
        self.perceiver_resampler = Resampler(width, image_width, **sizes)
        self.resample = Resampler(image_width, image_width, learned=APPEARANCE_TOKENS, **sizes)
        self.proj_out = operations.Linear(width, width, **where)
        self.norm_out = operations.LayerNorm(width, **where)

    def forward(
        self,
        id_embeds: Tensor,
        character: Tensor,
        face: Tensor,
        face_strength: float | Tensor = 1.0,
        appearance_strength: float | Tensor = 1.0,
        positions: Sequence[int] | None = None,
    ) -> Tensor:
        """Image tokens for an image with B characters: [1, 20 * (B + 1), width], the background's first.

        Arguments as in `character_tokens`. Raises ValueError unless there are 1 to 3 characters.
        """
        if not 1 <= len(id_embeds) <= CHARACTERS:
            raise ValueError(
                f"StoryMaker supports 1 to {CHARACTERS} characters per image, got {len(id_embeds)}: connect 1 to "
                f"{CHARACTERS} characters."
            )
        return self.with_background(
            self.character_tokens(id_embeds, character, face, face_strength, appearance_strength, positions)
        )

    def character_tokens(
        self,
        id_embeds: Tensor,
        character: Tensor,
        face: Tensor,
        face_strength: float | Tensor = 1.0,
        appearance_strength: float | Tensor = 1.0,
        positions: Sequence[int] | None = None,
    ) -> Tensor:
        """Tokens of each character without the background's: [B, 20, width], 4 for the face, 16 for the appearance.

        id_embeds: [B, id_width] unit vectors of the faces (ArcFace); character, face: [B, 257, image_width] CLIP
        ViT-H/14 features, penultimate layer, of the character and of the aligned face; face_strength,
        appearance_strength: numbers or [B] that multiply these tokens before the character embeddings are added; 0
        drops them, as training did at times; positions: the embedding of each character, 0 to 2, default its index. As
        in StoryMaker's program, where the paper's "MLP" (arXiv 2409.12576) is one linear layer and a norm. Raises
        ValueError unless there is one position from 0 to 2 per character.
        """
        positions = list(range(len(id_embeds)) if positions is None else positions)
        if len(positions) != len(id_embeds) or not set(positions) <= set(range(CHARACTERS)):
            raise ValueError(
                f"StoryMaker needs a position from 0 to {CHARACTERS - 1} for each of {len(id_embeds)} characters, got "
                f"{positions}: assign one to each character."
            )
        queries = self.norm(rearrange(self.proj(id_embeds), "b (n c) -> b n c", n=FACE_TOKENS))
        of_face = queries + self.perceiver_resampler(queries, face)
        latents = self.resample.latents.to(character).expand(len(character), -1, -1)
        of_appearance = self.resample(latents, character)
        tokens = torch.cat([_times(of_face, face_strength), _times(of_appearance, appearance_strength)], dim=1)
        tokens = tokens + self.pos_embed[positions].to(tokens)
        return tokens + self.norm_out(self.proj_out(tokens))

    def with_background(self, tokens: Tensor) -> Tensor:
        """The background's tokens, then those of the characters: [B, 20, width] -> [1, 20 * (B + 1), width]."""
        return rearrange(torch.cat([self.bg_embed.to(tokens), tokens]), "b n c -> 1 (b n) c")

    def unconditional(
        self,
        characters: int,
        positions: Sequence[int] | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Tokens for the negative: those of zero features, with the same background tokens.

        dtype, device: of the computation, default those of the weights. Raises ValueError as in `forward`.
        """
        where = {"dtype": dtype or self.bg_embed.dtype, "device": device or self.bg_embed.device}
        picture = torch.zeros(characters, FEATURES, self.image_width, **where)
        return self(torch.zeros(characters, self.id_width, **where), picture, picture, positions=positions)


def _times(tokens: Tensor, strength: float | Tensor) -> Tensor:
    return tokens * torch.as_tensor(strength).to(tokens).view(-1, 1, 1)
