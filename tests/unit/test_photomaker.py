"""Where PhotoMaker's photos enter a story's prompts: the trigger word, the class noun and its token rows."""

import pytest
import torch
from test_story_encoding import Encoders, tokenize
from test_tokens import Tokenizer, words

from storyloom.prompts.conditioning import TAG
from storyloom.prompts.encode import frame_by_frame, one_prompt
from storyloom.prompts.photomaker import (
    photo_report,
    photo_story,
    rows_frame_by_frame,
    rows_in_one_prompt,
    without_trigger,
)
from storyloom.prompts.script import parse_story
from storyloom.prompts.tag import tag_of
from storyloom.prompts.windows import frame_prompts

MAN = "a man photomaker in a blue coat"
CAST = "[Bob] a tall man photomaker in blue\n[Amy] a woman, smiling"
CAST_FRAMES = "[Bob] asleep\n[NC] a beach\n[Amy] reading\n[Amy] and [Bob] arguing\nAt noon [Bob] meets [Bob]"


def prepared(identity=MAN, frames="asleep in the snow\nreading", style="", photos=1):
    return photo_story(parse_story(identity, frames, style), photos)


def rows_of(identity, frames, style="", photos=1, tokenizer=None, weights=True, shared=True):
    """Rows to fuse in every frame, and the words of every frame's prompt by row."""
    tokenizer = tokenizer or Tokenizer()
    story, person = prepared(identity, frames, style, photos)
    if shared:
        prompts = frame_prompts(tokenizer, story, "circular", weights=weights)
        rows = rows_in_one_prompt(tokenizer, story, person, prompts, weights=weights)
        texts = [prompt.text for prompt in prompts]
    else:
        rows, texts = rows_frame_by_frame(tokenizer, story, person, weights=weights), story.prompts
    found = [tokenizer(text)["l"] for text in texts]
    return rows, [[words(chunks, mention) for mention in own] for chunks, own in zip(found, rows, strict=True)]


def test_the_trigger_word_is_left_out_of_every_text():
    story, person = prepared(CAST, CAST_FRAMES)
    plain = parse_story(CAST.replace(" photomaker", ""), CAST_FRAMES)
    assert story == plain and story.identity == "a tall man in blue and a woman, smiling"
    assert (person.name, person.noun, person.beginnings) == ("Bob", "man", ("a tall man",))


@pytest.mark.parametrize(
    "identity, plain",
    [
        (MAN, "a man man man in a blue coat"),
        ("A girl PhotoMaker, smiling", "A girl girl girl, smiling"),
        ("a (man photomaker:1.2) in blue", "a (man man man:1.2) in blue"),
        ("a 猫 photomaker", "a 猫 猫 猫"),
    ],
)
def test_the_class_noun_comes_once_for_each_photo(identity, plain):
    story, person = prepared(identity, photos=3)
    assert story.identity == plain and len(person.beginnings) == 3
    assert {frame.parts[0].text for frame in story.frames} == {plain}
    assert all(plain.startswith(beginning) for beginning in person.beginnings)


def test_a_text_without_the_trigger_is_otherwise_unchanged():
    assert without_trigger("a man  PhotoMaker, in a coat") == "a man, in a coat"
    assert without_trigger("a (man photomaker:1.2) photomakers") == "a (man:1.2) photomakers"


@pytest.mark.parametrize("photos", [1, 3])
@pytest.mark.parametrize("shared", [True, False])
def test_the_rows_are_those_of_the_noun_in_the_frames_of_its_character(shared, photos):
    rows, found = rows_of(CAST, CAST_FRAMES, "fine-grained ink of {prompt}, flat", photos, shared=shared)
    noun = ["man"] * photos
    assert found == [[noun], [], [], [noun], [noun] if shared else [noun, noun]]
    assert all(list(mention) == list(range(mention[0], mention[0] + photos)) for own in rows for mention in own)


def test_the_rows_count_tokens_and_not_words():
    identity = "an unbelievably (handsome:1.3) gentleman photomaker, smiling"
    for shared in (True, False):
        rows, found = rows_of(identity, "asleep", "ink-drawn {prompt}", shared=shared)
        assert rows == [((13,),)] and found == [[["n"]]], "ink - draw n | an | unbe liev ably | hand some | gent lema n"


def test_a_noun_of_several_tokens_is_fused_at_its_last_one():
    rows, found = rows_of("a gentleman photomaker", "asleep", photos=2)
    assert rows == [((4, 7),)] and found == [[["n", "n"]]]


def test_parentheses_count_as_text_where_weights_are_not_parsed():
    rows, found = rows_of(
        "a (tall man photomaker:1.2) in blue", "asleep", tokenizer=Tokenizer(literal=True), weights=False
    )
    assert rows == [((4,),)] and found == [[["man"]]]


@pytest.mark.parametrize("identity", ["a (tall man photomaker:1.2) in (blue)", "(a \\(tall\\) man photomaker)"])
def test_a_weight_around_the_noun_is_parsed(identity):
    _, found = rows_of(identity, "asleep")
    assert found == [[["man"]]]


def test_the_noun_is_found_in_a_later_chunk_of_a_long_frame():
    rows, found = rows_of(CAST, "x " * 74 + "[Bob] y", photos=2, shared=False)
    assert found == [[["man", "man"]]] and rows == [((79, 80),)]


def test_windows_of_a_long_story_have_their_rows_too():
    rows, found = rows_of(MAN, "\n".join(f"{'x ' * 30}{number}" for number in range(4)), "ink of {prompt}")
    assert found == [[["man"]]] * 4 and rows == [((4,),)] * 4


NO_TRIGGER = r'A photo is connected, but the identity has no word "photomaker"\. Write it after the noun .*"a man photo'


@pytest.mark.parametrize(
    "identity, frames, style, message",
    [
        ("a man in a blue coat", "asleep", "", NO_TRIGGER),
        ("a man, photomakers", "asleep", "", NO_TRIGGER),
        ("a man photomaker and a man photomaker", "asleep", "", r"occurs 2 times in the identity\. One character"),
        ("[A] a man photomaker\n[B] a cat photomaker", "[A] x", "", r"occurs 2 times in the identity \(\[A\], \[B\]\)"),
        ("photomaker in a coat", "asleep", "", r'In the identity "photomaker in a coat", .*does not follow a noun'),
        ("a man, photomaker", "asleep", "", "does not follow a noun"),
        ("a (man:1.2) photomaker", "asleep", "", "does not follow a noun"),
        (MAN, "asleep\nthe man photomaker", "", r'is in frame 2 \("the man photomaker"\)\. Remove it there'),
        (MAN, "asleep", "photomaker style of {prompt}", r"is in the style \(.*Remove it there"),
    ],
)
def test_a_misplaced_trigger_is_an_error_that_shows_what_to_write(identity, frames, style, message):
    with pytest.raises(ValueError, match=message) as error:
        prepared(identity, frames, style)
    assert '"a man photomaker in a blue coat"' in str(error.value) or "directly after the noun" in str(error.value)


def marked(rows):
    """A fusion that can be recognised: the rows become their own number, plus a half."""

    def fuse(frame, context):
        out = context.clone()
        for mention in rows[frame]:
            for row in mention:
                out[:, row] = row + 0.5
        return out

    return fuse


@pytest.mark.parametrize("reweighting", ["svr", "svr_eot", "npr", "none"])
def test_fusion_and_reweighting_commute(reweighting):
    """Reweighting reads and changes the rows of frames and end-of-text only, and fusion those of the identity."""
    story, person = prepared(frames="asleep\nreading a book\n[NC] a beach", style="ink of {prompt}", photos=2)
    prompts = frame_prompts(tokenize, story, "circular")
    fuse = marked(rows_in_one_prompt(tokenize, story, person, prompts))
    ((before, info),) = one_prompt(tokenize, Encoders(), prompts, reweighting, fuse=fuse)
    ((plain, same),) = one_prompt(tokenize, Encoders(), prompts, reweighting)
    after = torch.cat([fuse(frame, context[None]) for frame, context in enumerate(plain)])
    assert torch.equal(before, after) and not torch.equal(before, plain)
    assert torch.equal(before[2], plain[2]), "a frame without the character"
    assert info[TAG] == same[TAG] and torch.equal(info["pooled_output"], same["pooled_output"])


def test_every_entry_of_a_schedule_is_fused():
    story, person = prepared()
    fuse = marked(rows_frame_by_frame(tokenize, story, person))
    for entries in (
        frame_by_frame(tokenize, Encoders(2), story, fuse=fuse),
        one_prompt(tokenize, Encoders(2), frame_prompts(tokenize, story, "circular"), "none", fuse=fuse),
    ):
        assert [bool((context[:, 2] == 2.5).all()) for context, _ in entries] == [True, True]


@pytest.mark.parametrize("shared", [True, False])
def test_the_fused_rows_are_identity_columns_of_their_frames(shared):
    story, person = prepared(CAST, CAST_FRAMES, "ink of {prompt}", 2)
    prompts = frame_prompts(tokenize, story, "circular")
    if shared:
        rows = rows_in_one_prompt(tokenize, story, person, prompts)
        ((_, info),) = one_prompt(tokenize, Encoders(), prompts, "svr")
    else:
        rows = rows_frame_by_frame(tokenize, story, person)
        ((_, info),) = frame_by_frame(tokenize, Encoders(), story)
    for frame, mentions in enumerate(rows):
        columns = tag_of(info).identity_columns(frame)
        assert {row for mention in mentions for row in mention} <= set(columns)


def test_the_report_lists_the_fused_rows_of_every_frame():
    story, person = prepared(CAST, CAST_FRAMES, photos=2)
    rows = rows_frame_by_frame(tokenize, story, person)
    assert photo_report(person, rows) == (
        'PhotoMaker: "man" of [Bob] is fused with 2 photos: rows 3, 4 (frame 1); rows 8, 9 (frame 4); '
        "rows 5, 6, 12, 13 (frame 5)"
    )
    story, person = prepared()
    assert photo_report(person, rows_frame_by_frame(tokenize, story, person)) == (
        'PhotoMaker: "man" of the identity is fused with 1 photo: row 2 (frames 1, 2)'
    )
    assert photo_report(person, [(), ()]).endswith("1 photo: in no frame")
