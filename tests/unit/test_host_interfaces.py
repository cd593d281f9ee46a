"""The list of ComfyUI's interfaces: complete for imports and keys, equal to its table, and found in source files."""

import ast

import pytest
from interfaces import ROOT, host_interfaces


@pytest.fixture(scope="module")
def host():
    with host_interfaces() as module:
        yield module


def test_every_name_that_the_nodes_import_or_read_is_listed(host):
    listed = {f"{module}.{name}" for module, names in host.IMPORTED.items() for name in names.split()}
    listed |= {"comfy.cli_args.args.disable_metadata"}  # an option of the command line, listed as a text
    used = host.users()
    assert {name: used[name] for name in used.keys() - listed} == {}, "add these to IMPORTED in scripts/host_data.py"
    assert {name for name in listed if not any(other.startswith(name) for other in used)} == set()


OWN = {"failed", "server", "unet"}
"""Texts with which the pack reads dicts of its own and of Python."""


def read_keys(text):
    """Texts with which a Python source reads dicts."""
    for node in ast.walk(ast.parse(text)):
        key = None
        if isinstance(node, ast.Subscript):
            key = node.slice
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
            key = node.args[0] if node.func.attr in ("get", "pop", "setdefault") else None
        if isinstance(key, ast.Constant) and isinstance(key.value, str):
            yield key.value


def test_every_key_with_which_the_pack_reads_what_the_host_passes_is_listed(host):
    listed = {interface.name for interface in host.TEXTS}
    patterns = ("nodes/*.py", "runtime/*.py", "attention/*.py", "prompts/batches.py")
    files = [path for pattern in patterns for path in ROOT.glob(pattern)]
    read = {key: path.name for path in files for key in read_keys(path.read_text(encoding="utf-8"))}
    assert {key: read[key] for key in read.keys() - listed - OWN} == {}, "add these to TEXTS in scripts/host_data.py"
    assert set(read) >= OWN


def test_imports_aliases_and_assignments_are_followed(host):
    source = """
import os, comfy.utils, comfy.model_management
import comfy.sd as sd
from comfy_api.latest import io, ui as shown
from .patching import attend
management = comfy.model_management
def f(folder_paths): return sd.VAE, io.Int.Input("a"), management.free_memory(1), shown.PreviewImage
def g():
    import folder_paths
    return folder_paths.models_dir, os.sep, attend
"""
    assert host.used_names(source) == {
        "comfy.utils",
        "comfy.sd.VAE",
        "comfy_api.latest.io.Int.Input",
        "comfy.model_management.free_memory",
        "comfy_api.latest.ui.PreviewImage",
        "folder_paths.models_dir",
    }


def test_the_table_is_the_list(host):
    """After a change: python scripts/host_interfaces.py --write."""
    assert (ROOT / "docs" / "host.md").read_text(encoding="utf-8") == host.table()
    assert "docs/host.md" in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


FILES = {
    "comfy/base.py": """
try:
    import torch
except ImportError:
    torch = None
class Base:
    kind: str = ""
    def __init__(self, model, device=None, *, size=0):
        self.model, self.device = model, device
    def load(self, sd, strict=True, **more): ...
class Server:
    def __init__(self):
        Server.instance = self
""",
    "comfy/patcher.py": """
from .base import Base as Ancestor
from comfy.base import *
import comfy.base
class Patcher(Ancestor):
    def clone(self): return {"uuids": 1, f"{self}": 2}
class Other(comfy.base.Base): ...
Alias = Patcher
if True:
    def attend(q, k): ...
chosen = attend
""",
    "comfy/latest/__init__.py": "from ..patcher import Patcher\nfrom . import shapes as io\n",
    "comfy/latest/shapes.py": "class Schema:\n    id: str\n    hidden: bool = False\n",
}


@pytest.fixture
def folder(tmp_path):
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize(
    "name",
    [
        "comfy.patcher",
        "comfy.patcher.Patcher.clone",
        "comfy.patcher.Patcher.load",
        "comfy.patcher.Other.model",
        "comfy.patcher.Alias.device",
        "comfy.patcher.Server.instance",
        "comfy.patcher.attend",
        "comfy.latest.Patcher.kind",
        "comfy.latest.io.Schema.hidden",
        "comfy.latest.shapes",
    ],
)
def test_definitions_are_found_through_imports_aliases_and_base_classes(host, folder, name):
    assert host.Source(folder).find(name)


@pytest.mark.parametrize(
    "name", ["comfy.gone", "comfy.patcher.gone", "comfy.patcher.Patcher.gone", "comfy.latest.io.gone", "gone.comfy"]
)
def test_what_a_folder_lacks_is_missing(host, folder, name):
    assert host.Source(folder).find(name) is None


@pytest.mark.parametrize(
    ("name", "first", "accepts", "fault"),
    [
        ("comfy.patcher.attend", ("q", "k"), (), None),
        ("comfy.patcher.chosen", ("q",), ("k",), None),
        ("comfy.patcher.Patcher", ("model", "device"), ("size",), None),
        ("comfy.latest.io.Schema", (), ("id", "hidden"), None),
        ("comfy.patcher.Patcher.load", ("sd",), ("anything",), None),
        ("comfy.patcher.attend", ("k", "q"), (), "comfy.patcher.attend(k, q), which has (q, k)"),
        ("comfy.patcher.attend", (), ("mask",), "comfy.patcher.attend(..., mask), which has (q, k)"),
        ("comfy.latest.io.Schema", (), ("name",), "comfy.latest.io.Schema(..., name), which has (id, hidden)"),
        ("comfy.patcher.Patcher.model", ("x",), (), "comfy.patcher.Patcher.model is not a function"),
    ],
)
def test_parameters_are_compared(host, folder, name, first, accepts, fault):
    assert host.Source(folder).fault(host.Interface(name, "nodes/", first, accepts)) == fault


def test_texts_are_strings_or_names_of_arguments(host, folder):
    def fault(text, file):
        return host.Source(folder).fault(host.Interface(text, "runtime/", file=file))

    assert fault("uuids", "comfy/patcher.py") is None and fault("strict", "comfy/base.py") is None
    assert fault("uuid", "comfy/patcher.py") == '"uuid" in comfy/patcher.py'
    assert fault("uuids", "comfy/gone.py") == '"uuids" in comfy/gone.py'


def test_only_what_the_pack_needs_fails(host, folder, monkeypatch, capsys):
    gone = host.Interface("comfy.gone", "nodes/", otherwise="nothing is drawn")
    monkeypatch.setattr(host, "interfaces", lambda: [gone])
    assert host.main([str(folder)]) == 0
    assert "missing: comfy.gone; used in nodes/. Without it, nothing is drawn." in capsys.readouterr().out
    monkeypatch.setattr(host, "interfaces", lambda: [host.Interface("comfy.gone", "nodes/")])
    assert host.main([str(folder)]) == 1
    assert "missing: comfy.gone; used in nodes/.\n1 interfaces, 1 of" in capsys.readouterr().out


def test_another_folder_is_refused(host, tmp_path, capsys):
    assert host.main([str(tmp_path)]) == host.main([]) == 2
    assert "Name one folder with a ComfyUI" in capsys.readouterr().err
