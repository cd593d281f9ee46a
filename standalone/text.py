"""SDXL's text side without a hub: token ids from the vocabulary that open_clip ships, encoders from transformers.

Token ids and encodings equal those of ComfyUI's SDXL CLIP. Weights such as (snow:1.2) are plain text, as in the
published methods, and embeddings are not supported.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from ..prompts.tokens import END, PADDING, ROOM, START, Tokens


def token_ids(text: str) -> list[int]:
    """Token ids of a text of any length, without start and end tokens."""
    return _vocabulary().encode(text.replace("\\(", "(").replace("\\)", ")"))


def tokenize(text: str) -> Tokens:
    """Windows of 77 (token, weight, word id) for both encoders; the word id is 0 for start, end and padding."""
    ids = token_ids(text)
    windows = [ids[i : i + ROOM] for i in range(0, len(ids), ROOM)] or [[]]
    return {key: [_window(words, padding) for words in windows] for key, padding in PADDING.items()}


def _window(words: Sequence[int], padding: int) -> list[tuple[int, float, int]]:
    frame = [(START, 1.0, 0), *((token, 1.0, 1) for token in words), (END, 1.0, 0)]
    return frame + [(padding, 1.0, 0)] * (ROOM + 2 - len(frame))


def spelling() -> Mapping[int, str]:
    """Token id -> its letters, with "</w>" at the end of a word."""
    return _vocabulary().decoder


@lru_cache(maxsize=1)
def _vocabulary():
    from open_clip.tokenizer import SimpleTokenizer

    vocabulary = SimpleTokenizer()
    vocabulary.clean_fn = _clean
    return vocabulary


def _clean(text: str) -> str:
    """Clean text as CLIP's tokenizer in transformers does; open_clip's would also repair encodings and HTML."""
    return " ".join(unicodedata.normalize("NFC", text).split()).lower()


class TextEncoders:
    """CLIP-L and CLIP-G of SDXL.

    clip_l: `transformers.CLIPTextModel`; clip_g: `transformers.CLIPTextModelWithProjection`; device: where they run.
    """

    def __init__(self, clip_l: nn.Module, clip_g: nn.Module, device: torch.device):
        self.encoders = {"l": clip_l, "g": clip_g}
        self.device = device

    @torch.no_grad()
    def __call__(self, tokens: Tokens) -> tuple[Tensor, dict[str, Any]]:
        """Context [1, 77 * windows, 2048] from both encoders' penultimate layer, and the first window's pooled output.

        tokens: as `tokenize` returns them. `pooled_output` is [1, 1280]; both are float32 on the CPU.
        """
        encoded = {key: self._encode(key, windows) for key, windows in tokens.items()}
        contexts = [encoded[key].hidden_states[-2].float().cpu().flatten(0, 1) for key in ("l", "g")]
        return torch.cat(contexts, dim=-1)[None], {"pooled_output": encoded["g"].text_embeds[:1].float().cpu()}

    def _encode(self, key: str, windows):
        ids = torch.tensor([[token for token, _, _ in window] for window in windows], device=self.device)
        return self.encoders[key](ids, output_hidden_states=True)
