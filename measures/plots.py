"""Plots of the results, drawn with Matplotlib: a heat map of pairs of frames, and bars per frame."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

import numpy as np

from .consistency import Consistency, others

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NUMBERED = 12
"""Most frames of a matrix with values written into its cells."""
DPI = 100
INK, BAR, MEAN, MISSING = "#262428", "#5b8db8", "#c8553d", "#d9d7d2"


def matrix_picture(results: Consistency) -> np.ndarray:
    """The pairwise measures side by side, each a heat map with its own scale: float32 [H, W, 3] in 0..1.

    Values are written in for up to NUMBERED frames; missing values are grey and hatched, the diagonal is grey. Raises
    ValueError without a pairwise measure.
    """
    matrices = results.matrices
    if not matrices:
        raise ValueError("No pairwise measure was taken, so there is no matrix to draw.")
    figure = _figure(1.2 + 5.4 * len(matrices), 5.2)
    for place, (name, matrix) in enumerate(matrices.items(), start=1):
        axes = figure.add_subplot(1, len(matrices), place)
        _heat_map(figure, axes, matrix.double().numpy(), lower_is_alike=name == "dreamsim")
        mean = results.means()[name]
        axes.set_title(f"{_wrapped(results.label(name))}\n{_mean_words(mean, 'mean of the pairs')}", fontsize=11)
        axes.set_xlabel(_wrapped(results.encoders.get(name, "")), fontsize=8)
    return _pixels(figure)


def alignment_picture(results: Consistency) -> np.ndarray:
    """A bar per frame for its match with its text and with the other frames: float32 [H, W, 3] in 0..1.

    One panel per convention of CLIP-T and per pairwise measure, with a line at the mean. A frame without a value is
    hatched.
    """
    rows = [
        (results.label(f"clip_t_{name}"), results.encoders.get("clip_t", ""), row)
        for name, row in results.clip_t.items()
    ]
    rows += [
        (f"{results.label(name)} with the other frames", results.encoders.get(name, ""), others(matrix))
        for name, matrix in results.matrices.items()
    ]
    figure = _figure(min(16.0, max(6.0, 2.0 + 0.45 * results.frames)), 0.4 + 2.2 * max(1, len(rows)))
    for place, (title, encoder, values) in enumerate(rows, start=1):
        axes = figure.add_subplot(len(rows), 1, place)
        _bars(axes, values.double().numpy())
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_ylabel(_wrapped(encoder, 24), fontsize=8)
        if place == len(rows):
            axes.set_xlabel("frame", fontsize=9)
    return _pixels(figure)


def _figure(width: float, height: float) -> Figure:
    """An empty figure. width, height: in inches."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            f"The plots need Matplotlib, which cannot be imported ({error}): run 'pip install matplotlib' with the "
            "Python that runs this."
        ) from error
    figure = Figure((width, height), DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _pixels(figure: Any) -> np.ndarray:
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3].astype(np.float32) / 255


def _heat_map(figure: Figure, axes: Axes, matrix: np.ndarray, lower_is_alike: bool) -> None:
    count = len(matrix)
    shown = np.where(np.isfinite(matrix) & ~np.eye(count, dtype=bool), matrix, np.nan)
    _hatched(axes, 0, 0, 1, 1)
    low, high = (np.nanmin(shown), np.nanmax(shown)) if np.isfinite(shown).any() else (0.0, 1.0)
    spread = max(high - low, 0.02)
    image = axes.imshow(
        shown,
        cmap="viridis_r" if lower_is_alike else "viridis",
        vmin=(low + high - spread) / 2,
        vmax=(low + high + spread) / 2,
        interpolation="nearest",
        zorder=2,
    )
    for number in range(count):
        axes.add_patch(_square(number, number))
    figure.colorbar(image, ax=axes, shrink=0.8).ax.tick_params(labelsize=8)
    _ticks(axes.set_xticks, count)
    _ticks(axes.set_yticks, count)
    axes.tick_params(labelsize=8)
    if count <= NUMBERED:
        for row, column in np.argwhere(np.isfinite(shown)):
            value = shown[row, column]
            red, green, blue, _ = image.cmap(image.norm(value))
            dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
            size = 10 if count <= 8 else 7
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", size=size, color="white" if dark else INK)


def _square(column: int, row: int) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor=MISSING, edgecolor="none", zorder=2.2)


def _hatched(axes: Axes, left: float, bottom: float, width: float, height: float, transform: Any = None) -> None:
    """A grey hatched rectangle for a missing value, in coordinates of the axes or of another transform."""
    from matplotlib.patches import Rectangle

    axes.add_patch(
        Rectangle(
            (left, bottom),
            width,
            height,
            facecolor=MISSING,
            edgecolor="white",
            hatch="///",
            linewidth=0,
            transform=transform or axes.transAxes,
            zorder=1,
        )
    )


def _bars(axes: Axes, values: np.ndarray) -> None:
    count, known = len(values), np.isfinite(values)
    numbers = np.arange(1, count + 1)
    finite = values[known]
    low, high = (min(0.0, finite.min()), max(0.0, finite.max())) if len(finite) else (0.0, 1.0)
    room = 0.15 * max(high - low, 0.1)
    axes.set_ylim(low - (room if low < 0 else 0), high + room)
    axes.set_xlim(0.4, count + 0.6)
    axes.bar(numbers[known], finite, color=BAR, width=0.8, zorder=2)
    for number in numbers[~known]:
        _hatched(axes, number - 0.4, 0, 0.8, 1, axes.get_xaxis_transform())
    if count <= NUMBERED:
        for number, value in zip(numbers[known], finite, strict=True):
            inside = abs(value) > room
            height, color = (value / 2, "white") if inside else (max(0.0, value) + room / 2, INK)
            axes.text(number, height, f"{value:.3f}", ha="center", va="center", size=8, color=color, zorder=4)
    if len(finite):
        axes.axhline(finite.mean(), color=MEAN, linewidth=1.2, zorder=3)
    mean = finite.mean() if len(finite) else float("nan")
    axes.set_title(_mean_words(mean, "mean"), loc="right", fontsize=9, color=MEAN)
    _ticks(axes.set_xticks, count, first=1)
    axes.tick_params(labelsize=8)


def _ticks(put: Any, count: int, first: int = 0) -> None:
    """Frame numbers from 1, at most 20 of them. first: the position of frame 1."""
    step = -(-count // 20)
    at = [number for number in range(1, count + 1) if number == 1 or number % step == 0]
    put([number - 1 + first for number in at], [f"{number}" for number in at])


def _mean_words(mean: float, words: str) -> str:
    return f"{words} {mean:.4f}" if np.isfinite(mean) else f"no {words}"


def _wrapped(text: str, width: int = 44) -> str:
    return "\n".join(textwrap.wrap(text, width))
