"""A story's conditioning from any host's tokenizer and encoders."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from storyloom.prompts import encode as encoding
from storyloom.prompts.conditioning import per_encoder
from storyloom.prompts.encode import expressed, frame_by_frame
from storyloom.prompts.report import one_prompt_report
from storyloom.prompts.script import parse_story
from storyloom.prompts.svr import NPRSettings, SVRSettings, express_frame, express_frame_naively
from storyloom.prompts.tag import tag_of
from storyloom.prompts.tokens import StoryTokens
from storyloom.prompts.windows import frame_prompts

STORY = parse_story("a red fox", "asleep\nreading a book\ndrinking", "ink of {prompt}, fine")
TOKENS = StoryTokens(range(1, 7), (range(7, 8), range(8, 11), range(11, 12)), 12, 77)
SETTINGS = SVRSettings(0.02, 0.1, -0.02, 0.9, "enhance_first")


def tokenize(text):
    """One token per word, as many windows of 77 as it takes."""
    words = text.replace(",", " ,").split()
    windows = [words[i : i + 75] for i in range(0, len(words), 75)] or [[]]
    frames = [[("<", 1.0, 0), *((word, 1.0, 1) for word in window), (">", 1.0, 0)] for window in windows]
    padded = [frame + [(">", 1.0, 0)] * (77 - len(frame)) for frame in frames]
    return {"l": padded, "g": padded}


class Encoders:
    """Encodings by the text alone; `entries` of them, as where encoders change along a schedule."""

    def __init__(self, entries=1):
        self.entries, self.received = entries, []

    def __call__(self, prompts):
        self.received.append(
            [" ".join(word for window in p["l"] for word, _, known in window if known) for p in prompts]
        )
        return [[self.encoded(tokens, number) for number in range(self.entries)] for tokens in prompts]

    def encoded(self, tokens, number):
        words = [word for window in tokens["l"] for word, _, _ in window]
        generator = torch.Generator().manual_seed(sum(map(ord, "".join(words))) + number)
        context = torch.randn(1, len(words), 2048, generator=generator)
        return context, {"pooled_output": context[:, -1, :1280], "number": number}


def one_prompt(tokenize, encode, story, *settings, kind="circular", **options):
    return encoding.one_prompt(tokenize, encode, frame_prompts(tokenize, story, kind), *settings, **options)


def whole(number=0):
    return Encoders().encoded(tokenize("ink of a red fox , fine asleep reading a book drinking"), number)


@pytest.mark.parametrize("reweighting", ["svr", "svr_eot", "npr", "none"])
def test_every_row_of_one_prompt_expresses_its_frame(reweighting):
    ((context, info),) = one_prompt(tokenize, Encoders(), STORY, reweighting, SETTINGS)
    (plain, plain_info) = whole()
    tokens = tag_of(info).rows[0].tokens
    edits = {
        "svr": lambda frame: lambda part: express_frame(part, tokens, frame, SETTINGS),
        "svr_eot": lambda frame: lambda part: express_frame(part, tokens, frame, replace(SETTINGS, eot="scale")),
        "npr": lambda frame: lambda part: express_frame_naively(part, tokens, frame),
        "none": lambda frame: lambda part: part,
    }
    for frame, row in enumerate(context):
        assert torch.equal(row, per_encoder(plain[0], edits[reweighting](frame)))
    assert [row.frame for row in tag_of(info).rows] == [0, 1, 2] and tag_of(info).length == 77
    assert all(row.descriptions == (tokens.identity,) for row in tag_of(info).rows) and len(tokens.identity) == 7
    assert torch.equal(info["pooled_output"], plain_info["pooled_output"].repeat(3, 1))


@pytest.mark.parametrize("reweighting, eot", [("svr", "svr"), ("svr_eot", "scale")])
def test_an_enhanced_identity_is_that_of_each_row(reweighting, eot):
    settings = replace(SETTINGS, enhance_identity=True)
    ((context, info),) = one_prompt(tokenize, Encoders(), STORY, reweighting, settings)
    tokens, plain = tag_of(info).rows[0].tokens, whole()[0][0]
    for frame, row in enumerate(context):
        edit = partial(express_frame, tokens=tokens, frame=frame, settings=replace(settings, eot=eot))
        assert torch.equal(row, per_encoder(plain, edit))
    identities = [row[list(tokens.identity)] for row in (plain, *context)]
    assert all((a - b).abs().max() > 1e-2 for i, a in enumerate(identities) for b in identities[:i])
    assert [tag_of(info).identity_columns(row) for row in range(3)] == [tuple(range(8))] * 3


@pytest.mark.parametrize("reweighting", ["npr", "none"])
def test_other_reweightings_leave_the_identity_as_it_is(reweighting):
    plain, enhanced = (
        one_prompt(tokenize, Encoders(), STORY, reweighting, replace(SETTINGS, enhance_identity=on))[0][0]
        for on in (False, True)
    )
    assert torch.equal(plain, enhanced)


def test_the_factors_of_naive_reweighting_reach_every_row():
    npr = NPRSettings(express=1.0, suppress=0.25)
    ((context, info),) = one_prompt(tokenize, Encoders(), STORY, "npr", SETTINGS, npr=npr)
    tokens = tag_of(info).rows[0].tokens
    for frame, row in enumerate(context):
        expected = whole()[0][0].clone()
        for k, rows in enumerate(tokens.frames):
            expected[list(rows)] *= 1.0 if k == frame else 0.25
        assert torch.equal(row, expected)


def test_the_four_reweightings_differ():
    contexts = [expressed(whole()[0], TOKENS, 1, name, SETTINGS) for name in ("svr", "svr_eot", "npr", "none")]
    assert all(not torch.allclose(a, b, atol=1e-2) for i, a in enumerate(contexts) for b in contexts[:i])


@pytest.mark.parametrize("pooled", ["full", "zero", "frame"])
def test_summaries_are_of_the_story_or_nothing_or_the_own_frame(pooled):
    encode = Encoders()
    ((_, info),) = one_prompt(tokenize, encode, STORY, "svr", SETTINGS, pooled)
    story = "ink of a red fox , fine asleep reading a book drinking"
    own = [f"ink of a red fox , fine {words}" for words in ("asleep", "reading a book", "drinking")]
    assert encode.received == [[story, *own] if pooled == "frame" else [story]]
    texts = own if pooled == "frame" else [story] * 3
    expected = torch.cat([Encoders().encoded(tokenize(text), 0)[1]["pooled_output"] for text in texts])
    assert torch.equal(info["pooled_output"], expected * (pooled != "zero"))


def test_every_entry_of_a_schedule_keeps_its_own_encoding():
    entries = one_prompt(tokenize, Encoders(2), STORY, "none", pooled="frame")
    for number, (context, info) in enumerate(entries):
        assert torch.equal(context[1:2], whole(number)[0]) and info["number"] == number
    own = Encoders().encoded(tokenize("ink of a red fox , fine asleep"), 1)[1]["pooled_output"]
    assert torch.equal(entries[1][1]["pooled_output"][:1], own)
    first, second = frame_by_frame(tokenize, Encoders(2), STORY)
    assert first[1]["number"] == 0 and second[1]["number"] == 1 and not torch.equal(first[0], second[0])


def test_frames_alone_are_repeated_to_a_common_length():
    story = parse_story("[Fox] a red fox", "[Fox] asleep\n[NC] " + "snow " * 80)
    encode = Encoders()
    ((context, info),) = frame_by_frame(tokenize, encode, story)
    ((short,), (long,)) = Encoders()([tokenize(text) for text in encode.received[0]])
    assert context.shape == (2, 154, 2048)
    assert torch.equal(context[0], short[0][0].repeat(2, 1)) and torch.equal(context[1], long[0][0])
    assert torch.equal(info["pooled_output"], torch.cat([short[1]["pooled_output"], long[1]["pooled_output"]]))
    assert [row.characters for row in tag_of(info).rows] == [("Fox",), ()]
    assert [row.descriptions for row in tag_of(info).rows] == [(range(1, 4),), ()]


def test_numbers_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="not finite.*closer to the published"):
        one_prompt(tokenize, Encoders(), STORY, "svr", SVRSettings(weaken_alpha=-20.0))


CAST = parse_story(
    "[Fox] a red fox\n[Owl] a grey owl",
    "[Fox] asleep\n[NC] an empty beach\n[Fox] and [Owl] arguing\n[Fox] reading a book\n[Owl] meets [Fox]\n[Owl] flies",
    "ink of {prompt}, fine",
)
FOX, OWL, BOTH = (f"ink of {who} , fine" for who in ("a red fox", "a grey owl", "a red fox and a grey owl"))
EXPECTED = [
    (f"{FOX} asleep reading a book", [range(8, 9), range(9, 12)], 0),
    ("ink of an empty beach , fine", None, None),
    (f"{BOTH} arguing meets", [range(12, 13), range(13, 14)], 0),
    (f"{FOX} asleep reading a book", [range(8, 9), range(9, 12)], 1),
    (f"{BOTH} arguing meets", [range(12, 13), range(13, 14)], 1),
    (f"{OWL} flies", [range(8, 9)], 0),
]


@pytest.mark.parametrize("reweighting", ["svr", "svr_eot", "npr", "none"])
def test_every_cast_is_a_prompt_of_its_own_and_the_rows_come_in_story_order(reweighting):
    encode = Encoders()
    ((context, info),) = one_prompt(tokenize, encode, CAST, reweighting, SETTINGS)
    assert sorted(encode.received[0]) == sorted({text for text, _, _ in EXPECTED}), "every prompt is encoded once"
    assert [row.frame for row in tag_of(info).rows] == [*range(6)]
    assert [row.characters for row in tag_of(info).rows] == [frame.characters for frame in CAST.frames]
    for row, summary, tagged, (text, frames, place) in zip(
        context, info["pooled_output"], tag_of(info).rows, EXPECTED, strict=True
    ):
        plain, plain_info = Encoders().encoded(tokenize(text), 0)
        assert torch.equal(summary, plain_info["pooled_output"][0])
        if frames is None:
            assert torch.equal(row, plain[0]) and tagged.descriptions == ()
            continue
        tokens = StoryTokens(range(1, frames[0].start), tuple(frames), frames[-1].stop, 77)
        assert tagged.tokens == tokens and tagged.descriptions == (tokens.identity,)
        assert torch.equal(row, expressed(plain, tokens, place, reweighting, SETTINGS)[0])
    columns = [len(tag_of(info).identity_columns(row)) for row in range(6)]
    assert columns == [8, 0, 12, 8, 12, 8]


def test_a_summary_of_the_own_frame_is_of_its_cast():
    encode = Encoders()
    ((_, info),) = one_prompt(tokenize, encode, CAST, "svr", pooled="frame")
    own = [f"{FOX} asleep", EXPECTED[1][0], f"{BOTH} arguing", f"{FOX} reading a book", f"{BOTH} meets", f"{OWL} flies"]
    expected = [Encoders().encoded(tokenize(text), 0)[1]["pooled_output"] for text in own]
    assert torch.equal(info["pooled_output"], torch.cat(expected))
    assert len(encode.received[0]) == len({*own, *(text for text, _, _ in EXPECTED)})


def test_a_long_frame_without_a_character_lengthens_every_row():
    story = parse_story("a fox", "asleep\n[NC] " + "snow " * 80 + "\nawake")
    ((context, info),) = one_prompt(tokenize, Encoders(), story, "none")
    plain, _ = Encoders().encoded(tokenize("a fox asleep awake"), 0)
    snow, _ = Encoders().encoded(tokenize("snow " * 80), 0)
    assert torch.equal(context[2], plain[0].repeat(2, 1)) and torch.equal(context[1], snow[0])
    assert tag_of(info).identity_columns(0) == (0, 1, 2, 77, 78, 79) and tag_of(info).identity_columns(1) == ()


def test_a_story_of_nobody_is_encoded_plainly():
    story = parse_story("a fox", "[NC] a beach\n[NC] the sea")
    ((context, info),) = one_prompt(tokenize, Encoders(), story, "svr")
    ((alone, alone_info),) = frame_by_frame(tokenize, Encoders(), story)
    assert torch.equal(context, alone) and tag_of(info) == tag_of(alone_info)


@pytest.mark.parametrize("kind", ["circular", "trailing"])
def test_windows_are_prompts_that_express_their_frame(kind):
    texts = [f"{name} " + "x " * 19 for name in "abcde"]
    story = parse_story("a red fox", "\n".join(texts))
    encode = Encoders()
    ((context, info),) = one_prompt(tokenize, encode, story, "svr", SETTINGS, kind=kind)
    windows = {
        "circular": [(0, 1, 2), (1, 2, 3), (2, 3, 4), (3, 4, 0), (4, 0, 1)],
        "trailing": [(0, 1, 2), (0, 1, 2), (0, 1, 2), (1, 2, 3), (2, 3, 4)],
    }[kind]
    tokens = StoryTokens(range(1, 4), (range(4, 24), range(24, 44), range(44, 64)), 64, 77)
    for number, window in enumerate(windows):
        plain, plain_info = Encoders().encoded(tokenize("a red fox " + " ".join(texts[place] for place in window)), 0)
        expected = expressed(plain, tokens, window.index(number), "svr", SETTINGS)
        assert torch.equal(context[number], expected[0])
        assert torch.equal(info["pooled_output"][number], plain_info["pooled_output"][0])
    assert {row.tokens for row in tag_of(info).rows} == {tokens}
    assert len(encode.received[0]) == len(set(windows)), "a window that frames share is encoded once"


def report(story, reweighting="svr", kind="circular"):
    return one_prompt_report(story, frame_prompts(tokenize, story, kind), reweighting)


def test_the_report_counts_tokens_and_names_what_is_suppressed():
    text = report(STORY, "svr_eot")
    assert "end-of-text scaled" in text
    assert "The identity (frames 1, 2, 3): 7 tokens (rows 1-7): ink of a red fox, fine" in text
    assert (
        "Frame 2: 3 tokens (rows 9-11): reading a book\n"
        "    window: frames 1, 2, 3; 12 of 75 tokens, 63 free; expressed: 2; suppressed: 1, 3" in text
    )
    assert "enhanced" not in text
    assert "suppressed" not in report(STORY, "none") and "frames 1, 2, 3; 12 of 75" in report(STORY, "none")


def test_the_report_names_an_enhanced_identity_where_it_is():
    prompts = frame_prompts(tokenize, STORY, "circular")
    first = [
        one_prompt_report(STORY, prompts, reweighting, enhance_identity=True).splitlines()[0]
        for reweighting in ("svr", "svr_eot", "npr", "none")
    ]
    assert first[0] == (
        "Every frame: SVR expresses it and suppresses the other frames of its window, and enhances the identity."
    )
    assert ["enhances the identity" in line for line in first] == [True, True, False, False]


def test_the_report_tells_casts_and_frames_without_a_character():
    text = report(CAST)
    assert "The identity of [Fox] and [Owl] (frames 3, 5): 11 tokens (rows 1-11): ink of a red fox and a grey" in text
    assert "Frame 2: 7 tokens: ink of an empty beach, fine\n    no character: encoded alone, nothing suppr" in text
    assert "Frame 4: 3 tokens (rows 9-11): reading a book\n    window: frames 1, 4; 11 of 75 tokens" in text
    assert "Frame 6: 1 token (row 8): flies\n    window: frame 6; 8 of 75 tokens, 67 free; expressed: 6; su" in text
    assert "suppressed: none\nLatent batch: 6 images, one per frame" in text


def test_the_report_tells_windows():
    story = parse_story("a red fox", "\n".join(["x " * 20] * 5))
    assert "window: frames 5, 1, 2; 63 of 75 tokens, 12 free; expressed: 5; suppressed: 1, 2" in report(story)
    assert "window: frames 3, 4, 5; 63 of 75 tokens, 12 free; expressed: 5; suppressed: 3, 4" in report(
        story, kind="trailing"
    )


class Changed(Encoders):
    """Encoders that return two rows for every token, as CLIP NegPip."""

    def encoded(self, tokens, number):
        context, info = super().encoded(tokens, number)
        return context.repeat_interleave(2, 1), info


@pytest.mark.parametrize("reweighting", ["svr", "npr", "none", "frame by frame"])
def test_rows_that_are_not_those_of_the_tokens_are_refused(reweighting):
    with pytest.raises(ValueError, match="encodes the 77 tokens of a prompt as 154 rows.* Connect the checkpoint's"):
        if reweighting == "frame by frame":
            frame_by_frame(tokenize, Changed(), STORY)
        else:
            one_prompt(tokenize, Changed(), STORY, reweighting)


def test_a_conditioning_holds_only_plain_values():
    for _, info in [
        *frame_by_frame(tokenize, Encoders(), STORY),
        *one_prompt(tokenize, Encoders(), STORY, "svr"),
    ]:
        assert {type(value) for value in info.values()} == {torch.Tensor, int, str}
