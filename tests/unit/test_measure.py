"""A story script measured line by line: what an encode node would count and refuse, with a token for every word."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storyloom.prompts.measure import Fault, measure_script
from storyloom.prompts.report import one_prompt_report
from storyloom.prompts.script import StoryScriptError, parse_story
from storyloom.prompts.windows import frame_prompts


def tokenize(text):
    words = [(word, 1.0, number) for number, word in enumerate(text.split(), start=1)]
    padded = [("<", 1.0, 0), *words[:75], *[(">", 1.0, 0)] * max(1, 76 - len(words))]
    rest = [[("<", 1.0, 0), *words[75:], (">", 1.0, 0)]] if words[75:] else []
    return {"l": [padded, *rest], "g": [padded, *rest]}


def measure(identity="a red fox", frames="asleep in the snow", style=""):
    return measure_script(tokenize, identity, frames, style)


def test_a_sound_story_is_counted_as_the_encode_node_counts_it():
    script = (
        "[Fox] a red fox\n[Owl] an old owl",
        "[Fox] asleep # zzz\n\n[Owl] and [Fox] talk\n[NC] a beach",
        "oil of {prompt}",
    )
    measured = measure(*script)
    prompts = frame_prompts(tokenize, parse_story(*script), "circular")
    report = one_prompt_report(parse_story(*script), prompts, "svr")
    assert not measured.faults and not any(line.fault or line.warning for line in measured.lines)
    assert [(line.line, line.number) for line in measured.lines] == [(1, 1), (3, 2), (4, 3)]
    assert [line.used for line in measured.lines] == [prompt.used for prompt in prompts]
    assert [line.characters for line in measured.lines] == [prompt.characters for prompt in prompts]
    assert [line.own for line in measured.lines] == [1, 1, 2] and "Frame 2: 1 token (" in report
    assert [line.caption for line in measured.lines] == ["zzz", "Owl and Fox talk", "a beach"]
    assert [(total.characters, total.frames, total.tokens) for total in measured.totals] == [
        (("Fox",), (1,), prompts[0].used),
        (("Owl", "Fox"), (2,), prompts[1].used),
    ]


def test_a_long_story_tells_how_many_prompts_it_takes():
    frames = "\n".join(f"word {'again ' * 28}" for _ in range(4))
    (total,) = measure(frames=frames).totals
    windows = {prompt.window for prompt in frame_prompts(tokenize, parse_story("a red fox", frames), "circular")}
    assert total.tokens == 3 + 4 * 29 and total.prompts == len(windows) == 4
    assert measure().totals[0].prompts == 1


def test_every_faulty_line_is_reported_and_the_others_are_measured():
    measured = measure(frames="asleep\n[Wolf] runs\n# only this\n(open\nawake")
    assert [bool(line.fault) for line in measured.lines] == [False, True, True, False, False]
    assert "[Wolf] is not known" in measured.lines[1].fault and "only a caption" in measured.lines[2].fault
    assert "parentheses in frame 4" in measured.lines[3].warning
    assert measured.lines[1].own is None and measured.lines[4].used == 4
    assert measured.totals[0].frames == (1, 5)


@pytest.mark.parametrize(
    "frames, warning",
    [("very " * 80, r"\(83 of 75\)"), ("[Fox]", "has no words of its own")],
)
def test_what_the_encode_node_refuses_is_a_warning_in_its_words(frames, warning):
    identity = "[Fox] a red fox"
    (line,) = measure(identity, frames).lines
    with pytest.raises(ValueError, match=warning) as refused:
        frame_prompts(tokenize, parse_story(identity, frames), "circular")
    assert line.warning == str(refused.value) and not line.fault


def test_faults_of_the_other_boxes_are_told_with_their_place_and_leave_own_words():
    measured = measure("[Fox] a fox\nnameless\n[NC] x", "[Fox] runs far", "no place")
    assert [(fault.box, fault.line) for fault in measured.faults] == [("identity", 2), ("identity", 3), ("style", None)]
    assert (measured.lines[0].own, measured.lines[0].used, measured.totals) == (2, None, ())
    assert measure("", "", "").faults == (
        Fault(
            "identity", None, 'it is empty. Describe who the story is about, for example "a red fox in a blue coat".'
        ),
        Fault("frames", None, 'there is no frame. Write one per line, for example "asleep in the snow".'),
    )


def test_a_text_that_is_not_known_yet_is_no_fault():
    measured = measure(None, "[Anyone] runs\nand (open", None)
    assert not measured.faults and measured.lines[0].characters == ("Anyone",)
    assert (measured.lines[0].own, measured.lines[0].used) == (1, None) and measured.lines[1].warning
    assert measure("a fox", None, "").lines == ()


SIGNS = st.text(st.sampled_from("[]#\\(){}NCFox :\n\r"), max_size=40)


@given(SIGNS, SIGNS, SIGNS)
def test_any_text_is_measured_and_its_first_fault_is_the_parser_s(identity, frames, style):
    measured = measure(identity, frames, style)
    faults = [(fault.box, fault.line) for fault in measured.faults]
    lines = [("frames", line.line) for line in measured.lines if line.fault]
    try:
        parse_story(identity, frames, style)
    except StoryScriptError as error:
        if error.box == "frames":
            assert (error.box, error.line) == next(iter(f for f in (*faults, *lines) if f[0] == "frames"))
        else:
            assert (error.box, error.line) in faults
    else:
        assert not faults and not lines
