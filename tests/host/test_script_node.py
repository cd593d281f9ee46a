"""The story script in ComfyUI: typed faults are refused before anything runs, linked ones when they arrive."""

import asyncio
import os

import pytest
from story_graphs import STORY, SVR

FAULTS = [
    {"frames": ""},
    {"frames": "asleep\n# only a caption"},
    {"frames": "asleep\nat [night"},
    {"frames": "[Wolf] howls"},
    {"identity": " \n"},
    {"identity": "[Fox] a fox\n[fox] a vixen"},
    {"style": "ink drawing"},
]
IDS = [str(fault) for fault in FAULTS]


@pytest.fixture(scope="module", autouse=True)
def text_nodes(host):
    """ComfyUI's own text nodes."""
    import nodes

    for name in ("nodes_primitive", "nodes_string"):
        path = os.path.join(os.environ["COMFYUI_PATH"], "comfy_extras", f"{name}.py")
        assert asyncio.run(nodes.load_custom_node(path, module_parent="comfy_extras"))


def message_of(host, texts):
    """What the parser says about these texts."""
    script = host.pack("prompts.script")
    with pytest.raises(script.StoryScriptError) as fault:
        script.parse_story(**texts)
    return str(fault.value)


def refused(host, graph):
    """What validation says about a graph: the errors of every node, by class."""
    with pytest.raises(Exception, match="Story script") as error:
        host.validate(graph)
    return error.value.errors


def failed(host, graph):
    """The class of the node that stops a graph, and what it says."""
    host.validate(graph)
    with pytest.raises(Exception, match="Story script") as error:
        host.run(graph)
    return error.value.node, str(error.value)


def whole_story(graph, **texts):
    """A script with every node that takes a story behind it."""
    script = graph.add("StoryLoom_Script", **STORY | texts)
    clip = graph.add("TestTiny")(1)
    images = graph.add("EmptyImage", width=64, height=64, batch_size=3, color=0)()
    graph.capture(
        one=graph.add("StoryLoom_EncodeOnePrompt", clip=clip, story=script(), **SVR)(),
        frames=graph.add("StoryLoom_EncodePerFrame", clip=clip, story=script(), literal=False)(),
        latent=graph.add("StoryLoom_EmptyLatent", width=64, height=64, story=script(), shared_noise=True)(),
        page=graph.add(
            "StoryLoom_Page", images=images, story=script(), columns=0, captions=True, gap=12, caption_size=0
        )(),
        count=script(1),
    )
    return graph


def linked(graph, text):
    return graph.add("PrimitiveStringMultiline", value=text)()


def test_a_whole_story_runs(host, graph):
    seen = host.run(whole_story(graph))
    assert seen.count == 3 and seen.one[0][0].shape[0] == seen.frames[0][0].shape[0] == 3
    assert seen.latent["samples"].shape[0] == 3


@pytest.mark.parametrize("fault", FAULTS, ids=IDS)
def test_a_typed_fault_is_one_error_before_anything_runs(host, graph, fault):
    expected = message_of(host, STORY | fault)
    errors = refused(host, whole_story(graph, **fault))
    assert list(errors) == ["StoryLoom_Script"]
    (error,) = errors["StoryLoom_Script"]
    assert error["details"] == expected


@pytest.mark.parametrize("fault", FAULTS, ids=IDS)
def test_a_fault_that_arrives_through_links_stops_the_run_with_the_same_words(host, graph, fault):
    texts = STORY | fault
    links = {name: linked(graph, text) for name, text in texts.items()}
    whole_story(graph, **links)
    assert failed(host, graph) == ("StoryLoom_Script", message_of(host, texts))


def test_a_story_put_together_by_other_nodes_is_the_story_as_typed(host, graph):
    frames = STORY["frames"].split("\n", 1)
    joined = graph.add("StringConcatenate", string_a=frames[0], string_b=frames[1], delimiter="\n")()
    count = graph.add("StoryLoom_Script", **STORY | {"frames": joined})
    graph.capture(story=count(0), count=count(1))
    seen = host.run(graph)
    assert seen.count == 3
    assert seen.story == host.pack("prompts.script").parse_story(**STORY)


@pytest.mark.parametrize(
    "through_a_link, fault",
    [
        ("identity", {"frames": "asleep\n# only a caption"}),
        ("identity", {"style": "ink drawing"}),
        ("frames", {"identity": ""}),
        ("frames", {"style": "ink drawing"}),
        ("style", {"frames": "[Wolf] howls"}),
    ],
)
def test_a_script_that_is_partly_linked_is_checked_as_far_as_it_is_typed(host, graph, through_a_link, fault):
    texts = STORY | fault
    whole_story(graph, **fault | {through_a_link: linked(graph, texts[through_a_link])})
    (error,) = refused(host, graph)["StoryLoom_Script"]
    assert error["details"] == message_of(host, texts)


def test_names_are_checked_when_a_linked_identity_arrives(host, graph):
    texts = STORY | {"identity": "[Fox] a fox", "frames": "[Wolf] howls"}
    whole_story(graph, identity=linked(graph, texts["identity"]), frames=texts["frames"])
    assert failed(host, graph) == ("StoryLoom_Script", message_of(host, texts))


@pytest.mark.parametrize("frames, count", [("a", 1), ("a\n\nb # c\r\nd", 3), ("\n".join("x" * 100), 100)])
def test_the_frame_count_is_the_number_of_frames(host, graph, frames, count):
    script = graph.add("StoryLoom_Script", **STORY | {"frames": frames})
    latent = graph.add("StoryLoom_EmptyLatent", width=64, height=64, story=script(), shared_noise=True)()
    graph.capture(count=script(1), latent=latent)
    seen = host.run(graph)
    assert seen.count == count == seen.latent["samples"].shape[0]


@pytest.mark.parametrize("shared", [True, False])
def test_empty_latents_share_their_noise_or_do_not(host, graph, shared):
    script = graph.add("StoryLoom_Script", **STORY)
    latent = graph.add("StoryLoom_EmptyLatent", width=72, height=136, story=script(), shared_noise=shared)()
    graph.capture(latent=latent)
    latent = host.run(graph).latent
    assert latent["samples"].shape == (3, 4, 17, 9) and not latent["samples"].any()
    assert latent["batch_index"] == ([0, 0, 0] if shared else [0, 1, 2])
