"""Stories are measured inside ComfyUI: numbers, table, file and pictures, and a page that tells what changed."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from killing import can_be_killed, killed_at_every_point
from PIL import Image
from rounding import rounding
from story_graphs import COMPARE, STORY

CLIP = "storyloom-host-tiny"
NAN = float("nan")
SCENES = (("snow", "sleeping", "none"), ("train", "standing", "book"), ("beach", "jumping", "none"))
TEXTS = {"identity": "a fox in a blue coat", "frames": "asleep in the snow\nreading on a train\njumping on the beach"}


@pytest.fixture(scope="module")
def drawn(host):
    """Frames of TOLD as the demo model could draw them: in the first batch every fox has another look."""
    draw, scene = host.pack("world.draw").draw, host.pack("world.scene")
    looks = (("red", "green", "cap"), ("white", "red", "none"), ("red", "red", "crown"))

    def frames(chosen):
        pictures = []
        for (place, action, prop), (fur, trousers, hat) in zip(SCENES, chosen, strict=True):
            figure = scene.Figure("fox", fur, "blue", trousers, hat)
            shown = scene.Scene(place, action, prop, (figure,))
            pictures.append(draw(shown, np.random.default_rng(1)))
        batch = torch.from_numpy(np.stack(pictures)).float() / 255
        return batch.repeat_interleave(8, 1).repeat_interleave(8, 2)

    return frames(looks), frames(looks[:1] * 3)


@pytest.fixture(scope="module")
def clip_file(host):
    """A tiny CLIP's weights in models/open_clip, and its architecture in the list."""
    open_clip = pytest.importorskip("open_clip", reason="CLIP IS NOT TESTED: pip install open_clip_torch")
    import folder_paths
    from safetensors.torch import save_file

    folder = host.base / "models" / "open_clip"
    folder.mkdir(parents=True, exist_ok=True)
    text = {"context_length": 77, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1}
    vision = {"image_size": 32, "layers": 1, "width": 16, "head_width": 8, "patch_size": 16}
    config = host.base / f"{CLIP}.json"
    config.write_text(json.dumps({"embed_dim": 8, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(config)
    torch.manual_seed(3)
    save_file(open_clip.create_model(CLIP).state_dict(), folder / "tiny.safetensors")
    (folder / "broken.pt").write_bytes(b"\x80\x04no weights")
    module = host.pack("nodes.similarity")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "ARCHITECTURES", (*module.ARCHITECTURES, CLIP))
        yield folder / "tiny.safetensors"
    for file in folder.iterdir():
        file.unlink()
    folder_paths.filename_list_cache.pop("open_clip", None)


def given(graph, host, value):
    """Put a value into the graph."""
    return graph.add("TestCall", value="", name=host.function(lambda _: value))()


def loaded(graph, weights="tiny.safetensors"):
    return graph.add("StoryLoom_LoadOpenCLIP", architecture=CLIP, weights=weights, download=False)()


def measured(graph, images, **inputs):
    node = graph.add("StoryLoom_Consistency", images=images, **inputs)
    graph.capture(report=node(0), matrix=node(1), plot=node(2), measures=node(3))


def written(host, folder="StoryLoom"):
    return sorted((host.base / "output" / folder).glob("*.json"))


def test_the_demo_reader_measures_a_story_and_everything_is_written(host, graph, drawn):
    story = graph.add("StoryLoom_Script", **STORY | TEXTS)()
    measured(graph, given(graph, host, drawn[0]), story=story, clip=graph.add("StoryLoom_DemoSimilarity")())
    before = written(host)
    result = host.run(graph, fresh=True)
    measures = result.measures
    assert measures.prompts == (
        "a fox in a blue coat asleep in the snow",
        "a fox in a blue coat reading on a train",
        "a fox in a blue coat jumping on the beach",
    )
    pairs = [(1 + 0 + 1 + 0 + 0) / 5, (1 + 1 + 1 + 0 + 0) / 5, (1 + 0 + 1 + 1 + 0) / 5]
    assert measures.clip_i[[0, 0, 1], [1, 2, 2]].tolist() == pytest.approx(pairs)
    assert measures.means() == pytest.approx({"clip_i": sum(pairs) / 3, "clip_t_cosine": 1})
    assert "CLIP" not in result.report and "Same figures (demo reader)" in result.report
    (file,) = set(written(host)) - set(before)
    saved = json.loads(file.read_text(encoding="utf-8"))
    assert saved == measures.to_json() and f"Saved: StoryLoom/{file.name}" in result.report
    assert not list(file.parent.glob("*.tmp"))
    for picture in (result.matrix, result.plot):
        assert picture.dtype == torch.float32 and picture.shape[0] == 1 and picture.shape[3] == 3
        assert 0 <= picture.min() and picture.max() <= 1 and picture.std() > 0.05


def test_the_node_shows_report_and_pictures_that_keep_prompt_and_workflow(host, graph, drawn):
    node = graph.add(
        "StoryLoom_Consistency", images=given(graph, host, drawn[0]), clip=graph.add("StoryLoom_DemoSimilarity")()
    )
    outputs = host.validate(graph)
    executor = host.new_executor()
    extra = {"extra_pnginfo": {"workflow": {"nodes": [], "name": "mine"}}}
    executor.execute(dict(graph), "shown", extra, outputs)
    assert executor.success
    shown = executor.history_result["outputs"][node()[0]]
    assert shown["text"][0].startswith("3 frames") and len(shown["images"]) == 2
    import folder_paths

    for image in shown["images"]:
        with Image.open(Path(folder_paths.get_temp_directory()) / image["filename"]) as picture:
            assert json.loads(picture.text["workflow"])["name"] == "mine"
            assert json.loads(picture.text["prompt"])[node()[0]]["class_type"] == "StoryLoom_Consistency"


def test_open_clip_measures_as_the_library_does(host, graph, clip_file, drawn):
    images = drawn[1]
    clip = loaded(graph)
    graph.capture(encoder=clip)
    lines = "one fox\ntwo foxes\nthree foxes\n"
    measured(graph, given(graph, host, images), clip=clip, prompts=lines)
    result = host.run(graph)
    reference = host.pack("measures.clip").load_open_clip(CLIP, clip_file)

    def figures(pictures):
        measures = host.pack("measures.measuring").measure(pictures, lines.split("\n")[:3], reference, reference)
        return measures.clip_i, *measures.clip_t.values()

    ours = result.measures
    assert list(ours.clip_t) == ["clip_score", "clip_score_file_name", "cosine"]
    bound = rounding(figures, images)
    for value, expected in zip((ours.clip_i, *ours.clip_t.values()), figures(images), strict=True):
        assert (value - expected).abs().max() < bound < 1e-2
    assert f"{CLIP} (tiny.safetensors)" in result.report
    import comfy.model_management

    loaded_models = [entry.model for entry in comfy.model_management.current_loaded_models]
    assert result.encoder.patcher in loaded_models, "ComfyUI knows of the network"


def test_clip_i_comes_from_the_encoder_that_is_connected_for_it(host, graph, clip_file, drawn):
    class Vision:
        def encode_image(self, pictures, crop):
            assert crop and pictures.shape[3] == 3
            return {"image_embeds": pictures.mean((1, 2))}

    images, clip = given(graph, host, drawn[0]), loaded(graph)
    vision = given(graph, host, Vision())
    measured(graph, images, clip=clip, clip_vision=vision, prompts="a\nb\nc")
    measures = host.run(graph).measures
    pairwise = host.pack("measures.consistency").pairwise

    def expected(pictures):
        return pairwise(pictures.mean((1, 2)))

    assert (measures.clip_i - expected(drawn[0])).abs().max() < rounding(expected, drawn[0]) < 1e-4
    assert measures.encoders == {"clip_i": "CLIP_VISION", "clip_t": f"{CLIP} (tiny.safetensors)"}
    other = type(graph)()
    measured(
        other, given(other, host, drawn[0]), clip=loaded(other), clip_image=other.add("StoryLoom_DemoSimilarity")()
    )
    assert host.run(other).measures.encoders == {"clip_i": "demo reader"}


def test_masks_take_the_background_away_from_clip_i(host, graph, clip_file):
    images = torch.zeros(2, 32, 32, 3)
    images[0, :, 16:], images[:, :, :16] = 1, 0.5
    mask = torch.zeros(1, 32, 32)
    mask[:, :, :16] = 1
    inputs = {"clip": loaded(graph), "masks": given(graph, host, mask)}
    pictures = given(graph, host, images)
    for name, chosen in (("white", inputs), ("whole", {"clip": inputs["clip"]})):
        node = graph.add("StoryLoom_Consistency", images=pictures, background="white", **chosen)
        graph.capture(**{name: node(3)})
    results = host.run(graph)
    assert 1 - results.white.clip_i[0, 1].item() < 1e-9, "the same character on the same paper"
    assert results.whole.clip_i[0, 1].item() < 0.9999 and "background white" in results.white.encoders["clip_i"]


class Faces:
    def embeddings(self, pictures):
        return torch.tensor([[1.0, 0.0], [0.6, 0.8], [NAN, NAN]])[: len(pictures)]


def test_faces_alone_are_enough_and_frames_without_one_are_told(host, graph, drawn):
    measured(graph, given(graph, host, drawn[0]), face_analysis=given(graph, host, Faces()))
    result = host.run(graph)
    assert result.measures.means() == pytest.approx({"face": 0.6})
    assert "Faces: found in 2 of 3 frames" in result.report


def test_demo_heads_measure_drawn_frames(host, graph, drawn):
    for batch, bounds in zip(drawn, ((0.0, 0.8), (0.999, 1.001)), strict=True):
        graph = type(graph)()
        heads = graph.add("StoryLoom_LoadFaceAnalysis", pack="demo heads", provider="CPU")()
        measured(graph, given(graph, host, batch), face_analysis=heads)
        measures = host.run(graph).measures
        assert bounds[0] < measures.means()["face"] < bounds[1], "the second batch shows one fox, the first three"
        assert measures.encoders == {"face": "demo heads"}


def test_one_image_has_no_pairs_and_says_so(host, graph, drawn):
    measured(graph, given(graph, host, drawn[0][:1]), clip=graph.add("StoryLoom_DemoSimilarity")())
    result = host.run(graph)
    assert "A single frame has no pairs" in result.report and result.matrix.std() > 0


@can_be_killed
def test_numbers_that_are_written_while_the_server_is_killed_are_whole(host, drawn):
    module, reader = host.pack("nodes.consistency"), host.pack("models.demo.similarity").DemoReader()
    measures = host.pack("measures.measuring").measure(drawn[0].repeat(8, 1, 1, 1), None, reader)
    folder = Path(host.base, "output", "killed")
    killed = sum(1 for _ in killed_at_every_point(lambda _: module.saved(measures, "killed/numbers"), folder))
    files = list(folder.glob("*.json"))
    assert killed > len(files) > 2 and all(json.loads(file.read_bytes()) == measures.to_json() for file in files)


def failure(host, graph):
    with pytest.raises(Exception) as error:
        host.run(graph)
    assert type(error.value).__name__ == "PromptFailed"
    return str(error.value)


@pytest.mark.parametrize(
    "inputs, message",
    [
        ({}, "nothing to measure with: connect Load OpenCLIP"),
        ({"clip": "demo", "story": {"frames": "asleep in the snow"}}, "story has 1 frames, but there are 3 images"),
        ({"clip": "demo", "prompts": "one\ntwo"}, "prompts has 2 lines, but there are 3 images"),
        ({"clip": "demo", "prompts": "one\ntwo\nthree", "story": TEXTS}, "disconnect story, or empty prompts"),
        ({"clip": "demo", "masks": torch.ones(2, 8, 8)}, "for 3 images"),
        ({"clip": "demo", "masks": torch.zeros(3, 8, 8)}, "mask for image 1 is empty"),
        ({"clip": "demo", "images": torch.full((3, 48, 48, 3), NAN)}, "Image 1, 2, 3: the values contain NaN"),
        ({"clip": "demo", "images": torch.zeros(3, 50, 48, 3)}, "only images from the Demo model"),
        ({"clip_image": "demo", "clip_vision": "demo"}, "disconnect one of them"),
        ({"dreamsim": "ensemble"}, "pip install dreamsim"),
    ],
)
def test_what_cannot_be_measured_says_what_to_change(host, graph, drawn, monkeypatch, inputs, message):
    monkeypatch.setitem(sys.modules, "dreamsim", None)  # as where the package is not installed
    demo = graph.add("StoryLoom_DemoSimilarity")()
    links = {}
    for name, value in {"images": drawn[0], **inputs}.items():
        if name == "story":
            links[name] = graph.add("StoryLoom_Script", **STORY | value)()
        elif value == "demo" if isinstance(value, str) else False:
            links[name] = (
                given(graph, host, host.pack("models.demo.similarity").DemoReader()) if "vision" in name else demo
            )
        else:
            links[name] = given(graph, host, value) if isinstance(value, torch.Tensor) else value
    measured(graph, **links)
    before = written(host)
    assert message in failure(host, graph)
    assert written(host) == before, "nothing half-done is written"


@pytest.mark.parametrize("prefix", ["../outside", "/tmp/outside", "a/../../outside", "", "folder/", "a\nb", "C:\\x"])
def test_a_prefix_that_leaves_the_output_folder_is_refused_before_anything_runs(host, graph, drawn, prefix):
    demo = graph.add("StoryLoom_DemoSimilarity")()
    measured(graph, given(graph, host, drawn[0]), clip=demo, filename_prefix=prefix)
    with pytest.raises(Exception) as error:
        host.validate(graph)
    assert "filename_prefix" in error.value.errors["StoryLoom_Consistency"][0]["details"]


def test_a_prefix_with_a_folder_counts_on(host, graph, drawn):
    demo, images = graph.add("StoryLoom_DemoSimilarity")(), given(graph, host, drawn[0])
    measured(graph, images, clip=demo, filename_prefix="mine/%year%/story")
    host.run(graph, fresh=True)
    host.run(graph, fresh=True)
    names = sorted(path.name for path in (host.base / "output" / "mine").glob("*/*.json"))
    assert names == ["story_00001_.json", "story_00002_.json"]


def test_weights_that_are_none_stop_with_one_sentence(host, graph, clip_file):
    graph.capture(x=loaded(graph, "broken.pt"))
    assert "broken.pt" in (message := failure(host, graph)) and "download it again" in message
    other = type(graph)()
    tag = {"architecture": CLIP, "weights": "cached: openai", "download": False}
    other.capture(x=other.add("StoryLoom_LoadOpenCLIP", **tag)())
    assert f"{CLIP} has no tags" in failure(host, other)


# ---- A/B -------------------------------------------------------------------------------------------------------------


def compared(graph, host, drawn, measures=True, **inputs):
    reader, measure = host.pack("models.demo.similarity").DemoReader(), host.pack("measures.measuring").measure
    links = {"story": graph.add("StoryLoom_Script", **STORY | TEXTS)()}
    prompts = [f"{TEXTS['identity']} {frame}" for frame in TEXTS["frames"].split("\n")]
    for side, images in zip("ab", drawn, strict=True):
        links[f"images_{side}"] = given(graph, host, images)
        if measures:
            links[f"measures_{side}"] = given(graph, host, measure(images, prompts, reader, reader))
    node = graph.add("StoryLoom_Compare", **COMPARE | links | inputs)
    graph.capture(page=node(0), changes=node(1))


def test_the_page_tells_what_changed_with_the_reader_s_own_names(host, graph, drawn):
    compared(graph, host, drawn)
    result = host.run(graph)
    assert result.changes.split("\n") == [
        "Same figures (demo reader) 0.533 -> 1.000 (+0.467)",
        "Shown as told (demo reader) 1.000 -> 1.000 (+0.000)",
    ]
    assert result.page.shape[0] == 1 and result.page.shape[2] > 3 * 192
    plain = type(graph)()
    compared(plain, host, drawn, measures=False)
    bare = host.run(plain)
    assert bare.changes == "" and bare.page.shape[1] < result.page.shape[1], "two lines less"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"measures_a": None}, "measures_a is not connected"),
        ({"images_a": slice(2)}, "measures_a covers 3 frames, but images_a has 2"),
        (
            {"images_a": slice(2), "measures_a": None, "measures_b": None, "story": None},
            "A has 2 images, but B has 3",
        ),
        ({"images_a": slice(2), "measures_a": None, "measures_b": None}, "The story has 3 frames, but images_a has 2"),
    ],
)
def test_what_does_not_belong_together_is_not_compared(host, graph, drawn, change, message):
    compared(graph, host, drawn)
    node = next(entry for entry in graph.values() if entry["class_type"] == "StoryLoom_Compare")
    for name, value in change.items():
        if value is None:
            del node["inputs"][name]
        else:
            node["inputs"][name] = given(graph, host, drawn[0][value])
    assert message in failure(host, graph)
