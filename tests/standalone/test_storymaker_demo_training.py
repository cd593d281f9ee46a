"""StoryMaker's training on the demo world: its data, its networks at both widths, and interrupted runs."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.nn.functional import normalize

from storyloom.models.demo import model as demo
from storyloom.models.demo import vision, wide
from storyloom.models.demo.storymaker import demo_storymaker
from storyloom.models.storymaker.ppr import PositionalPerceiverResampler
from storyloom.models.storymaker.weights import LAYER_SLOTS, StoryMakerFileError
from storyloom.training.demo.data import Vocabulary
from storyloom.training.storymaker.demo import lessons
from storyloom.training.storymaker.demo.__main__ import objective, stored
from storyloom.training.storymaker.demo.control import ControlTraining
from storyloom.training.storymaker.demo.lessons import World, random_lesson
from storyloom.training.storymaker.demo.networks import frozen_model, narrow_ppr, new_adapter, repeat_blocks
from storyloom.training.storymaker.loop import TrainingLoop
from storyloom.training.storymaker.options import Options
from storyloom.world import references
from storyloom.world.draw import draw, draw_parts
from storyloom.world.pose import pose
from storyloom.world.scene import LOOKS, Figure, Scene

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def vocabulary():
    return Vocabulary()


@pytest.fixture
def net():
    return frozen_model()


def world(net, vocabulary, **changes):
    return World(net, vocabulary, **{"seed": 5, "size": 3} | changes)


def filled(module):
    """A module with random parameters, where training starts with zeros."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return module


# ---- pictures --------------------------------------------------------------------------------------------------------


def test_the_parts_of_a_picture_are_those_of_the_picture_that_is_drawn():
    who = Figure("fox", "pink", "purple", "green", "cap")
    for figures in ((who,), (who, who)):
        scene = Scene("cave", "waving", "none", figures)
        drawn = draw_parts(scene, np.random.default_rng(4))
        assert np.array_equal(drawn.picture, draw(scene, np.random.default_rng(4)))
        shirts = (drawn.picture == (164, 50, 172)).all(-1)
        assert shirts.sum() >= 25 * len(figures)
        assert not (shirts & ~np.any(drawn.masks, axis=0)).any()
        assert all((shirts & mask).sum() >= 25 for mask in drawn.masks)
        for mask, (row, column) in zip(drawn.masks, drawn.heads, strict=True):
            assert mask[row : row + 5, column : column + 8].all()


def test_a_pose_shows_where_a_figure_is_and_nothing_of_its_looks():
    scenes = [
        Scene("cave", "running", "lantern", (Figure(species, fur, shirt, "red", hat),))
        for species, fur, shirt, hat in (("fox", "pink", "purple", "cap"), ("robot", "black", "white", "none"))
    ]
    first, second = (pose(scene, [7]) for scene in scenes)
    assert np.array_equal(first, second) and first.any()
    assert not np.array_equal(first, pose(scenes[0], [8]))
    assert not np.array_equal(first, pose(Scene("cave", "sitting", "lantern", scenes[0].figures), [7]))


def test_a_reference_is_another_picture_of_the_same_character(monkeypatch):
    photos = []
    for module in (lessons, references):
        monkeypatch.setattr(
            module, "draw_parts", lambda scene, random: photos.append(scene) or draw_parts(scene, random)
        )
    different = 0
    for seed in range(12):
        photos.clear()
        lesson = random_lesson(np.random.default_rng(seed))
        target, *others = photos
        assert target is lesson.scene and len(lesson.references) == len(target.figures)
        for who in target.figures:
            mine = [each for each in others if each.figures == (who,)]
            assert mine
            different += any(each.place != target.place for each in mine)
    assert different >= 10


def test_clothes_come_from_others_at_times_and_the_face_never_does():
    who = Figure("bear", "grey", "yellow", "blue", "crown")
    random = np.random.default_rng(0)
    seen = [lessons.reference(who, random) for _ in range(40)]
    assert all(torch.equal(each.identity, seen[0].identity) for each in seen)
    grey = [(abs(each.character.astype(int) - (146, 150, 160)).sum(-1) < 12).mean() > 0.03 for each in seen]
    yellow = [(abs(each.character.astype(int) - (248, 212, 48)).sum(-1) < 12).mean() > 0.03 for each in seen]
    assert all(yellow) and 0.5 < np.mean(grey) < 0.95


def test_what_the_encoder_sees_in_training_is_nearly_what_it_sees_in_a_workflow():
    """Training computes the aligned face at the resolution that the encoder keeps."""
    photo = lessons.photograph(Figure("cat", "brown", "red", "white", "top hat"), np.random.default_rng(2))
    whole = torch.from_numpy(lessons.face_crop(photo, 224).copy())[None] / 255
    quick = torch.from_numpy(lessons.means(lessons.face_crop(photo)))[None]
    likeness = torch.cosine_similarity(vision.narrow_features(whole), vision.quarter_features(quick), -1)
    assert likeness.mean() > 0.99 and likeness.min() > 0.9


def test_a_batch_depends_on_its_numbers_alone(net, vocabulary):
    first, again, other = (world(net, vocabulary)(step, 0) for step in (3, 3, 4))
    for name in ("latents", "context", "pooled", "masks", "id_embeds", "face", "character", "pose"):
        assert torch.equal(getattr(first, name), getattr(again, name)), name
    assert not torch.equal(first.latents[:1], other.latents[:1])
    assert (first.masks.sum((2, 3)) > 0).sum().item() == sum(first.counts) == len(first.face)


# ---- networks --------------------------------------------------------------------------------------------------------


def test_the_frozen_model_is_the_shipped_one(net):
    assert not any(parameter.requires_grad for parameter in net.parameters())
    stored = demo._read(demo.FILE, "l.", "g.")
    assert torch.equal(net.l.embedding, stored["l.embedding"]) and torch.equal(net.g.fc2[1], stored["g.fc2.1"])


def test_the_wide_token_network_computes_the_narrow_one():
    narrow = filled(narrow_ppr()).double()
    full = PositionalPerceiverResampler(depth=1, dtype=torch.float64)
    full.load_state_dict(wide.wide_ppr({name: value.float() for name, value in narrow.state_dict().items()}))
    generator = torch.Generator().manual_seed(1)
    ident = normalize(torch.randn(2, demo.NARROW, generator=generator), dim=1)
    face, character = torch.randn(2, 2, 257, demo.NARROW, generator=generator)
    expected = narrow(ident.double(), character.double(), face.double()) @ wide.tokens().into.T.double()
    given = (
        x @ space.into.T
        for x, space in ((ident, wide.identities()), (character, wide.features()), (face, wide.features()))
    )
    seen = full(*(x.double() for x in given))
    assert (seen - expected).abs().max() < 1e-5 * expected.abs().max()
    less = full(
        *(
            x.double()
            for x in (ident @ wide.identities().into.T, face @ wide.features().into.T, face @ wide.features().into.T)
        )
    )
    assert (less - expected).abs().max() > 1e-3 * expected.abs().max()


def test_every_layer_gets_its_lora_keys_and_values(net):
    adapter = filled(new_adapter(net, 0))
    parts = adapter.state()
    weights = wide.widened({f"{part}.{name}": x for part, tensors in parts.items() for name, x in tensors.items()})
    assert len(weights.image_kv) == 70 and len(weights.lora) == 1120
    context = torch.randn(2, 2 * demo.NARROW, generator=torch.Generator().manual_seed(2))
    tokens = context @ wide.tokens().into.T
    scales = torch.tensor([demo._scale(which) for which in "lg"]).repeat_interleave(demo.NARROW)
    text = (context * scales) @ wide.tokens().columns.T
    for number, slot in enumerate(LAYER_SLOTS):
        narrow = adapter.processors[2 * number + 1]
        for j in range(slot.depth):
            name = f"{slot.diffusers}.transformer_blocks.{j}.attn2.processor.to_k_lora.down.weight"
            assert torch.allclose(text @ weights.lora[name].T, narrow.to_k_lora.down(context), rtol=0, atol=1e-4), name
            k, v = weights.image_kv[slot.part, slot.number, j]
            assert torch.allclose(tokens @ k.T, narrow.to_k_ip(context), rtol=0, atol=1e-4), name
            assert torch.allclose(tokens @ v.T, narrow.to_v_ip(context), rtol=0, atol=1e-4), name


def test_a_written_file_is_read_at_full_width(net, tmp_path):
    adapter = filled(new_adapter(net, 0))
    batches = World(net, Vocabulary(), 5, size=1)
    loop = TrainingLoop(adapter, net.unet, objective(), batches, Options(average=0.0))
    save_file(stored(loop), tmp_path / "storymaker.safetensors")
    weights = demo_storymaker(tmp_path / "storymaker.safetensors")
    k, _ = weights.image_kv["middle", 0, 9]
    assert torch.allclose(k @ wide.tokens().into, adapter.processors[-1].to_k_ip.weight, rtol=0, atol=1e-3)
    (tmp_path / "other.safetensors").write_bytes(b"nothing")
    with pytest.raises(StoryMakerFileError, match=r"other\.safetensors is not an adapter of the demo model .*train it"):
        demo_storymaker(tmp_path / "other.safetensors")


def test_a_repeated_block_adds_as_much_of_its_lora(net):
    adapter = new_adapter(net, 0)
    loop = new(net, adapter, world(net, Vocabulary()))
    up = filled(adapter.processors[0].to_out_lora.up)
    x = torch.randn(1, up.in_features)
    once = up(x)
    repeat_blocks(net, adapter, 3)
    assert torch.allclose(up(x) * up.repeats, once, rtol=0, atol=1e-6) and up.repeats == 2
    assert loop.adapter is adapter


# ---- training --------------------------------------------------------------------------------------------------------


def new(net, adapter, batches, control=None, **changes):
    options = Options(
        **{"seed": 5, "steps": 4, "rate": 1e-3, "schedule": "cosine", "average": 0.99, "clip": 1.0} | changes
    )
    return TrainingLoop(adapter, net.unet, objective(), batches, options, control)


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(vocabulary, tmp_path):
    def begin():
        net = frozen_model()
        return new(net, new_adapter(net, 5), world(net, vocabulary))

    straight, stopped, resumed = begin(), begin(), begin()
    losses = [straight.advance() for _ in range(3)]
    for _ in range(2):
        stopped.advance()
    stopped.save(tmp_path / "state.pt")
    resumed.load(tmp_path / "state.pt")
    assert resumed.advance() == losses[-1]
    for name, value in straight.adapter.state_dict().items():
        assert torch.equal(resumed.adapter.state_dict()[name], value), name


def test_training_changes_the_adapter_and_nothing_of_the_model(net, vocabulary):
    before = {name: value.clone() for name, value in net.state_dict().items()}
    adapter = new_adapter(net, 5)
    batches = world(net, vocabulary)
    batch = batches(0, 0)
    loop = new(net, adapter, lambda step, micro: batch, steps=40, rate=3e-3)
    losses = [loop.advance() for _ in range(12)]
    assert losses[-1]["attention"] < 0.9 * losses[0]["attention"]
    after = net.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_the_pose_net_changes_nothing_at_first_and_then_learns(net, vocabulary, tmp_path):
    def begin():
        return ControlTraining(frozen_model(), objective(), world(net, vocabulary), 4)

    straight, stopped, resumed = begin(), begin(), begin()
    batch = straight.world(0, 0)
    added = {"text_embeds": batch.pooled, "time_ids": batch.time_ids}
    call = batch.latents, torch.tensor([500] * 3), batch.context
    with torch.no_grad():
        down, middle = straight.control(*call, batch.pose, added)
    assert not any(each.any() for each in (*down, middle))
    losses = [straight.advance() for _ in range(3)]
    for _ in range(2):
        stopped.advance()
    stopped.save(tmp_path / "control.pt")
    resumed.load(tmp_path / "control.pt")
    assert resumed.advance() == losses[-1]
    with torch.no_grad():
        seen = straight.control(*call, batch.pose, added)[1]
        elsewhere = straight.control(*call, batch.pose.flip(-1), added)[1]
    assert seen.any() and not torch.equal(seen, elsewhere)


def test_without_references_the_adapter_learns_from_the_poses_too(net, vocabulary):
    """The residuals of a ControlNet reach the UNet in the adapter's training."""
    adapter, batches = new_adapter(net, 5), world(net, vocabulary)
    training = ControlTraining(frozen_model(), objective(), batches, 4)
    with torch.no_grad():
        training.control.middle.weight.fill_(0.1)
    with_pose = new(net, adapter, batches, training.control).advance()
    assert not any(parameter.requires_grad for parameter in training.control.parameters())
    again = frozen_model()
    without = new(again, new_adapter(again, 5), batches).advance()
    assert with_pose["diffusion"] != without["diffusion"]


def test_every_look_is_drawn_equally_often_where_the_caption_is_silent():
    random = np.random.default_rng(1)
    scenes = [random_lesson(random).scene for _ in range(120)]
    for look, values in LOOKS.items():
        seen = [getattr(who, look) for scene in scenes for who in scene.figures]
        assert min(seen.count(value) for value in values) > 0.3 * len(seen) / len(values), look
