"""Pictures of a node among the nodes that it is used with, for nodes that change no picture by themselves."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from ..model import WIDGETS, inputs_of
from .sheets import ACCENT, FAINT, INK, letters, sheet

APPLY = "StoryLoom_ApplyStoryMaker"
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

CARD, SLOT, TITLE, BETWEEN = 190, 17, 24, 60
"""Pixels: width of a node, height of a slot and of a title, room between columns."""


def neighbours(kind: str, columns: Sequence[Sequence[str]], wires: Sequence[Wire], schemas: dict) -> Image.Image:
    """A node, the nodes around it in columns, and the wires between."""
    sockets = {
        name: [slot for slot, type_, _ in inputs_of(schemas[name]) if type_ not in WIDGETS]
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
