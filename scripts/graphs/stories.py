"""The templates' stories, as inputs of Story script: one line per frame, with its caption after `#`."""

STYLE = {"style": "watercolor illustration of {prompt}, soft light"}

DEMO_IDENTITY = "a fox in a blue coat"
"""In the demo model's words, like the frames below. Fur, trousers and hat are left open."""
FOX = {
    "identity": DEMO_IDENTITY,
    "frames": """asleep in the snow # Winter came early.
reading a book on a train # So he went south.
with an umbrella in the city # It rained in the city,
jumping on the beach # but not at the sea.""",
}
LONG_FOX = {
    "identity": DEMO_IDENTITY,
    "frames": """waving in the meadow # Every journey begins at home.
standing with a lantern in the forest # The forest was dark,
running in the snow # the winter long,
asleep in a cave # the cave warm.
with an umbrella in the city # It rained in the city.
reading a book on a train # The train was slow,
jumping on the beach # but then: the sea!
sitting in the desert # Not all of it was fun.
with a balloon in the meadow # Back home with a balloon,
asleep in the bedroom # and so to bed.""",
}
FOX_AND_BEAR = {
    "identity": """[Fox] a red fox in a blue coat
[Bear] a brown bear in a yellow sweater and green pants""",
    "frames": """[Fox] asleep in the snow # Winter came early.
[Bear] with a lantern in the forest # Someone was on the way.
[Fox] and [Bear] waving on the beach # They met at the sea
[Fox] and [Bear] sitting on a train # and went on together.""",
}
PERSON = {
    "identity": "a person",
    "frames": """reading a book on a train # The train was slow,
walking through a snowy forest # the forest quiet,
with an umbrella in the city at night # the city wet.
laughing on a beach # And then: the sea.""",
}
PHOTOGRAPHED = {**PERSON, "identity": "a man photomaker in a blue coat"}
"""With PhotoMaker's trigger word after the noun for what the photo shows."""
COUPLE = {
    "identity": """[Woman] a woman
[Man] a man""",
    "frames": """[Woman] waiting on a railway platform # She was early,
[Man] asleep on a train # he was late,
[Woman] and [Man] walking on a beach # the sea was there all the time.
[Man] and [Woman] drinking tea in a garden # And so was tea.""",
}
