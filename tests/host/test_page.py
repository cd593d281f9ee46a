"""The page never loses pictures."""

import pytest
from story_graphs import STORY

WIDE_STORY = {"frames": "asleep # one\nreading # two\nwaving # three"}


@pytest.mark.parametrize("images", [2, 3, 5])
def test_a_page_is_made_also_when_images_and_frames_differ(host, graph, caplog, images):
    story = graph.add("StoryLoom_Script", **STORY | WIDE_STORY)
    pictures = graph.add("EmptyImage", width=96, height=64, batch_size=images, color=0x3366CC)
    page = graph.add(
        "StoryLoom_Page", images=pictures(), story=story(), columns=1, captions=True, gap=4, caption_size=0
    )
    graph.capture(page=page())
    image = host.run(graph).page
    assert image.shape[0] == 1 and image.shape[3] == 3 and image.shape[1] > images * 64
    assert 0 <= image.min() and image.max() <= 1
    warned = [r.message for r in caplog.records if f"{images} images but 3 frames" in r.message]
    assert bool(warned) == (images != 3)
