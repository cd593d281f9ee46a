"""The vocabulary of the story world: for every value of an attribute, phrases that mean the same picture."""

from __future__ import annotations

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


def all_phrases() -> list[str]:
    """Every phrase that can occur in a caption, for the demo's vocabulary."""
    lists = (SPECIES_WORDS, FUR_WORDS, CLOTH_WORDS, HAT_WORDS, PLACE_WORDS, ACTION_WORDS, PROP_WORDS, FUR_NOUNS)
    single = (SHIRT_WORDS, TROUSERS_WORDS, ADJECTIVES, NAMES, BEFORE, AFTER, ADVERBS)
    other = ("a an the and in with wearing called named fur , . : ; ! ?",)
    return [
        *(phrase for words in lists for phrases in words.values() for phrase in phrases),
        *(phrase for phrases in single for phrase in phrases),
        *other,
    ]
