"""Windows of a story that one prompt does not hold: which frames a frame's prompt tells."""

import pytest
from hypothesis import given
from hypothesis import strategies as some

from storyloom.prompts.script import parse_story
from storyloom.prompts.tokens import ROOM, StoryTooLongError
from storyloom.prompts.windows import WINDOW_KINDS, choose_windows, frame_prompts

KINDS = some.sampled_from(WINDOW_KINDS)


def tokenize(text):
    """One token per letter: no two texts of these tests meet inside a word."""
    letters = [letter for letter in text if letter != " "]
    frames = [["<", *letters[i : i + ROOM], ">"] for i in range(0, len(letters), ROOM)]
    padded = [[*frame, *[">"] * (ROOM + 2 - len(frame))] for frame in frames]
    chunks = [[(sign, 1.0, int(sign not in "<>")) for sign in chunk] for chunk in padded]
    return {"l": chunks, "g": chunks}


def prompts_of(identity, frames, kind="circular", **options):
    return frame_prompts(tokenize, parse_story(identity, "\n".join(frames)), kind, **options)


@some.composite
def stories(draw):
    """Tokens of an identity and of frames, each of which fits behind the identity alone."""
    identity = draw(some.integers(1, ROOM - 1))
    return identity, draw(some.lists(some.integers(1, ROOM - identity), min_size=1, max_size=20))


@given(stories(), KINDS)
def test_every_window_holds_its_frame_once_and_fits(story, kind):
    identity, frames = story
    windows = choose_windows(identity, frames, kind)
    assert len(windows) == len(frames)
    for place, window in enumerate(windows):
        assert window.count(place) == 1 and len(set(window)) == len(window)
        assert identity + sum(frames[other] for other in window) <= ROOM


@given(stories(), KINDS)
def test_a_story_that_fits_is_one_window_in_its_own_order_and_no_other_is(story, kind):
    identity, frames = story
    fits = identity + sum(frames) <= ROOM
    whole = [tuple(range(len(frames)))] * len(frames)
    assert (choose_windows(identity, frames, kind) == whole) == (fits or len(frames) == 1)


@given(stories())
def test_circular_windows_begin_with_their_frame_and_go_round(story):
    identity, frames = story
    windows = choose_windows(identity, frames, "circular")
    if len(windows[0]) == len(frames):
        return
    for place, window in enumerate(windows):
        assert window == tuple((place + step) % len(frames) for step in range(len(window)))
        assert is_full(identity, frames, window, (place + len(window)) % len(frames), len(windows[0]))


@given(stories())
def test_trailing_windows_are_the_first_frames_and_then_end_with_their_frame(story):
    identity, frames = story
    windows = choose_windows(identity, frames, "trailing")
    size = len(windows[0])
    assert windows[:size] == [tuple(range(size))] * size
    for place, window in enumerate(windows[size:], start=size):
        assert window == tuple(range(place - len(window) + 1, place + 1))
        assert is_full(identity, frames, window, window[0] - 1, size)


def is_full(identity, frames, window, following, size):
    """Whether a window is as long as the first, or one frame more would not fit."""
    used = identity + sum(frames[place] for place in window)
    return len(window) == size or (len(window) < size and used + frames[following] > ROOM)


@pytest.mark.parametrize(
    "kind, windows",
    [
        ("circular", ["abc", "bcd", "cde", "dea", "eab"]),
        ("trailing", ["abc", "abc", "abc", "bcd", "cde"]),
    ],
)
def test_windows_of_equal_frames_are_as_published(kind, windows):
    chosen = choose_windows(15, [20] * 5, kind)
    assert ["".join("abcde"[place] for place in window) for window in chosen] == windows


def test_a_window_too_long_leaves_out_the_frames_farthest_from_its_own():
    assert choose_windows(15, [10, 10, 10, 40, 10], "circular")[1:4] == [(1, 2, 3), (2, 3, 4), (3, 4, 0)]
    assert choose_windows(15, [10, 10, 10, 45, 10], "circular")[1:4] == [(1, 2), (2, 3), (3, 4)]
    assert choose_windows(15, [10, 10, 10, 45, 10], "trailing")[3:] == [(2, 3), (3, 4)]


def test_the_smallest_window_is_the_frame_alone():
    assert choose_windows(10, [60, 40, 3], "circular") == [(0,), (1,), (2,)]
    assert choose_windows(10, [60, 40, 3], "trailing") == [(0,), (1,), (2,)]


@pytest.mark.parametrize("kind", WINDOW_KINDS)
def test_prompts_are_the_windows_of_every_cast(kind):
    frames = ["[A] " + "a" * 30, "[B] " + "b" * 30, "[A] " + "c" * 30, "[NC] " + "d" * 80, "[A] " + "e" * 30]
    prompts = prompts_of("[A] xxx\n[B] yyyy", frames, kind)
    circular = [(0, 2), (1,), (2, 4), (3,), (4, 0)]
    trailing = [(0, 2), (1,), (0, 2), (3,), (2, 4)]
    assert [prompt.window for prompt in prompts] == (circular if kind == "circular" else trailing)
    assert [prompt.used for prompt in prompts] == [63, 34, 63, 80, 63]
    assert [prompt.frame for prompt in prompts] == [*range(5)]
    letters = [prompt.text.replace(" ", "") for prompt in prompts]
    for prompt, text, words in zip(prompts, letters, "abcde", strict=True):
        assert prompt.alone.replace(" ", "")[-1] == words
        if prompt.characters:
            assert {text[row - 1] for row in prompt.tokens.frames[prompt.index]} == {words}
            assert [*prompt.descriptions] == [prompt.tokens.identity]


@pytest.mark.parametrize("kind", WINDOW_KINDS)
@pytest.mark.parametrize(
    "identity, frames, message",
    [
        (
            "[A] " + "x" * 80,
            ["[A] a"],
            r"^The identity of \[A\] \(80 tokens\) alone is 5 tokens too long.*Shorten the id",
        ),
        (
            "[A] xx\n[B] " + "y" * 40,
            ["[A] a", "[A] [B] a", "[B] [A] " + "b" * 40],
            r"^The identity of \[A\] and \[B\] \(45 tokens\) and frame 3 \(40 tokens\) together are 10 tokens too long",
        ),
        ("x" * 10, ["a" * 30, "b" * 30, "c" * 67], r"The identity \(10 tokens\) and frame 3 \(67 .* 2 tokens too long"),
    ],
)
def test_an_identity_and_a_frame_that_do_not_fit_are_named(kind, identity, frames, message):
    with pytest.raises(StoryTooLongError, match=message):
        prompts_of(identity, frames, kind)


def test_faults_name_the_frame_of_the_story_and_not_of_its_cast():
    with pytest.raises(ValueError, match="parentheses in frame 3 "):
        prompts_of("[A] x\n[B] y", ["[A] a", "[B] b", "[A] (c"])
    with pytest.raises(ValueError, match=r"parentheses in the identity of \[B\] "):
        prompts_of("[A] x\n[B] (y", ["[A] a", "[B] b"])
    assert len(prompts_of("[A] x\n[B] (y", ["[A] a", "[B] (b"], weights=False)) == 2
