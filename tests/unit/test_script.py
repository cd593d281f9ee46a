"""The story script: what every line means, and what the artist is told when one is wrong."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storyloom.prompts.script import Part, Story, StoryScriptError, parse_frames, parse_story

FOX = "a red fox in a blue coat"
TWO = "[Fox] a red fox in a blue coat\n[Owl] a grey owl"


def frame(line: str, identity: str = FOX):
    (only,) = parse_story(identity, line).frames
    return only


def frame_text(line: str, identity: str = FOX) -> str:
    return " ".join(part.text for part in frame(line, identity).parts)


def test_a_single_identity_stands_before_every_frame():
    story = parse_story(FOX, "asleep in the snow\nreading on a train")
    assert story.identity == FOX
    assert [(c.name, c.description) for c in story.characters] == [("", FOX)]
    assert [f.text for f in story.frames] == ["asleep in the snow", "reading on a train"]
    assert [f.characters for f in story.frames] == [("",), ("",)]
    assert story.frames[0].parts == (Part(FOX, ""), Part("asleep in the snow"))


def test_an_identity_without_names_may_take_several_lines():
    assert parse_story("a red fox\n\n  in a blue coat ", "asleep").identity == FOX


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_every_kind_of_line_end_a_byte_order_mark_and_blank_lines_are_taken(newline):
    frames = newline.join(["\ufeffasleep", "", "  \t ", "reading\u00a0\u3000on  a train ", ""])
    story = parse_story("\ufeff" + newline + FOX + newline, frames, "\ufeffink of {prompt}" + newline)
    assert story.identity == FOX
    assert [(f.text, f.line) for f in story.frames] == [("asleep", 1), ("reading on a train", 4)]
    assert story.style == "ink of {prompt}"


def test_unicode_stays_as_it_is_typed():
    story = parse_story("[Füchsin 🦊] eine rote Füchsin\n[狐] 赤い狐", "[füchsin 🦊] schläft\n[狐] 走る # 走れ！")
    assert [c.name for c in story.characters] == ["Füchsin 🦊", "狐"]
    assert frame_text("[狐] 走る", "[狐] 赤い狐") == "赤い狐 走る"
    assert story.frames[1].caption == "走れ！"


def test_a_hundred_frames_keep_their_order_and_lines():
    story = parse_story(FOX, "\n\n".join(f"frame {i}" for i in range(100)))
    assert [f.text for f in story.frames] == [f"frame {i}" for i in range(100)]
    assert [f.line for f in story.frames] == list(range(1, 200, 2))


@pytest.mark.parametrize(
    "line, text, caption",
    [
        ("asleep # Winter came.", "asleep", "Winter came."),
        ("asleep#Winter # came.", "asleep", "Winter # came."),
        ("asleep #", "asleep", ""),
        ("asleep", "asleep", "asleep"),
        (r"page \#1 # It is \#1 \[really\]", "page #1", "It is #1 [really]"),
        (r"a sign \[open\]", "a sign [open]", "a sign [open]"),
        (r"\# on a door", "# on a door", "# on a door"),
    ],
)
def test_a_caption_follows_the_first_plain_number_sign_and_escapes_are_plain(line, text, caption):
    assert (frame(line).text, frame(line).caption) == (text, caption)


def test_a_frame_without_a_caption_is_its_own_without_the_brackets():
    assert frame("[Fox] meets [Owl] at night", TWO).caption == "Fox meets Owl at night"
    assert frame("[NC] an empty beach").caption == "an empty beach"


def test_names_stand_for_descriptions_where_they_are_written():
    both = frame("at night [Fox] and [Owl] sing", TWO)
    assert [(p.text, p.character) for p in both.parts] == [
        ("at night", None),
        (FOX, "Fox"),
        ("and", None),
        ("a grey owl", "Owl"),
        ("sing", None),
    ]
    assert both.characters == ("Fox", "Owl")
    assert both.text == "at night and sing"


@pytest.mark.parametrize("name", ["[Fox]", "[fox]", "[ FOX ]"])
def test_names_do_not_mind_case_and_blanks(name):
    assert frame_text(f"{name} asleep", TWO) == f"{FOX} asleep"


def test_a_character_named_twice_in_a_frame_is_one_character_described_twice():
    twice = frame("[Fox] looks at [Fox] in a mirror", TWO)
    assert twice.characters == ("Fox",)
    assert frame_text("[Fox] looks at [Fox]", TWO) == f"{FOX} looks at {FOX}"


def test_several_characters_are_only_where_they_are_named():
    assert frame("an empty wood", TWO).characters == ()
    assert frame_text("an empty wood", TWO) == "an empty wood"
    assert parse_story(TWO, "[Fox] asleep").identity == f"{FOX} and a grey owl"


def test_a_single_named_character_is_in_every_frame():
    one = "[Fox] a red fox"
    assert frame_text("asleep", one) == "a red fox asleep"
    assert frame_text("at night [Fox] sleeps", one) == "at night a red fox sleeps"
    assert frame("asleep", one).characters == frame("[Fox] asleep", one).characters == ("Fox",)


@pytest.mark.parametrize("mark", ["[NC]", "[nc]", "[ Nc ]"])
@pytest.mark.parametrize("identity", [FOX, "[Fox] a red fox", TWO])
def test_nc_keeps_every_character_out(mark, identity):
    empty = frame(f"{mark} an empty beach", identity)
    assert (empty.characters, empty.text, len(empty.parts)) == ((), "an empty beach", 1)


def test_a_frame_that_is_a_name_alone_shows_that_character():
    assert frame("[Fox]", TWO).parts == (Part(FOX, "Fox"),)


def test_brackets_inside_an_identity_are_left_alone():
    assert parse_story("a fox [old]", "asleep").identity == "a fox [old]"
    assert parse_story(r"\[old\] fox", "asleep").identity == "[old] fox"


def test_notes_after_a_number_sign_are_no_part_of_the_identity():
    story = parse_story(f"# who\n{FOX} # the hero", "asleep")
    assert story.identity == FOX


@pytest.mark.parametrize(
    "style, around",
    [
        ("", ("", "")),
        ("  \n ", ("", "")),
        ("ink of {prompt}, flat colours", ("ink of ", ", flat colours")),
        ("ink of\n{prompt}", ("ink of ", "")),
        ("{prompt}", ("", "")),
    ],
)
def test_a_style_stands_around_the_prompt(style, around):
    assert parse_story(FOX, "asleep", style).style_around == around


FAULTS = [
    (("", "asleep"), "identity", None, ["is empty", "Describe who the story is about"]),
    ((" \n# only a note", "asleep"), "identity", None, ["is empty"]),
    ((FOX, ""), "frames", None, ["no frame", "one per line"]),
    ((FOX, "\n \r\n"), "frames", None, ["no frame"]),
    ((FOX, "asleep\n# only words"), "frames", 2, ["only a caption", "before the #"]),
    (("[Fox] a fox\na grey owl", "[Fox] asleep"), "identity", 2, ['"a grey owl" has no name', "Begin the line with"]),
    (("[ ] a fox", "asleep"), "identity", 1, ["is empty", "a name"]),
    (("[nc] a fox", "asleep"), "identity", 1, ["[NC] is reserved", "another name"]),
    (("[Fox] a fox\n\n[fox] a vixen", "asleep"), "identity", 3, ["[fox] is described twice", "its own name"]),
    (("[Fox]  # later\n", "asleep"), "identity", 1, ["[Fox] has no description", "after the name"]),
    (("[Fox] a fox [old", "asleep"), "identity", 1, ["is unmatched", "\\["]),
    ((TWO, "\n[Wolf] howls"), "frames", 2, ["[Wolf] is not known", "[Fox], [Owl]", "[NC]", "Correct it or add it"]),
    (
        (FOX, "[Wolf] howls"),
        "frames",
        1,
        ["[Wolf] is not known", "has no named characters", 'line with "[Wolf]"'],
    ),
    ((TWO, "[NC] [Fox] asleep"), "frames", 1, ["[NC] means no character", "[Fox] is named", "Remove one"]),
    ((FOX, "[NC] # nothing"), "frames", 1, ["the frame is empty", "after [NC]"]),
    ((FOX, "asleep\nat [night"), "frames", 2, ['"at [night" is unmatched', "\\["]),
    ((FOX, "at night]"), "frames", 1, ["is unmatched"]),
    ((FOX, "asleep", "ink"), "style", None, ['"ink" has no {prompt}', "Put {prompt} once"]),
    ((FOX, "asleep", "{prompt} {prompt}"), "style", None, ["has {prompt} 2 times"]),
]


@pytest.mark.parametrize("texts, box, line, expected", FAULTS, ids=[str(fault[0]) for fault in FAULTS])
def test_a_fault_names_the_box_the_line_and_the_remedy(texts, box, line, expected):
    with pytest.raises(StoryScriptError) as fault:
        parse_story(*texts)
    message = str(fault.value)
    assert isinstance(fault.value, ValueError)
    assert (fault.value.box, fault.value.line) == (box, line)
    assert message.startswith(f"Story script, {box}: " if line is None else f"Story script, {box}, line {line}: ")
    assert all(words in message for words in expected), message
    assert re.search(r"[.\"]$", message) and "\n" not in message


def test_a_long_line_is_cut_in_the_message():
    with pytest.raises(StoryScriptError) as fault:
        parse_story(FOX, "[ " + "x" * 500)
    assert len(str(fault.value)) < 250


@pytest.mark.parametrize("line", ["asleep", "[Fox]", "[Fox] # asleep", "[NC] an empty beach", "[Fox] meets [Owl]"])
def test_frames_can_be_checked_before_the_identity_is_known(line):
    """A frame that some identity makes valid is not refused while the identity is still to come through a link."""
    assert len(parse_frames(line, None)) == 1


@pytest.mark.parametrize("line", ["", "# words", "[Fox", "[NC]"])
def test_frames_that_no_identity_can_help_are_refused_before_it_is_known(line):
    with pytest.raises(StoryScriptError):
        parse_frames(line, None)


PIECES = ["[", "]", "[Fox]", "[fox ]", "[NC]", "[]", "#", "\\", "\n", "\r", " ", "\ufeff", "{prompt}", "a", "狐", "\0"]
TEXT = st.one_of(st.text(st.characters(), max_size=40), st.lists(st.sampled_from(PIECES), max_size=14).map("".join))


@settings(max_examples=400)
@given(TEXT, TEXT, st.one_of(st.just(""), TEXT))
def test_any_three_texts_are_a_story_or_a_story_script_error(identity, frames, style):
    try:
        story = parse_story(identity, frames, style)
    except StoryScriptError as fault:
        box = {"identity": identity, "frames": frames, "style": style}[fault.box]
        assert fault.line is None or 1 <= fault.line <= len(re.split(r"\r\n|\r|\n", box))
        return
    assert isinstance(story, Story) and story.identity and story.frames
    lines = [f.line for f in story.frames]
    assert lines == sorted(set(lines)) and lines[0] >= 1
    names = {c.name for c in story.characters}
    for f in story.frames:
        assert f.parts and all(p.text.strip() for p in f.parts)
        assert set(f.characters) == {p.character for p in f.parts} - {None} <= names
        assert f.text == " ".join(p.text for p in f.parts if p.character is None)
    assert story.style.count("{prompt}") == bool(story.style)


def test_a_colon_after_a_name_is_not_part_of_the_words():
    story = parse_story("[Fox]: a red fox\n[Crow]  a crow", "[Fox]: asleep\n[Crow] flies: high")
    assert [character.description for character in story.characters] == ["a red fox", "a crow"]
    assert [frame.text for frame in story.frames] == ["asleep", "flies: high"]
    assert story.frames[0].caption == "Fox: asleep"


def test_prompts_are_what_each_frame_says_alone_with_its_style():
    frames = "[Fox] asleep # caption\n[NC] an empty beach\n[Fox] and [Owl] arguing"
    story = parse_story(TWO, frames, "ink of {prompt}, flat")
    assert story.prompts == (
        "ink of a red fox in a blue coat asleep, flat",
        "ink of an empty beach, flat",
        "ink of a red fox in a blue coat and a grey owl arguing, flat",
    )
    assert parse_story(FOX, "asleep").prompts == (f"{FOX} asleep",)


@pytest.mark.parametrize("opening, closing", ["【】", "［］"])
@pytest.mark.parametrize("colon", ["", "：", ":"])
def test_full_width_brackets_and_colons_name_characters(opening, closing, colon):
    identity = f"{opening}狐狸{closing}{colon} 穿蓝色外套的红狐狸\n{opening}猫头鹰{closing}{colon}一只灰色的猫头鹰"
    story = parse_story(identity, f"{opening}狐狸{closing}{colon}在雪中睡觉\n{opening}NC{closing} 空荡荡的海滩")
    assert [(c.name, c.description) for c in story.characters] == [
        ("狐狸", "穿蓝色外套的红狐狸"),
        ("猫头鹰", "一只灰色的猫头鹰"),
    ]
    assert [frame.characters for frame in story.frames] == [("狐狸",), ()]
    assert [part.text for part in story.frames[0].parts] == ["穿蓝色外套的红狐狸", "在雪中睡觉"]
    assert [frame.caption for frame in story.frames] == [f"狐狸{colon}在雪中睡觉", "空荡荡的海滩"]


def test_a_full_width_number_sign_starts_the_caption_and_escapes_are_literal():
    one = frame("在雪中睡觉 ＃ 冬天来得早。")
    assert (one.text, one.caption) == ("在雪中睡觉", "冬天来得早。")
    assert frame(r"房间 \＃7 和 \【门\】").text == "房间 ＃7 和 【门】"


@pytest.mark.parametrize("line", ["【Fox asleep", "Fox】 asleep", "［Fox asleep"])
def test_an_unmatched_full_width_bracket_is_refused(line):
    with pytest.raises(StoryScriptError, match="frames, line 1: a bracket in .* is unmatched"):
        frame(line, TWO)


def test_names_in_a_caption_lose_their_brackets_and_other_brackets_stay():
    one = frame("[Fox] and [Owl] at a table # [Fox] invited 【Owl】: [laughs]", TWO)
    assert one.caption == "Fox invited Owl: [laughs]"


@pytest.mark.parametrize("schedule", ["cat:dog:0.5", "snow:10", "a:b: 3"])
def test_prompt_scheduling_is_refused_by_its_name(schedule):
    for identity in (FOX, TWO):
        with pytest.raises(StoryScriptError, match=r"looks like prompt scheduling, which a script does not support\."):
            frame(f"a [{schedule}] in the garden", identity)
