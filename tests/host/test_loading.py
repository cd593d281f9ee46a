"""How the pack is loaded beside others: what is broken takes nothing else with it, and others' folders stay theirs."""

import asyncio
import logging
import os
import sys
from types import SimpleNamespace

import pytest
from test_schemas import CATALOGUE, PACK


class Broken:
    """An import system in which the modules with these endings fail."""

    def __init__(self, *endings):
        self.endings = endings

    def find_spec(self, name, path=None, target=None):
        if name.endswith(self.endings):
            raise OSError(f"libmissing.so: cannot open shared object file, needed by {name.rpartition('.')[2]}")


@pytest.fixture
def another(host, tmp_path, monkeypatch, caplog):
    """Loads the pack once more, into a ComfyUI without nodes, and returns what came of it; all is undone afterwards."""
    import folder_paths

    import nodes

    for table in ("NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "EXTENSION_WEB_DIRS", "LOADED_MODULE_DIRS"):
        monkeypatch.setattr(nodes, table, {})
    kinds = {kind: (list(paths), ends) for kind, (paths, ends) in folder_paths.folder_names_and_paths.items()}
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", kinds)
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    folder = tmp_path / "storyloom"
    folder.symlink_to(PACK)
    name = str(folder).replace(".", "_x_")

    def load(*broken):
        monkeypatch.setattr(sys, "meta_path", [Broken(*(f"{name}.{end}" for end in broken)), *sys.meta_path])
        caplog.clear()
        with caplog.at_level(logging.DEBUG):
            done = asyncio.run(nodes.load_custom_node(str(folder), module_parent="custom_nodes"))
        records = [record for record in caplog.records if record.name.startswith(name)]
        errors = [record.getMessage() for record in records if record.levelno == logging.ERROR]
        traces = [record.exc_info for record in records if record.levelno == logging.DEBUG and record.exc_info]
        return SimpleNamespace(done=done, nodes=sorted(nodes.NODE_CLASS_MAPPINGS), errors=errors, traces=traces)

    yield load
    for module in [module for module in sys.modules if module == name or module.startswith(f"{name}.")]:
        del sys.modules[module]


def without(*missing):
    return [node for node in CATALOGUE if node.removeprefix("StoryLoom_") not in missing]


def test_the_log_s_names_are_those_of_the_menu_and_nothing_is_left_out(host, another):
    loaded = another()
    assert loaded.done and loaded.nodes == CATALOGUE and not loaded.errors
    pack = host.pack("nodes")
    for file, shown in pack.CATALOGUE.items():
        module = host.pack(f"nodes.{file}")
        assert {name: getattr(module, name).GET_SCHEMA().display_name for name in shown} == shown


def test_a_file_that_cannot_be_loaded_takes_no_other_with_it(another):
    loaded = another("nodes.save_page")
    assert loaded.done and loaded.nodes == without("SavePage")
    (error,) = loaded.errors
    assert "StoryLoom runs without Save story page: nodes/save_page.py" in error
    assert "(OSError: libmissing.so: cannot open shared object file, needed by save_page)" in error
    assert "--verbose DEBUG" in error and len(loaded.traces) == 1


def test_a_module_that_a_host_does_not_have_costs_only_the_nodes_that_need_it(another, monkeypatch):
    monkeypatch.setitem(sys.modules, "comfy.lora", None)
    loaded = another()
    assert loaded.nodes == without("LoadStoryMaker", "ApplyStoryMaker")
    (error,) = loaded.errors
    assert len(loaded.traces) == 1 and "comfy.lora" in error
    assert all(name in error for name in ("Load StoryMaker adapter", "Apply StoryMaker (PPR)"))


def test_what_all_files_need_is_told_for_each_and_the_host_goes_on(another):
    loaded = another("prompts")
    assert loaded.done and loaded.nodes == []
    assert len(loaded.errors) >= 10 and all("needed by prompts" in error for error in loaded.errors)


def test_a_schema_that_cannot_be_made_costs_that_node_alone(another, monkeypatch):
    import folder_paths

    usual = folder_paths.get_filename_list

    def refuse(kind):
        if kind == "storyloom_characters":
            raise PermissionError(13, "Permission denied", kind)
        return usual(kind)

    monkeypatch.setattr(folder_paths, "get_filename_list", refuse)
    loaded = another()
    assert loaded.nodes == without("LoadCharacter")
    (error,) = loaded.errors
    assert "without Load character: nodes/character_files.py" in error and "Permission denied" in error


def test_without_the_route_of_the_script_s_editor_all_nodes_are_there(another):
    loaded = another("nodes.routes")
    assert loaded.done and loaded.nodes == CATALOGUE
    (error,) = loaded.errors
    assert "without the token counts of Story script: nodes/routes.py" in error


def test_a_route_that_cannot_be_added_is_told_and_all_nodes_are_there(another, monkeypatch):
    class Frozen:
        def __iter__(self):
            raise RuntimeError("Cannot register a resource into frozen router.")

    instance = SimpleNamespace(routes=Frozen())
    monkeypatch.setitem(sys.modules, "server", SimpleNamespace(PromptServer=SimpleNamespace(instance=instance)))
    loaded = another()
    assert loaded.done and loaded.nodes == CATALOGUE
    (error,) = loaded.errors
    assert "frozen router" in error


@pytest.mark.parametrize(
    "listed", [{".ckpt", ".bin"}, [".ckpt", ".bin"], (".ckpt", ".bin"), frozenset({".ckpt", ".bin"})], ids=repr
)
def test_suffixes_of_another_pack_stay_in_their_collection_and_ours_come_to_them(another, tmp_path, listed):
    import folder_paths

    place, before = str(tmp_path / "theirs"), list(listed)
    folder_paths.folder_names_and_paths["storymaker"] = ([place], listed)
    loaded = another()
    assert loaded.nodes == CATALOGUE and not loaded.errors
    paths, suffixes = folder_paths.folder_names_and_paths["storymaker"]
    ours = [".safetensors", ".pt", ".pth"]
    assert type(suffixes) is type(listed) and set(suffixes) == {*before, *ours} and len(suffixes) == 5
    assert isinstance(listed, frozenset | tuple) or suffixes is listed, "they may hold it elsewhere"
    if isinstance(listed, list | tuple):
        assert list(suffixes) == before + ours
    assert paths[0] == place and [os.path.basename(path) for path in paths[1:]] == [
        "storymaker",
        "photomaker",
        "ipadapter",
    ]


@pytest.mark.parametrize("listed", [set(), [], ()], ids=repr)
def test_a_kind_of_any_files_stays_one_and_our_widgets_list_ours(another, tmp_path, listed):
    """As extra_model_paths.yaml registers a kind that nobody has named yet."""
    import folder_paths

    import nodes

    place = tmp_path / "theirs"
    place.mkdir()
    for name in ("mask.bin", "theirs.gguf", "README.md"):
        (place / name).write_bytes(b"x")
    folder_paths.folder_names_and_paths["storymaker"] = ([str(place)], listed)
    assert another().nodes == CATALOGUE
    assert folder_paths.folder_names_and_paths["storymaker"][1] is listed and not listed
    assert {"mask.bin", "theirs.gguf", "README.md"} <= set(folder_paths.get_filename_list("storymaker"))
    (entry,) = nodes.NODE_CLASS_MAPPINGS["StoryLoom_LoadStoryMaker"].GET_SCHEMA().inputs
    assert entry.options == ["mask.bin"]


def test_a_single_suffix_without_a_collection_is_one_suffix(another):
    """A tuple of one that lost its comma."""
    import folder_paths

    folder_paths.folder_names_and_paths["storymaker"] = ([], ".pth")
    assert another().nodes == CATALOGUE
    assert folder_paths.folder_names_and_paths["storymaker"][1] == (".pth", ".bin", ".safetensors", ".pt")
