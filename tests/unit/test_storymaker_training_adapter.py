"""The adapter that is trained: its tokens, its file, what it starts from, and that it alone learns."""

from dataclasses import replace

import pytest
import torch
from small_training import (
    CONTEXT,
    ID,
    OBJECTIVE,
    RANK,
    tiny_adapter,
    tiny_batch,
    tiny_controlnet,
    tiny_ppr,
    tiny_unet,
)

from storyloom.models.storymaker.ppr import PositionalPerceiverResampler
from storyloom.models.storymaker.weights import ADAPTER, PROJECTION, StoryMakerWeights, layers, load_storymaker
from storyloom.training.storymaker.adapter import TrainedAdapter
from storyloom.training.storymaker.drops import NOTHING, Dropped, drawn
from storyloom.training.storymaker.options import Options
from storyloom.training.storymaker.step import Faces, TrainingStep

pytest.importorskip("diffusers", reason="the training runs on diffusers")
CLOSE = {"rtol": 0, "atol": 1e-9}


def kept(batch):
    return drawn(NOTHING, batch.counts, torch.Generator())


def test_tokens_are_the_background_s_and_those_of_the_picture_s_own_characters():
    batch = tiny_batch((2, 1, 3))
    adapter = tiny_adapter(tiny_unet())
    with torch.no_grad():
        tokens, keep = adapter.tokens(batch, kept(batch))
        assert tokens.shape == (3, 80, CONTEXT)
        first = 0
        for picture, count in enumerate(batch.counts):
            own = slice(first, first + count)
            alone = adapter.ppr(batch.id_embeds[own], batch.character[own], batch.face[own])[0]
            length = 20 * (1 + count)
            torch.testing.assert_close(tokens[picture, :length], alone, **CLOSE)
            assert not tokens[picture, length:].any()
            assert keep[picture].tolist() == [True] * length + [False] * (80 - length)
            first += count


def test_dropped_references_give_the_tokens_of_zero_features():
    batch = tiny_batch((2, 1))
    adapter = tiny_adapter(tiny_unet())
    with torch.no_grad():
        full, _ = adapter.tokens(batch, kept(batch))
        tokens, _ = adapter.tokens(batch, replace(kept(batch), picture=torch.tensor([True, False])))
        zero, _ = adapter.tokens(
            replace(batch, **{name: getattr(batch, name) * 0 for name in ("id_embeds", "face", "character")}),
            kept(batch),
        )
    torch.testing.assert_close(tokens[0], zero[0], **CLOSE)
    torch.testing.assert_close(tokens[1], full[1], **CLOSE)
    assert not torch.allclose(tokens[0], full[0])
    torch.testing.assert_close(tokens[0, :20], full[0, :20], **CLOSE)


def test_dropped_faces_and_appearances_are_zero_before_the_character_embeddings():
    batch = tiny_batch((2, 1))
    adapter = tiny_adapter(tiny_unet())
    factors = torch.tensor([0.0, 1.0, 1.0]), torch.tensor([1.0, 1.0, 0.0])
    with torch.no_grad():
        none = torch.tensor([False, False])
        tokens, _ = adapter.tokens(batch, Dropped(none, none, *factors))
        own = batch.id_embeds, batch.character, batch.face
        expected = adapter.ppr.character_tokens(*own, *factors, positions=[0, 1, 0])
        torch.testing.assert_close(tokens[0, 20:], expected[:2].flatten(0, 1), **CLOSE)
        torch.testing.assert_close(tokens[1, 20:40], expected[2], **CLOSE)
        other = replace(batch, face=batch.face.flip(-1))
        assert torch.equal(adapter.tokens(other, Dropped(none, none, *factors))[0][0, 20:24], tokens[0, 20:24])


def test_at_full_size_the_file_has_exactly_mask_bin_s_names_and_shapes():
    from storyloom.models.demo.model import UNET
    from storyloom.standalone.unet import build_unet

    with torch.device("meta"):
        unet = build_unet({**UNET, "model_channels": 320}, 64)
    adapter = TrainedAdapter(unet, PositionalPerceiverResampler(device="meta", dtype=torch.float16))
    assert adapter.names == [layer.processor for layer in layers()]
    assert adapter.keys == [layer.key for layer in layers()]
    state = adapter.state()
    assert (len(state[PROJECTION]), len(state[ADAPTER])) == (113, 1260)
    assert round(sum(tensor.numel() for part in state.values() for tensor in part.values()) / 1e6) == 831
    weights = load_storymaker(state)
    assert not weights.missing and not weights.unused
    assert next(iter(adapter.state(torch.bfloat16)[ADAPTER].values())).dtype == torch.bfloat16
    adapter.install(unet)
    assert adapter.processors[139] is unet.mid_block.attentions[0].transformer_blocks[9].attn2.processor


def weights_of(adapter):
    """A small adapter's tensors as StoryMaker's file gives them; the reader itself accepts only the full size."""
    state = adapter.state()
    lora, image_kv = {}, {}
    for number, (name, key) in enumerate(zip(adapter.names, adapter.keys, strict=True)):
        own = {inside: tensor for inside, tensor in state[ADAPTER].items() if inside.startswith(f"{number}.")}
        lora |= {f"{name}.{k.split('.', 1)[1]}": v for k, v in own.items() if "_lora." in k}
        if f"{number}.to_k_ip.weight" in own:
            image_kv[key] = own[f"{number}.to_k_ip.weight"], own[f"{number}.to_v_ip.weight"]
    return StoryMakerWeights(state[PROJECTION], lora, image_kv)


def test_training_continues_from_a_file():
    unet = tiny_unet()
    trained, fresh = tiny_adapter(unet, seed=1), tiny_adapter(unet, trained=False)
    fresh.load(weights_of(trained))
    for (name, value), expected in zip(fresh.named_parameters(), trained.parameters(), strict=True):
        assert torch.equal(value, expected), name
    with pytest.raises(ValueError, match="only half of StoryMaker"):
        fresh.load(replace(weights_of(trained), missing="The file contains only half of StoryMaker"))


def test_averages_replace_the_parameters_in_the_file():
    adapter = tiny_adapter(tiny_unet())
    averages = {name: value.detach() + 1 for name, value in adapter.named_parameters()}
    state, averaged = adapter.state(), adapter.state(values=averages)
    assert averaged.keys() == state.keys()
    for part, tensors in state.items():
        assert averaged[part].keys() == tensors.keys()
        assert all(torch.equal(averaged[part][name], tensors[name] + 1) for name in tensors)


def ip_adapter_files(adapter):
    """Stand-ins for ip-adapter-plus (nested) and ip-adapter-faceid-plusv2 (dotted), and all tensors they share."""
    state = adapter.state()
    query = ("proj.", "norm.", "perceiver_resampler.")
    resample = {k: torch.randn_like(v) for k, v in state[PROJECTION].items() if k.startswith("resample.")}
    faces = {k: torch.randn_like(v) for k, v in state[PROJECTION].items() if k.startswith(query)}
    changes = {k: torch.randn_like(v) for k, v in state[ADAPTER].items()}
    plus = {"image_proj": {k[len("resample.") :]: v for k, v in resample.items()}, "ip_adapter": {"1.to_k_ip": None}}
    faceid = {f"image_proj.{k}": v for k, v in faces.items()} | {f"ip_adapter.{k}": v for k, v in changes.items()}
    return plus, faceid, resample | faces | changes


def test_training_starts_from_ip_adapter_files():
    torch.manual_seed(0)
    adapter = tiny_adapter(tiny_unet(), trained=False)
    plus, faceid, shared = ip_adapter_files(adapter)
    before = adapter.state()
    before = {name: value.clone() for part in before.values() for name, value in part.items()}
    taken = adapter.from_ip_adapter(plus, faceid)
    assert taken == (len(shared), [], ["1.to_k_ip"])
    after = {name: value for part in adapter.state().values() for name, value in part.items()}
    for name, value in after.items():
        assert torch.equal(value, shared.get(name, before[name])), name
    assert set(after) - set(shared) == {
        "pos_embed",
        "bg_embed",
        *(f"{m}.{p}" for m in ("proj_out", "norm_out") for p in ("weight", "bias")),
    }


def test_what_ip_adapter_files_lack_is_reported_and_keeps_its_values(caplog):
    adapter = tiny_adapter(tiny_unet(), trained=False)
    plus, faceid, _ = ip_adapter_files(adapter)
    del plus["image_proj"]["latents"]
    faceid["ip_adapter.0.to_q_lora.down.weight"] = torch.zeros(RANK + 1, 64)
    before = adapter.ppr.resample.latents.detach().clone()
    taken = adapter.from_ip_adapter(plus, faceid)
    assert taken.missing == ["resample.latents", "0.to_q_lora.down.weight [4, 64] instead of [3, 64]"]
    assert torch.equal(adapter.ppr.resample.latents, before)
    assert "2 tensors were not found in the IP-Adapter files: resample.latents, 0.to_q_lora" in caplog.text
    assert adapter.from_ip_adapter() == (0, [], [])


def test_a_new_adapter_starts_with_the_text_s_keys_and_no_lora():
    unet = tiny_unet()
    adapter, again, other = (tiny_adapter(unet, trained=False, seed=seed) for seed in (1, 1, 2))
    for name, processor in zip(adapter.names, adapter.processors, strict=True):
        assert not processor.to_q_lora.up.weight.any() and processor.to_q_lora.down.weight.any()
        if processor.cross:
            layer = unet.get_submodule(name.removesuffix(".processor"))
            assert torch.equal(processor.to_k_ip.weight, layer.to_k.weight)
            assert torch.equal(processor.to_v_ip.weight, layer.to_v.weight)
    assert all(map(torch.equal, adapter.parameters(), again.parameters()))
    assert not torch.equal(adapter.ppr.bg_embed, other.ppr.bg_embed)
    wide = TrainedAdapter(unet, tiny_ppr(width=2 * CONTEXT), rank=RANK)
    assert wide.processors[1].to_k_ip.weight.shape == (64, 2 * CONTEXT)
    assert wide.processors[1].to_k_ip.weight.any()


@pytest.fixture
def step():
    """A step with every loss, a ControlNet and a face network; two pictures at early timesteps."""
    unet = tiny_unet()
    controlnet = tiny_controlnet(unet)
    face = torch.nn.Linear(3 * 4 * 4, ID).double().requires_grad_(False)
    faces = Faces(lambda latents: latents[:, :3].tanh(), lambda crops: face(crops.flatten(1)), side=4)
    options = Options(drops=NOTHING, attention=0.1, identity=0.5, foreground=5.0)
    return TrainingStep(tiny_adapter(unet), unet, OBJECTIVE, options, controlnet, faces)


def losses_of(step, batch=None, dropped=None, t=(100, 240)):
    batch = batch or tiny_batch((1, 2), pose=True, crops=True)
    noise = torch.randn(batch.latents.shape, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    return step(batch, dropped or kept(batch), batch.latents + noise, torch.tensor(t), noise)


def test_gradients_reach_all_that_learns_and_nothing_else(step):
    losses_of(step)["loss"].backward()
    learning = {id(parameter) for parameter in step.adapter.parameters()}
    for name, parameter in step.named_parameters():
        if id(parameter) in learning:
            assert parameter.grad is not None and parameter.grad.any(), name
        else:
            assert parameter.grad is None and not parameter.requires_grad, name
    others = sum(1 for parameter in step.parameters() if id(parameter) not in learning)
    assert others > len(learning)


def test_the_losses_add_up_with_their_weights(step):
    with torch.no_grad():
        losses = losses_of(step)
    expected = losses["diffusion"] + 0.1 * losses["attention"] + 0.5 * losses["identity"]
    torch.testing.assert_close(losses["loss"], expected, **CLOSE)
    assert all(value > 0 for value in losses.values())


@pytest.mark.parametrize(
    "off, gone",
    [
        ({"attention": 0.0}, "attention"),
        ({"identity": 0.0}, "identity"),
        ({"foreground": 0.0}, None),
        ({"per_layer": False}, None),
    ],
)
def test_each_loss_can_be_switched_off_and_changes_the_gradient(step, off, gone):
    def gradient():
        step.adapter.zero_grad()
        losses = losses_of(step)
        losses["loss"].backward()
        return losses, step.adapter.processors[1].to_k_ip.weight.grad.clone()

    losses, with_it = gradient()
    step.options = replace(step.options, **off)
    others, without = gradient()
    assert not torch.allclose(with_it, without, rtol=1e-6, atol=0)
    assert set(losses) - set(others) == ({gone} if gone else set())


def test_the_identity_loss_needs_faces_and_an_early_timestep(step):
    with torch.no_grad():
        assert losses_of(step, t=(251, 900))["identity"] == 0
        assert "identity" not in losses_of(step, tiny_batch((1, 2), pose=True))
        step.faces = None
        assert "identity" not in losses_of(step)


def test_the_pose_reaches_the_prediction_and_is_optional(step):
    batch = tiny_batch((1, 2), pose=True)
    with torch.no_grad():
        seen = losses_of(step, batch)["loss"]
        other = losses_of(step, replace(batch, pose=1 - batch.pose))["loss"]
        without = losses_of(step, replace(batch, pose=None))["loss"]
        step.controlnet = None
        assert losses_of(step, batch)["loss"] == without
    assert len({float(each) for each in (seen, other, without)}) == 3


def test_the_controlnet_reads_the_text_or_as_in_the_program_the_image_tokens(step):
    contexts = []
    net = step.controlnet
    net.register_forward_pre_hook(lambda module, _, named: contexts.append(named), with_kwargs=True)
    batch = tiny_batch((1, 2), pose=True)
    with torch.no_grad():
        losses_of(step, batch)
        step.options = replace(step.options, pose_reads_images=True)
        losses_of(step, batch)
        tokens, _ = step.adapter.tokens(batch, kept(batch))
    assert torch.equal(contexts[0]["encoder_hidden_states"], batch.context)
    assert torch.equal(contexts[1]["encoder_hidden_states"], tokens)
    assert torch.equal(contexts[0]["controlnet_cond"], batch.pose)


def test_dropped_text_is_the_empty_text(step):
    batch = tiny_batch((1, 2))
    dropped = replace(kept(batch), text=torch.tensor([False, True]))
    context, pooled = batch.context.clone(), batch.pooled.clone()
    context[1], pooled[1] = batch.empty_context[0], batch.empty_pooled[0]
    with torch.no_grad():
        seen = losses_of(step, batch, dropped)["diffusion"]
        assert seen == losses_of(step, replace(batch, context=context, pooled=pooled))["diffusion"]
        assert seen != losses_of(step, batch)["diffusion"]
        assert seen != losses_of(step, replace(batch, context=context))["diffusion"]


def test_wide_pictures_are_trained_too(step):
    batch = tiny_batch((1, 2))
    wide = replace(batch, latents=torch.cat([batch.latents, batch.latents], -1), masks=batch.masks.repeat(1, 1, 1, 2))
    with torch.no_grad():
        assert losses_of(step, wide)["attention"] > 0
