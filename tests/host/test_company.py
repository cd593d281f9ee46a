"""StoryLoom in strange company: other packs that are known to change how the UNet is called, and stand-ins for them."""

import torch
from company import attention_couple, deep_cache, passed_through, row_by_row, tiled
from story_graphs import build, call, close, differ, sample

STAND_INS = {
    "a function that passes calls through": passed_through,
    "rows one by one": row_by_row,
    "one tile at a time": tiled(1),
    "three tiles at a time": tiled(3),
    "cached features": deep_cache(),
    "no feature is reused": deep_cache(interval=1),
}


def test_the_stand_ins_draw_what_the_packs_draw(host, graph):
    """Those that only call the UNet in another way draw the same. Tiles and reused features change the picture."""
    parts = build(graph)
    sample(graph, parts, "plain", steps=3)
    for name, patch in STAND_INS.items():
        sample(graph, parts, name, steps=3, model=call(graph, host, patch, parts["model"]))
    seen = vars(host.run(graph))
    for name in ("a function that passes calls through", "rows one by one", "no feature is reused"):
        assert close(seen[name], seen["plain"])
    assert close(seen["one tile at a time"], seen["three tiles at a time"])
    assert differ(seen["one tile at a time"], seen["plain"])
    assert differ(seen["cached features"], seen["plain"])


def test_the_attention_couple_gives_parts_of_an_image_texts_of_their_own(host, graph):
    parts = build(graph)
    graph.capture(story=parts["positive"])
    sample(graph, parts, "plain")
    first = host.run(graph)
    plain, story = first.plain, first.story[0][0]
    other = torch.randn(1, 154, story.shape[-1], generator=torch.Generator().manual_seed(2)).double()
    left = torch.tensor([1.0, 0.0]).repeat_interleave(4).expand(8, 8)
    couples = {
        "no text but its own": attention_couple([other], torch.stack([torch.ones(8, 8), torch.zeros(8, 8)])),
        "the same text in both halves": attention_couple([story], torch.stack([left, 1 - left])),
        "another text in the right half": attention_couple([other], torch.stack([left, 1 - left])),
        "another text in the left half": attention_couple([other], torch.stack([1 - left, left])),
    }
    for name, patch in couples.items():
        sample(graph, parts, name, model=call(graph, host, patch, parts["model"]))
    seen = vars(host.run(graph))
    for name in ("no text but its own", "the same text in both halves"):
        assert close(seen[name], plain)
    assert differ(seen["another text in the right half"], plain)
    assert differ(seen["another text in the right half"], seen["another text in the left half"])
