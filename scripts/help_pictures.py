"""Draws the pictures of the help pages, web/docs/images, and the pack's emblem, on the demo model in a real ComfyUI.

`python scripts/help_pictures.py` after a change of the demo model or of what a node does. It needs no download; the
same machine draws the same pictures. One graph holds every comparison.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import comfyui
import environment
from demo import ProgressBars

import workflows

if TYPE_CHECKING:
    from PIL import Image

ROOT = Path(__file__).absolute().parent.parent
IMAGES, EMBLEMS = ROOT / "web" / "docs" / "images", ROOT / "docs" / "images"
FRAME, GAP, LABEL = 144, 4, 22
"""Pixels: side of a frame in a picture, between frames, height of the words above a row.

The demo model's pictures are 24 x 24 squares of 8 x 8 pixels, so 144 pixels hold everything that is in them.
"""
SQUARES = 24
PAPER, INK, FAINT, ACCENT = "#fcfbf8", "#262428", "#b9b5ad", "#c8321f"

Link = Callable[..., list]
Rows = Mapping[str, Sequence["Image.Image"]]

FOX = {"identity": workflows.DEMO_IDENTITY, "frames": workflows.DEMO_FRAMES}
LONG = {"identity": workflows.DEMO_IDENTITY, "frames": "\n".join(workflows.LONG_FRAMES.splitlines()[:8])}
CAST = {"identity": workflows.CAST, "frames": workflows.CAST_FRAMES}
WORLD = {
    "identity": "\n".join(f"[{name}] a {name}" for name in ("cat", "fox", "rabbit", "bear", "robot", "girl")),
    "frames": "\n".join(
        [
            "[cat] asleep in the bedroom",
            "[fox] running in the snow",
            "[rabbit] jumping in the meadow",
            "[bear] with a lantern in a cave",
            "[robot] with an umbrella in the city",
            "[girl] with a balloon on the beach",
            "[rabbit] sitting in the desert",
            "[girl] reading a book on a train",
            "[fox] and [bear] waving in the forest",
            "[cat] waving on the beach",
        ]
    ),
}
IPCA, CSA, FREEU, APPLY = (
    f"StoryLoom_{name}" for name in ("IPCA", "ConsistentSelfAttention", "FreeU", "ApplyStoryMaker")
)
FULLEST = {"sampling_rate": 1.0, "blocks": "all", "skip_first_steps": 0}


class Graph(dict):
    """An API-format prompt, written node by node. shown: name -> the node that shows these pictures."""

    def __init__(self, schemas: dict):
        super().__init__()
        self.schemas = schemas
        self.shown: dict[str, str] = {}

    def add(self, kind: str, **inputs) -> Link:
        """Add a node, with defaults for widgets that are not given. Returns a function that links to its outputs.

        What is there already, the same with the same inputs, is not added again and so not drawn twice.
        """
        schema = self.schemas[kind]
        node = workflows.Node(kind, (0, 0), (0, 0), inputs)
        values = {
            name: workflows.value_of(node, name, options)
            for name, type_, options in workflows.inputs_of(schema)
            if name in inputs or type_ in workflows.WIDGETS
        }
        entry = {"class_type": kind, "inputs": values, "_meta": {"title": schema["display_name"]}}
        key = next((key for key, known in self.items() if known == entry), str(len(self) + 1))
        self[key] = entry
        return lambda output=0: [key, output]

    def show(self, name: str, images: list) -> None:
        """Keep these pictures under a name."""
        self.shown[name], _ = self.add("PreviewImage", images=images)()


class Studio:
    """The demo model in a graph, and stories told to it."""

    def __init__(self, graph: Graph):
        self.graph = graph
        self.demo = graph.add("StoryLoom_DemoModel")

    def model(self, *patches: tuple[str, dict]) -> list:
        """The demo model with these nodes on it."""
        model = self.demo(0)
        for kind, settings in patches:
            model = self.graph.add(kind, model=model, **settings)()
        return model

    def sample(self, model: list, positive: list, latent: list, negative: list | None = None) -> list:
        zeros = negative or self.graph.add("ConditioningZeroOut", conditioning=positive)()
        settings = {"seed": 7, "steps": workflows.DEMO_STEPS, "cfg": 5.0, "scheduler": workflows.DEMO_SCHEDULER}
        sides = {"positive": positive, "negative": zeros, "latent_image": latent}
        drawn = self.graph.add("KSampler", model=model, sampler_name="euler", **sides, **settings)
        return self.graph.add("VAEDecode", samples=drawn(), vae=self.demo(2))()

    def latent(self, story: list, shared: bool = True) -> list:
        size = dict.fromkeys(("width", "height"), workflows.DEMO_SIZE)
        return self.graph.add("StoryLoom_EmptyLatent", story=story, shared_noise=shared, **size)()

    def tell(
        self,
        name: str,
        script: dict,
        *patches: tuple[str, dict],
        encode: str = "EncodeOnePrompt",
        shared: bool = True,
        **words: object,
    ) -> tuple[list, list]:
        """Show a story under this name. words: settings of the encode node. Returns its frames and its story."""
        story = self.graph.add("StoryLoom_Script", **script)()
        positive = self.graph.add(f"StoryLoom_{encode}", clip=self.demo(1), story=story, **words)()
        frames = self.sample(self.model(*patches), positive, self.latent(story, shared))
        self.graph.show(name, frames)
        return frames, story


# ---- what is drawn ---------------------------------------------------------------------------------------------------

EFFECTS = {
    "IPCA": {
        "identity_weight 1: off": (FOX, [(IPCA, {"identity_weight": 1.0})], {}),
        "identity_weight 2: published": (FOX, [(IPCA, {"identity_weight": 2.0})], {}),
        "identity_weight 4": (FOX, [(IPCA, {"identity_weight": 4.0})], {}),
    },
    "ConsistentSelfAttention": {
        "sampling_rate 0: off": (FOX, [(IPCA, {}), (CSA, {"sampling_rate": 0.0})], {}),
        "sampling_rate 0.5: published": (FOX, [(IPCA, {}), (CSA, {})], {}),
        "sampling_rate 1, blocks all, skip_first_steps 0: the fullest": (FOX, [(IPCA, {}), (CSA, FULLEST)], {}),
    },
    "EncodeOnePrompt": {
        "none: one prompt as it is": (FOX, [], {"reweighting": "none"}),
        "svr: the method": (FOX, [], {"reweighting": "svr"}),
        "svr_eot: the benchmark's variant": (FOX, [], {"reweighting": "svr_eot"}),
        "npr: the paper's baseline": (FOX, [], {"reweighting": "npr"}),
    },
    "EncodePerFrame": {
        "frame by frame": (FOX, [], {"encode": "EncodePerFrame"}),
        "frame by frame, with IPCA": (FOX, [(IPCA, {})], {"encode": "EncodePerFrame"}),
        "one prompt (SVR), with IPCA": (FOX, [(IPCA, {})], {}),
    },
    "EmptyLatent": {
        "shared_noise on": (FOX, [(IPCA, {})], {}),
        "shared_noise off": (FOX, [(IPCA, {})], {"shared": False}),
    },
    "FreeU": {
        "without": (FOX, [(IPCA, {})], {}),
        "with Story FreeU": (FOX, [(FREEU, {}), (IPCA, {})], {}),
    },
}
"""Page -> label of a row -> (script, patches on the model, settings of `Studio.tell`)."""

TITLED = "grid, title, caption_place over"
PAGES = {
    "classic": {"layout": "classic"},
    "rows 3,2,3": {"layout": "rows", "rows": "3,2,3"},
    TITLED: {"columns": 4, "title": "The long way home", "caption_place": "over"},
    "rows 4,4, right_to_left, dark paper": {
        "layout": "rows",
        "rows": "4,4",
        "direction": "right_to_left",
        "paper": "#262428",
        "ink": "#fcfbf8",
    },
}
"""Label of a page -> its settings."""

Wire = tuple[str, int, str, str]
"""From a node's output to a node's input."""
NEXT_TO: dict[str, tuple[list[list[str]], list[Wire]]] = {
    "LoadStoryMaker": (
        [["StoryLoom_Character", "StoryLoom_LoadStoryMaker"], [APPLY], ["KSampler"]],
        [
            ("StoryLoom_LoadStoryMaker", 0, APPLY, "storymaker"),
            ("StoryLoom_Character", 0, APPLY, "character_1"),
            (APPLY, 0, "KSampler", "model"),
        ],
    ),
    "LoadFaceAnalysis": (
        [["LoadImage", "CLIPVisionLoader", "StoryLoom_LoadFaceAnalysis"], ["StoryLoom_Character"], [APPLY]],
        [
            ("LoadImage", 0, "StoryLoom_Character", "image"),
            ("LoadImage", 1, "StoryLoom_Character", "mask"),
            ("CLIPVisionLoader", 0, "StoryLoom_Character", "clip_vision"),
            ("StoryLoom_LoadFaceAnalysis", 0, "StoryLoom_Character", "face_analysis"),
            ("StoryLoom_Character", 0, APPLY, "character_1"),
        ],
    ),
    "SaveCharacter": (
        [["StoryLoom_Character"], ["StoryLoom_SaveCharacter", APPLY]],
        [
            ("StoryLoom_Character", 0, "StoryLoom_SaveCharacter", "character"),
            ("StoryLoom_Character", 0, APPLY, "character_1"),
        ],
    ),
    "LoadCharacter": (
        [["StoryLoom_LoadStoryMaker", "StoryLoom_LoadCharacter"], [APPLY], ["KSampler"]],
        [
            ("StoryLoom_LoadStoryMaker", 0, APPLY, "storymaker"),
            ("StoryLoom_LoadCharacter", 0, APPLY, "character_1"),
            (APPLY, 0, "KSampler", "model"),
        ],
    ),
    "LoadOpenCLIP": (
        [["VAEDecode", "StoryLoom_Script", "StoryLoom_LoadOpenCLIP"], ["StoryLoom_Consistency"], ["StoryLoom_Compare"]],
        [
            ("VAEDecode", 0, "StoryLoom_Consistency", "images"),
            ("StoryLoom_Script", 0, "StoryLoom_Consistency", "story"),
            ("StoryLoom_LoadOpenCLIP", 0, "StoryLoom_Consistency", "clip"),
            ("StoryLoom_Consistency", 3, "StoryLoom_Compare", "measures_b"),
        ],
    ),
}
"""Nodes that change no picture by themselves -> nodes around them, in columns, and the wires between."""


def ask(graph: Graph) -> None:
    """Put everything that is to be drawn into the graph."""
    studio = Studio(graph)
    for page, rows in EFFECTS.items():
        for label, (script, patches, settings) in rows.items():
            studio.tell(f"{page} {label}", script, *patches, **settings)
    long, story = studio.tell("long", LONG, (IPCA, {}), (CSA, {}))
    for label, settings in PAGES.items():
        page = graph.add("StoryLoom_Page", images=long, story=story, caption_size=22, **settings)
        graph.show(f"page {label}", page())
    cast, story = studio.tell("cast", CAST, (IPCA, {}), (CSA, {}), encode="EncodePerFrame")
    graph.show("script", graph.add("StoryLoom_Page", images=cast, story=story)())
    studio.tell("world", WORLD, encode="EncodePerFrame")
    ask_for_batches(studio)
    ask_for_characters(studio)
    ask_for_measures(studio)


def ask_for_batches(studio: Studio) -> None:
    graph = studio.graph
    story = graph.add("StoryLoom_Script", **LONG)()
    positive = graph.add("StoryLoom_EncodeOnePrompt", clip=studio.demo(1), story=story)()
    zeros = graph.add("ConditioningZeroOut", conditioning=positive)()
    anchors = {"anchors": 2}
    parts = {"latent": studio.latent(story), "positive": positive, "negative": zeros}
    split = graph.add("StoryLoom_SplitBatches", batch_size=4, **anchors, **parts)
    frames = studio.sample(studio.model((IPCA, {}), (CSA, anchors)), split(1), split(0), split(2))
    graph.show("batches", frames)
    graph.show("joined", graph.add("StoryLoom_JoinBatches", plan=split(5), images=frames)(1))


def ask_for_characters(studio: Studio) -> None:
    graph, size = studio.graph, workflows.DEMO_SIZE
    adapter = graph.add("StoryLoom_DemoStoryMaker")
    people = {}
    for name, who in (("Fox", "a fox in a blue coat"), ("Bear", "a brown bear in a yellow sweater")):
        words = graph.add("CLIPTextEncode", clip=studio.demo(1), text=f"{who} standing in the meadow")()
        drawing = studio.sample(studio.model(), words, graph.add("EmptyLatentImage", width=size, height=size)())
        graph.show(f"drawing {name}", drawing)
        head = graph.add("ImageCrop", image=drawing, width=80, height=80, x=56, y=24)()
        mask = box(graph, size, 120, 176, 36, 12)
        graph.show(f"mask {name}", graph.add("MaskToImage", mask=mask)())
        person = {"clip_vision": adapter(1), "image": drawing, "name": name, "face_crop": head}
        people[name] = graph.add("StoryLoom_Character", mask=mask, **person)
        graph.show(f"whole {name}", graph.add("StoryLoom_Character", clip_vision=adapter(1), image=drawing)(1))
        graph.show(f"character {name}", people[name](1))
    blend = graph.add("StoryLoom_BlendCharacters", first=people["Fox"](), second=people["Bear"]())
    graph.show("blend", blend(1))
    adapted = {"storymaker": adapter(0), "character_1": people["Fox"]()}
    unnamed = {**adapted, "character_1": graph.add("StoryLoom_Character", clip_vision=adapter(1), image=drawing)()}
    tokens = {**unnamed, "lora_strength": 0.0}
    left = box(graph, size, size // 2, size, 0, 0)
    for label, patches in (
        (WITHOUT, []),
        (WITH, [(APPLY, unnamed)]),
        (TOKENS, [(APPLY, tokens)]),
        (LEFT, [(APPLY, {**tokens, "region_1": left})]),
    ):
        studio.tell(label, FOX, *patches, encode="EncodePerFrame")


def ask_for_measures(studio: Studio) -> None:
    graph, reader, sides = studio.graph, studio.graph.add("StoryLoom_DemoSimilarity")(), {}
    for side, (patches, encode) in {"a": ([], "EncodePerFrame"), "b": ([(IPCA, {})], "EncodeOnePrompt")}.items():
        frames, story = studio.tell(f"measured {side}", FOX, *patches, encode=encode)
        found = graph.add("StoryLoom_Consistency", images=frames, story=story, clip=reader)
        graph.show(f"matrix {side}", found(1))
        graph.show(f"plot {side}", found(2))
        sides |= {f"images_{side}": frames, f"measures_{side}": found(3)}
    graph.show("compared", graph.add("StoryLoom_Compare", story=story, caption_size=18, **sides)())


WITHOUT, WITH = "without", "with, both strengths 0.8"
TOKENS, LEFT = "lora_strength 0", "lora_strength 0, region_1: the left half"


def box(graph: Graph, size: int, width: int, height: int, x: int, y: int) -> list:
    """A mask of this size that is white in a box."""
    dark = graph.add("SolidMask", value=0.0, width=size, height=size)()
    light = graph.add("SolidMask", value=1.0, width=width, height=height)()
    return graph.add("MaskComposite", destination=dark, source=light, x=x, y=y, operation="add")()


# ---- pictures from it ------------------------------------------------------------------------------------------------


def pictures(drawn: Rows, schemas: dict) -> dict[str, Image.Image]:
    """Every picture by the name of its file. drawn: what was shown under the names of `ask`."""
    made = {page: rows({label: drawn[f"{page} {label}"] for label in labels}) for page, labels in EFFECTS.items()}
    batches = [drawn["batches"][start : start + 4] for start in range(0, len(drawn["batches"]), 4)]
    made["SplitBatches"] = rows({f"batch {number}": batch for number, batch in enumerate(batches, start=1)})
    made["JoinBatches"] = rows({"joined": drawn["joined"][:4], "": drawn["joined"][4:]})
    made["Page"] = tiles({label: drawn[f"page {label}"][0] for label in PAGES}, columns=2, width=240)
    made["SavePage"] = tiles(saved_as(drawn[f"page {TITLED}"][0]), columns=2, width=300)
    made["Script"] = beside(script_text(CAST), drawn["script"][0])
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


SAVED = {
    "png": ("png", 1),
    "jpg, quality 90": ("jpg", 90),
    "jpg, quality 15": ("jpg", 15),
    "webp, quality 15": ("webp", 15),
}
"""What a file is called in a picture -> its format and quality."""


def saved_as(page: Image.Image) -> dict[str, Image.Image]:
    """The same piece of a page out of its file in several formats."""
    from io import BytesIO

    from PIL import Image

    from storyloom.pages.encoding import encoded

    pieces = {}
    for label, settings in SAVED.items():
        kept = Image.open(BytesIO(encoded([page], *settings))).convert("RGB")
        pieces[label] = kept.crop((24, 210, 224, 330)).resize((600, 360), Image.NEAREST)
    return pieces


def changes(before: Sequence[Image.Image], after: Sequence[Image.Image]) -> list[Image.Image]:
    """Three times the difference of pictures; what did not change is black."""
    from PIL import ImageChops

    return [ImageChops.difference(a, b).point(lambda value: 3 * value) for a, b in zip(before, after, strict=True)]


def emblems(drawn: Rows) -> dict[str, Image.Image]:
    """The pack's icon, and its banner of 7 x 3 frames, by the name of their files."""
    from PIL import Image

    side = 7 * SQUARES
    banner, _ = sheet(7 * side, 3 * side)
    frames = [*drawn["world"], *drawn["long"], *drawn["cast"]]
    for number, frame in enumerate(frames[: 7 * 3]):
        row, column = divmod(5 * number % 21, 7)
        banner.paste(frame.resize((side, side), Image.NEAREST), (column * side, row * side))
    icon = drawn["long"][6].resize((16 * SQUARES, 16 * SQUARES), Image.NEAREST)
    return {"icon": icon, "banner": banner}


def sheet(width: int, height: int):
    """White paper and a pen for it."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (width, height), PAPER)
    return image, ImageDraw.Draw(image)


def letters(size: float):
    from PIL import ImageFont

    return ImageFont.load_default(size)


def rows(drawn: Rows) -> Image.Image:
    """Rows of frames, each below its label; a label of blanks takes no room."""
    from PIL import Image

    width = max(map(len, drawn.values())) * (FRAME + GAP) + GAP
    tall = [FRAME + GAP + (LABEL if label.strip() else 0) for label in drawn]
    image, pen = sheet(width, sum(tall) + GAP)
    top = GAP
    for (label, frames), height in zip(drawn.items(), tall, strict=True):
        pen.text((GAP, top + 1), label, INK, font=letters(14))
        for column, frame in enumerate(frames):
            small = frame.resize((FRAME, FRAME), Image.NEAREST)
            image.paste(small, (GAP + column * (FRAME + GAP), top + height - FRAME - GAP))
        top += height
    return image


def tiles(drawn: Mapping[str, Image.Image], columns: int, width: int = 0, height: int = 0) -> Image.Image:
    """Pictures of one width or one height, each below its label."""
    from PIL import Image

    small = []
    for picture in drawn.values():
        scale = width / picture.width if width else height / picture.height
        small.append(picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.LANCZOS))
    wide = [max(picture.width for picture in small[column::columns]) + 2 * GAP for column in range(columns)]
    lines = [small[start : start + columns] for start in range(0, len(small), columns)]
    tall = [max(picture.height for picture in line) + LABEL + 2 * GAP for line in lines]
    image, pen = sheet(sum(wide) + GAP, sum(tall) + GAP)
    for number, (label, picture) in enumerate(zip(drawn, small, strict=True)):
        row, column = divmod(number, columns)
        corner = (2 * GAP + sum(wide[:column]), GAP + sum(tall[:row]))
        pen.text(corner, label, INK, font=letters(14))
        image.paste(picture, (corner[0], corner[1] + LABEL))
    return image


def script_text(script: dict) -> str:
    return f"identity\n\n{script['identity']}\n\n\nframes\n\n{script['frames']}"


def beside(text: str, page: Image.Image, width: int = 320) -> Image.Image:
    """What was typed, and the page that came of it."""
    from PIL import Image

    lines = [part for line in text.split("\n") for part in wrapped(line, 42)]
    small = page.resize((width, round(page.height * width / page.width)), Image.LANCZOS)
    left, height = 330, max(small.height, 18 * len(lines)) + 4 * GAP
    image, pen = sheet(left + width + 2 * GAP, height)
    for number, line in enumerate(lines):
        color = ACCENT if line in ("identity", "frames") else INK
        pen.text((2 * GAP, 2 * GAP + 18 * number), line, color, font=letters(13))
    image.paste(small, (left, 2 * GAP))
    return image


def wrapped(line: str, width: int) -> list[str]:
    from textwrap import wrap

    return wrap(line, width, subsequent_indent="    ") or [""]


CARD, SLOT, TITLE, BETWEEN = 190, 17, 24, 60
"""Pixels: width of a node, height of a slot and of a title, room between columns."""


def neighbours(kind: str, columns: Sequence[Sequence[str]], wires: Sequence[Wire], schemas: dict) -> Image.Image:
    """A node, the nodes around it in columns, and the wires between."""
    sockets = {
        name: [slot for slot, type_, _ in workflows.inputs_of(schemas[name]) if type_ not in workflows.WIDGETS]
        for column in columns
        for name in column
    }
    tall = {
        name: TITLE + SLOT * max(len(slots), len(schemas[name]["output_name"])) + 8 for name, slots in sockets.items()
    }
    corners, top = {}, max(sum(tall[name] + 16 for name in column) for column in columns)
    for number, column in enumerate(columns):
        y = (top - sum(tall[name] + 16 for name in column)) / 2 + 16
        for name in column:
            corners[name] = (16 + number * (CARD + BETWEEN), y)
            y += tall[name] + 16
    image, pen = sheet(len(columns) * (CARD + BETWEEN) - BETWEEN + 32, top + 16)
    for source, output, target, slot in wires:
        (x, y), (to_x, to_y) = corners[source], corners[target]
        end = (to_x, to_y + TITLE + SLOT * (sockets[target].index(slot) + 0.5))
        pen.line(curve((x + CARD, y + TITLE + SLOT * (output + 0.5)), end), ACCENT, 2, joint="curve")
    for name, (x, y) in corners.items():
        edge = ACCENT if name == kind else FAINT
        pen.rounded_rectangle((x, y, x + CARD, y + tall[name]), 5, "#ffffff", edge, 3 if name == kind else 1)
        pen.text((x + 8, y + 4), schemas[name]["display_name"], INK, font=letters(13))
        for side, slots, edge_x in (("la", sockets[name], x + 8), ("ra", schemas[name]["output_name"], x + CARD - 8)):
            for number, slot in enumerate(slots):
                pen.text((edge_x, y + TITLE + SLOT * number + 2), slot, "#77736b", font=letters(10.5), anchor=side)
    return image


def curve(start: tuple[float, float], end: tuple[float, float]) -> list[tuple[float, float]]:
    """A wire: level at both ends."""
    reach = max(30.0, abs(end[0] - start[0]) / 2)
    points = (start, (start[0] + reach, start[1]), (end[0] - reach, end[1]), end)
    steps = [number / 24 for number in range(25)]
    weights = (((1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t * t * (1 - t), t**3) for t in steps)
    return [tuple(sum(w * p[axis] for w, p in zip(four, points, strict=True)) for axis in (0, 1)) for four in weights]


LIMIT = 60_000
"""Bytes of a file."""


def png(picture: Image.Image) -> bytes:
    """A picture's file: whole, or with as many colours as the limit leaves room for."""
    from io import BytesIO

    from PIL import Image

    for colors in (None, 256, 128, 96, 64, 32):
        file = BytesIO()
        kept = picture if colors is None else picture.quantize(colors, dither=Image.Dither.NONE)
        kept.save(file, "PNG", optimize=True)
        if file.tell() <= LIMIT:
            break
    return file.getvalue()


def main() -> None:
    environment.enter()
    from PIL import Image

    with workflows.running("help") as (server, schemas):
        graph = Graph(schemas)
        ask(graph)
        bars = ProgressBars(graph)
        shown = server.images(server.wait(server.submit(graph), bars))
        bars.close()
        drawn = {name: [Image.open(path).convert("RGB") for path in shown[key]] for name, key in graph.shown.items()}
    IMAGES.mkdir(exist_ok=True)
    files = {IMAGES / f"{name}.png": picture for name, picture in pictures(drawn, schemas).items()}
    files |= {EMBLEMS / f"{name}.png": picture for name, picture in emblems(drawn).items()}
    for path, picture in files.items():
        path.write_bytes(png(picture))
        environment.say(f"Written: {path}")


if __name__ == "__main__":
    try:
        main()
    except (environment.SetupError, *comfyui.FAILURES, KeyboardInterrupt) as reason:
        environment.exit_with(reason)
