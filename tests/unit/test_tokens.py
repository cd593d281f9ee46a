"""Which rows belong to which part of a story, counted with a tokenizer that works like ComfyUI's."""

import math
import re

import pytest
import torch

from storyloom.prompts.conditioning import StoryCond, StoryRow, batch_contexts, per_encoder
from storyloom.prompts.script import parse_story
from storyloom.prompts.tokens import (
    ROOM,
    StoryTokens,
    StoryTooLongError,
    count_tokens,
    locate_frame,
    locate_story,
    without_word_ids,
)

START, END, WINDOW, LARGE = "<start>", "<end>", 77, 8
PADDING = {"l": END, "g": "!"}
WORD = re.compile(r"[^\W_]+|[^\w\s]|_")


class Tokenizer:
    """Words in pieces of four letters, punctuation alone, weights, embeddings, windows of 77: as the host's, in small.

    embeddings: name -> rows it has in CLIP-L and in CLIP-G. literal: "(words:1.2)" is plain text.
    """

    def __init__(self, embeddings=None, literal=False):
        self.literal = literal
        self.embeddings = {
            name: {key: torch.arange(rows * 2.0).view(rows, 2) for key, rows in zip("lg", counts, strict=True)}
            for name, counts in (embeddings or {}).items()
        }

    def __call__(self, text):
        return {key: self.windows(key, self.groups(key, text)) for key in "lg"}

    def groups(self, key, text):
        text = text.replace("\\(", "\1").replace("\\)", "\2")
        for piece, weight in [(text, 1.0)] if self.literal else weighted(text, 1.0):
            for segment in re.split(r"(?<=\s)(?=embedding:)", piece):
                if segment.startswith("embedding:"):
                    name, _, segment = segment.removeprefix("embedding:").partition(" ")
                    yield [(row, weight) for row in self.embeddings[name][key]]
                words = WORD.findall(segment.replace("\1", "(").replace("\2", ")"))
                yield [(word[i : i + 4], weight) for word in words for i in range(0, len(word), 4)]

    def windows(self, key, groups):
        start, end, pad = ((sign, 1.0, 0) for sign in (START, END, PADDING[key]))
        windows = [[start]]
        for number, group in enumerate((group for group in groups if group), start=1):
            tokens = [(*token, number) for token in group]
            while tokens:
                room = WINDOW - 1 - len(windows[-1])
                if len(tokens) <= room:
                    windows[-1] += tokens
                    break
                if len(group) >= LARGE:
                    windows[-1] += tokens[:room]
                    tokens = tokens[room:]
                windows[-1].append(end)
                windows.append([start])
        windows[-1].append(end)
        return [window + [pad] * (WINDOW - len(window)) for window in windows]


def weighted(text, weight):
    for piece in re.findall(r"\([^()]*\)|[^()]+", text):
        inside = re.fullmatch(r"\((.*?)(?::([\d.]+))?\)", piece, re.DOTALL)
        if inside:
            yield inside[1], float(inside[2]) if inside[2] else weight * 1.1
        else:
            yield piece, weight


def words(chunks, rows):
    flat = [token for chunk in chunks for token in chunk]
    return [flat[row][0] for row in rows]


def weights(chunks, rows):
    flat = [token for chunk in chunks for token in chunk]
    return [flat[row][1] for row in rows]


def locate(identity, *frames, tokenizer=None, **options):
    names = ["the identity", *(f"frame {number}" for number in range(1, 1 + len(frames)))]
    return locate_story(tokenizer or Tokenizer(), [identity, *frames], names, **options)


def located_frame(identity, line, style="", tokenizer=None, **options):
    story = parse_story(identity, line, style)
    return locate_frame(tokenizer or Tokenizer(), story.frames[0], story.style_around, "frame 1", **options)


@pytest.mark.parametrize(
    "parts",
    [
        ["a fox", "asleep"],
        ["a red fox in a blue coat", "asleep in the snow", "reading, on a train!", "x"],
        ["unbelievably foxlike", "a fox", "unbelievably", "fox"],
    ],
)
def test_the_lengths_of_the_parts_plus_start_and_end_reach_just_past_the_first_end(parts):
    tokens, joined = locate(*parts)
    lengths = [len(tokens.identity), *map(len, tokens.frames)]
    assert 1 + sum(lengths) + 1 == tokens.eot + 1
    assert [token for token, _, _ in joined["l"][0]].index(END) == tokens.eot
    assert tokens.length == 77 == len(joined["l"][0])
    starts = [1]
    for length in lengths:
        starts.append(starts[-1] + length)
    assert [r.start for r in (tokens.identity, *tokens.frames)] == starts[:-1]


def test_words_that_parts_share_keep_their_own_rows():
    tokens, joined = locate("a red fox", "a red fox", "a red", "fox", "a red fox")
    assert tokens == StoryTokens(range(1, 4), (range(4, 7), range(7, 9), range(9, 10), range(10, 13)), 13, 77)
    for key in "lg":
        assert words(joined[key], tokens.frames[1]) == ["a", "red"]


def test_sub_words_and_punctuation_belong_to_their_part():
    tokens, joined = locate("foxlike creature,", "reading... quietly!", "¡hola!")
    assert words(joined["g"], tokens.identity) == ["foxl", "ike", "crea", "ture", ","]
    assert words(joined["g"], tokens.frames[0]) == ["read", "ing", ".", ".", ".", "quie", "tly", "!"]
    assert words(joined["g"], tokens.frames[1]) == ["¡", "hola", "!"]


def test_weights_are_read_and_take_no_rows():
    tokens, joined = locate("a (red:1.2) fox", "(asleep:0.5) here", "awake")
    assert [len(tokens.identity), *map(len, tokens.frames)] == [3, 3, 2]
    assert words(joined["l"], tokens.identity) == ["a", "red", "fox"]
    assert weights(joined["l"], tokens.identity) == [1, 1.2, 1]
    assert weights(joined["l"], tokens.frames[0]) == [0.5, 0.5, 1]


def test_literal_text_takes_rows_for_its_parentheses():
    tokens, joined = locate("a (red:1.2) fox", ":( alone", tokenizer=Tokenizer(literal=True), weights=False)
    assert words(joined["l"], tokens.identity) == ["a", "(", "red", ":", "1", ".", "2", ")", "fox"]
    assert words(joined["l"], tokens.frames[0]) == [":", "(", "alon", "e"]
    assert set(weights(joined["l"], range(77))) == {1.0}


def test_an_embedding_keeps_its_rows():
    tokenizer = Tokenizer({"fox": (3, 3)})
    tokens, joined = locate("a embedding:fox", "embedding:fox asleep", "fox", tokenizer=tokenizer)
    assert [len(tokens.identity), *map(len, tokens.frames)] == [4, 5, 1]
    row = joined["g"][0][tokens.frames[0][1]][0]
    assert torch.equal(row, tokenizer.embeddings["fox"]["g"][1])


@pytest.mark.parametrize(
    "parts, name",
    [
        (["an embedding:odd", "asleep"], "The identity"),
        (["a fox", "asleep", "near embedding:odd"], "Frame 2"),
    ],
)
def test_an_embedding_of_unequal_lengths_is_an_error_that_names_its_part(parts, name):
    with pytest.raises(ValueError, match=rf"^{name} \(.*takes 3 tokens in CLIP-L but 4 in CLIP-G.*made for SDXL"):
        locate(*parts, tokenizer=Tokenizer({"odd": (2, 3)}))


def test_unequal_lengths_are_an_error_in_a_frame_of_its_own_too():
    with pytest.raises(ValueError, match="Frame 1 .*CLIP-L but"):
        located_frame("a fox", "near embedding:odd", tokenizer=Tokenizer({"odd": (2, 3)}))


@pytest.mark.parametrize(
    "parts, name",
    [
        (["a (red fox", "asleep:1.2) here"], "the identity"),
        (["a fox", "(asleep", "reading:1.2)"], "frame 1"),
        (["a fox", "asleep", "reading)"], "frame 2"),
        (["a fox", ")asleep("], "frame 1"),
    ],
)
def test_parentheses_may_not_straddle_parts(parts, name):
    with pytest.raises(ValueError, match=rf"parentheses in {name} \(.*are not balanced.*begin and end within"):
        locate(*parts)


def test_parentheses_may_not_stand_in_each_other_without_end():
    """Hosts read one level after the other, and their own error would be Python's."""
    deep = "(" * 100 + "asleep" + ")" * 100
    assert len(locate("a fox", deep)[0].frames) == 1
    with pytest.raises(ValueError, match="parentheses in frame 1 .* are nested more than 100 deep"):
        locate("a fox", f"({deep})")


def test_escaped_parentheses_are_plain():
    tokens, joined = locate(r"a fox :\)", r"\( asleep")
    assert words(joined["l"], tokens.identity) == ["a", "fox", ":", ")"]
    assert words(joined["l"], tokens.frames[0]) == ["(", "asle", "ep"]


def test_a_part_without_tokens_is_an_error():
    with pytest.raises(ValueError, match=r"Frame 1 \(.*produces no tokens"):
        locate("a fox", "()", "asleep")


def test_parts_that_merge_with_their_neighbour_are_an_error_and_not_wrong_rows():
    class Merging(Tokenizer):
        def groups(self, key, text):
            return super().groups(key, text.replace("fox asleep", "foxasleep"))

    with pytest.raises(ValueError, match="tokenized differently as a whole"):
        locate("a fox", "asleep here", tokenizer=Merging())


def test_a_full_prompt_fits_and_one_token_more_does_not():
    tokens, _ = locate("a " * 25, "b " * 25, "c " * 25)
    assert tokens.eot == 1 + ROOM == 76
    with pytest.raises(StoryTooLongError, match="1 tokens? too long"):
        locate("a " * 25, "b " * 25, "c " * 26)


@pytest.mark.parametrize(
    "lengths, message",
    [
        ((70, 6), "The identity of [Fox] (70 tokens) and frame 4 (6 tokens) together are 1 token too long"),
        ((75, 1), "The identity of [Fox] (75 tokens) and frame 4 (1 token) together are 1 token too long"),
        ((80, 1), "The identity of [Fox] (80 tokens) alone is 5 tokens too long for one prompt (80 of 75)"),
        ((5, 90), "The identity of [Fox] (5 tokens) and frame 4 (90 tokens) together are 20 tokens too long"),
    ],
)
def test_a_frame_too_long_is_told_by_how_much_and_what_takes_it(lengths, message):
    with pytest.raises(StoryTooLongError) as error:
        locate_story(Tokenizer(), ["a " * length for length in lengths], ["the identity of [Fox]", "frame 4"])
    assert message in str(error.value) and "Encode story frame by frame" in str(error.value)


def test_parts_are_counted_as_they_will_be_located():
    parts = ["a (red:1.2) foxlike creature", "(asleep:0.5) here", "awake"]
    tokens, _ = locate(*parts)
    assert count_tokens(Tokenizer(), parts, parts) == [len(rows) for rows in (tokens.identity, *tokens.frames)]


def test_the_encoders_get_the_same_tokens_without_word_numbers():
    _, joined = locate("a (red:1.2) fox", "asleep")
    plain = without_word_ids(joined)
    assert plain["g"][0][:4] == [(START, 1.0), ("a", 1.0), ("red", 1.2), ("fox", 1.0)]
    assert [len(chunk) for chunk in plain["l"]] == [77]


def test_the_description_of_a_frame_is_found_at_its_beginning():
    located, joined = located_frame("a red fox", "asleep in snow")
    assert located.descriptions == (range(1, 4),) and located.tokens.identity == range(1, 4)
    assert located.tokens.frames == (range(4, 8),)
    assert words(joined["l"], located.tokens.frames[0]) == ["asle", "ep", "in", "snow"]
    assert (located.tokens.eot, located.tokens.length) == (8, 77)


def test_the_description_of_a_frame_is_found_in_its_middle():
    located, joined = located_frame("[Fox] a red fox", "a red kite over [Fox] at dusk")
    assert located.descriptions == (range(5, 8),)
    assert words(joined["g"], located.descriptions[0]) == ["a", "red", "fox"]
    assert located.tokens.frames == (range(1, 5), range(8, 10))


def test_two_descriptions_of_a_frame_are_found():
    located, joined = located_frame("[Fox] a fox\n[Owl] a grey owl", "[Owl] feeds [Fox]")
    assert [words(joined["l"], rows) for rows in located.descriptions] == [["a", "grey", "owl"], ["a", "fox"]]
    assert [words(joined["l"], rows) for rows in located.tokens.frames] == [["feed", "s"]]
    assert located.tokens.identity == located.descriptions[0]


def test_a_frame_without_a_character_has_no_descriptions():
    located, _ = located_frame("a fox", "[NC] an empty beach", style="ink of {prompt}")
    assert located.descriptions == () and len(located.tokens.identity) == 0
    assert located.tokens.frames == (range(3, 8),)


@pytest.mark.parametrize("frame", ["[Fox] asleep", "asleep [Fox]", "asleep, [Fox] too"])
def test_a_style_is_put_around_a_frame_and_never_counts_as_a_description(frame):
    located, joined = located_frame("[Fox] a fox\n[Bob] a man", frame, style="ink of {prompt}, flat")
    shown = words(joined["l"], range(1, located.tokens.eot))
    assert shown[:2] == ["ink", "of"] and shown[-2:] == [",", "flat"]
    assert [words(joined["l"], rows) for rows in located.descriptions] == [["a", "fox"]]
    own = [word for rows in located.tokens.frames for word in words(joined["l"], rows)]
    assert "ink" not in own and "flat" not in own and own[:2] == ["asle", "ep"]


def test_a_style_that_merges_with_the_end_of_a_frame_is_taken_with_it():
    class Merging(Tokenizer):
        def groups(self, key, text):
            return super().groups(key, text.replace(".,", "dotcomma"))

    story = parse_story("a fox", "asleep.", "{prompt}, flat")
    located, joined = locate_frame(Merging(), story.frames[0], story.style_around, "frame 1")
    assert words(joined["l"], located.descriptions[0]) == ["a", "fox"]


def test_a_long_frame_goes_on_in_further_windows():
    located, joined = located_frame("[Fox] the red fox", "x " * 74 + "[Fox] " + "y " * 80)
    assert located.tokens.length == 3 * 77 and located.tokens.eot == 76
    assert [words(joined["l"], rows) for rows in located.descriptions] == [["the"], ["red", "fox"]]
    assert located.descriptions == (range(75, 76), range(78, 80))
    own = [row for rows in located.tokens.frames for row in rows]
    assert words(joined["l"], own) == ["x"] * 74 + ["y"] * 80


def test_padding_between_windows_belongs_to_nobody():
    located, joined = located_frame("[Fox] (the red fox:1.1)", "x " * 74 + "[Fox] y")
    assert located.tokens.eot == 75 and located.tokens.length == 2 * 77
    assert words(joined["l"], located.descriptions[0]) == ["the", "red", "fox"]
    assert located.descriptions == (range(78, 81),)
    assert located.tokens.frames == (range(1, 75), range(81, 82))


def attention(q, context):
    return torch.softmax(q @ context.mT / math.sqrt(q.shape[-1]), -1) @ context


def test_contexts_of_unequal_length_are_batched_exactly():
    generator = torch.Generator().manual_seed(0)
    contexts = [torch.randn(1, length, 16, generator=generator, dtype=torch.float64) for length in (77, 154, 231)]
    q = torch.randn(1, 5, 16, generator=generator, dtype=torch.float64)
    batch = batch_contexts(contexts)
    assert batch.shape == (3, 462, 16)
    for row, context in zip(batch, contexts, strict=True):
        assert torch.allclose(attention(q, row), attention(q, context), rtol=0, atol=1e-12)


def test_contexts_of_one_length_are_batched_as_they_are():
    contexts = [torch.randn(1, 77, 4) for _ in range(3)]
    assert torch.equal(batch_contexts(contexts), torch.cat(contexts))


@pytest.mark.parametrize("shrunk", [1, 8])
def test_each_encoder_is_edited_on_its_own(shrunk):
    hidden = torch.randn(5, 2048 // shrunk)
    widths = []

    def negate(part):
        widths.append(part.shape)
        return -part

    assert torch.equal(per_encoder(hidden, negate), -hidden)
    assert widths == [(5, 768 // shrunk), (5, 1280 // shrunk)]


def test_the_refiners_context_is_edited_as_one_encoders():
    """A part's own size is what a split would change."""
    hidden = torch.randn(5, 1280)
    assert torch.equal(per_encoder(hidden, lambda part: part / part.numel()), hidden / hidden.numel())


def story_row(descriptions, length=77):
    identity = descriptions[0] if descriptions else range(1, 1)
    return StoryRow(0, ("",), StoryTokens(identity, (range(8, 10),), 10, length), descriptions)


def test_identity_columns_are_the_start_and_every_description():
    tag = StoryCond((story_row((range(1, 4), range(6, 8))), story_row(())), 77)
    assert tag.identity_columns(0) == (0, 1, 2, 3, 6, 7)
    assert tag.identity_columns(1) == ()


def test_identity_columns_repeat_with_the_row_and_not_with_its_windows():
    tag = StoryCond((story_row((range(1, 3),)), story_row((range(1, 2), range(80, 81)), 154)), 154)
    assert tag.identity_columns(0) == (0, 1, 2, 77, 78, 79)
    assert tag.identity_columns(1) == (0, 1, 80)
