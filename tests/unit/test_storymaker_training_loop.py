"""StoryMaker's training loop: it learns, continues exactly, and uses one process or several alike."""

import json
import math
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import pytest
import torch
from killing import can_be_killed, killed_at_every_point
from small_training import OBJECTIVE, tiny_adapter, tiny_batch, tiny_unet

from storyloom.training.storymaker.drops import NOTHING, drawn
from storyloom.training.storymaker.loop import TrainingLoop
from storyloom.training.storymaker.options import Options

pytest.importorskip("diffusers", reason="the training runs on diffusers")
COUNTS = ((1,), (2, 1), (3,))


def batches(step, number):
    return tiny_batch(COUNTS[(step + number) % 3], seed=100 * step + number)


def loop_of(trained=False, unet=None, **changes):
    settings = {"steps": 4, "rate": 1e-2, "schedule": "cosine", "accumulation": 2, "average": 0.9, "clip": 1.0}
    named = {
        name: changes.pop(name) for name in ("accelerator", "optimisers", "settings", "batches") if name in changes
    }
    unet = unet or tiny_unet()
    data = named.pop("batches", batches)
    return TrainingLoop(tiny_adapter(unet, trained), unet, OBJECTIVE, data, Options(**settings | changes), **named)


def everything(loop):
    """All tensors on which later steps or the file depend."""
    optimisers = [value for o in loop.optimisers for state in o.state.values() for value in state.values()]
    return [*loop.adapter.parameters(), *loop.averages.values(), *optimisers]


def same(one, other):
    pairs = list(zip(everything(one), everything(other), strict=True))
    return len(pairs) > 100 and all(torch.equal(a, b) for a, b in pairs) and one.log == other.log


@pytest.fixture(scope="module")
def uninterrupted():
    loop = loop_of()
    for _ in range(3):
        loop.advance()
    return loop


@pytest.mark.parametrize("stop", [0, 1, 2])
def test_a_continued_run_equals_an_uninterrupted_one_bit_for_bit(stop, uninterrupted, tmp_path):
    """Stopped after any step, and continued from the file by new objects, whose first weights are others."""
    stopped = loop_of()
    for _ in range(stop):
        stopped.advance()
    stopped.save(tmp_path / "state.pt")
    continued = loop_of(trained=True)
    torch.manual_seed(stop)  # the process's own random numbers change nothing
    continued.load(tmp_path / "state.pt")
    while continued.step < 3:
        continued.advance()
    assert same(continued, uninterrupted)


def test_another_seed_trains_otherwise(uninterrupted):
    other = loop_of(seed=1)
    other.advance()
    assert other.log[0] != uninterrupted.log[0]


def test_a_state_of_other_settings_is_refused_and_named(tmp_path):
    loop = loop_of(settings={"folder": "A"})
    loop.save(tmp_path / "state.pt")
    other = loop_of(rate=2e-2, settings={"folder": "B"})
    with pytest.raises(ValueError, match=r"folder was 'A' and is 'B'; rate was 0.01 and is 0.02. Use those"):
        other.load(tmp_path / "state.pt")


@can_be_killed
def test_a_run_killed_while_it_saves_keeps_a_complete_state(tmp_path):
    first, second = loop_of(), loop_of()
    for loop, step in ((first, 10), (second, 11)):  # few tensors, so that many kills take little time
        loop.adapter, loop.averages, loop.step, loop.optimisers = torch.nn.Linear(2, 2), {}, step, []
    path = tmp_path / "state.pt"
    for _ in killed_at_every_point(lambda n: (first, second)[n % 2].save(path), tmp_path):
        assert torch.load(path, weights_only=True)["step"] in (10, 11)
        assert {each.name for each in tmp_path.iterdir()} <= {"state.pt", "state.pt.tmp"}


class SameEveryStep(Options):
    """Options whose random numbers never change, so that the losses of two steps can be compared."""

    def generator(self, step, micro):
        return super().generator(0, 0)


def test_training_lowers_the_loss():
    batch, unet = tiny_batch((1, 2)), tiny_unet()
    options = SameEveryStep(rate=1e-2, schedule="constant", drops=NOTHING)
    loop = TrainingLoop(tiny_adapter(unet, trained=False), unet, OBJECTIVE, lambda *_: batch, options)
    losses = [loop.advance() for _ in range(12)]
    for name in ("loss", "diffusion", "attention"):
        assert losses[-1][name] < 0.9 * losses[0][name], name


def test_accumulated_batches_are_averaged():
    """Two batches of a step give the gradients of their mean loss."""
    loop = loop_of(trained=True, clip=None)
    unet = loop.model.unet
    generators = [loop.options.generator(0, number) for number in range(2)]
    total = 0
    for number, generator in enumerate(generators):
        batch = batches(0, number)
        noisy = OBJECTIVE.noisy(batch.latents, generator)
        total = total + loop.model(batch, drawn(loop.options.drops, batch.counts, generator), *noisy)["loss"] / 2
    total.backward()
    expected = [parameter.grad.clone() for parameter in loop.adapter.parameters()]
    losses = loop.advance()
    assert math.isclose(losses["loss"], float(total.detach()), abs_tol=1e-12)
    for parameter, gradient in zip(loop.adapter.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=0, atol=1e-9)
    assert all(parameter.grad is None for parameter in unet.conv_in.parameters())


def test_gradient_checkpointing_changes_nothing():
    plain, saving = loop_of(accumulation=1, clip=None), loop_of(accumulation=1, clip=None)
    saving.model.unet.enable_gradient_checkpointing()
    losses = plain.advance(), saving.advance()
    assert math.isclose(losses[0]["loss"], losses[1]["loss"], abs_tol=1e-12)
    for one, other in zip(plain.adapter.parameters(), saving.adapter.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=1e-9)


def test_the_moving_average_is_what_is_saved_for_use():
    loop = loop_of(accumulation=1)
    start = {name: value.detach().clone() for name, value in loop.adapter.named_parameters()}
    loop.advance()
    name = "ppr.bg_embed"
    now = loop.adapter.ppr.bg_embed.detach()
    expected = start[name] + (now - start[name]) * 0.9  # the first decay is 1 / 10
    torch.testing.assert_close(loop.state()["image_proj_model"]["bg_embed"], expected, rtol=0, atol=1e-12)
    plain = loop_of(accumulation=1, average=0.0)
    plain.advance()
    assert torch.equal(plain.state()["image_proj_model"]["bg_embed"], now)


def test_the_norm_of_the_gradient_is_limited():
    loop = loop_of(accumulation=1, clip=1e-3)
    loop.advance()
    norm = torch.stack([parameter.grad.norm() for parameter in loop.adapter.parameters()]).norm()
    assert math.isclose(norm, 1e-3, rel_tol=1e-3)


def test_the_limit_holds_for_gradients_of_a_scaled_loss():
    loop = loop_of(unet=tiny_unet(torch.float32), precision="fp16", accumulation=1, clip=1e-3)
    loop.scaler.load_state_dict({**loop.scaler.state_dict(), "scale": 8.0})
    loop.advance()
    norm = torch.stack([parameter.grad.norm() for parameter in loop.adapter.parameters()]).norm()
    assert math.isclose(norm, 1e-3, rel_tol=1e-2)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_weights():
    loop = loop_of(batches=lambda *_: replace(tiny_batch((1,)), latents=torch.full((1, 4, 8, 8), torch.nan)))
    before = [parameter.detach().clone() for parameter in loop.adapter.parameters()]
    with pytest.raises(FloatingPointError, match="The losses of step 1 are .*nan.*lower learning rate"):
        loop.advance()
    assert loop.step == 0
    assert all(map(torch.equal, before, loop.adapter.parameters()))


@pytest.mark.parametrize(
    "schedule, warmup, expected",
    [
        ("constant", 0, [1, 1, 1, 1]),
        ("stages", 0, [1, 1, 0.5, 0.5]),
        ("cosine", 0, [1, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125)]),
        ("constant", 3, [0.25, 0.5, 0.75, 1]),
    ],
)
def test_the_learning_rate_follows_its_schedule(schedule, warmup, expected):
    options = Options(steps=4, schedule=schedule, warmup=warmup)
    assert [options.factor(step) for step in range(4)] == pytest.approx(expected, abs=1e-12)


def test_the_caller_s_optimisers_keep_their_own_rates():
    unet = tiny_unet()
    adapter = tiny_adapter(unet)
    optimisers = [torch.optim.SGD(adapter.ppr.parameters(), 0.5), torch.optim.SGD(adapter.processors.parameters(), 0.1)]
    options = Options(steps=2, schedule="stages")
    loop = TrainingLoop(adapter, unet, OBJECTIVE, batches, options, optimisers=optimisers)
    rates = []
    for _ in range(2):
        before = adapter.ppr.bg_embed.detach().clone()
        loop.advance()
        rates.append([optimiser.param_groups[0]["lr"] for optimiser in optimisers])
        expected = before - rates[-1][0] * adapter.ppr.bg_embed.grad
        torch.testing.assert_close(adapter.ppr.bg_embed.detach(), expected, rtol=0, atol=1e-12)
    assert rates == [[0.5, 0.1], [0.25, 0.05]]


@pytest.mark.parametrize("name, value", [("precision", "int8"), ("schedule", "linear")])
def test_unknown_settings_are_refused(name, value):
    with pytest.raises(ValueError, match=f"precision is one of .*schedule one of .*{value}"):
        Options(**{name: value})


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_single_precision_weights(precision, tmp_path):
    unet = tiny_unet(torch.float32)
    loop = loop_of(unet=unet, precision=precision, accumulation=1)
    layer = unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_q
    seen = []
    layer.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    before = loop.adapter.ppr.bg_embed.detach().clone()
    for _ in range(2):
        assert math.isfinite(loop.advance()["loss"])
    assert set(seen) == {{"bf16": torch.bfloat16, "fp16": torch.float16}[precision]}
    assert loop.adapter.ppr.bg_embed.dtype == torch.float32
    assert not torch.equal(loop.adapter.ppr.bg_embed, before)
    assert loop.scaler.is_enabled() == (precision == "fp16")
    loop.save(tmp_path / "state.pt")
    again = loop_of(unet=tiny_unet(torch.float32), precision=precision, accumulation=1)
    again.load(tmp_path / "state.pt")
    assert again.scaler.state_dict() == loop.scaler.state_dict()


class Accelerator:
    """The parts of `accelerate.Accelerator` that the loop uses, for process `index` of `count`."""

    scaler = None

    def __init__(self, index, count):
        self.process_index, self.num_processes, self.is_main_process = index, count, index == 0
        self.unsynchronised = 0

    def prepare(self, *objects):
        return objects

    def autocast(self):
        return nullcontext()

    def backward(self, loss):
        loss.backward()

    @contextmanager
    def no_sync(self, model):
        self.unsynchronised += 1
        yield


def test_several_processes_share_the_batches_of_a_step(tmp_path):
    """Two processes with two batches each see what one process with four sees."""
    seen = {None: [], 0: [], 1: []}

    def noting(who):
        def give(step, number):
            seen[who].append(number)
            return batches(step, number)

        return give

    alone = loop_of(batches=noting(None), accumulation=4, clip=None)
    alone.advance()
    parts = []
    for index in range(2):
        accelerator = Accelerator(index, 2)
        loop = loop_of(batches=noting(index), clip=None, accelerator=accelerator)
        loop.advance()
        parts.append(loop)
        assert accelerator.unsynchronised == 1
        loop.save(tmp_path / f"{index}.pt")
    assert seen == {None: [0, 1, 2, 3], 0: [0, 2], 1: [1, 3]}
    for whole, *shares in zip(*(loop.adapter.parameters() for loop in (alone, *parts)), strict=True):
        torch.testing.assert_close(whole.grad, sum(share.grad for share in shares) / 2, rtol=0, atol=1e-9)
    assert [path.name for path in tmp_path.iterdir()] == ["0.pt"], "only the main process saves"


def test_the_log_and_the_settings_can_be_written_as_json(uninterrupted):
    assert [entry["step"] for entry in uninterrupted.log] == [1, 2, 3]
    assert json.loads(json.dumps(uninterrupted.log)) == uninterrupted.log
    assert json.loads(json.dumps(uninterrupted.settings))["drops"]["text"] == 0.1
