"""What the start of a host pays for the pack: the modules that come with its nodes, beyond torch and the host's own."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import storyloom

FILES = [path for path in (Path(storyloom.__file__).parent / "nodes").glob("*.py") if path.stem != "__init__"]
LOAD = """
import asyncio, json, sys
from importlib.machinery import ModuleSpec

class Anything(type):
    '''Stands for whatever is taken from a host's module: a base class, a decorator, a value.'''
    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Any
    def __call__(cls, *args, **kwargs):
        return Any if cls is Any else super().__call__(*args, **kwargs)
    def __or__(cls, other):
        return Any

class Any(metaclass=Anything):
    pass

class Host:
    '''The modules of a ComfyUI that does nothing.'''
    def find_spec(self, name, path=None, target=None):
        known = name.partition(".")[0] in ("comfy", "comfy_api", "comfy_extras", "folder_paths")
        return ModuleSpec(name, self, is_package=True) if known else None
    def create_module(self, spec):
        return None
    def exec_module(self, module):
        module.__getattr__ = lambda name: getattr(Any, name)
        if module.__name__ == "folder_paths":
            module.models_dir, module.folder_names_and_paths = "models", {}
            module.get_output_directory, module.get_filename_list = lambda: "output", lambda kind: []
            module.get_folder_paths = lambda kind: []
            module.add_model_folder_path = lambda kind, place: (
                module.folder_names_and_paths.setdefault(kind, ([], set()))[0].append(place)
            )

sys.meta_path.insert(0, Host())
import torch, numpy, PIL.Image
before = set(sys.modules)
from storyloom import comfy_entrypoint
extension = asyncio.run(comfy_entrypoint())
nodes = asyncio.run(extension.get_node_list())
asyncio.run(extension.on_load())
for node in nodes:
    node.define_schema()
new = sorted(set(sys.modules) - before)
print(json.dumps({"nodes": len(nodes), "modules": new}))
"""

HOST = {"comfy", "comfy_api", "comfy_extras", "folder_paths"}
LISTED = {"PIL", "einops", "safetensors"}
"""What the nodes may bring: packages that ComfyUI imports at its own start. Of torch nothing more than torch brings."""


def test_loading_the_nodes_brings_only_what_is_listed_here():
    """Another module costs every start of ComfyUI: import it where it is used, or weigh it and list it."""
    environment = {**os.environ, "PYTHONPATH": str(Path(storyloom.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", LOAD], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    loaded = json.loads(done.stdout)
    assert loaded["nodes"] == sum(
        len(re.findall(r"^class .*ComfyNode", path.read_text(encoding="utf-8"), re.M)) for path in FILES
    )
    assert not [module for module in loaded["modules"] if module.startswith("storyloom.world")], "only a demo needs it"
    packages = {module: module.partition(".")[0] for module in loaded["modules"]}
    known = {*HOST, *LISTED, *sys.stdlib_module_names, "storyloom"}
    assert not {module for module, package in packages.items() if package not in known}
