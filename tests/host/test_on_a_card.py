"""What has to hold on a graphics card: `STORYLOOM_DEVICE=cuda pytest -m gpu`. Without a card the same on the CPU."""

import gc
import os

import pytest
import torch
from story_makers import loaded_for

pytestmark = pytest.mark.gpu
ON_A_CARD = os.environ.get("STORYLOOM_DEVICE") == "cuda"
DTYPES = [torch.float16, torch.bfloat16] if ON_A_CARD else [torch.float32]
"""Half precision is for cards: a processor takes many times as long for it."""
PATCHES = ["IPCA 2 + SVR", "IPCA 1.5", "CSA 0.5", "StoryMaker, 2 characters", "all together"]


@pytest.fixture(scope="module")
def card(host):
    """The device benchmark's parts, tiny, on the device that ComfyUI works on."""
    import comfy.model_management

    torch.backends.cudnn.deterministic = True
    parts = type("Card", (), {})()
    parts.device = comfy.model_management.get_torch_device()
    parts.models, parts.rows = host.pack("benchmarks.card.model"), host.pack("benchmarks.card.rows")
    parts.measure = host.pack("benchmarks.card.measure")
    parts.story = parts.models.random_story(4)
    return parts


@pytest.fixture(scope="module", params=DTYPES, ids=str)
def networks(card, request):
    """The UNet and StoryMaker's adapter in a dtype."""
    model = card.models.sdxl(card.models.TINY, request.param, card.device)
    return model, card.models.storymaker(model, card.models.TINY, request.param, card.device)


@pytest.fixture(scope="module")
def rows(card, networks):
    return {row.name: row for row in card.rows.rows_of(*networks, card.story, card.models.TINY)}


@pytest.fixture(scope="module")
def plain(rows):
    with torch.inference_mode():
        return rows["unpatched"].draw()


@pytest.fixture(autouse=True)
def as_the_executor_does():
    with torch.inference_mode():
        yield


@pytest.fixture
def on_a_card(card):
    if card.device.type != "cuda":
        pytest.skip("PyTorch sees no CUDA card here, or STORYLOOM_DEVICE=cuda is not set")


def test_off_is_bit_identical(host, card, networks, plain):
    attention, storymaker = host.pack("nodes.attention"), host.pack("nodes.storymaker")
    node, (model, maker) = card.rows.node, networks
    off = node(attention.IPCA, model=model, identity_weight=1.0)
    off = node(attention.ConsistentSelfAttention, model=off, sampling_rate=0.0)
    character = card.models.random_character(card.models.TINY, 1)
    strengths = {"token_strength": 0.0, "lora_strength": 0.0}
    off = node(storymaker.ApplyStoryMaker, model=off, storymaker=maker, character_1=character, **strengths)
    sampling = card.rows.Sampling.of(card.story, card.models.TINY)
    assert torch.equal(sampling.run(off, card.story.tagged())(lambda step: None), plain)


@pytest.mark.parametrize("name", PATCHES)
def test_on_acts_and_is_finite(rows, plain, name):
    drawn = rows[name].draw()
    assert drawn.isfinite().all() and plain.isfinite().all()
    assert (drawn - plain).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["unpatched", *PATCHES])
def test_a_warm_unet_call_never_waits_for_the_card(on_a_card, networks, rows, name):
    """PyTorch itself raises at the line that waits."""
    unet, evaluated = networks[0].model.diffusion_model, []

    def before(*_):
        if len(evaluated) > 1:
            torch.cuda.set_sync_debug_mode("error")

    def after(*_):
        torch.cuda.set_sync_debug_mode("default")

    hooks = [unet.register_forward_pre_hook(before), unet.register_forward_hook(after, always_call=True)]
    try:
        rows[name].draw(evaluated.append)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        for hook in hooks:
            hook.remove()
    assert len(evaluated) == 4


@pytest.mark.parametrize("name", PATCHES)
def test_memory_is_back_to_where_it_was(on_a_card, card, networks, rows, plain, name):
    memory, _ = card.measure.measure_memory(rows[name], networks[0], card.device)
    assert memory.left == 0
    assert memory.peak > 0


@pytest.mark.parametrize("name", ["CSA 0.5", "CSA 0.5, 2 anchors"])
def test_csa_s_slices_equal_the_whole(host, monkeypatch, rows, plain, name):
    """One image at a time instead of all at once: the kernel answers for fewer rows, and each row as before."""
    consistent, counts = host.pack("attention.consistent"), []
    group = host.pack("attention.gathering").ImageGroup
    within = group.within

    def counted(images, limit, k):
        counts.append(len(within(images, limit, k)))
        return within(images, limit, k)

    monkeypatch.setattr(group, "within", counted)
    whole = rows[name].draw()
    assert set(counts) == {1}
    counts.clear()
    monkeypatch.setattr(consistent, "GATHER_LIMIT", 1)
    sliced = rows[name].draw()
    assert max(counts) > 1
    apart, moved = (sliced - whole).norm(), (whole - plain).norm()
    assert apart < (moved / 3 if ON_A_CARD else moved / 100)  # a card may take another kernel for fewer rows
    assert apart < (0.02 if ON_A_CARD else 1e-5) * whole.norm()


def test_storymaker_s_networks_can_leave_while_the_unet_stays(card, networks, rows):
    import comfy.model_management as management

    model, maker = networks
    rows["StoryMaker, 2 characters"].draw()
    card.measure.settle(model, card.device)
    gc.collect()
    assert loaded_for(maker) == []
    assert any(entry.model is not None and entry.model.is_clone(model) for entry in management.current_loaded_models)
    assert {parameter.device.type for parameter in maker.adapter.parameters()} == {"cpu"}


@pytest.mark.parametrize(
    ("name", "bound"), [("published CSA: dense mask", 0.02), ("published IPCA: stored K and V", 0.02)]
)
def test_the_published_forms_draw_the_same_on_this_device(rows, plain, name, bound):
    """Other kernels, so other rounding: near, and far nearer than to the unpatched model."""
    published, ours = rows[name].draw(), rows[rows[name].like].draw()
    rows[name].forget()
    apart, moved = (published - ours).norm(), (ours - plain).norm()
    assert apart < moved / 3
    assert apart < bound * ours.norm()
