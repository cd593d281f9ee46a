"""Did it work? How alike the frames of a story are, and how well each shows what its text says.

CLIP-I is the mean cosine of all pairs of image features, CLIP-T the cosine of each image and its text, DreamSim a mean
pairwise distance: the protocol of One-Prompt-One-Story (arXiv 2501.13554), with CLIP-T scaled as CLIPScore (arXiv
2104.08718) is, without its cut at zero. Encoders come in as arguments; see `measures/encoders.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

FORMAT, VERSION = "storyloom-consistency", 1
"""What `Consistency.to_json` says it is."""
PLACEHOLDER = "{prompt}"
Background = Literal["noise", "grey", "white"]
BACKGROUNDS: tuple[str, ...] = get_args(Background)
GREY = 130 / 255
"""The grey that the published script has behind a cut-out character before it draws noise there."""
CHUNK = 8
"""Pictures that are encoded at a time, so that 100 large frames fit into memory."""
NAN = float("nan")


class Convention(NamedTuple):
    """How an alignment is counted: factor * cosine(image, template with the prompt)."""

    factor: float
    template: str


CONVENTIONS = {
    "clip_score": Convention(2.5, f"A photo depicts {PLACEHOLDER}"),
    "clip_score_file_name": Convention(2.5, f"A photo depicts {PLACEHOLDER}.jpg"),
    "cosine": Convention(1.0, PLACEHOLDER),
}
"""clip_score_file_name is the published script's, which takes the prompt from the picture's file name with its end."""
LABELS = {"clip_i": "CLIP-I", "clip_t": "CLIP-T", "face": "Face similarity", "dreamsim": "DreamSim distance"}
"""What tables call the measures where the encoder says nothing else."""


@dataclass(frozen=True, eq=False)
class Consistency:
    """What was measured of N pictures.

    clip_i    [N, N] cosines of image features, None if not measured
    clip_t    convention -> [N] alignment with the prompts, nan for a prompt that the encoder does not understand; empty
              without text
    faces     [N, N] cosines of face identities, nan in the rows of pictures without a face; None if not measured
    dreamsim  [N, N] distances, lower is more alike; None if not measured
    encoders  measure ("clip_i", "clip_t", "face", "dreamsim") -> what measured it
    prompts   one per picture, or none
    labels    measure -> what tables and pictures call it
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
        """The pairwise measures that there are, by name."""
        found = {"clip_i": self.clip_i, "face": self.faces, "dreamsim": self.dreamsim}
        return {name: matrix for name, matrix in found.items() if matrix is not None}

    @property
    def faceless(self) -> tuple[int, ...]:
        """Numbers, from 0, of the pictures in which faces were looked for and none was found."""
        return () if self.faces is None else tuple(torch.nonzero(self.faces.diagonal().isnan()).flatten().tolist())

    def label(self, measure: str) -> str:
        """What a measure of `means` is called: "CLIP-T (clip_score)"."""
        convention = measure.removeprefix("clip_t_")
        if convention == measure:
            return self.labels[measure]
        return f"{self.labels['clip_t']} ({convention})" if len(self.clip_t) > 1 else self.labels["clip_t"]

    def means(self) -> dict[str, float]:
        """One number for each measure that there is; nan where no pair and no frame has one.

        clip_i, face, dreamsim: mean over the pairs; clip_t_<convention>: mean over the frames.
        """
        order = ("clip_i", *(f"clip_t_{name}" for name in self.clip_t), "face", "dreamsim")
        values = {name: mean_pairwise(matrix) for name, matrix in self.matrices.items()}
        values |= {f"clip_t_{name}": _mean(row) for name, row in self.clip_t.items()}
        return {name: values[name] for name in order if name in values}

    def to_json(self) -> dict[str, Any]:
        """Everything as plain data for a JSON file; what is not a number is null.

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
        """The numbers as text: a line per measure with its mean and ends, then a line per frame."""
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
        unheard = max((int(row.isnan().sum()) for row in self.clip_t.values()), default=0)
        if unheard:
            parts.append(f"Text: {unheard} of {self.frames} prompts were not understood and are not counted.")
        return "\n\n".join([*parts, _columns(frames, last_left=bool(self.prompts))])

    def _values(self, measure: str) -> Tensor:
        """The finite single values whose mean `means` tells."""
        if measure in self.matrices:
            return _pairs(self.matrices[measure])
        row = self.clip_t[measure.removeprefix("clip_t_")].double()
        return row[row.isfinite()]


def text_of(prompt: str, convention: str) -> str:
    """What an encoder reads for a prompt. convention: a key of CONVENTIONS."""
    return CONVENTIONS[convention].template.replace(PLACEHOLDER, prompt)


def pairwise(features: Tensor) -> Tensor:
    """Cosines of all pairs of features [N, D]: float64 [N, N]. Rows of nan or of zeros give nan."""
    unit = _unit(features)
    return unit @ unit.T


def mean_pairwise(matrix: Tensor) -> float:
    """Mean of the finite entries i < j of a matrix [N, N]; nan when there are none."""
    return _mean(_pairs(matrix))


def others(matrix: Tensor) -> Tensor:
    """For each row of a matrix [N, N] the mean of its finite entries beside the diagonal, nan where there are none."""
    alone = matrix.double().clone()
    alone.fill_diagonal_(NAN)
    return alone.where(alone.isfinite(), NAN).nanmean(1)


def alignment(images: Tensor, texts: Tensor, convention: str) -> Tensor:
    """factor * cosine of each image [N, D] and its text [N, D]: float64 [N]. Nothing is cut at zero."""
    return CONVENTIONS[convention].factor * (_unit(images) * _unit(texts)).sum(1)


def replace_background(
    images: Tensor, masks: Tensor, fill: Background = "noise", seed: int = 0, first: int = 0
) -> Tensor:
    """Pictures [N, H, W, 3] in 0..1 with what lies outside their masks replaced. Returns a new tensor.

    masks  [N, h, w], or [1, h, w] for all: 0.5 and more is the character, the rest background; other sizes are scaled
    fill   noise: each pixel and channel uniform in 0..255, as published; grey: 130 of 255; white
    seed   of the noise; picture number `first` + i has the same noise in any batch
    Raises ValueError for another number of masks, and for a mask that shows nothing.
    """
    check_masks(masks, len(images))
    images = images[..., :3].float().clone()
    height, width = images.shape[1:3]
    for number, image in enumerate(images):
        mask = masks[number % len(masks)].detach().float().cpu()[None, None]
        if mask.shape[2:] != (height, width):
            mask = torch.nn.functional.interpolate(mask, (height, width), mode="nearest-exact")
        background = ~(mask[0, 0] >= 0.5)  # nan is background
        if background.all():
            raise ValueError(
                f"The mask for image {first + number + 1} is empty: paint the character white, or disconnect masks to "
                "measure whole images."
            )
        if fill == "noise":
            random = np.random.default_rng([seed, first + number])
            paper = torch.from_numpy(random.integers(256, size=(height, width, 3), dtype=np.uint8)).float() / 255
        else:
            paper = torch.full((height, width, 3), GREY if fill == "grey" else 1.0)
        image[background] = paper[background].to(image.device)
    return images


def check_masks(masks: Tensor, pictures: int) -> None:
    """Raise ValueError unless there is one mask [h, w] for all pictures, or one for each."""
    if masks.ndim != 3 or len(masks) not in (1, pictures):
        raise ValueError(
            f"masks has shape {list(masks.shape)} for {pictures} images: connect one mask for all of them or one per "
            "image, [1 or number of images, height, width]."
        )


def measure(
    images: Tensor,
    prompts: Sequence[str] | None = None,
    image_encoder: Any = None,
    text_encoder: Any = None,
    faces: Any = None,
    dreamsim: Any = None,
    masks: Tensor | None = None,
    background: Background = "noise",
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Consistency:
    """Measure pictures [N, H, W, 3] in 0..1 with what is given; what is not given is not measured.

    prompts        one per picture; without them there is no alignment
    image_encoder  `measures.encoders.Encoder` for CLIP-I: images(pictures) -> [N, D]
    text_encoder   the same for CLIP-T, with texts(list) -> [N, D] too. Where it has images_for(pictures, texts) ->
                   [N, D], pictures are seen with their text at hand. Its `conventions` may be fewer than CONVENTIONS.
    faces          `models.storymaker.faces.FaceAnalysis`: embeddings(pictures) -> [N, D], nan where there is no face
    dreamsim       distance(pictures) -> [N, N], `measures.encoders.load_dreamsim`
    masks          [N or 1, h, w] of the character: as published, what CLIP-I and DreamSim see outside it is replaced,
                   see `replace_background`; CLIP-T and faces see the whole pictures
    progress       called as progress(done, total)
    An encoder's `image_label` and `text_label` are what tables call its numbers.
    Raises ValueError: no picture, another shape, values that are not numbers, other numbers of prompts or masks.
    """
    _check(images, prompts)
    if masks is not None:
        check_masks(masks, len(images))
    count, starts = len(images), range(0, len(images), CHUNK)
    texts = list(prompts or ())
    conventions = getattr(text_encoder, "conventions", tuple(CONVENTIONS)) if texts and text_encoder else ()
    conditional = hasattr(text_encoder, "images_for")
    shared = bool(conventions) and image_encoder is text_encoder and masks is None and not conditional
    passes = [image_encoder is not None, bool(conventions) and not shared, faces is not None, dreamsim is not None]
    done, total = 0, count * sum(passes)
    encoders: dict[str, str] = {}
    labels = dict(LABELS)

    def told(pictures: int) -> None:
        nonlocal done
        done += pictures
        if progress is not None:
            progress(done, total)

    def chunks(work: Callable[[Tensor, int], Tensor]) -> Tensor:
        found = []
        for start in starts:
            part = images[start : start + CHUNK]
            found.append(work(part, start))
            told(len(part))
        return torch.cat(found)

    def character(part: Tensor, start: int) -> Tensor:
        if masks is None:
            return part
        own = masks if len(masks) == 1 else masks[start : start + len(part)]
        return replace_background(part, own, background, seed, start)

    clip_i, clip_t, whose, distances, features = None, {}, None, None, None
    if image_encoder is not None:
        features = chunks(lambda part, start: image_encoder.images(character(part, start)))
        clip_i = pairwise(features)
        encoders["clip_i"] = image_encoder.name + _behind(masks, background)
        labels["clip_i"] = getattr(image_encoder, "image_label", labels["clip_i"])
    if conventions:
        if conditional:
            seen = chunks(lambda part, start: text_encoder.images_for(part, texts[start : start + len(part)]))
        else:
            seen = features if shared else chunks(lambda part, _: text_encoder.images(part))
        for name in conventions:
            said = text_encoder.texts([text_of(prompt, name) for prompt in texts])
            clip_t[name] = alignment(seen, said, name)
        encoders["clip_t"] = text_encoder.name
        labels["clip_t"] = getattr(text_encoder, "text_label", labels["clip_t"])
    if faces is not None:
        whose = pairwise(chunks(lambda part, _: faces.embeddings(part)))
        encoders["face"] = getattr(faces, "name", "InsightFace")
    if dreamsim is not None:
        shown = [character(images[start : start + CHUNK], start) for start in starts] if masks is not None else [images]
        distances = dreamsim.distance(torch.cat(shown)).double()
        encoders["dreamsim"] = dreamsim.name + _behind(masks, background)
        told(count)
    return Consistency(count, clip_i, clip_t, whose, distances, encoders, tuple(texts), labels)


def _behind(masks: Tensor | None, background: str) -> str:
    return "" if masks is None else f", background {background}"


def _check(images: Tensor, prompts: Sequence[str] | None) -> None:
    if images.ndim != 4 or images.shape[3] not in (3, 4) or 0 in images.shape:
        raise ValueError(
            f"The images have shape {list(images.shape)} instead of [number, height, width, 3]: connect an IMAGE."
        )
    broken = [str(number) for number, image in enumerate(images, start=1) if not image.isfinite().all()]
    if broken:
        raise ValueError(
            f"Image {', '.join(broken)}: the values contain NaN or infinity. Check the node that produced them."
        )
    if prompts is not None and len(prompts) != len(images):
        raise ValueError(f"There are {len(prompts)} prompts for {len(images)} images: provide one per image.")


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
    """Numbers and lists of them, None in place of what is not finite."""
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return value if math.isfinite(value) else None


def _number(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "-"


def _short(text: str, limit: int = 60) -> str:
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def _columns(rows: Sequence[Sequence[str]], last_left: bool) -> str:
    """Rows of text in columns, the first to the left, the others to the right; the last to the left where asked."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    last = len(widths) - 1

    def cell(text: str, at: int) -> str:
        left = at == 0 or (last_left and at == last)
        return text.ljust(widths[at]) if left else text.rjust(widths[at])

    return "\n".join("  ".join(cell(text, at) for at, text in enumerate(row)).rstrip() for row in rows)
