"""What the help pages compare, as one graph."""

from __future__ import annotations

from ..parts import DEMO_SIZE
from ..stories import FOX, FOX_AND_BEAR, LONG_FOX
from .prompt import DemoModel, Graph

LONG = {**LONG_FOX, "frames": "\n".join(LONG_FOX["frames"].splitlines()[:8])}
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

EFFECTS = {
    "IPCA": {
        "identity_weight 1: off": (FOX, [(IPCA, {"identity_weight": 1.0})], {}),
        "identity_weight 2: published": (FOX, [(IPCA, {"identity_weight": 2.0})], {}),
        "identity_weight 4": (FOX, [(IPCA, {"identity_weight": 4.0})], {}),
    },
    "ConsistentSelfAttention": {
        "sampling_rate 0: off": (FOX, [(IPCA, {}), (CSA, {"sampling_rate": 0.0})], {}),
        "sampling_rate 0.5: published": (FOX, [(IPCA, {}), (CSA, {})], {}),
        "sampling_rate 1, blocks all, skip_first_steps 0: the fullest": (
            FOX,
            [(IPCA, {}), (CSA, FULLEST)],
            {},
        ),
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
"""Page -> label of a row -> (script, patches on the model, settings of `DemoModel.draw`)."""

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

WITHOUT, WITH = "without", "with, both strengths 0.8"
TOKENS, LEFT = "lora_strength 0", "lora_strength 0, region_1: the left half"


def add_comparisons(graph: Graph) -> None:
    """Add everything that `pictures` shows to the graph."""
    demo = DemoModel(graph)
    for page, rows in EFFECTS.items():
        for label, (script, patches, settings) in rows.items():
            demo.draw(f"{page} {label}", script, *patches, **settings)
    long, story = demo.draw("long", LONG, (IPCA, {}), (CSA, {}))
    for label, settings in PAGES.items():
        page = graph.add("StoryLoom_Page", images=long, story=story, caption_size=22, **settings)
        graph.show(f"page {label}", page())
    cast, story = demo.draw("cast", FOX_AND_BEAR, (IPCA, {}), (CSA, {}), encode="EncodePerFrame")
    graph.show("script", graph.add("StoryLoom_Page", images=cast, story=story)())
    demo.draw("world", WORLD, encode="EncodePerFrame")
    add_batches(demo)
    add_characters(demo)
    add_measures(demo)


def add_batches(demo: DemoModel) -> None:
    graph = demo.graph
    story = graph.add("StoryLoom_Script", **LONG)()
    positive = graph.add("StoryLoom_EncodeOnePrompt", clip=demo.loader(1), story=story)()
    zeros = graph.add("ConditioningZeroOut", conditioning=positive)()
    anchors = {"anchors": 2}
    parts = {"latent": demo.latent(story), "positive": positive, "negative": zeros}
    split = graph.add("StoryLoom_SplitBatches", batch_size=4, **anchors, **parts)
    frames = demo.sample(demo.model((IPCA, {}), (CSA, anchors)), split(1), split(0), split(2))
    graph.show("batches", frames)
    graph.show("joined", graph.add("StoryLoom_JoinBatches", plan=split(5), images=frames)(1))


def add_characters(demo: DemoModel) -> None:
    graph, size = demo.graph, DEMO_SIZE
    adapter = graph.add("StoryLoom_DemoStoryMaker")
    people = {}
    for name, who in (("Fox", "a fox in a blue coat"), ("Bear", "a brown bear in a yellow sweater")):
        positive = graph.add("CLIPTextEncode", clip=demo.loader(1), text=f"{who} standing in the meadow")()
        drawing = demo.sample(demo.model(), positive, graph.add("EmptyLatentImage", width=size, height=size)())
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
        demo.draw(label, FOX, *patches, encode="EncodePerFrame")


def add_measures(demo: DemoModel) -> None:
    graph, reader, sides = demo.graph, demo.graph.add("StoryLoom_DemoSimilarity")(), {}
    for side, (patches, encode) in {"a": ([], "EncodePerFrame"), "b": ([(IPCA, {})], "EncodeOnePrompt")}.items():
        frames, story = demo.draw(f"measured {side}", FOX, *patches, encode=encode)
        measures = graph.add("StoryLoom_Consistency", images=frames, story=story, clip=reader)
        graph.show(f"matrix {side}", measures(1))
        graph.show(f"plot {side}", measures(2))
        sides |= {f"images_{side}": frames, f"measures_{side}": measures(3)}
    graph.show("compared", graph.add("StoryLoom_Compare", story=story, caption_size=18, **sides)())


def box(graph: Graph, size: int, width: int, height: int, x: int, y: int) -> list:
    """A mask of this size that is white in a box."""
    dark = graph.add("SolidMask", value=0.0, width=size, height=size)()
    light = graph.add("SolidMask", value=1.0, width=width, height=height)()
    return graph.add("MaskComposite", destination=dark, source=light, x=x, y=y, operation="add")()
