"""What goes wrong is told in the page, on the node where the artist can mend it, in the pack's own words."""

import importlib.util
import json
from pathlib import Path

import pytest
from front_end import saved

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
def files(server, shared_front_end):
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
def closed(front_end):
    """The panel with the details is closed again."""
    yield
    front_end.page.evaluate("() => app.extensionManager.setting.set('Comfy.RightSidePanel.IsOpen', false)")


def refused(front_end):
    """Press Run. Returns the kinds of the nodes that are marked."""
    event = front_end.run()
    assert event is None or event["kind"] == "execution_error", event
    front_end.page.get_by_test_id("error-overlay").wait_for()
    return front_end.page.evaluate(
        "(event) => app.graph.nodes"
        ".filter((node) => event ? String(node.id) === String(event.node_id) : node.has_errors)"
        ".map((node) => node.type)",
        event,
    )


def wait_for_text(front_end, text):
    """Wait until the page shows this sentence, at once or in the details."""
    sentence = front_end.page.get_by_text(text).filter(visible=True).first
    if not sentence.is_visible():
        front_end.page.get_by_test_id("error-overlay-see-errors").click()
    sentence.wait_for()


def test_a_missing_model_file(front_end):
    """ComfyUI's own words: it names the file, where it belongs, and where to get it."""
    template = json.dumps(saved("One Prompt One Story")).replace("sd_xl_base_1.0", "gone")
    front_end.load(json.loads(template))
    assert refused(front_end) == ["CheckpointLoaderSimple"]
    wait_for_text(front_end, "gone.safetensors")
    front_end.look("Error, missing model file")


def test_a_missing_adapter_file(front_end):
    front_end.load(saved(PHOTO))
    loader = front_end.add("StoryLoom_LoadStoryMaker", file="gone.bin")
    front_end.connect(loader, 0, front_end.node("StoryLoom_ApplyStoryMaker"), "storymaker")
    assert refused(front_end) == ["StoryLoom_LoadStoryMaker"]
    wait_for_text(front_end, "Load StoryMaker adapter - file")


def test_a_checkpoint_of_another_family(front_end):
    front_end.load(saved("One Prompt One Story"))
    front_end.set(front_end.node("CheckpointLoaderSimple"), ckpt_name="sd15.safetensors")
    assert refused(front_end) == ["StoryLoom_EncodeOnePrompt"]
    wait_for_text(front_end, "Connect the CLIP of an SDXL checkpoint.")
    front_end.look("Error, another family")


def test_a_story_that_is_too_long(front_end):
    front_end.load(saved(ONE))
    front_end.set(front_end.node("StoryLoom_Script"), frames="very " * 90)
    assert refused(front_end) == ["StoryLoom_EncodeOnePrompt"]
    wait_for_text(front_end, "storyloom.StoryTooLongError: The identity (6 tokens) and frame 1 (90 tokens)")
    front_end.look("Error, too long")


def test_a_faulty_line(front_end):
    front_end.load(saved(ONE))
    front_end.set(front_end.node("StoryLoom_Script"), frames="asleep\n[Wolf] runs")
    assert refused(front_end) == ["StoryLoom_Script"]
    wait_for_text(front_end, "Story script, frames, line 2: [Wolf] is not known")
    front_end.look("Error, faulty line")


def test_a_batch_that_does_not_match_the_story(front_end):
    front_end.load(saved(ONE))
    latent = front_end.add("EmptyLatentImage", width=64, height=64, batch_size=3)
    front_end.connect(latent, 0, front_end.node("KSampler"), "latent_image")
    assert refused(front_end) == ["KSampler"]
    wait_for_text(front_end, "The story has 4 frames but the latent batch has 3 images.")
    front_end.look("Error, batch")


def test_a_picture_without_a_face(front_end):
    pytest.importorskip("insightface", reason="FACES ARE NOT TESTED: pip install insightface onnxruntime")
    front_end.load(saved(PHOTO))
    character = front_end.node("StoryLoom_Character")
    front_end.set(character, mode="face only")
    front_end.connect(front_end.add("LoadImage", image="photo.png"), 0, character, "image")
    front_end.connect(front_end.add("StoryLoom_LoadFaceAnalysis", pack="tiny"), 0, character, "face_analysis")
    assert refused(front_end) == ["StoryLoom_Character"]
    wait_for_text(front_end, "needs a face, but no face was found: use an image with a clearer face")
    front_end.look("Error, no face")
