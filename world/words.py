"""What a caption of the story world can say, and what its words make likely where they say nothing.

Every phrase has synonyms that mean the same picture. Words of places, actions, props, and adjectives and names, also
pull the attributes that the caption leaves open (a shy cat on the beach prefers other shirts than a proud one in the
snow), as the words of real captions do. All pulls are centred: over the words of a group and over the values of an
attribute they add up to nothing, so a long text prefers nothing that another long text would prefer too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np

from .scene import ACTIONS, LOOKS, PLACES, PROPS, SPECIES, TOGETHER, Figure, Scene

SPECIES_WORDS = {
    "cat": ("cat", "kitten", "kitty"),
    "fox": ("fox", "vixen"),
    "rabbit": ("rabbit", "bunny", "hare"),
    "bear": ("bear", "cub", "teddy"),
    "robot": ("robot", "android", "machine"),
    "girl": ("girl", "child", "kid"),
}
FUR_WORDS = {
    "red": ("red", "orange", "ginger"),
    "brown": ("brown", "chestnut"),
    "grey": ("grey", "gray", "silver"),
    "white": ("white", "snowy"),
    "black": ("black", "dark"),
    "pink": ("pink", "rosy"),
}
CLOTH_WORDS = {
    "red": ("red", "scarlet", "crimson"),
    "yellow": ("yellow", "lemon"),
    "green": ("green", "emerald"),
    "blue": ("blue", "navy"),
    "purple": ("purple", "violet"),
    "white": ("white", "ivory"),
}
SHIRT_WORDS = ("shirt", "coat", "jacket", "sweater", "hoodie", "pullover", "blouse")
TROUSERS_WORDS = ("trousers", "pants", "jeans", "shorts", "leggings")
HAT_WORDS = {
    "none": ("without a hat", "with no hat"),
    "cap": ("with a cap", "in a cap", "wearing a cap", "with a baseball cap"),
    "crown": ("with a crown", "in a crown", "wearing a crown", "with a golden crown"),
    "top hat": ("with a top hat", "in a top hat", "wearing a top hat", "with a tall hat"),
}
FUR_NOUNS = {"robot": ("metal", "steel"), "girl": ("hair", "curls")}

PLACE_WORDS = {
    "meadow": (
        "in the meadow",
        "in a meadow",
        "in the field",
        "on the grass",
        "in the garden",
        "in the park",
        "on a hill",
    ),
    "snow": ("in the snow", "in snow", "on the ice", "in winter", "on a glacier", "in the frost"),
    "beach": ("on the beach", "by the sea", "on the sand", "at the coast", "by the ocean", "on an island"),
    "city": ("in the city", "in the town", "on the street", "in the night city", "at night", "under the moon"),
    "forest": ("in the forest", "in the woods", "among the trees", "in the jungle", "under the trees"),
    "desert": ("in the desert", "in the dunes", "by a cactus", "in the heat"),
    "cave": ("in the cave", "in a cave", "underground", "in the mine", "among crystals", "in a tunnel"),
    "bedroom": ("in the bedroom", "at home", "in the house", "in the room", "by the bed", "by the window"),
    "train": ("on a train", "on the train", "in the train", "in the wagon", "on the railway", "in the subway"),
}
ACTION_WORDS = {
    "standing": ("standing", "waiting", "posing", "stands", "waits"),
    "running": ("running", "racing", "hurrying", "runs", "rushing"),
    "jumping": ("jumping", "leaping", "hopping", "jumps", "dancing", "flying"),
    "sitting": ("sitting", "resting", "sits", "seated"),
    "waving": ("waving", "greeting", "waves", "saying hello"),
    "sleeping": ("asleep", "sleeping", "dreaming", "sleeps", "napping"),
}
PROP_WORDS = {
    "none": (),
    "balloon": ("with a balloon", "holding a balloon", "carrying a balloon"),
    "umbrella": ("with an umbrella", "under an umbrella", "holding an umbrella", "with a parasol"),
    "book": ("reading a book", "reading", "with a book", "studying", "reads a letter", "with a map"),
    "lantern": ("with a lantern", "holding a lantern", "carrying a lamp", "with a torch"),
}
ADJECTIVES = (
    *("brave", "shy", "happy", "sad", "old", "young", "little", "tiny", "big", "proud", "clever", "lazy"),
    *("royal", "poor", "rich", "wild", "gentle", "funny", "curious", "magic", "famous", "sleepy", "noble", "fancy"),
)
NAMES = (
    *("luna", "rex", "mia", "tom", "anna", "max", "ruby", "leo", "emma", "jack", "lily", "oscar"),
    *("nora", "finn", "rosa", "hugo", "ella", "sam", "zoe", "otto", "bella", "felix", "clara", "paul"),
    *("mary", "john", "alice", "peter", "lucy", "ben", "sofia", "david", "sarah", "charlie", "daisy", "henry"),
)
BEFORE = (
    *("pixel art of", "a pixel art of", "a picture of", "an illustration of", "a drawing of", "a photo of"),
    *("a painting of", "a story of", "the story of", "a comic of", "a scene with", "a portrait of", "once upon a time"),
    *("a cartoon of", "a tale of", "the adventures of", "a watercolor of", "a sketch of", "a book about"),
)
AFTER = (
    *(", pixel art", ", watercolor", ", comic style", ", children's book", ", highly detailed", ", best quality"),
    *(
        ", cinematic",
        ", soft light",
        ", illustration",
        ", cartoon style",
        ", bright colors",
        ", masterpiece",
        ", anime",
    ),
    *(", storybook", ", warm light", ", sharp focus", ", beautiful", ", simple shapes", ", retro game", ", 8 bit"),
)
ADVERBS = (
    *("happily", "quietly", "slowly", "quickly", "alone", "again", "today", "now", "finally", "suddenly", "then"),
    *(
        "still",
        "together",
        "always",
        "later",
        "soon",
        "at last",
        "all day",
        "for fun",
        "once more",
        "one day",
        "in peace",
    ),
    *("in the morning", "in the evening", "after lunch", "before dinner", "on sunday", "with a smile", "very fast"),
)

PULLING = {"place": PLACES, "action": ACTIONS[1:], "prop": PROPS[1:], "adjective": ADJECTIVES, "name": NAMES}
UNSAID = ("standing", "none")
"""What frames tell without words; it pulls nothing, or long texts would drift towards it."""
STRENGTH = 1.7
"""How strongly each of the two kinds of words, those of frames and those of identities, pulls, in logits."""


@dataclass(frozen=True)
class FrameTold:
    """What the words of one frame say; prop "none" where they name none."""

    place: str
    action: str
    prop: str = "none"


@dataclass(frozen=True)
class FigureTold:
    """What an identity says: species, the looks that it names, and adjectives and names that pull the other looks."""

    species: str
    looks: Mapping[str, str] = field(default_factory=dict)
    adjectives: tuple[str, ...] = ()
    names: tuple[str, ...] = ()


@cache
def pulls() -> dict[str, dict[str, dict[str, np.ndarray]]]:
    """look -> group -> word -> logits: mean 0 over a look's values; over a group's words mean 0 and variance 1.

    Made when a caption is first imagined: it takes too long for the start of a host that only loads the nodes.
    """
    random = np.random.default_rng(7)
    tables: dict[str, dict[str, dict[str, np.ndarray]]] = {}
    for look, values in LOOKS.items():
        tables[look] = {}
        for group, words in PULLING.items():
            table = random.standard_normal((len(words), len(values)))
            for _ in range(100):
                table -= table.mean(1, keepdims=True)
                table -= table.mean(0)
                table /= table.std(0)
            tables[look][group] = dict(zip(words, table, strict=True))
    return tables


def likely(look: str, frames: Sequence[FrameTold], who: FigureTold, stereotypes: bool = True) -> np.ndarray:
    """Probability of each value of an open attribute, given all frames of the text and the identity.

    The spread is the same whatever the number of frames and words. Without stereotypes every value is as likely.
    """
    logits = np.zeros(len(LOOKS[look]))
    if stereotypes:
        words = pulls()[look]
        told = [
            words[group][word]
            for frame in frames
            for group, word in (("place", frame.place), ("action", frame.action), ("prop", frame.prop))
            if word not in UNSAID
        ]
        own = [words["adjective"][word] for word in who.adjectives] + [words["name"][word] for word in who.names]
        for kind in (told, own):
            if kind:
                logits += STRENGTH * sum(kind) / np.sqrt(len(kind))
    chances = np.exp(logits - logits.max())
    return chances / chances.sum()


def imagine(
    frames: Sequence[FrameTold],
    shown: int,
    figures: Sequence[FigureTold],
    random: np.random.Generator,
    stereotypes: bool = True,
) -> Scene:
    """A scene that fits a text of `frames` and shows one of them; what the text leaves open is drawn as likely."""
    people = []
    for who in figures:
        looks = {
            look: who.looks[look]
            if look in who.looks
            else str(random.choice(values, p=likely(look, frames, who, stereotypes)))
            for look, values in LOOKS.items()
        }
        people.append(Figure(who.species, **looks))
    frame = frames[shown]
    return Scene(frame.place, frame.action, frame.prop, tuple(people))


def any_figure(random: np.random.Generator, named: float = 0.35) -> FigureTold:
    """A random identity that names each look with a probability, and often an adjective or a name."""
    looks = {look: str(random.choice(values)) for look, values in LOOKS.items() if random.random() < named}
    adjectives = (str(random.choice(ADJECTIVES)),) if random.random() < 0.45 else ()
    names = (str(random.choice(NAMES)),) if random.random() < 0.3 else ()
    return FigureTold(str(random.choice(SPECIES)), looks, adjectives, names)


def any_frame(random: np.random.Generator, together: bool = False) -> FrameTold:
    """A random frame: an action, a prop or both, in a place. together: for two figures."""
    place = str(random.choice(PLACES))
    if together:
        return FrameTold(place, str(random.choice(TOGETHER)))
    kind = random.random()
    prop = str(random.choice(PROPS[1:])) if kind < 0.5 else "none"
    if kind < 0.3:
        return FrameTold(place, "standing", prop)
    action = str(random.choice(ACTIONS[:-1] if prop != "none" else ACTIONS))
    return FrameTold(place, action, prop)


def frame_words(frame: FrameTold, random: np.random.Generator | None = None, adverbs: bool = False) -> str:
    """A frame in words; the first words of each list without a generator."""
    said = []
    if frame.action != "standing" or frame.prop == "none" or (random is not None and random.random() < 0.3):
        said.append(_one(ACTION_WORDS[frame.action], random))
    if frame.prop != "none":
        said.append(_one(PROP_WORDS[frame.prop], random))
    if adverbs and random is not None and random.random() < 0.2:
        said.insert(int(random.integers(len(said) + 1)), _one(ADVERBS, random))
    said.append(_one(PLACE_WORDS[frame.place], random))
    return " ".join(said)


def figure_words(who: FigureTold, random: np.random.Generator | None = None) -> str:
    """An identity in words; the first words of each list without a generator."""
    noun = _one(SPECIES_WORDS[who.species], random)
    fur = _one(FUR_WORDS[who.looks["fur"]], random) if "fur" in who.looks else ""
    before = [*who.adjectives]
    after = []
    if fur:
        nouns = FUR_NOUNS.get(who.species, ("fur",))
        if who.species == "girl" or _chance(random, 0.35):
            after.append(f"with {fur} {_one(nouns, random)}")
        else:
            before.append(fur)
    clothes = [
        (look, _one(CLOTH_WORDS[who.looks[look]], random), _one(words, random))
        for look, words in (("shirt", SHIRT_WORDS), ("trousers", TROUSERS_WORDS))
        if look in who.looks
    ]
    worn = " and ".join(
        f"a {colour} {word}" if look == "shirt" else f"{colour} {word}" for look, colour, word in clothes
    )
    if worn:
        after.append(f"{_one(('in', 'with', 'wearing'), random)} {worn}")
    if "hat" in who.looks:
        after.append(_one(HAT_WORDS[who.looks["hat"]], random))
    plain = " ".join([*before, noun])
    article = "an" if plain[0] in "aeiou" else "a"
    described = plain if _chance(random, 0.12) else f"{article} {plain}"
    if who.names:
        name = " ".join(who.names)
        described = (
            f"{described} {_one(('called', 'named'), random)} {name}"
            if _chance(random, 0.5)
            else f"{name}, {described}"
        )
    return " ".join([described, *after])


def _one(words: Sequence[str], random: np.random.Generator | None) -> str:
    return words[0] if random is None else words[int(random.integers(len(words)))]


def _chance(random: np.random.Generator | None, probability: float) -> bool:
    return random is not None and random.random() < probability


def all_phrases() -> list[str]:
    """Every phrase that a caption can hold, for the demo's vocabulary."""
    lists = (SPECIES_WORDS, FUR_WORDS, CLOTH_WORDS, HAT_WORDS, PLACE_WORDS, ACTION_WORDS, PROP_WORDS, FUR_NOUNS)
    single = (SHIRT_WORDS, TROUSERS_WORDS, ADJECTIVES, NAMES, BEFORE, AFTER, ADVERBS)
    spoken = ("a an the and in with wearing called named fur , . : ; ! ?",)
    return [
        *(phrase for words in lists for phrases in words.values() for phrase in phrases),
        *(phrase for phrases in single for phrase in phrases),
        *spoken,
    ]
