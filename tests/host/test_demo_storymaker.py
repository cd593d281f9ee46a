"""The demo's stand-in for StoryMaker: it fits the demo model, is always the same, and changes pictures mildly."""

import pytest
import torch
from story_graphs import build, call, differ, distance, sample
from story_makers import APPLY

from storyloom.benchmarks.likeness_rows import outfit
from storyloom.benchmarks.portraits import Portraits
from storyloom.models.storymaker.crops import character_crop, to_image
from storyloom.world.reader import Reader

TEXTS = {"identity": "a fox in a blue coat", "frames": "jumping on the beach\nwith an umbrella in the city"}


def load(host):
    return host.pack("nodes.demo").DemoStoryMaker.execute().result


@pytest.fixture(scope="module")
def loaded(host):
    return load(host)


def picture(seed):
    """A picture of six times six squares in any colours."""
    colours = torch.rand(1, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(colours, (192, 192)).movedim(1, -1)


def character(host, vision, seed=1):
    return host.pack("nodes.characters").Character.execute("", vision, picture(seed), "face and appearance").result[0]


def story(host, graph, loaded, size):
    """Links to what a sampler needs, and a function that gives the model with the stand-in on it."""
    parts = build(graph, "EncodePerFrame", size, loader="StoryLoom_DemoModel", **TEXTS)
    maker = call(graph, host, lambda _: loaded[0], parts["story"])

    def applied(seed=1, **changes):
        someone = call(graph, host, lambda _: character(host, loaded[1], seed), parts["story"])
        links = {"model": parts["model"], "storymaker": maker, "character_1": someone}
        return graph.add("StoryLoom_ApplyStoryMaker", **links, **APPLY | changes)()

    return parts, applied


def test_it_is_the_same_every_time_it_is_loaded(host, loaded):
    again = load(host)
    for first, second in ((loaded[0].adapter, again[0].adapter), (loaded[1].model, again[1].model)):
        for a, b in zip(first.parameters(), second.parameters(), strict=True):
            assert torch.equal(a, b)
    assert all(torch.equal(tensor, again[0].lora[name]) for name, tensor in loaded[0].lora.items())


def test_it_is_made_for_the_demo_model_s_layers(host, loaded):
    model = host.pack("nodes.demo").build_model()
    widths, context = host.pack("nodes.patching").attention_widths(model)
    assert (loaded[0].adapter.widths, loaded[0].adapter.context) == (widths, context)
    assert len(loaded[0].lora) == 2 * 140 * 4


def test_the_encoder_returns_the_features_of_the_demo(host, loaded):
    images = torch.stack(
        [torch.nn.functional.interpolate(picture(seed).movedim(-1, 1), (224, 224))[0] for seed in (1, 2)]
    )
    images = (images.movedim(1, -1) * 255).round() / 255
    encoded = loaded[1].encode_image(images)
    expected = host.pack("models.demo.vision").features(images)
    assert distance(expected, encoded["penultimate_hidden_states"]) < 5e-5
    assert distance(*encoded["image_embeds"]) > 0.01, "CLIP-I with this encoder has to tell pictures apart"


def test_the_encoder_tells_pictures_apart(host, loaded):
    first, same, other = (character(host, loaded[1], seed).parts[0][0].character for seed in (1, 1, 2))
    assert first.shape == (257, 1280) and first.isfinite().all()
    assert torch.equal(first, same) and not torch.allclose(first, other, atol=0.1)


def test_pictures_change_with_it_and_with_the_character_and_off_is_bit_identical(host, graph, loaded):
    parts, applied = story(host, graph, loaded, (64, 64))
    sample(graph, parts, "plain", steps=1)
    sample(graph, parts, "ours", model=applied(), steps=1)
    sample(graph, parts, "other", model=applied(seed=2), steps=1)
    sample(graph, parts, "off", model=applied(token_strength=0.0, lora_strength=0.0), steps=1)
    result = host.run(graph)
    assert torch.equal(result.plain["samples"], result.off["samples"])
    assert differ(result.plain, result.ours) and differ(result.ours, result.other)


def test_each_half_does_something_of_its_own(host, graph, loaded):
    parts, applied = story(host, graph, loaded, (64, 64))
    sample(graph, parts, "plain", steps=1)
    sample(graph, parts, "lora", model=applied(token_strength=0.0), steps=1)
    sample(graph, parts, "tokens", model=applied(lora_strength=0.0), steps=1)
    result = host.run(graph)
    assert differ(result.plain, result.lora) and differ(result.plain, result.tokens)


def test_the_pictures_still_show_what_they_were_told(host, graph, loaded):
    parts, applied = story(host, graph, loaded, (192, 192))
    latents = sample(graph, parts, "samples", model=applied(), steps=8)
    graph.capture(images=graph.add("VAEDecode", samples=latents, vae=parts["vae"])())
    scenes = [reading.scene for reading in Reader().read_all(host.run(graph).images.numpy())]
    assert [scene.place for scene in scenes] == ["beach", "city"]
    assert all(scene.figures[0].species == "fox" for scene in scenes)


def test_the_benchmark_of_likeness_makes_the_node_s_characters(host, loaded):
    faces = host.pack("models.demo.faces").DemoFaces()
    head, clothes = outfit(30_000, 1).references
    large = [array.repeat(8, 0).repeat(8, 1) for array in (head.picture, head.mask, clothes.picture)]
    inputs = {"mask": torch.from_numpy(large[1])[None].float(), "face_analysis": faces}
    worn = character_crop(large[2], clothes.below_the_head.repeat(8, 0).repeat(8, 1).astype("uint8") * 255)
    made = Portraits(faces)
    pairs = [
        ("face and appearance", {}, made.whole(head)),
        ("face only", {}, made.face_only(head)),
        ("face and appearance", {"clothing": to_image(worn)[None]}, made.dressed(head, clothes)),
    ]
    node = host.pack("nodes.characters").Character
    for mode, changes, ours in pairs:
        theirs = node.execute("", loaded[1], to_image(large[0])[None], mode, **inputs, **changes).result[0]
        (ours, _), (theirs, _) = *ours.parts, *theirs.parts
        assert (ours.has_face, ours.has_character) == (theirs.has_face, theirs.has_character)
        for name in ("id_embed", "face", "character"):
            assert (getattr(ours, name) - getattr(theirs, name)).abs().max() < 2e-4, name
