"""PhotoMaker in the encode nodes: ComfyUI's own loader, model and node, on a small random file with the real names."""

import asyncio
import json
import os
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from PIL import Image
from story_graphs import SVR, call, close, differ, ipca, log_bias, sample, tag_of
from tiny_models import WIDE, WIDE_TEXT, fill_, tiny_clip, tiny_model

PACK = Path(__file__).resolve().parents[2]
FILE = "photomaker-v1.bin"
SMALL = {"num_hidden_layers": 1, "intermediate_size": 64}
"""Of the photo encoder; its widths are those of the file."""
MAN = "a man photomaker in a blue coat"
ONE = {"identity": MAN, "frames": "asleep in the snow"}
THREE = {"identity": MAN, "frames": "asleep in the snow\nreading on a train\ndrinking tea"}
CAST = {
    "identity": "[Bob] a tall man photomaker in blue\n[Amy] a woman",
    "frames": "[Bob] asleep\n[NC] an empty beach\n[Amy] reading\n[Amy] and [Bob] arguing",
}
ENCODE = {"EncodeOnePrompt": SVR, "EncodePerFrame": {"literal": False}}
NODES = list(ENCODE)
wide_clip = cache(lambda: tiny_clip(widths=WIDE_TEXT))


@pytest.fixture(scope="module")
def core(host):
    """ComfyUI's module of PhotoMaker, whose loader finds a small file."""
    import nodes

    path = os.path.join(os.environ["COMFYUI_PATH"], "comfy_extras", "nodes_photomaker.py")
    assert asyncio.run(nodes.load_custom_node(path, module_parent="comfy_extras"))
    module = sys.modules[nodes.NODE_CLASS_MAPPINGS["PhotoMakerLoader"].__module__]
    file = host.base / "models" / "photomaker" / FILE
    file.parent.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "VISION_CONFIG_DICT", module.VISION_CONFIG_DICT | SMALL)
        made = fill_(module.PhotoMakerIDEncoder(), 11)
        torch.save({"id_encoder": made.state_dict(), "lora_weights": {}}, file)
        yield module
    file.unlink()


def photos(count=1, seed=4):
    return torch.rand(count, 90, 60, 3, generator=torch.Generator().manual_seed(seed))


def prepared(graph, host, story, pictures=None, clip=wide_clip):
    """Links to the story and to what it is encoded with. pictures: the photos; None: PhotoMaker is not connected."""
    start = graph.add("TestTiny")
    inputs = {
        "clip": call(graph, host, lambda _: clip(), start(1)),
        "story": graph.add("StoryLoom_Script", **{"style": ""} | story)(),
    }
    if pictures is not None:
        inputs["photomaker"] = graph.add("PhotoMakerLoader", photomaker_model_name=FILE)()
        inputs["photo"] = call(graph, host, lambda _: pictures, start(1))
    return inputs


def encoded(graph, host, node, story, pictures=None, name="out", **changes):
    """What an encode node returns is captured as `name`; returns its inputs and its conditioning."""
    inputs = prepared(graph, host, story, pictures)
    link = graph.add(f"StoryLoom_{node}", **ENCODE[node] | changes, **inputs)
    graph.capture(**{name: link()})
    if node == "EncodeOnePrompt":
        graph.capture(**{f"{name}_report": link(1)})
    return inputs, link()


def without(story):
    """The same story with an ordinary identity."""
    return story | {"identity": story["identity"].replace(" photomaker", "")}


class WordNumbers:
    """A CLIP whose tokenizer numbers every word between spaces, as PhotoMakerEncode expects.

    That of ComfyUI 0.19 to 0.33 numbers whole weighted segments, so its node does not remove the trigger word's tokens.
    """

    def __init__(self, clip):
        self.clip = clip

    def tokenize(self, text, return_word_ids):
        counts = [sum(1 for t in self.clip.tokenize(w, return_word_ids=True)["l"][0] if t[2]) for w in text.split(" ")]
        numbers = [number for number, count in enumerate(counts, start=1) for _ in range(count)]
        numbers = [0, *numbers, *[0] * (76 - len(numbers))]
        found = self.clip.tokenize(text, return_word_ids=True)
        return {
            key: [[(token, weight, n) for (token, weight, _), n in zip(chunk, numbers, strict=True)]]
            for key, (chunk,) in found.items()
        }

    def encode_from_tokens(self, tokens, **options):
        return self.clip.encode_from_tokens(tokens, **options)


def of_core(graph, inputs, clip, name):
    """ComfyUI's own PhotoMakerEncode of the first frame of ONE, with the same model and photo."""
    settings = {"photomaker": inputs["photomaker"], "image": inputs["photo"], "clip": clip}
    graph.capture(**{name: graph.add("PhotoMakerEncode", text=f"{MAN} asleep in the snow", **settings)()})


def test_a_frame_is_bit_identical_to_that_of_comfyui_s_own_node(host, graph, core):
    inputs, _ = encoded(graph, host, "EncodePerFrame", ONE, photos())
    encoded(graph, host, "EncodePerFrame", without(ONE), name="plain")
    of_core(graph, inputs, call(graph, host, WordNumbers, inputs["clip"]), "core")
    of_core(graph, inputs, inputs["clip"], "as_it_is")
    seen = host.run(graph)
    (ours,), (reference,), (as_it_is,), (plain,) = seen.out, seen.core, seen.as_it_is, seen.plain
    assert torch.equal(ours[0], reference[0])
    assert torch.equal(ours[1]["pooled_output"], reference[1]["pooled_output"])
    assert torch.equal(ours[0][:, :3], as_it_is[0][:, :3]), "up to the trigger word, with its own tokenizer too"
    changed = (ours[0] != plain[0]).any(-1).nonzero().tolist()
    assert changed == [[0, 2]], "the row of the class noun, and no other"
    assert torch.equal(ours[1]["pooled_output"], plain[1]["pooled_output"])
    assert ours[1]["storyloom"] == plain[1]["storyloom"]


@pytest.mark.parametrize("node", NODES)
@pytest.mark.parametrize("count", [1, 3])
def test_each_photo_is_fused_with_a_repetition_of_the_noun(host, graph, core, node, count):
    """As in the published pipeline: the whole prompt with the noun once per photo, and all of its rows at once."""
    repeated = without(THREE) | {"identity": f"a {' '.join(['man'] * count)} in a blue coat"}
    inputs, _ = encoded(graph, host, node, THREE, photos(count))
    encoded(graph, host, node, repeated, name="plain")
    graph.capture(photomaker=inputs["photomaker"])
    seen = host.run(graph)
    ((ours, info),), ((plain, same),) = seen.out, seen.plain
    assert info["storyloom"] == same["storyloom"] and torch.equal(info["pooled_output"], same["pooled_output"])
    assert tag_of(host, info).identity_columns(0) == tuple(range(1 + 5 + count))
    mask = torch.zeros(1, 77, dtype=torch.bool)
    mask[:, 2 : 2 + count] = True
    pixels = core.comfy.clip_vision.clip_preprocess(photos(count))[None]
    for frame in range(3):
        with torch.inference_mode():
            expected = seen.photomaker(pixels, plain[frame : frame + 1].clone(), mask)
        assert torch.equal(ours[frame : frame + 1], expected), "also if the frame's words were reweighted before"
    distinct = {tuple(row.tolist()) for row in ours[0, 2 : 2 + count]}
    assert len(distinct) == count and not torch.equal(ours, plain)


@pytest.mark.parametrize("node", NODES)
def test_another_photo_changes_the_noun_and_nothing_else(host, graph, core, node):
    encoded(graph, host, node, THREE, photos(), "one")
    encoded(graph, host, node, THREE, photos(seed=5), "other")
    seen = host.run(graph)
    changed = (seen.one[0][0] != seen.other[0][0]).any(-1).nonzero().tolist()
    assert changed == [[0, 2], [1, 2], [2, 2]]


def fused(core, photomaker, row):
    """ComfyUI's model on one photo and one token row [2048]."""
    pixels = core.comfy.clip_vision.clip_preprocess(photos())[None]
    with torch.inference_mode():
        return photomaker(pixels, row[None, None].clone(), torch.ones(1, 1, dtype=torch.bool))[0, 0]


@pytest.mark.parametrize("node", NODES)
def test_frames_without_the_character_are_unchanged(host, graph, core, node):
    inputs, _ = encoded(graph, host, node, CAST, photos())
    encoded(graph, host, node, without(CAST), name="plain")
    graph.capture(photomaker=inputs["photomaker"])
    seen = host.run(graph)
    ((ours, info),), ((plain, same),) = seen.out, seen.plain
    changed = (ours != plain).any(-1).nonzero().tolist()
    assert changed == [[0, 3], [3, 6 if node == "EncodePerFrame" else 3]], "[Amy] comes first in the frame's own line"
    for frame, row in changed:
        assert torch.equal(ours[frame, row], fused(core, seen.photomaker, plain[frame, row])), "its own noun"
    assert torch.equal(info["pooled_output"], same["pooled_output"]) and info["storyloom"] == same["storyloom"]


@pytest.mark.parametrize("node", NODES)
def test_without_photos_the_trigger_is_an_ordinary_word(host, graph, core, node, caplog):
    encoded(graph, host, node, ONE)
    ((context, info),) = host.run(graph).out
    clip = wide_clip()
    text = f"{MAN} asleep in the snow"
    (stock, said) = clip.encode_from_tokens_scheduled(clip.tokenize(text))[0]
    rows = len(tag_of(host, info).rows[0].tokens.identity)
    assert rows == 8, "photo and maker are two tokens"
    assert torch.equal(info["pooled_output"], said["pooled_output"])
    assert torch.equal(context[:, : 1 + rows], stock[:, : 1 + rows])
    assert 'The identity contains "photomaker", but no photo is connected' in caplog.text


@pytest.mark.parametrize("node", NODES)
def test_ipca_counts_the_fused_rows_twice(host, graph, core, node):
    inputs, positive = encoded(graph, host, node, THREE, photos(2))
    story, columns = inputs["story"], range(1 + 7)
    parts = {
        "model": call(graph, host, lambda _: tiny_model("SDXL", WIDE, torch.float64), inputs["clip"]),
        "positive": positive,
        "negative": graph.add("ConditioningZeroOut", conditioning=positive)(),
        "latent_image": graph.add("StoryLoom_EmptyLatent", width=64, height=64, story=story, shared_noise=True)(),
    }
    sample(graph, parts, "ours", model=ipca(graph, parts["model"]), steps=1)
    for name, own in {"biased": columns, "other": [column for column in columns if column not in (2, 3)]}.items():
        model = call(graph, host, log_bias(2.0, columns=[own] * 3), parts["model"])
        sample(graph, parts, name, model=model, steps=1)
    sample(graph, parts, "plain", steps=1)
    seen = host.run(graph)
    assert close(seen.ours, seen.biased)
    assert not close(seen.ours, seen.other) and differ(seen.ours, seen.plain)


def test_the_report_counts_the_prompt_that_is_encoded_and_names_the_fused_rows(host, graph, core):
    encoded(graph, host, "EncodeOnePrompt", CAST, photos(2))
    report = host.run(graph).out_report.splitlines()
    assert report[1] == "The identity of [Bob] (frame 1): 6 tokens (rows 1-6): a tall man man in blue"
    assert report[-1] == 'PhotoMaker: "man" of [Bob] is fused with 2 photos: rows 3, 4 (frames 1, 4)'


@pytest.mark.parametrize("node", NODES)
def test_a_photo_is_encoded_once_for_all_frames(host, graph, core, node, monkeypatch):
    seen, forward = [], core.PhotoMakerIDEncoder.forward
    monkeypatch.setattr(
        core.PhotoMakerIDEncoder, "forward", lambda self, *a, **k: seen.append(a) or forward(self, *a, **k)
    )
    encoded(graph, host, node, THREE, photos())
    host.run(graph)
    assert len(seen) == 1


def test_a_story_is_measured_without_the_trigger_word(host, graph, core):
    graph.capture(story=prepared(graph, host, THREE)["story"])
    texts = host.pack("nodes.consistency").texts_of(3, host.run(graph).story, "")
    assert texts[2] == "a man in a blue coat drinking tea"


def narrow():
    return tiny_clip()


@pytest.mark.parametrize("node", NODES)
@pytest.mark.parametrize(
    "story, changes, clip, message",
    [
        (without(ONE), {}, wide_clip, r'A photo is connected, but the identity has no word "photomaker"\. Write it'),
        (ONE | {"identity": f"{MAN}, photomaker"}, {}, wide_clip, "occurs 2 times in the identity"),
        (CAST | {"identity": CAST["identity"] + " photomaker"}, {}, wide_clip, r"\(\[Bob\], \[Amy\]\)\. One character"),
        (ONE, {"photo": None}, wide_clip, "photomaker is connected, but photo is not"),
        (ONE, {"photomaker": None}, wide_clip, "photo is connected, but photomaker is not"),
        (ONE, {}, narrow, "text embeddings with 2048 channels, but those of this CLIP have 256"),
    ],
)
def test_what_is_missing_or_does_not_fit_is_an_error(host, graph, core, node, story, changes, clip, message):
    inputs = prepared(graph, host, story, photos(), clip)
    inputs = {key: link for key, link in inputs.items() if key not in changes}
    graph.capture(out=graph.add(f"StoryLoom_{node}", **ENCODE[node], **inputs)())
    with pytest.raises(Exception, match=message) as error:
        host.run(graph)
    assert error.value.node == f"StoryLoom_{node}"


@pytest.mark.parametrize("node", NODES)
@pytest.mark.parametrize("count", [0, 33])
def test_a_batch_without_a_photo_or_with_too_many_is_an_error(host, graph, core, node, count):
    encoded(graph, host, node, ONE, photos(count))
    with pytest.raises(Exception, match=f"photo is a batch of {count} images. Connect 1 to 32"):
        host.run(graph)


def test_more_photos_than_the_prompt_has_room_for_are_an_error_that_counts_the_tokens(host, graph, core):
    encoded(graph, host, "EncodeOnePrompt", ONE | {"frames": "asleep " * 42}, photos(32))
    with pytest.raises(Exception, match=r"together are 4 tokens too long for one prompt \(79 of 75\)"):
        host.run(graph)


def test_the_template_draws_its_story_with_the_demo_model(host, new_graph, core):
    import nodes

    file = Path(nodes.folder_paths.get_input_directory()) / "photo.png"
    file.parent.mkdir(exist_ok=True)
    Image.fromarray((photos()[0] * 255).byte().numpy()).save(file)
    prompt = json.loads((PACK / "workflows" / "api" / "PhotoMaker Story.json").read_text(encoding="utf-8"))
    number = {node["class_type"]: key for key, node in prompt.items()}
    prompt[number["CheckpointLoaderSimple"]] = {"class_type": "StoryLoom_DemoModel", "inputs": {}}
    prompt[number["KSampler"]]["inputs"]["steps"] = 1
    prompt[number["StoryLoom_EmptyLatent"]]["inputs"] |= {"width": 64, "height": 64}
    for kind in ("PreviewAny", "PreviewImage", "StoryLoom_SavePage"):
        del prompt[number[kind]]
    prompt["kept"] = {"class_type": "TestCapture", "inputs": {"value": [number["VAEDecode"], 0], "name": "frames"}}
    with_photo = host.run(new_graph(prompt)).frames
    for name in ("photomaker", "photo"):
        del prompt[number["StoryLoom_EncodeOnePrompt"]]["inputs"][name]
    plain = host.run(new_graph(prompt)).frames
    assert with_photo.shape == (4, 64, 64, 3) and not torch.equal(with_photo, plain)
    file.unlink()
