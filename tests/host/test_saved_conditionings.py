"""A story's conditioning that was saved and loaded is still the story's."""

import io

import pytest
import torch
from story_graphs import build, call, csa, differ, ipca, sample, tag_of


def torch_file(conditioning):
    """Through a file of torch.save, read by its safe reader."""
    file = io.BytesIO()
    torch.save(conditioning, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def save_and_load(conditioning):
    """As ComfyUI's Save Conditioning and Load Conditioning, which know tensors, numbers and strings only."""
    loaded = []
    for context, options in conditioning:
        for key, value in options.items():
            if not isinstance(value, (torch.Tensor, int, float, str)):
                raise ValueError(f"{key} of type {type(value).__name__} cannot be saved")
        plain = {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in options.items()}
        loaded.append([context.clone(), plain])
    return loaded


FILES = {"torch.save": torch_file, "Save Conditioning": save_and_load}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("encode", ["EncodeOnePrompt", "EncodePerFrame"])
def test_a_loaded_story_is_drawn_as_the_saved_one(host, graph, file, encode):
    parts = build(graph, encode, loader="TestSingle", frames="asleep in the snow\n[NC] an empty beach\ndrinking tea")
    loaded = call(graph, host, FILES[file], parts["positive"])
    negative = call(graph, host, FILES[file], parts["negative"])
    patched = {"model": csa(graph, ipca(graph, parts["model"]), anchors=1)}
    sample(graph, parts, "saved", **patched)
    sample(graph, parts, "loaded", positive=loaded, negative=negative, **patched)
    sample(graph, parts, "unpatched", positive=loaded, negative=negative)
    graph.capture(before=parts["positive"], after=loaded)
    out = host.run(graph)
    assert torch.equal(out.saved["samples"], out.loaded["samples"]) and differ(out.loaded, out.unpatched)
    assert tag_of(host, out.before[0][1]) == tag_of(host, out.after[0][1])


def test_a_loaded_story_is_split_into_batches_that_are_checked_again(host, graph):
    parts = build(graph, loader="TestSingle", frames="one\ntwo\nthree\nfour\nfive")
    loaded = call(graph, host, torch_file, parts["positive"])
    node = graph.add("StoryLoom_SplitBatches", latent=parts["latent_image"], positive=loaded, batch_size=3, anchors=1)
    latent = graph.add("EmptyLatentImage", width=64, height=64, batch_size=2)()
    sample(graph, parts, "out", positive=node(1), latent_image=latent)
    with pytest.raises(Exception, match="The story has 3 frames but the latent batch has 2 images"):
        host.run(graph)


def test_a_tag_of_a_newer_version_is_refused_where_it_is_read(host, graph):
    def newer(conditioning):
        return [[context, {**info, "storyloom": '{"version":2}'}] for context, info in conditioning]

    parts = build(graph, loader="TestSingle")
    sample(graph, parts, "out", model=ipca(graph, parts["model"]), positive=call(graph, host, newer, parts["positive"]))
    with pytest.raises(Exception, match="has a story tag that this version of StoryLoom cannot read") as failed:
        host.run(graph)
    assert failed.value.node == "KSampler"
