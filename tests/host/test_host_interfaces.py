"""Everything that the pack relies on is in this ComfyUI, and what is taken out of a copy is reported."""

import os
import re
from pathlib import Path

import pytest
from interfaces import host_interfaces


@pytest.fixture(scope="module")
def listed():
    with host_interfaces() as module:
        yield module


@pytest.fixture(scope="module")
def comfyui():
    return Path(os.environ["COMFYUI_PATH"])


def damaged(comfyui, folder, file, pattern, text):
    """A folder of links to this ComfyUI, with a changed copy of one file."""
    here = folder
    for part in Path(file).parts:
        original = comfyui / here.relative_to(folder)
        here.mkdir(exist_ok=True)
        for each in original.iterdir():
            if each.name != part:
                (here / each.name).symlink_to(each, target_is_directory=each.is_dir())
        here = here / part
    changed, count = re.subn(pattern, text, (comfyui / file).read_text(encoding="utf-8"))
    assert count
    here.write_text(changed, encoding="utf-8")
    return folder


def faults(listed, folder):
    return {fault for interface, fault in listed.missing(folder) if not interface.otherwise}


def test_nothing_that_the_pack_needs_is_missing(listed, comfyui, capsys):
    assert listed.main([str(comfyui)]) == 0
    assert "0 of those that the pack needs are missing" in capsys.readouterr().out


def test_the_table_says_in_which_versions_an_interface_was_seen(listed, comfyui):
    version = re.search(r'"(.+)"', (comfyui / "comfyui_version.py").read_text(encoding="utf-8"))[1]
    if version not in listed.VERSIONS:
        pytest.skip(f"the table has no column for {version}")
    absent = {interface.name for interface, _ in listed.missing(comfyui)}
    assert {each.name for each in listed.interfaces() if version not in each.seen} == absent


@pytest.mark.parametrize(
    ("file", "pattern", "text", "reported"),
    [
        ("comfy/samplers.py", r'"uuids"', '"ids"', '"uuids" in comfy/samplers.py'),
        ("comfy/model_patcher.py", r"def remove_wrappers_with_key", "def remove_wrappers", "ModelPatcher.remove_wrap"),
        ("comfy/model_patcher.py", r"CoreModelPatcher", "Core", "comfy.model_patcher.CoreModelPatcher"),
        ("comfy/samplers.py", r"(?<=def _calc_cond_batch\()model: \S+ ", "", "_calc_cond_batch(model, conds"),
        ("comfy/patcher_extension.py", r"CALC_COND_BATCH = .*", "pass", "WrappersMP.CALC_COND_BATCH"),
        ("folder_paths.py", r"def get_full_path_or_raise", "def full_path", "folder_paths.get_full_path_or_raise"),
        ("comfy_api/latest/_io.py", r"class Schema\b", "class NodeSchema", "comfy_api.latest.io.Schema"),
        ("comfy/ldm/modules/attention.py", r'"attn2"', '"cross"', '"attn2" in comfy/ldm/modules/attention.py'),
    ],
)
def test_what_a_new_version_takes_away_is_reported(listed, comfyui, tmp_path, file, pattern, text, reported):
    found = faults(listed, damaged(comfyui, tmp_path / "copy", file, pattern, text))
    assert [fault for fault in found if reported in fault], found
    assert len(found) < 10
