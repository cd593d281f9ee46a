"""Which frames of a story one prompt tells together."""

import pytest
from hypothesis import given
from hypothesis import strategies as some

from storyloom.prompts.casts import casts_of
from storyloom.prompts.script import parse_story

TRIO = "[Fox] a red fox\n[Owl] a grey owl\n[Cat] a fat cat"


def casts_by_identity(identity, frames, style=""):
    return {cast.identity: (cast.frames, cast.words) for cast in casts_of(parse_story(identity, frames, style))}


@pytest.mark.parametrize(
    "identity, frames", [("a red fox", "asleep\nreading"), ("[Fox] a red fox", "[Fox] asleep\nreading [Fox]")]
)
def test_one_character_is_one_cast(identity, frames):
    assert casts_by_identity(identity, frames, "ink of {prompt}, flat") == {
        "ink of a red fox, flat": ((0, 1), ("asleep", "reading"))
    }


def test_frames_of_the_same_characters_are_together_in_any_order_of_names():
    frames = "[Owl] flies\n[Fox] and [Owl] argue\n[Owl] sings\n[NC] a beach\n[Owl] feeds [Fox]"
    assert casts_by_identity(TRIO, frames) == {
        "a grey owl": ((0, 2), ("flies", "sings")),
        "a red fox and a grey owl": ((1, 4), ("argue", "feeds")),
    }


@pytest.mark.parametrize(
    "frame, words",
    [
        ("[Fox] and [Owl] argue", "argue"),
        ("At sea [Fox], [Cat], and [Owl] argue", "At sea argue"),
        ("[Fox] & [Owl] and a dog", "and a dog"),
        ("[Fox] and then [Owl]", "and then"),
        ("and [Fox] [Owl] and", "and and"),
        ("[Fox] and [Fox] asleep", "and asleep"),
    ],
)
def test_an_and_between_two_names_is_left_to_the_identity(frame, words):
    (cast,) = casts_of(parse_story(TRIO, frame))
    assert cast.words == (words,)


def test_a_cast_is_called_by_its_names():
    (both,) = casts_of(parse_story(TRIO, "[Owl] meets [Fox]"))
    (nameless,) = casts_of(parse_story("a fox", "asleep"))
    assert (both.name, nameless.name) == ("the identity of [Fox] and [Owl]", "the identity")


@pytest.mark.parametrize("frames", ["[Fox] asleep\n\n[Fox]", "[Fox] asleep\n\n[Fox] and [Owl]"])
def test_a_frame_that_says_nothing_of_its_own_is_refused(frames):
    with pytest.raises(ValueError, match=r"Frame 2 \(line 3\) has no words of its own"):
        casts_of(parse_story(TRIO, frames))


@given(some.lists(some.lists(some.sampled_from(["Fox", "Owl", "Cat"]), max_size=4), min_size=1, max_size=12))
def test_every_frame_with_a_character_is_in_the_cast_of_exactly_its_characters(shown):
    lines = ["".join(f"[{name}] " for name in names or ["NC"]) + f"does {i}" for i, names in enumerate(shown)]
    casts = casts_of(parse_story(TRIO, "\n".join(lines)))
    assert sorted(frame for cast in casts for frame in cast.frames) == [i for i, names in enumerate(shown) if names]
    for cast in casts:
        assert len({frozenset(shown[frame]) for frame in cast.frames}) == 1
        assert cast.words == tuple(f"does {frame}" for frame in cast.frames)
    assert len({cast.identity for cast in casts}) == len(casts)
