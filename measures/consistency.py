"""How similar the frames of a story are, and how well each matches its text: the results and their formulas.

CLIP-I is the mean cosine over all pairs of image features, CLIP-T the cosine of each image and its text, DreamSim a
mean pairwise distance: the protocol of One-Prompt-One-Story (arXiv 2501.13554), with CLIP-T scaled as CLIPScore (arXiv
2104.08718), but without clipping at zero. `measures.measuring` computes the features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

FORMAT, VERSION = "storyloom-consistency", 1
"""Identifiers that `Consistency.to_json` writes."""
PLACEHOLDER = "{prompt}"
NAN = float("nan")


class Convention(NamedTuple):
    """A definition of alignment: factor * cosine(image, template filled with the prompt)."""

    factor: float
    template: str


CONVENTIONS = {
    "clip_score": Convention(2.5, f"A photo depicts {PLACEHOLDER}"),
    "clip_score_file_name": Convention(2.5, f"A photo depicts {PLACEHOLDER}.jpg"),
    "cosine": Convention(1.0, PLACEHOLDER),
}
"""clip_score_file_name is the published script's, which takes the prompt from the image's file name and its suffix."""


LABELS = {"clip_i": "CLIP-I", "clip_t": "CLIP-T", "face": "Face similarity", "dreamsim": "DreamSim distance"}
"""Names of the measures in tables, unless the encoder provides its own."""


@dataclass(frozen=True, eq=False)
class Consistency:
    """Measured results for N images.

    clip_i    [N, N] cosines of image features, None if not measured
    clip_t    convention -> [N] alignment with the prompts, nan for a prompt that the encoder does not understand; empty
              without text
    faces     [N, N] cosines of face identities, nan in the rows of images without a face; None if not measured
    dreamsim  [N, N] distances, lower means more similar; None if not measured
    encoders  measure ("clip_i", "clip_t", "face", "dreamsim") -> name of its encoder
    prompts   one per image, or none
    labels    measure -> its name in tables and plots
    """

    frames: int
    clip_i: Tensor | None = None
    clip_t: dict[str, Tensor] = field(default_factory=dict)
    faces: Tensor | None = None
    dreamsim: Tensor | None = None
    encoders: dict[str, str] = field(default_factory=dict)
    prompts: tuple[str, ...] = ()
    labels: dict[str, str] = field(default_factory=lambda: dict(LABELS))

    @property
    def matrices(self) -> dict[str, Tensor]:
        """The available pairwise measures by name."""
        matrices = {"clip_i": self.clip_i, "face": self.faces, "dreamsim": self.dreamsim}
        return {name: matrix for name, matrix in matrices.items() if matrix is not None}

    @property
    def faceless(self) -> tuple[int, ...]:
        """Indices of the images in which no face was found; empty if faces were not measured."""
        return () if self.faces is None else tuple(torch.nonzero(self.faces.diagonal().isnan()).flatten().tolist())

    def label(self, measure: str) -> str:
        """The name of a measure in `means`, such as "CLIP-T (clip_score)"."""
        convention = measure.removeprefix("clip_t_")
        if convention == measure:
            return self.labels[measure]
        return f"{self.labels['clip_t']} ({convention})" if len(self.clip_t) > 1 else self.labels["clip_t"]

    def means(self) -> dict[str, float]:
        """The mean of each available measure; nan if no pair or frame has a value.

        clip_i, face, dreamsim: mean over the pairs; clip_t_<convention>: mean over the frames.
        """
        order = ("clip_i", *(f"clip_t_{name}" for name in self.clip_t), "face", "dreamsim")
        values = {name: mean_pairwise(matrix) for name, matrix in self.matrices.items()}
        values |= {f"clip_t_{name}": _mean(row) for name, row in self.clip_t.items()}
        return {name: values[name] for name in order if name in values}

    def to_json(self) -> dict[str, Any]:
        """All results as plain data for a JSON file; values that are not finite become null.

        {"format": "storyloom-consistency", "version": 1, "frames": N, "prompts": [...], "encoders": {measure: name},
        "labels": {measure: text}, "means": {...}, "faceless": [numbers from 1], "clip_i" | "face" | "dreamsim":
        [[...]], "clip_t": {convention: [...]}}. Matrices that were not measured are left out.
        """
        return {
            "format": FORMAT,
            "version": VERSION,
            "frames": self.frames,
            "prompts": list(self.prompts),
            "encoders": dict(self.encoders),
            "labels": {name: self.labels[name] for name in self.encoders},
            "means": {name: _plain(value) for name, value in self.means().items()},
            "faceless": [number + 1 for number in self.faceless],
            **{name: _plain(matrix.tolist()) for name, matrix in self.matrices.items()},
            "clip_t": {name: _plain(row.tolist()) for name, row in self.clip_t.items()},
        }

    def table(self) -> str:
        """The results as text: one line per measure with its mean and range, then one line per frame."""
        summary = [("", "mean", "lowest", "highest", "measured by")]
        for name, mean in self.means().items():
            kind = "clip_t" if name.startswith("clip_t_") else name
            values = self._values(name)
            ends = (values.min().item(), values.max().item()) if len(values) else (NAN, NAN)
            summary.append((self.label(name), *map(_number, (mean, *ends)), self.encoders.get(kind, "")))
        columns = {self.label(f"clip_t_{name}"): row for name, row in self.clip_t.items()}
        columns |= {f"{self.labels[name]}, others": others(matrix) for name, matrix in self.matrices.items()}
        frames = [("frame", *columns, *(["prompt"] if self.prompts else []))]
        for number in range(self.frames):
            words = [_short(self.prompts[number])] if self.prompts else []
            frames.append((f"{number + 1}", *(_number(row[number].item()) for row in columns.values()), *words))
        parts = [f"{self.frames} frames", _columns(summary, last_left=True)]
        if self.frames == 1 and self.matrices:
            parts.append("A single frame has no pairs: pairwise measures need at least 2 frames.")
        if self.faces is not None:
            parts.append(f"Faces: found in {self.frames - len(self.faceless)} of {self.frames} frames.")
        unknown = max((int(row.isnan().sum()) for row in self.clip_t.values()), default=0)
        if unknown:
            parts.append(f"Text: {unknown} of {self.frames} prompts were not understood and are not counted.")
        return "\n\n".join([*parts, _columns(frames, last_left=bool(self.prompts))])

    def _values(self, measure: str) -> Tensor:
        """The finite values that `means` averages."""
        if measure in self.matrices:
            return _pairs(self.matrices[measure])
        row = self.clip_t[measure.removeprefix("clip_t_")].double()
        return row[row.isfinite()]


def text_of(prompt: str, convention: str) -> str:
    """The text to encode for a prompt. convention: a key of CONVENTIONS."""
    return CONVENTIONS[convention].template.replace(PLACEHOLDER, prompt)


def pairwise(features: Tensor) -> Tensor:
    """Cosines of all pairs of features [N, D]: float64 [N, N]. Rows of nan or zeros give nan."""
    unit = _unit(features)
    return unit @ unit.T


def mean_pairwise(matrix: Tensor) -> float:
    """Mean of the finite entries i < j of a matrix [N, N]; nan if there are none."""
    return _mean(_pairs(matrix))


def others(matrix: Tensor) -> Tensor:
    """Mean of the finite off-diagonal entries in each row of a matrix [N, N]; nan if there are none."""
    alone = matrix.double().clone()
    alone.fill_diagonal_(NAN)
    return alone.where(alone.isfinite(), NAN).nanmean(1)


def alignment(images: Tensor, texts: Tensor, convention: str) -> Tensor:
    """factor * cosine of each image [N, D] and its text [N, D]: float64 [N]. Not clipped at zero."""
    return CONVENTIONS[convention].factor * (_unit(images) * _unit(texts)).sum(1)


def _unit(features: Tensor) -> Tensor:
    features = features.double()
    return features / features.norm(dim=1, keepdim=True)


def _pairs(matrix: Tensor) -> Tensor:
    """The finite entries i < j of a matrix."""
    row, column = torch.triu_indices(*matrix.shape, offset=1)
    entries = matrix.double()[row, column]
    return entries[entries.isfinite()]


def _mean(values: Tensor) -> float:
    finite = values.double()[values.isfinite()]
    return finite.mean().item() if len(finite) else NAN


def _plain(value: Any) -> Any:
    """Numbers and lists of them, with None for values that are not finite."""
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return value if math.isfinite(value) else None


def _number(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "-"


def _short(text: str, limit: int = 60) -> str:
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def _columns(rows: Sequence[Sequence[str]], last_left: bool) -> str:
    """Rows of text as a table: the first column left-aligned, the others right-aligned, the last left if set."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    last = len(widths) - 1

    def cell(text: str, at: int) -> str:
        left = at == 0 or (last_left and at == last)
        return text.ljust(widths[at]) if left else text.rjust(widths[at])

    return "\n".join("  ".join(cell(text, at) for at, text in enumerate(row)).rstrip() for row in rows)
