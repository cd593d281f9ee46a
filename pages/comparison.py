"""The same story without and with a method, on one page, with the change in each measure."""

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
MAX_COLUMNS = 6
"""Maximum panels per row with A above B, if the number of columns is automatic."""


def comparison_page(
    a: Sequence[Panel],
    b: Sequence[Panel],
    captions: Sequence[str] = (),
    labels: tuple[str, str] = ("without", "with"),
    lines: Sequence[str] = (),
    arrangement: Arrangement = "rows",
    style: PageStyle | None = None,
) -> Image.Image:
    """Two sets of the same number of panels on one page: A above B, or A beside B. Returns an RGB image.

    captions  one per panel of a set, printed in both, see `comic_pages`
    labels    headings above A and above B
    lines     printed above both, under the style's title: the changes in numbers
    style     layout grid; columns 0: A above B in rows of at most MAX_COLUMNS, A beside B near-square
    Raises ValueError if the numbers of panels differ, and as `comic_pages` does.
    """
    style = style or PageStyle()
    if len(a) != len(b):
        raise ValueError(
            f"A has {len(a)} images, but B has {len(b)}: compare the same frames, once without and once with "
            "the method."
        )
    columns = style.columns or (min(len(a), MAX_COLUMNS) if arrangement == "rows" else 0)
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
    top = max(0, sum(heights) - margin)  # the margins of A and B are enough space between them, and above
    below = top + one.height - margin
    height = top + max(one.height, other.height) if beside else below + other.height
    page = Image.new("RGB", (width, height), style.paper)
    page.paste(one, (0, top))
    page.paste(other, (one.width, top) if beside else (0, below))
    for block, face, above in zip(blocks, faces, (0, heights[0]), strict=True):
        write(page, block, face, width / 2, above, style.ink)
    return page


def differences(a: Consistency, b: Consistency) -> list[str]:
    """The changes from A to B, a line for each measure: "CLIP-I 0.812 -> 0.874 (+0.062)".

    CLIP-T in its first convention only. Measures of one side only, or of different encoders, are marked as such.
    """
    lines, before, after = [], a.means(), b.means()
    for name in dict.fromkeys([*before, *after]):
        kind = "clip_t" if name.startswith("clip_t_") else name
        side = a if name in before else b
        if kind == "clip_t" and name != f"clip_t_{next(iter(side.clip_t))}":
            continue
        label = side.label(name)
        if name not in before or name not in after:
            lines.append(f"{label} was measured for one side only")
        elif a.encoders.get(kind) != b.encoders.get(kind):
            lines.append(f"{label} was measured with {a.encoders.get(kind)} and {b.encoders.get(kind)}: not compared")
        elif before[name] != before[name] or after[name] != after[name]:
            lines.append(f"{label} could not be measured for both sides")
        else:
            lower = ", lower means more similar" if name == "dreamsim" else ""
            lines.append(f"{label} {before[name]:.3f} -> {after[name]:.3f} ({after[name] - before[name]:+.3f}{lower})")
    return lines
