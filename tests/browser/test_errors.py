"""What goes wrong is told in the page, on the node where the artist can mend it, in the pack's own words."""

import importlib.util
import json
from pathlib import Path

import pytest
from desk import saved

ONE = "Demo - One Prompt One Story"
PHOTO = "Demo - Character from a Photo"


TEXT, UNET = "cond_stage_model.transformer.text_model", "model.diffusion_model"
ATTENTION = {"1.proj_in.weight": (320, 320, 1, 1), "1.transformer_blocks.0.attn2.to_k.weight": (320, 768)}
OUTPUT = {"0.in_layers.0.weight": (640,), **ATTENTION}
SD15 = {
    f"{TEXT}.encoder.layers.1.mlp.fc1.weight": (3072, 768),
    f"{UNET}.input_blocks.0.0.weight": (320, 4, 3, 3),
    f"{UNET}.input_blocks.1.0.in_layers.0.weight": (320,),
    f"{UNET}.input_blocks.1.0.out_layers.3.weight": (320, 320, 3, 3),
    **{f"{UNET}.input_blocks.1.{name}": shape for name, shape in ATTENTION.items()},
    **{f"{UNET}.output_blocks.{block}.{name}": shape for block in (0, 1) for name, shape in OUTPUT.items()},
    f"{UNET}.out.2.weight": (4, 320, 3, 3),
}
"""Name -> shape of the weights by which ComfyUI takes a checkpoint for one of Stable Diffusion 1.5, with one block."""


@pytest.fixture(scope="module", autouse=True)
def files(server, only_desk):
    """A checkpoint of SD 1.5 and, if possible, a face pack."""
    import torch
    from safetensors.torch import save_file

    folder = server.base / "models" / "checkpoints"
    save_file({name: torch.zeros(shape) for name, shape in SD15.items()}, folder / "sd15.safetensors")
    if importlib.util.find_spec("insightface"):
        path = Path(__file__).parents[1] / "unit" / "test_faces.py"
        spec = importlib.util.spec_from_file_location("storyloom_tests_faces", path)
        tiny = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(tiny)
        pack = server.base / "models" / "insightface" / "models" / "tiny"
        tiny.write_detector(pack / "det.onnx")
        tiny.write_recogniser(pack / "rec.onnx")


@pytest.fixture(autouse=True)
def closed(desk):
    """The panel with the details is closed again."""
    yield
    desk.page.evaluate("() => app.extensionManager.setting.set('Comfy.RightSidePanel.IsOpen', false)")


def refused(desk):
    """Press Run. Returns the kinds of the nodes that are marked."""
    event = desk.run()
    assert event is None or event["kind"] == "execution_error", event
    desk.page.get_by_test_id("error-overlay").wait_for()
    return desk.page.evaluate(
        "(event) => app.graph.nodes"
        ".filter((node) => event ? String(node.id) === String(event.node_id) : node.has_errors)"
        ".map((node) => node.type)",
        event,
    )


def told(desk, text):
    """Wait until the page shows this sentence, at once or in the details."""
    sentence = desk.page.get_by_text(text).filter(visible=True).first
    if not sentence.is_visible():
        desk.page.get_by_test_id("error-overlay-see-errors").click()
    sentence.wait_for()


def test_a_missing_model_file(desk):
    """ComfyUI's own words: it names the file, where it belongs, and where to get it."""
    template = json.dumps(saved("One Prompt One Story")).replace("sd_xl_base_1.0", "gone")
    desk.load(json.loads(template))
    assert refused(desk) == ["CheckpointLoaderSimple"]
    told(desk, "gone.safetensors")
    desk.look("Error, missing model file")


def test_a_missing_adapter_file(desk):
    desk.load(saved(PHOTO))
    loader = desk.add("StoryLoom_LoadStoryMaker", file="gone.bin")
    desk.connect(loader, 0, desk.node("StoryLoom_ApplyStoryMaker"), "storymaker")
    assert refused(desk) == ["StoryLoom_LoadStoryMaker"]
    told(desk, "Load StoryMaker adapter - file")


def test_a_checkpoint_of_another_family(desk):
    desk.load(saved("One Prompt One Story"))
    desk.set(desk.node("CheckpointLoaderSimple"), ckpt_name="sd15.safetensors")
    assert refused(desk) == ["StoryLoom_EncodeOnePrompt"]
    told(desk, "Connect the CLIP of an SDXL checkpoint.")
    desk.look("Error, another family")


def test_a_story_that_is_too_long(desk):
    desk.load(saved(ONE))
    desk.set(desk.node("StoryLoom_Script"), frames="very " * 90)
    assert refused(desk) == ["StoryLoom_EncodeOnePrompt"]
    told(desk, "storyloom.StoryTooLongError: The identity (6 tokens) and frame 1 (90 tokens)")
    desk.look("Error, too long")


def test_a_faulty_line(desk):
    desk.load(saved(ONE))
    desk.set(desk.node("StoryLoom_Script"), frames="asleep\n[Wolf] runs")
    assert refused(desk) == ["StoryLoom_Script"]
    told(desk, "Story script, frames, line 2: [Wolf] is not known")
    desk.look("Error, faulty line")


def test_a_batch_that_does_not_match_the_story(desk):
    desk.load(saved(ONE))
    latent = desk.add("EmptyLatentImage", width=64, height=64, batch_size=3)
    desk.connect(latent, 0, desk.node("KSampler"), "latent_image")
    assert refused(desk) == ["KSampler"]
    told(desk, "The story has 4 frames but the latent batch has 3 images.")
    desk.look("Error, batch")


def test_a_picture_without_a_face(desk):
    pytest.importorskip("insightface", reason="FACES ARE NOT TESTED: pip install insightface onnxruntime")
    desk.load(saved(PHOTO))
    character = desk.node("StoryLoom_Character")
    desk.set(character, mode="face only")
    desk.connect(desk.add("LoadImage", image="photo.png"), 0, character, "image")
    desk.connect(desk.add("StoryLoom_LoadFaceAnalysis", pack="tiny"), 0, character, "face_analysis")
    assert refused(desk) == ["StoryLoom_Character"]
    told(desk, "needs a face, but no face was found: use an image with a clearer face")
    desk.look("Error, no face")
