"""Lists which interfaces of ComfyUI that the pack relies on are missing in a ComfyUI folder.

    python scripts/host_interfaces.py FOLDER    prints what is missing, and ends with code 1 if the pack needs it
    python scripts/host_interfaces.py --write   writes docs/host.md, the table of all of them

It reads source files and imports nothing, so that a new ComfyUI can be checked before it is installed.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from host_data import CALLED, IMPORTED, ROOTS, TEXTS, VERSIONS, Interface
from host_source import Source

ROOT = Path(__file__).absolute().parent.parent
TABLE = ROOT / "docs" / "host.md"
PACK = ("__init__.py", "nodes/*.py")
"""Files of the pack that import ComfyUI."""


def used_names(text: str) -> set[str]:
    """Full names of everything that a Python source imports from ComfyUI or reads from such an import."""
    names: dict[str, str] = {}
    tree = ast.parse(text)
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                package = alias.name.split(".")[0]
                if package in ROOTS:
                    names[alias.asname or package] = alias.name if alias.asname else package
                    found.add(alias.name)
        elif isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] in ROOTS:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    for node in ast.walk(tree):  # management = comfy.model_management
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            dotted = _dotted(node.value, names)
            if dotted:
                names[node.targets[0].id] = dotted
    found |= {dotted for node in ast.walk(tree) if (dotted := _dotted(node, names))}
    return {name for name in found if not any(other.startswith(f"{name}.") for other in found)}


def users() -> dict[str, list[str]]:
    """For every name of ComfyUI that the pack imports or reads from, the files that do."""
    files = sorted(path for pattern in PACK for path in ROOT.glob(pattern))
    found: dict[str, list[str]] = {}
    for path in files:
        for name in sorted(used_names(path.read_text(encoding="utf-8"))):
            found.setdefault(name, []).append(path.relative_to(ROOT).as_posix())
    return found


def _files(name: str, used: dict[str, list[str]]) -> list[str]:
    """Files that use a name or an attribute of it."""
    return sorted({file for other, files in used.items() if f"{other}.".startswith(f"{name}.") for file in files})


def missing(folder: Path) -> Iterator[tuple[Interface, str]]:
    """Every interface that a ComfyUI folder lacks, with what is wrong."""
    source = Source(folder)
    for interface in interfaces():
        fault = source.fault(interface)
        if fault:
            yield interface, fault


def interfaces() -> list[Interface]:
    """Everything that the pack relies on."""
    used = users()
    imported = (
        Interface(f"{module}.{name}", ", ".join(_files(f"{module}.{name}", used)))
        for module, names in IMPORTED.items()
        for name in names.split()
    )
    return [*imported, *CALLED, *TEXTS]


def table() -> str:
    """The content of docs/host.md."""
    used = users()
    lines = [_INTRODUCTION]
    for module, names in IMPORTED.items():
        files = sorted({file for name in names.split() for file in _files(f"{module}.{name}", used)})
        lines.append(f"| `{module}` | {_listed(names.split())} | {_listed(files)} | {_seen(VERSIONS)} |")
    lines.append(_CALLED)
    lines += [f"| `{_call(each)}` | {each.used} | {_seen(each.seen)} | {each.otherwise} |" for each in CALLED]
    lines.append(_TEXTS)
    together: dict[tuple[str, ...], list[str]] = {}
    for each in TEXTS:
        together.setdefault((f"`{each.file}`", each.used, _seen(each.seen), each.otherwise), []).append(each.name)
    lines += [f"| {_listed(names)} | {' | '.join(columns)} |" for columns, names in together.items()]
    return "\n".join(lines) + "\n"


_INTRODUCTION = f"""# Interfaces of ComfyUI

Everything in ComfyUI that the pack relies on, and the versions in which it was seen: {" and ".join(VERSIONS)}.
`python scripts/host_interfaces.py FOLDER` lists what is missing in another ComfyUI. It reads source files only, so it
finds renamed and removed names and changed parameters, but not what behaves differently: run `make test` as well, with
`COMFYUI_PATH` set to that folder.

This file is written by `python scripts/host_interfaces.py --write`, from `scripts/host_data.py` and the pack's imports.

## Imported names

| module | names | used in | seen in |
|---|---|---|---|"""
_CALLED = """
## Methods, attributes and the arguments of wrappers

`name(a, b)`: with these first parameters. `name(..., a)`: with a parameter of this name. An empty last column means
that the pack needs the interface.

| interface | used in | seen in | without it |
|---|---|---|---|"""
_TEXTS = """
## Keys, slots and file names

Texts that both sides have to spell alike.

| texts | in ComfyUI's | used in | seen in | without it |
|---|---|---|---|---|"""


def _call(interface: Interface) -> str:
    accepted = [*interface.first, *(["..."] if interface.accepts else []), *interface.accepts]
    return f"{interface.name}({', '.join(accepted)})" if accepted else interface.name


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _seen(versions: Iterable[str]) -> str:
    return ", ".join(versions)


def _dotted(node: ast.AST, names: dict[str, str]) -> str | None:
    """The full name of `a.b.c`, where a is a known name; None for other expressions."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name) or node.id not in names:
        return None
    return ".".join([names[node.id], *reversed(parts)])


def main(arguments: list[str]) -> int:
    if arguments == ["--write"]:
        TABLE.write_text(table(), encoding="utf-8")
        print(TABLE)
        return 0
    if len(arguments) != 1 or not (Path(arguments[0]) / "comfy").is_dir():
        print("Name one folder with a ComfyUI, or --write.", file=sys.stderr)
        return 2
    needed = 0
    for interface, fault in missing(Path(arguments[0])):
        needed += not interface.otherwise
        without = f" Without it, {interface.otherwise}." if interface.otherwise else ""
        print(f"missing: {fault}; used in {interface.used}.{without}")
    print(f"{len(interfaces())} interfaces, {needed} of those that the pack needs are missing.")
    return 1 if needed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
