"""The same story without and with something, on one page, with what it changed in numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, get_args

from PIL import Image

from ..measures.consistency import Consistency
from .comic import PageStyle, Panel, auto_caption_size, comic_pages, write
from .fonts import Typeface
from .text import band, clean, wrap

Arrangement = Literal["rows", "columns"]
ARRANGEMENTS: tuple[str, ...] = get_args(Arrangement)
MOST_COLUMNS = 6
"""Most panels in a row where the number is left open and A stands above B."""


def comparison_page(
    a: Sequence[Panel],
    b: Sequence[Panel],
    captions: Sequence[str] = (),
    labels: tuple[str, str] = ("without", "with"),
    lines: Sequence[str] = (),
    arrangement: Arrangement = "rows",
    style: PageStyle | None = None,
) -> Image.Image:
    """Two rows of panels, as many in each, on one page: A above B, or A beside B. Returns an RGB image.

    captions  one per panel of a row, printed in both, see `comic_pages`
    labels    what stands above A and above B
    lines     printed above both, under the style's title: what the comparison says in numbers
    style     layout grid; columns 0: A above B in rows of at most MOST_COLUMNS, A beside B near-square
    Raises ValueError when A and B are not equally many, and as `comic_pages` does.
    """
    style = style or PageStyle()
    if len(a) != len(b):
        raise ValueError(
            f"A has {len(a)} pictures, but B has {len(b)}: compare the same frames, once without and once with "
            "the method."
        )
    columns = style.columns or (min(len(a), MOST_COLUMNS) if arrangement == "rows" else 0)
    margin = 2 * style.gap if style.margin is None else style.margin
    plain = replace(style, columns=columns)

    def halves(width: int) -> list[Image.Image]:
        styles = (replace(plain, title=label, page_width=width) for label in labels)
        return [
            page for panels, each in zip((a, b), styles, strict=True) for page in comic_pages(panels, captions, each)
        ]

    drawn = halves(style.page_width)
    if drawn[0].width != drawn[1].width:
        drawn = halves(max(half.width for half in drawn))
    one, other = drawn
    beside = arrangement == "columns"
    width = one.width + other.width if beside else one.width
    size = style.caption_size or auto_caption_size(one.width / max(1, columns or len(a)))
    faces = [Typeface([clean(style.title)], 2 * size, style.font, style.fonts)]
    faces.append(Typeface([clean(line) for line in lines], round(1.2 * size), style.font, style.fonts))
    texts = [[style.title] if style.title.strip() else [], lines]
    blocks = [
        [part for text in block for part in wrap(face.printable(clean(text)), face, max(1, width - 2 * margin))]
        for face, block in zip(faces, texts, strict=True)
    ]
    heights = [band(len(block), face.size) for face, block in zip(faces, blocks, strict=True)]
    top = max(0, sum(heights) - margin)  # the paper around A and B is enough between them, and above
    below = top + one.height - margin
    height = top + max(one.height, other.height) if beside else below + other.height
    page = Image.new("RGB", (width, height), style.paper)
    page.paste(one, (0, top))
    page.paste(other, (one.width, top) if beside else (0, below))
    for block, face, above in zip(blocks, faces, (0, heights[0]), strict=True):
        write(page, block, face, width / 2, above, style.ink)
    return page


def differences(a: Consistency, b: Consistency) -> list[str]:
    """What B changed: a line for each measure of both, "CLIP-I 0.812 -> 0.874 (+0.062)".

    Of CLIP-T the first convention alone. What only one of them has, or what different encoders measured, is said so.
    """
    lines, ours, theirs = [], a.means(), b.means()
    for name in dict.fromkeys([*ours, *theirs]):
        kind = "clip_t" if name.startswith("clip_t_") else name
        known = a if name in ours else b
        if kind == "clip_t" and name != f"clip_t_{next(iter(known.clip_t))}":
            continue
        label = known.label(name)
        if name not in ours or name not in theirs:
            lines.append(f"{label} was measured for one side only")
        elif a.encoders.get(kind) != b.encoders.get(kind):
            lines.append(f"{label} was measured with {a.encoders.get(kind)} and {b.encoders.get(kind)}: not compared")
        elif ours[name] != ours[name] or theirs[name] != theirs[name]:
            lines.append(f"{label} could not be measured for both sides")
        else:
            lower = ", lower is more similar" if name == "dreamsim" else ""
            lines.append(f"{label} {ours[name]:.3f} -> {theirs[name]:.3f} ({theirs[name] - ours[name]:+.3f}{lower})")
    return lines
