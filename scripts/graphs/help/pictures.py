"""Every picture of the help pages, and the pack's emblems, from what the demo model has drawn."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO

from PIL import Image, ImageChops

from ..stories import FOX, FOX_AND_BEAR
from .comparisons import EFFECTS, LEFT, PAGES, TITLED, TOKENS, WITH, WITHOUT
from .neighbours import NEXT_TO, neighbours
from .sheets import FRAME, INK, SQUARES, Rows, beside, letters, rows, sheet, tiles

SAVED = {
    "png": ("png", 1),
    "jpg, quality 90": ("jpg", 90),
    "jpg, quality 15": ("jpg", 15),
    "webp, quality 15": ("webp", 15),
}
"""Label -> format and quality of a file."""


def pictures(drawn: Rows, schemas: dict) -> dict[str, Image.Image]:
    """Every picture by the name of its file. drawn: `Graph.shown` of `add_comparisons`, as images."""
    made = {page: rows({label: drawn[f"{page} {label}"] for label in labels}) for page, labels in EFFECTS.items()}
    batches = [drawn["batches"][start : start + 4] for start in range(0, len(drawn["batches"]), 4)]
    made["SplitBatches"] = rows({f"batch {number}": batch for number, batch in enumerate(batches, start=1)})
    made["JoinBatches"] = rows({"joined": drawn["joined"][:4], "": drawn["joined"][4:]})
    made["Page"] = tiles({label: drawn[f"page {label}"][0] for label in PAGES}, columns=2, width=240)
    made["SavePage"] = tiles(saved_as(drawn[f"page {TITLED}"][0]), columns=2, width=300)
    made["Script"] = beside(script_text(FOX_AND_BEAR), drawn["script"][0])
    made["DemoModel"] = rows({"": drawn["world"][:5], " ": drawn["world"][5:]})
    fox = [drawn[f"{name} Fox"][0] for name in ("drawing", "mask", "whole", "character")]
    labels = ("the picture", "the mask", "preview: picture alone", "preview: mask and face_crop")
    made["Character"] = tiles(dict(zip(labels, fox, strict=True)), columns=2, height=FRAME)
    people = {"first: Fox": drawn["character Fox"][0], "second: Bear": drawn["character Bear"][0]}
    made["BlendCharacters"] = tiles({**people, "preview of the blend": drawn["blend"][0]}, columns=3, width=220)
    measured = {"matrix": drawn["matrix b"][0], "plot": drawn["plot b"][0]}
    made["Consistency"] = tiles(measured, columns=2, height=300)
    made["DemoSimilarity"] = tiles(
        {"frame by frame": drawn["matrix a"][0], "one prompt (SVR), with IPCA": drawn["matrix b"][0]}, 2, width=330
    )
    made["Compare"] = tiles({"": drawn["compared"][0]}, columns=1, width=640)
    made["DemoStoryMaker"] = rows({label: drawn[label] for label in (WITHOUT, WITH)})
    made["ApplyStoryMaker"] = rows(
        {
            WITHOUT: drawn[WITHOUT],
            WITH: drawn[WITH],
            f"{TOKENS}: what it changes, times 3": changes(drawn[WITHOUT], drawn[TOKENS]),
            f"{LEFT}: what it changes, times 3": changes(drawn[WITHOUT], drawn[LEFT]),
        }
    )
    return made | {node: neighbours(f"StoryLoom_{node}", *around, schemas) for node, around in NEXT_TO.items()}


def saved_as(page: Image.Image) -> dict[str, Image.Image]:
    """A detail of a page, saved in several formats and read again."""
    from storyloom.pages.encoding import encoded

    pieces = {}
    for label, settings in SAVED.items():
        read = Image.open(BytesIO(encoded([page], *settings))).convert("RGB")
        pieces[label] = read.crop((24, 210, 224, 330)).resize((600, 360), Image.NEAREST)
    return pieces


def changes(before: Sequence[Image.Image], after: Sequence[Image.Image]) -> list[Image.Image]:
    """The difference between pictures, times 3; unchanged pixels are black."""
    return [ImageChops.difference(a, b).point(lambda value: 3 * value) for a, b in zip(before, after, strict=True)]


def emblems(drawn: Rows) -> dict[str, Image.Image]:
    """The pack's icon, its banner of 7 x 3 frames and the README's first picture, by file name."""
    side = 7 * SQUARES
    banner, _ = sheet(7 * side, 3 * side)
    frames = [*drawn["world"], *drawn["long"], *drawn["cast"]]
    for number, frame in enumerate(frames[: 7 * 3]):
        row, column = divmod(5 * number % 21, 7)
        banner.paste(frame.resize((side, side), Image.NEAREST), (column * side, row * side))
    icon = drawn["long"][6].resize((16 * SQUARES, 16 * SQUARES), Image.NEAREST)
    separate, together = (
        drawn[f"EncodePerFrame {label}"] for label in ("frame by frame", "one prompt (SVR), with IPCA")
    )
    return {"icon": icon, "banner": banner, "story": story_picture(separate, together)}


def story_picture(separate: Sequence[Image.Image], together: Sequence[Image.Image]) -> Image.Image:
    """The README's first picture: the demo story without and with StoryLoom, with the text of each frame below."""
    side, gap, margin, heading = 8 * SQUARES, 8, 16, 34
    image, pen = sheet(2 * margin + 4 * side + 3 * gap, 2 * (heading + side + gap) + 38)
    labels = ("Without StoryLoom: each frame with its own prompt", "With StoryLoom: the same story, model and seed")
    for row, (label, frames) in enumerate(zip(labels, (separate, together), strict=True)):
        top = gap + row * (heading + side + gap)
        pen.text((margin, top + 4), label, INK, font=letters(20))
        for column, frame in enumerate(frames[:4]):
            squares = frame.resize((SQUARES, SQUARES), Image.NEAREST)
            image.paste(squares.resize((side, side), Image.NEAREST), (margin + column * (side + gap), top + heading))
    for column, line in enumerate(FOX["frames"].splitlines()):
        corner = margin + column * (side + gap) + side // 2, image.height - 28
        pen.text(corner, line.partition("#")[0].strip(), "#6b6760", font=letters(14), anchor="ma")
    return image


def script_text(script: dict) -> str:
    """A script as one text, with the names of its parts as headings."""
    return f"identity\n\n{script['identity']}\n\n\nframes\n\n{script['frames']}"
