"""StoryMaker's networks with their weights: image tokens for characters, and their keys and values in each layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .characters import CharacterReference
from .ppr import CHARACTERS, PositionalPerceiverResampler
from .weights import Key, StoryMakerWeights


class StoryMakerAdapter(nn.Module):
    """The token network and the projections of 70 cross-attention layers, in the sizes of the weights.

    operations: a namespace with Linear and LayerNorm, like torch.nn, whose layers load and cast weights. The weights
    are used as they are, not copied.
    """

    def __init__(self, weights: StoryMakerWeights, operations: Any = nn):
        super().__init__()
        ppr = weights.ppr
        self.ppr = PositionalPerceiverResampler(
            width=ppr["pos_embed"].shape[-1],
            image_width=ppr["resample.latents"].shape[-1],
            id_width=ppr["proj.0.weight"].shape[-1],
            depth=sum(name.startswith("resample.layers.") and name.endswith(".0.to_q.weight") for name in ppr),
            dtype=ppr["pos_embed"].dtype,
            device="meta",
            operations=operations,
        )
        self.projections = nn.ModuleDict()
        tensors = {f"ppr.{name}": tensor for name, tensor in ppr.items()}
        for key, pair in weights.image_kv.items():
            for which, matrix in zip("kv", pair, strict=True):
                width, context = matrix.shape
                self.projections[f"{_name(key)}_{which}"] = operations.Linear(
                    context, width, bias=False, dtype=matrix.dtype, device="meta"
                )
                tensors[f"projections.{_name(key)}_{which}.weight"] = matrix
        self.load_state_dict(tensors, assign=True)
        self.requires_grad_(False)
        self.widths = {key: k.shape[0] for key, (k, _) in weights.image_kv.items()}
        """Channels of each cross-attention layer."""
        self.context = next(iter(weights.image_kv.values()))[0].shape[1]
        """Width of the image tokens and of the text tokens it was trained with."""

    def check_characters(self, characters: Sequence[CharacterReference]) -> None:
        """Raise ValueError if a character's features do not have this adapter's widths."""
        face, picture = self.ppr.id_width, self.ppr.image_width
        for character in characters:
            for features, _ in character.parts:
                widths = {features.face.shape[-1], features.character.shape[-1]}
                if features.id_embed.shape != (face,) or widths != {picture}:
                    listed = " and ".join(f"{width}" for width in sorted(widths))
                    raise ValueError(
                        f'The character "{character.name}" has a face vector of {len(features.id_embed)} numbers and '
                        f"features of width {listed}, but this adapter needs {face} and {picture}: make the character "
                        "again with Character from image."
                    )

    def tokens(
        self,
        characters: Sequence[CharacterReference],
        face_strength: float,
        appearance_strength: float,
        device: torch.device,
    ) -> tuple[Tensor, Tensor]:
        """Image tokens [1, 20 * (B + 1), context] of B characters for the positive, and of zero features for the
        negative. Both are float32, or float64 if the weights are.

        Each character's position is its index. A blend is the mean of its parts' tokens weighted by their shares. Faces
        and appearances that a character lacks are dropped, as they were at times in training. Raises ValueError unless
        there are 1 to 3 characters.
        """
        if not 1 <= len(characters) <= CHARACTERS:
            raise ValueError(f"StoryMaker supports 1 to {CHARACTERS} characters per image, got {len(characters)}.")
        dtype, own = torch.promote_types(self.ppr.bg_embed.dtype, torch.float32), []
        for position, character in enumerate(characters):
            features, shares = zip(*character.parts, strict=True)
            inputs = [
                torch.stack([getattr(each, name) for each in features]).to(device, dtype)
                for name in ("id_embed", "character", "face")
            ]
            strengths = (
                torch.tensor([face_strength * each.has_face for each in features]),
                torch.tensor([appearance_strength * each.has_character for each in features]),
            )
            tokens = self.ppr.character_tokens(*inputs, *strengths, positions=[position] * len(features))
            own.append(torch.einsum("p,pnc->nc", torch.tensor(shares).to(tokens), tokens))
        return (
            self.ppr.with_background(torch.stack(own)),
            self.ppr.unconditional(len(characters), dtype=dtype, device=device),
        )

    def keys_values(self, layer: Key, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [1, M, C] of one layer for tokens [1, M, context]."""
        return tuple(self.projections[f"{_name(layer)}_{which}"](tokens) for which in "kv")


def _name(key: Key) -> str:
    return "_".join(map(str, key))
