"""The encode nodes on ComfyUI's own SDXL tokenizer and text encoders."""

from functools import cache

import pytest
import torch
from rounding import rounding
from story_graphs import CAST, CAST_COLUMNS, CAST_PROMPTS, STORY, SVR, build, tag_of
from tiny_models import TEXT

EOT = 49407
WIDTH = sum(TEXT.values())


def encode(graph, node="EncodeOnePrompt", clip=None, **changes):
    tiny = graph.add("TestTiny")
    script = STORY | {k: v for k, v in changes.items() if k in STORY}
    story = graph.add("StoryLoom_Script", **script)
    settings = SVR if node == "EncodeOnePrompt" else {"literal": False}
    settings = settings | {k: v for k, v in changes.items() if k in settings}
    encoded = graph.add(f"StoryLoom_{node}", clip=clip or tiny(1), story=story(), **settings)
    graph.capture(out=encoded())
    if node == "EncodeOnePrompt":
        graph.capture(report=encoded(1))


@cache
def stock(host, models, text, **options):
    clip = models[1]
    (context, info) = clip.encode_from_tokens_scheduled(clip.tokenize(text, **options))[0]
    return context, info["pooled_output"]


def text_of(tokenizer, rows, ids):
    """Text of some rows, without spaces: the tokenizer puts its own around signs."""
    return tokenizer.decode([ids[row] for row in rows]).replace(" ", "")


def test_every_part_gets_its_own_rows_also_when_words_repeat(host, graph, models):
    frames = ["a red fox", "fox, a red fox!", "unbelievably red (very red:1.3) foxes", "red", "café #1 naïve 漢字"]
    encode(graph, identity="a red fox in a red coat, red", frames="\n".join(f.replace("#", "\\#") for f in frames))
    ((context, info),) = host.run(graph).out
    tokenizer = models[1].tokenizer.clip_l.tokenizer
    tokens = tag_of(host, info).rows[0].tokens
    text = "a red fox in a red coat, red " + " ".join(frames)
    ids = [token for token, _ in models[1].tokenize(text)["l"][0]]
    assert ids.index(EOT) == tokens.eot == 1 + sum(map(len, (tokens.identity, *tokens.frames)))
    assert context.shape == (5, 77, WIDTH) and tokens.length == 77
    assert text_of(tokenizer, tokens.identity, ids) == "aredfoxinaredcoat,red"
    texts = [text_of(tokenizer, rows, ids) for rows in tokens.frames]
    assert texts[:2] == ["aredfox", "fox,aredfox!"]
    assert texts[3:] == ["red", "café#1naïve漢字"]


def test_the_identity_is_encoded_the_same_in_front_of_any_story(host, graph, models):
    encode(graph)
    ((context, info),) = host.run(graph).out
    rows = tag_of(host, info).rows[0].tokens.identity.stop
    alone, _ = stock(host, models, STORY["identity"])
    whole, _ = stock(host, models, " ".join([STORY["identity"], *STORY["frames"].split("\n")]))
    assert torch.equal(alone[0, :rows], whole[0, :rows])
    for row in context:
        assert torch.equal(row[:rows], whole[0, :rows])


def reference(hidden, tokens, frame, settings, eot="svr", enhance_identity=False):
    """The published loop, from its description: tokens as columns, thin SVD, cast back after every call."""
    hidden = hidden.clone()
    rest = list(range(tokens.eot, 77))

    def call(rows, alpha, beta):
        chosen = list(rows) + (rest if eot == "svr" else [])
        u, s, vt = torch.linalg.svd(hidden[chosen].T.double(), full_matrices=False)
        hidden[chosen] = (u @ torch.diag(beta * s * torch.exp(-alpha * s)) @ vt).T.to(hidden.dtype)
        if eot == "scale":
            hidden[rest] *= 0.9

    for k, rows in enumerate(tokens.frames):
        if k != frame:
            call(rows, settings["weaken_alpha"], settings["weaken_beta"])
    expressed = [*(tokens.identity if enhance_identity else ()), *tokens.frames[frame]]
    call(expressed, settings["enhance_alpha"], settings["enhance_beta"])
    return hidden


@pytest.mark.parametrize("mode, eot", [("svr", "svr"), ("svr_eot", "scale")])
def test_every_frame_expresses_its_own_words(host, graph, models, mode, eot):
    encode(graph, reweighting=mode)
    ((context, info),) = host.run(graph).out
    whole, pooled = stock(host, models, " ".join([STORY["identity"], *STORY["frames"].split("\n")]))
    tokens = tag_of(host, info).rows[0].tokens
    for frame, row in enumerate(context):

        def expected(hidden, frame=frame):
            return torch.cat(
                [reference(part, tokens, frame, SVR, eot) for part in hidden.split(list(TEXT.values()), -1)], -1
            )

        assert (row - expected(whole[0])).abs().max() < rounding(expected, whole[0])
        assert (row - whole[0])[list(tokens.frames[frame])].abs().max() > 0.01, "nothing was reweighted"
    assert torch.equal(info["pooled_output"], pooled.repeat(3, 1))


@pytest.mark.parametrize("mode, eot", [("svr", "svr"), ("svr_eot", "scale")])
def test_an_enhanced_identity_grows_with_each_frames_own_words(host, graph, models, mode, eot):
    encode(graph, reweighting=mode, enhance_identity=True)
    seen = host.run(graph)
    ((context, info),) = seen.out
    whole, pooled = stock(host, models, " ".join([STORY["identity"], *STORY["frames"].split("\n")]))
    tokens = tag_of(host, info).rows[0].tokens
    for frame, row in enumerate(context):

        def expected(hidden, frame=frame):
            parts = hidden.split(list(TEXT.values()), -1)
            return torch.cat([reference(part, tokens, frame, SVR, eot, enhance_identity=True) for part in parts], -1)

        assert (row - expected(whole[0])).abs().max() < rounding(expected, whole[0])
        assert (row - whole[0])[list(tokens.identity)].abs().max() > 0.01, "the identity was not enhanced"
    assert torch.equal(info["pooled_output"], pooled.repeat(3, 1))
    assert ", and enhances the identity." in seen.report.splitlines()[0]


@pytest.mark.parametrize("mode", ["svr", "svr_eot", "npr", "none"])
def test_an_identity_that_is_not_enhanced_is_bit_identical_to_a_graph_without_the_input(host, graph, mode):
    encode(graph, reweighting=mode)
    ((off, _),) = host.run(graph).out
    for node in graph.values():
        node["inputs"].pop("enhance_identity", None)
    ((without, _),) = host.run(graph, fresh=True).out
    assert torch.equal(off, without)


@pytest.mark.parametrize("window", ["circular", "trailing"])
def test_a_story_that_fits_one_prompt_has_no_windows(host, graph, models, window):
    """Bit for bit what the operator makes of the whole story's encoding."""
    encode(graph, window=window)
    ((context, info),) = host.run(graph).out
    whole, pooled = stock(host, models, " ".join([STORY["identity"], *STORY["frames"].split("\n")]))
    assert {row.tokens for row in tag_of(host, info).rows} == {hand_counted(host, [7, 4, 4, 2])}
    for frame in range(3):
        assert torch.equal(context[frame], express(host, whole[0], [7, 4, 4, 2], frame))
    assert torch.equal(info["pooled_output"], pooled.repeat(3, 1))


def hand_counted(host, lengths):
    """Rows of a prompt whose identity and frames take so many tokens."""
    ends = [1 + sum(lengths[:i]) for i in range(len(lengths) + 1)]
    spans = [range(start, stop) for start, stop in zip(ends, ends[1:], strict=False)]
    return host.pack("prompts.tokens").StoryTokens(spans[0], tuple(spans[1:]), ends[-1], 77)


def express(host, hidden, lengths, frame):
    """Published SVR on both encoders' hidden states of a prompt."""
    svr = host.pack("prompts.svr")
    tokens, settings = hand_counted(host, lengths), svr.SVRSettings()
    halves = hidden.split(list(TEXT.values()), 1)
    return torch.cat([svr.express_frame(half, tokens, frame, settings) for half in halves], 1)


def test_every_cast_is_a_story_of_its_own_and_frames_of_nobody_are_plain(host, graph, models):
    encode(graph, **CAST)
    seen = host.run(graph)
    ((context, info),) = seen.out
    words, lengths = {0: "asleep in the snow", 2: "arguing", 3: "drinking tea"}, {0: 4, 2: 1, 3: 2}
    for (identity, frames), tokens in zip(CAST_PROMPTS, (7, 0, 14), strict=True):
        text = " ".join([identity, *(words[frame] for frame in frames if frame in words)])
        plain, pooled = stock(host, models, text)
        for place, frame in enumerate(frames):
            counted = [tokens, *(lengths[other] for other in frames)] if tokens else []
            expected = express(host, plain[0], counted, place) if tokens else plain[0]
            assert torch.equal(context[frame], expected), frame
            assert torch.equal(info["pooled_output"][frame], pooled[0])
    tag = tag_of(host, info)
    assert [row.frame for row in tag.rows] == [0, 1, 2, 3] and tag.length == 77
    assert [row.characters for row in tag.rows] == [("Fox",), (), ("Fox", "Owl"), ("Fox",)]
    assert [tag.identity_columns(row) for row in range(4)] == [tuple(columns) for columns in CAST_COLUMNS]
    assert "window: frames 1, 4; 13 of 75 tokens, 62 free; expressed: 4; suppressed: 1" in seen.report
    assert "no character: encoded alone" in seen.report


@pytest.mark.parametrize(
    "window, windows",
    [
        ("circular", [(0, 1, 2), (1, 2, 3), (2, 3, 4), (3, 4, 0), (4, 0, 1)]),
        ("trailing", [(0, 1, 2), (0, 1, 2), (0, 1, 2), (1, 2, 3), (2, 3, 4)]),
    ],
)
@pytest.mark.parametrize("pooled", ["full", "frame"])
def test_a_story_over_75_tokens_is_told_in_windows(host, graph, models, window, windows, pooled):
    frames = [f"{word} " + "word " * 20 for word in ("asleep", "reading", "drinking", "swimming", "waving")]
    encode(graph, frames="\n".join(frames), window=window, pooled=pooled)
    seen = host.run(graph)
    ((context, info),) = seen.out
    for frame, others in enumerate(windows):
        text = " ".join([STORY["identity"], *(frames[other].strip() for other in others)])
        plain, summary = stock(host, models, text)
        assert torch.equal(context[frame], express(host, plain[0], [7, 21, 21, 21], others.index(frame)))
        if pooled == "frame":
            summary = stock(host, models, f"{STORY['identity']} {frames[frame].strip()}")[1]
        assert torch.equal(info["pooled_output"][frame], summary[0])
    numbers = ", ".join(str(other + 1) for other in windows[4])
    assert f"window: frames {numbers}; 70 of 75 tokens, 5 free; expressed: 5" in seen.report


def test_settings_change_the_result_and_none_is_the_plain_story(host, graph, models):
    whole, _ = stock(host, models, " ".join([STORY["identity"], *STORY["frames"].split("\n")]))
    seen = []
    for changes in (
        {},
        {"reweighting": "svr_eot"},
        {"reweighting": "npr"},
        {"order": "enhance_first"},
        {"weaken_beta": 0.5},
        {"weaken_alpha": 0.1},
        {"enhance_beta": 2.0},
        {"enhance_alpha": -0.02},
        {"enhance_identity": True},
    ):
        graph.clear()
        encode(graph, **changes)
        seen.append(host.run(graph).out[0][0])
    assert all(not torch.allclose(a, b, atol=1e-3) for i, a in enumerate(seen) for b in seen[:i])
    graph.clear()
    encode(graph, reweighting="none")
    assert torch.equal(host.run(graph).out[0][0], whole.repeat(3, 1, 1))


def test_numbers_that_overflow_are_refused_and_not_drawn_black(host, graph):
    encode(graph, order="enhance_first", enhance_alpha=-0.1, enhance_beta=4.0, weaken_alpha=-0.1, weaken_beta=4.0)
    with pytest.raises(Exception, match="not finite.*closer to the published"):
        host.run(graph)


def test_naive_reweighting_doubles_the_frame_and_halves_the_others(host, graph, models):
    whole, _ = stock(host, models, " ".join([STORY["identity"], *STORY["frames"].split("\n")]))
    encode(graph, reweighting="npr")
    ((context, info),) = host.run(graph).out
    tokens = tag_of(host, info).rows[0].tokens
    factors = torch.ones(3, 77, 1)
    for frame in range(3):
        for k, rows in enumerate(tokens.frames):
            factors[frame, list(rows)] = 2.0 if k == frame else 0.5
    assert torch.equal(context, whole * factors)


def test_pooled_summaries(host, graph, models):
    frames = STORY["frames"].split("\n")
    expected = {
        "full": stock(host, models, " ".join([STORY["identity"], *frames]))[1].repeat(3, 1),
        "zero": torch.zeros(3, TEXT["g"]),
        "frame": torch.cat([stock(host, models, f"{STORY['identity']} {frame}")[1] for frame in frames]),
    }
    for pooled, summary in expected.items():
        graph.clear()
        encode(graph, pooled=pooled)
        assert torch.equal(host.run(graph).out[0][1]["pooled_output"], summary)


def test_weights_work_as_in_the_stock_node_and_literal_reads_them_as_text(host, graph, models):
    script = {"identity": "a (red:1.4) fox", "frames": "(asleep:0.5) in snow\nreading \\(quietly\\)"}
    text = "a (red:1.4) fox (asleep:0.5) in snow reading \\(quietly\\)"
    encode(graph, reweighting="none", **script)
    assert torch.equal(host.run(graph).out[0][0][0], stock(host, models, text)[0][0])
    graph.clear()
    encode(graph, reweighting="none", literal=True, **script)
    literal = stock(host, models, text, disable_weights=True)[0][0]
    assert torch.equal(host.run(graph).out[0][0][1], literal)


def test_a_style_surrounds_the_identity_in_one_prompt(host, graph, models):
    encode(graph, reweighting="none", style="ink drawing of {prompt}, detailed")
    ((context, info),) = host.run(graph).out
    text = "ink drawing of a red fox in a blue coat, detailed asleep in the snow reading on a train drinking tea"
    assert torch.equal(context[0], stock(host, models, text)[0][0])
    assert len(tag_of(host, info).rows[0].tokens.identity) == 7 + 5


def save_embedding(host, name, rows_l, rows_g):
    import safetensors.torch

    generator = torch.Generator().manual_seed(5)
    tensors = {
        "clip_l": torch.randn(rows_l, TEXT["l"], generator=generator),
        "clip_g": torch.randn(rows_g, TEXT["g"], generator=generator),
    }
    folder = host.base / "models" / "embeddings"
    safetensors.torch.save_file(tensors, folder / f"{name}.safetensors")
    return str(folder)


@pytest.fixture
def embeddings(models):
    """A CLIP that finds the embeddings folder, as a checkpoint's does."""
    tokenizer = models[1].tokenizer
    encoders = (tokenizer.clip_l, tokenizer.clip_g)
    before = [encoder.embedding_directory for encoder in encoders]

    def find_in(folder):
        for encoder in encoders:
            encoder.embedding_directory = folder

    yield find_in
    for encoder, folder in zip(encoders, before, strict=True):
        encoder.embedding_directory = folder


def test_embeddings_take_their_rows(host, graph, models, embeddings):
    embeddings(save_embedding(host, "three", 3, 3))
    script = {"identity": "a fox embedding:three in snow", "frames": "embedding:three, asleep\nreading embedding:three"}
    encode(graph, reweighting="none", **script)
    ((context, info),) = host.run(graph, fresh=True).out
    tokens = tag_of(host, info).rows[0].tokens
    assert [len(rows) for rows in (tokens.identity, *tokens.frames)] == [2 + 3 + 2, 3 + 2, 1 + 3]
    text = "a fox embedding:three in snow embedding:three, asleep reading embedding:three"
    assert torch.equal(context[0], stock(host, models, text)[0][0])


def test_an_embedding_of_unequal_lengths_is_refused(host, graph, embeddings):
    embeddings(save_embedding(host, "odd", 3, 4))
    encode(graph, identity="a fox", frames="asleep\nreading embedding:odd")
    with pytest.raises(Exception, match=r"Frame 2 .* takes 4 tokens in CLIP-L but 5 in CLIP-G"):
        host.run(graph, fresh=True)


@pytest.mark.parametrize(
    "script, message",
    [
        ({"identity": "a fox", "frames": "word " * 80}, r"\(2 tokens\) and frame 1 \(80 .* 7 tokens too long"),
        ({"identity": "word " * 76, "frames": "asleep"}, r"The identity \(76 tokens\) alone is 1 token too long"),
        (
            {"identity": "[A] a fox\n[B] " + "crow " * 40, "frames": "[A] asleep\n[A] meets [B] " + "far " * 35},
            r"The identity of \[A\] and \[B\] \(43 tokens\) and frame 2 \(36 tokens\) together are 4 tokens too long",
        ),
        ({"identity": "a (red fox", "frames": "asleep) in snow"}, "parentheses in the identity"),
        ({"identity": "[Fox] a fox", "frames": "[Fox]"}, "has no words of its own"),
    ],
)
def test_what_one_prompt_cannot_hold_is_refused_with_a_remedy(host, graph, script, message):
    encode(graph, **script)
    with pytest.raises(Exception, match=message) as failed:
        host.run(graph)
    assert failed.value.node == "StoryLoom_EncodeOnePrompt"


@pytest.mark.parametrize("node", ["EncodeOnePrompt", "EncodePerFrame"])
def test_other_text_encoders_are_refused(host, graph, node):
    import comfy.sd
    import comfy.sd1_clip
    import comfy.supported_models_base

    def sd15(_):
        target = comfy.supported_models_base.ClipTarget(comfy.sd1_clip.SD1Tokenizer, comfy.sd1_clip.SD1ClipModel)
        return comfy.sd.CLIP(target, parameters=0)

    tiny = graph.add("TestTiny")
    clip = graph.add("TestCall", value=tiny(1), name=host.function(sd15))
    encode(graph, node, clip=clip())
    with pytest.raises(Exception, match="needs the two text encoders of SDXL"):
        host.run(graph)


def test_frame_by_frame_equals_the_stock_node_for_every_frame(host, graph, models):
    frames = "[Fox] asleep in the snow\n[NC] an empty beach\nat sea, [Crow] and [Fox] (argue:1.2)"
    encode(
        graph,
        "EncodePerFrame",
        identity="[Fox] a red fox\n[Crow] a (black:1.1) crow",
        frames=frames,
        style="ink drawing of {prompt}, fine lines",
    )
    ((context, info),) = host.run(graph).out
    texts = [
        "ink drawing of a red fox asleep in the snow, fine lines",
        "ink drawing of an empty beach, fine lines",
        "ink drawing of at sea, a (black:1.1) crow and a red fox (argue:1.2), fine lines",
    ]
    for row, pooled, text in zip(context, info["pooled_output"], texts, strict=True):
        expected, summary = stock(host, models, text)
        assert torch.equal(row, expected[0]) and torch.equal(pooled, summary[0])
    rows = tag_of(host, info).rows
    assert [row.characters for row in rows] == [("Fox",), (), ("Crow", "Fox")]
    assert [len(row.descriptions) for row in rows] == [1, 0, 2]


def test_frames_of_unequal_length_are_repeated_to_a_common_one(host, graph, models):
    long = "word " * 100
    encode(graph, "EncodePerFrame", identity="a fox", frames=f"asleep\n{long}")
    ((context, info),) = host.run(graph).out
    short, _ = stock(host, models, "a fox asleep")
    longer, _ = stock(host, models, f"a fox {long}".strip())
    assert context.shape[1] == 2 * 77
    assert torch.equal(context[0], short[0].repeat(2, 1)) and torch.equal(context[1], longer[0])
    tag = tag_of(host, info)
    assert tag.identity_columns(0) == (0, 1, 2, 77, 78, 79) and tag.identity_columns(1) == (0, 1, 2)


def test_the_report_names_tokens_and_what_is_suppressed(host, graph):
    encode(graph)
    report = host.run(graph).report
    assert "Frame 2: 4 tokens (rows 12-15): reading on a train" in report
    assert "window: frames 1, 2, 3; 17 of 75 tokens, 58 free; expressed: 2; suppressed: 1, 3" in report


def test_more_frames_than_one_prompt_holds_frame_by_frame(host, graph):
    encode(graph, "EncodePerFrame", frames="\n".join(f"chapter {number}, a long one" for number in range(16)))
    ((context, info),) = host.run(graph).out
    assert context.shape == (16, 77, WIDTH) and len(tag_of(host, info).rows) == 16


@pytest.mark.parametrize("shared", [True, False])
def test_an_empty_latent_for_every_frame(host, graph, shared):
    parts = build(graph, size=(192, 128), shared_noise=shared)
    graph.capture(latent=parts["latent_image"])
    latent = host.run(graph).latent
    assert latent["samples"].shape == (3, 4, 16, 24) and not latent["samples"].any()
    assert latent["batch_index"] == ([0, 0, 0] if shared else [0, 1, 2])
