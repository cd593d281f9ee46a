"""Fonts for captions: the chosen font, and fallbacks for characters that it lacks."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

BUILT_IN = ""
"""Name of the font that comes with Pillow. It has little more than the English alphabet."""
TEXT_FONTS = (
    "DejaVuSans.ttf",
    "NotoSans-Regular.ttf",
    "NotoSansCJK-Regular.ttc",
    "Arial Unicode.ttf",
    "Hiragino Sans GB.ttc",
    "arial.ttf",
    "msgothic.ttc",
    "msyh.ttc",
    "malgun.ttf",
)
"""System fonts, by file name."""
SYMBOL_FONTS = ("NotoColorEmoji.ttf", "NotoEmoji-Regular.ttf", "seguiemj.ttf", "Apple Color Emoji.ttc", "seguisym.ttf")
REPLACEMENT = "?"
JOINER = "\u200d"

_BITMAP_SIZES = (109, 160, 136, 128, 96, 64)
_PROBE_SIZE = 32
_NO_GLYPH = "\U0010ffff"


class Face(NamedTuple):
    """An open font. `scale`: wanted size / opened size; differs from 1 for bitmap fonts only."""

    name: str
    font: ImageFont.FreeTypeFont
    scale: float


class Typeface:
    """A font at one size, with fallbacks. `missing`: the characters found in no font so far.

    texts   the texts to write; select the font if none is chosen
    size    font size in pixels
    chosen  path of the font; None: Pillow's own if it has all characters, otherwise the font that lacks the fewest
    others  paths of fallback fonts that come before the system fonts
    Raises ValueError if the chosen font cannot be read.
    """

    def __init__(self, texts: Iterable[str], size: int, chosen: str | None = None, others: Sequence[str] = ()):
        self.size = size
        self.missing: dict[str, None] = {}
        self._names = (BUILT_IN, *others, *TEXT_FONTS)
        self._face = open_face(chosen, size) if chosen else self._lacking_fewest(texts)
        if self._face is None:
            raise ValueError(f'The font "{chosen}" cannot be read: choose another one, or "built-in".')
        self._faces: dict[str, Face | None] = {}

    def printable(self, text: str) -> str:
        """The text with characters that no font has replaced by the letter without accent, a simpler sign, or "?"."""
        return "".join(self._printable(cluster) for cluster in clusters(text))

    def length(self, text: str) -> float:
        """Width of a line in pixels."""
        return sum(face.font.getlength(part) * face.scale for face, part in self._runs(text))

    def draw(self, image: Image.Image, centre: float, top: float, text: str, ink: tuple[int, int, int]) -> None:
        """Draw a line on an RGB image, with its ascender at `top`."""
        draw, runs = ImageDraw.Draw(image), self._runs(text)
        if len(runs) == 1 and runs[0][0] is self._face and self._face.scale == 1:
            draw.text((centre, top), text, ink, self._face.font, anchor="ma")
            return
        x = centre - self.length(text) / 2
        baseline = top + max(face.font.getmetrics()[0] * face.scale for face, _ in runs)
        for face, part in runs:
            if face.scale == 1:
                draw.text((x, baseline), part, ink, face.font, anchor="ls", embedded_color=True)
            else:
                _paste_bitmaps(image, x, baseline, part, ink, face)
            x += face.font.getlength(part) * face.scale

    def _lacking_fewest(self, texts: Iterable[str]) -> Face:
        characters = {c for text in texts for c in text if not _ignorable(c)}
        best, fewest = open_face(BUILT_IN, self.size), math.inf
        for name in self._names:
            face = open_face(name, self.size)
            if face is None or face.scale != 1:
                continue
            lacking = sum(not has(name, c) for c in characters)
            if lacking < fewest:
                best, fewest = face, lacking
            if fewest == 0:
                break
        return best

    def _face_of(self, cluster: str) -> Face | None:
        """The first font that has all characters of a cluster, or None."""
        if cluster not in self._faces:
            visible = [c for c in cluster if not _ignorable(c)]
            names = (self._face.name, *self._names, *SYMBOL_FONTS)
            name = next((name for name in names if all(has(name, c) for c in visible)), None)
            self._faces[cluster] = name if name is None else self._face_named(name)
        return self._faces[cluster]

    def _face_named(self, name: str) -> Face:
        return self._face if name == self._face.name else open_face(name, self.size)

    def _printable(self, cluster: str) -> str:
        face = self._face_of(cluster)
        if face is not None:
            return "".join(c for c in cluster if not _ignorable(c) or c.isspace() or _hides(face.name, c))
        plain = "".join(c for c in unicodedata.normalize("NFKD", cluster) if not unicodedata.combining(c))
        if unicodedata.category(cluster[0]) == "Pd":
            plain = "-"
        if plain and all(self._face_of(c) for c in plain):
            return plain
        self.missing.setdefault(cluster)
        return REPLACEMENT

    def _runs(self, text: str) -> list[tuple[Face, str]]:
        """The line split where the font changes. Spaces between words in a fallback font use that font."""
        if all(_ignorable(c) or has(self._face.name, c) for c in text):
            return [(self._face, text)]
        runs: list[tuple[Face, str]] = []
        space = ""
        for cluster in clusters(text):
            if cluster.isspace():
                space += cluster
                continue
            face = self._face_of(cluster) or self._face
            if runs and runs[-1][0] is face:
                runs[-1] = face, runs[-1][1] + space + cluster
            else:
                runs += [(self._face, space), (face, cluster)] if space else [(face, cluster)]
            space = ""
        return runs


@lru_cache(maxsize=256)
def open_face(name: str, size: int) -> Face | None:
    """A font by path or file name, in one of its own sizes for bitmap fonts. None: no such font."""
    for pixels in (size, *_BITMAP_SIZES):
        try:
            font = ImageFont.truetype(name, pixels) if name else ImageFont.load_default(pixels)
        except OSError as error:
            if "size" in str(error):
                continue
            return None
        return Face(name, font, size / pixels)
    return None


@lru_cache(maxsize=1 << 15)
def has(name: str, character: str) -> bool:
    """Whether a font has a glyph for a character; False if there is no such font."""
    face = open_face(name, _PROBE_SIZE)
    return face is not None and bytes(face.font.getmask(character)) != _blank(name)


@lru_cache(maxsize=1 << 10)
def _hides(name: str, character: str) -> bool:
    """Whether an invisible character can be left in a text in this font."""
    font = open_face(name, _PROBE_SIZE).font
    if font.layout_engine != ImageFont.Layout.RAQM:
        return has(name, character)
    try:
        font.getlength(character)
    except ValueError:  # Raqm fails on invisible text if the font has no space
        return False
    return True


@lru_cache(maxsize=256)
def _blank(name: str) -> bytes:
    return bytes(open_face(name, _PROBE_SIZE).font.getmask(_NO_GLYPH))


def clusters(text: str) -> list[str]:
    """The text's grapheme clusters: characters with their accents, joined emoji, skin tones, flags."""
    if text.isascii():
        return list(text)
    parts: list[str] = []
    for c in text:
        if parts and (_joins(c) or parts[-1][-1] == JOINER or (_flag(c) and len(parts[-1]) == 1 and _flag(parts[-1]))):
            parts[-1] += c
        else:
            parts.append(c)
    return parts


def _joins(c: str) -> bool:
    return unicodedata.category(c) in ("Mn", "Mc", "Me", "Cf") or "\U0001f3fb" <= c <= "\U0001f3ff"


def _flag(c: str) -> bool:
    return "\U0001f1e6" <= c <= "\U0001f1ff"


def _ignorable(c: str) -> bool:
    """Whether a character is invisible: spaces, joiners, direction marks, variation selectors."""
    return c.isspace() or unicodedata.category(c) == "Cf" or "\ufe00" <= c <= "\ufe0f"


def _paste_bitmaps(
    image: Image.Image, x: float, baseline: float, text: str, ink: tuple[int, int, int], face: Face
) -> None:
    ascent, descent = face.font.getmetrics()
    tile = Image.new("RGBA", (max(1, math.ceil(face.font.getlength(text))), ascent + descent))
    ImageDraw.Draw(tile).text((0, ascent), text, ink, face.font, anchor="ls", embedded_color=True)
    tile = tile.resize([max(1, round(side * face.scale)) for side in tile.size], Image.Resampling.LANCZOS)
    image.paste(tile, (round(x), round(baseline - ascent * face.scale)), tile)
