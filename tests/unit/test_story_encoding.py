"""A story's conditioning from any host's tokenizer and encoders."""

from dataclasses import replace

import pytest
import torch

from storyloom.prompts.conditioning import TAG, per_encoder
from storyloom.prompts.encode import expressed, frame_by_frame, one_prompt
from storyloom.prompts.report import one_prompt_report
from storyloom.prompts.script import parse_story
from storyloom.prompts.svr import SVRSettings, express_frame, express_frame_naively
from storyloom.prompts.tokens import StoryTokens

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
        self.entries, self.asked = entries, []

    def __call__(self, prompts):
        self.asked.append([" ".join(word for window in p["l"] for word, _, known in window if known) for p in prompts])
        return [[self.encoded(tokens, number) for number in range(self.entries)] for tokens in prompts]

    def encoded(self, tokens, number):
        words = [word for window in tokens["l"] for word, _, _ in window]
        generator = torch.Generator().manual_seed(sum(map(ord, "".join(words))) + number)
        context = torch.randn(1, len(words), 2048, generator=generator)
        return context, {"pooled_output": context[:, -1, :1280], "number": number}


def whole(number=0):
    return Encoders().encoded(tokenize("ink of a red fox , fine asleep reading a book drinking"), number)


@pytest.mark.parametrize("reweighting", ["svr", "svr_eot", "npr", "none"])
def test_every_row_of_one_prompt_expresses_its_frame(reweighting):
    ((context, info),) = one_prompt(tokenize, Encoders(), STORY, reweighting, SETTINGS)
    (plain, said) = whole()
    tokens = info[TAG].rows[0].tokens
    edits = {
        "svr": lambda frame: lambda part: express_frame(part, tokens, frame, SETTINGS),
        "svr_eot": lambda frame: lambda part: express_frame(part, tokens, frame, replace(SETTINGS, eot="scale")),
        "npr": lambda frame: lambda part: express_frame_naively(part, tokens, frame),
        "none": lambda frame: lambda part: part,
    }
    for frame, row in enumerate(context):
        assert torch.equal(row, per_encoder(plain[0], edits[reweighting](frame)))
    assert [row.frame for row in info[TAG].rows] == [0, 1, 2] and info[TAG].length == 77
    assert all(row.descriptions == (tokens.identity,) for row in info[TAG].rows) and len(tokens.identity) == 7
    assert torch.equal(info["pooled_output"], said["pooled_output"].repeat(3, 1))


def test_the_four_reweightings_differ():
    contexts = [expressed(whole()[0], TOKENS, 1, name, SETTINGS) for name in ("svr", "svr_eot", "npr", "none")]
    assert all(not torch.allclose(a, b, atol=1e-2) for i, a in enumerate(contexts) for b in contexts[:i])


@pytest.mark.parametrize("pooled", ["full", "zero", "frame"])
def test_summaries_are_of_the_story_or_nothing_or_the_own_frame(pooled):
    encode = Encoders()
    ((_, info),) = one_prompt(tokenize, encode, STORY, "svr", SETTINGS, pooled)
    story = "ink of a red fox , fine asleep reading a book drinking"
    own = [f"ink of a red fox , fine {words}" for words in ("asleep", "reading a book", "drinking")]
    assert encode.asked == [[story, *own] if pooled == "frame" else [story]]
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
    ((short,), (long,)) = Encoders()([tokenize(text) for text in encode.asked[0]])
    assert context.shape == (2, 154, 2048)
    assert torch.equal(context[0], short[0][0].repeat(2, 1)) and torch.equal(context[1], long[0][0])
    assert torch.equal(info["pooled_output"], torch.cat([short[1]["pooled_output"], long[1]["pooled_output"]]))
    assert [row.characters for row in info[TAG].rows] == [("Fox",), ()]
    assert [row.descriptions for row in info[TAG].rows] == [(range(1, 4),), ()]


def test_numbers_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="not finite.*closer to the published"):
        one_prompt(tokenize, Encoders(), STORY, "svr", SVRSettings(weaken_alpha=-20.0))


def test_the_report_counts_tokens_and_names_what_is_suppressed():
    ((_, info),) = one_prompt(tokenize, Encoders(), STORY, "svr_eot")
    report = one_prompt_report(STORY, info[TAG].rows[0].tokens, "svr_eot")
    assert "One prompt: 12 of 75 tokens, 63 free" in report and "end-of-text scaled" in report
    assert "Identity: 7 tokens (rows 1-7): ink of a red fox, fine" in report
    assert "Frame 2: 3 tokens (rows 9-11): reading a book\n    expressed: 2; suppressed: 1, 3" in report
