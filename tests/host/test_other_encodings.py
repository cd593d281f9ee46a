"""The encode nodes with a CLIP that other nodes have changed, and with prompts of very different length."""

import pytest
import torch
from story_graphs import STORY, SVR, build, call, close, csa, ipca, sample, tag_of, watched

NODES = ["EncodeOnePrompt", "EncodePerFrame"]


def encoding(change):
    """A node that changes the contexts of a CLIP, and nothing else."""

    def patch(clip):
        clip = clip.clone()
        encode = clip.encode_from_tokens_scheduled

        def changed(*args, **kwargs):
            return [[change(context), info] for context, info in encode(*args, **kwargs)]

        clip.encode_from_tokens_scheduled = changed
        return clip

    return patch


def encoded(graph, node, clip, **script):
    story = graph.add("StoryLoom_Script", **STORY | script)
    settings = SVR if node == "EncodeOnePrompt" else {"literal": False}
    return graph.add(f"StoryLoom_{node}", clip=clip, story=story(), **settings)()


ROWS = {
    154: lambda context: context.repeat_interleave(2, 1),  # as CLIP NegPip: every token once more
    39: lambda context: context[:, ::2],  # merged tokens
    78: lambda context: torch.cat([context, context[:, :1]], 1),
}


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("node", NODES)
def test_an_encoding_with_other_rows_than_the_prompt_has_tokens_is_refused(host, graph, node, rows):
    clip = call(graph, host, encoding(ROWS[rows]), graph.add("TestSingle")(1))
    graph.capture(out=encoded(graph, node, clip))
    message = rf"The input clip encodes the 77 tokens of a prompt as {rows} rows.* such as CLIP NegPip\. Connect"
    with pytest.raises(Exception, match=message) as failed:
        host.run(graph)
    assert failed.value.node == f"StoryLoom_{node}"


def test_a_long_frame_is_refused_as_well(host, graph):
    clip = call(graph, host, encoding(ROWS[154]), graph.add("TestSingle")(1))
    graph.capture(out=encoded(graph, "EncodePerFrame", clip, frames="asleep " * 80))
    with pytest.raises(Exception, match="The input clip encodes the 154 tokens of a prompt as 308 rows"):
        host.run(graph)


def stock(graph, clip, text):
    return graph.add("CLIPTextEncode", clip=clip, text=text)()


def test_clip_skip_is_that_of_the_stock_node(host, graph):
    """The layer that another node chooses is the one that is reweighted."""
    clip = graph.add("TestSingle")(1)
    skipped = graph.add("CLIPSetLastLayer", clip=clip, stop_at_clip_layer=-3)()
    whole = " ".join([STORY["identity"], *STORY["frames"].split("\n")])
    graph.capture(
        frames=encoded(graph, "EncodePerFrame", skipped),
        story=encoded(graph, "EncodeOnePrompt", skipped),
        first=stock(graph, skipped, STORY["identity"] + " asleep in the snow"),
        whole=stock(graph, skipped, whole),
        unskipped=stock(graph, clip, whole),
    )
    out = host.run(graph)
    ((frames, _),), ((story, info),), ((first, _),), ((whole, _),), ((unskipped, _),) = (
        out.frames,
        out.story,
        out.first,
        out.whole,
        out.unskipped,
    )
    assert torch.equal(frames[0], first[0]) and not torch.equal(whole, unskipped)
    tokens, encode, svr = tag_of(host, info).rows[0].tokens, host.pack("prompts.encode"), host.pack("prompts.svr")
    for frame, row in enumerate(story):
        assert torch.equal(row, encode.expressed(whole, tokens, frame, "svr", svr.SVRSettings())[0])


def test_break_is_an_ordinary_word_as_in_the_stock_node(host, graph):
    clip = graph.add("TestSingle")(1)
    graph.capture(
        frames=encoded(graph, "EncodePerFrame", clip, frames="asleep BREAK in the snow"),
        first=stock(graph, clip, STORY["identity"] + " asleep BREAK in the snow"),
    )
    out = host.run(graph)
    assert torch.equal(out.frames[0][0], out.first[0][0]) and out.frames[0][0].shape[1] == 77


def frames_of(*chunks):
    """Frames whose own prompts take so many chunks of 75 tokens, with a short identity."""
    return "\n".join("[NC] " + "sea " * (75 * number - 20) for number in chunks)


@pytest.mark.parametrize("node", NODES)
def test_prompts_that_have_no_short_common_length_are_refused_before_they_are_encoded(host, graph, node):
    def nothing(_):
        raise AssertionError("a prompt was encoded")

    clip = call(graph, host, encoding(nothing), graph.add("TestSingle")(1))
    graph.capture(out=encoded(graph, node, clip, frames=frames_of(3, 4, 5, 7) + "\nasleep"))
    message = (
        r"The frames' prompts take 1, 3, 4, 5 and 7 chunks of 75 tokens\. .* need 32340 rows .* at most 1848 are "
        r"possible\. Shorten the prompts of frame 3 \(355 tokens\) and frame 4 \(505 tokens\) to 275 tokens or less"
    )
    with pytest.raises(Exception, match=message) as failed:
        host.run(graph)
    assert failed.value.node == f"StoryLoom_{node}"


def test_prompts_of_up_to_four_chunks_fit_together(host, graph):
    graph.capture(out=encoded(graph, "EncodePerFrame", graph.add("TestSingle")(1), frames=frames_of(1, 2, 3, 4)))
    ((context, info),) = host.run(graph).out
    assert context.shape[:2] == (4, 12 * 77) and tag_of(host, info).length == 12 * 77


def repeated(times):
    return lambda conditioning: [[context.repeat(1, times, 1), info] for context, info in conditioning]


def test_a_context_that_the_host_does_not_batch_with_its_negative_is_drawn_exactly(host, graph):
    """ComfyUI repeats a context at most four times: beside five chunks the negative is a call of its own."""
    frames = "asleep\n" + "far " * (4 * 75 + 10)
    parts = build(graph, "EncodePerFrame", frames=frames)
    negative = stock(graph, parts["clip"], "blurry")
    long = call(graph, host, repeated(5), negative)
    model = csa(graph, ipca(graph, parts["model"]))
    seen = {"apart": [], "together": []}
    for name, side in {"apart": negative, "together": long}.items():
        sample(graph, parts, name, model=watched(graph, host, model, seen[name]), negative=side, steps=1)
    out = host.run(graph)
    assert [len(calls) for calls in seen.values()] == [2, 1] and seen["apart"][0]["context"] == 5 * 77
    assert close(out.apart, out.together)
