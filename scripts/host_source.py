"""Finds names in the source files of a ComfyUI folder without importing them."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

from host_data import Interface

Place = tuple[Path, ast.AST]
"""A module file, and a definition in it."""


class Source:
    """A ComfyUI folder. Definitions are followed through imports, aliases and base classes inside the folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def fault(self, interface: Interface) -> str | None:
        """What is missing of an interface, None if nothing is."""
        if interface.file:
            return None if self.has_text(interface) else f'"{interface.name}" in {interface.file}'
        found = self.find(interface.name)
        if found is None:
            return interface.name
        return self._parameters_fault(interface, found)

    def has_text(self, interface: Interface) -> bool:
        """Whether a file contains this text as a string, a keyword argument or a parameter."""
        path = self.folder / interface.file
        return path.is_file() and interface.name in _texts(path)

    def find(self, name: str) -> Place | None:
        """The module file and the definition of a full name; None if the folder has neither module nor name."""
        parts = name.split(".")
        for length in range(len(parts), 0, -1):
            module = self._module(parts[:length])
            if module is not None:
                return self._walk((module, _parsed(module)), parts[length:])
        return None

    def _module(self, parts: Iterable[str]) -> Path | None:
        path = self.folder.joinpath(*parts)
        return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)

    def _walk(self, place: Place, parts: list[str]) -> Place | None:
        for part in parts:
            member = self._member(*place, part)
            if member is None:
                return None
            place = member
        return place

    def _member(self, module: Path, definition: ast.AST, name: str) -> Place | None:
        """The definition of a name in a module or class."""
        if isinstance(definition, ast.Module):
            return self._in_module(module, definition, name)
        if not isinstance(definition, ast.ClassDef):
            return None
        own = next((node for node in _statements(definition.body) if name in _bound(node)), None)
        own = own or next((node for node in ast.walk(definition) if _sets(node, name, definition.name)), None)
        if own is not None:
            return module, own
        for base in definition.bases:
            text = ast.unparse(base)
            there = self._walk((module, _parsed(module)), text.split(".")) or self.find(text)
            found = self._member(*there, name) if there else None
            if found is not None:
                return found
        return None

    def _in_module(self, module: Path, tree: ast.Module, name: str) -> Place | None:
        for node in _statements(tree.body):
            if isinstance(node, ast.ImportFrom):
                found = self._imported(module, node, name)
                if found is not None:
                    return found
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    if (alias.asname or alias.name.split(".")[0]) == name:
                        return self.find(alias.name if alias.asname else name) or (module, node)
            elif name in _bound(node):
                value = getattr(node, "value", None)  # an alias: CoreModelPatcher = ModelPatcher
                there = isinstance(value, ast.Name) and value.id != name and self._in_module(module, tree, value.id)
                return there or (module, node)
        inside = self._module([*self._name(module), name]) if module.name == "__init__.py" else None
        return inside and (inside, _parsed(inside))

    def _imported(self, module: Path, node: ast.ImportFrom, name: str) -> Place | None:
        """A name that `from ... import` brings into a module."""
        package = self._name(module) if module.name == "__init__.py" else self._name(module)[:-1]
        start = package[: len(package) - node.level + 1] if node.level else []
        source = ".".join([*start, *(node.module.split(".") if node.module else [])])
        for alias in node.names:
            if alias.name == "*":
                found = self.find(f"{source}.{name}")
            elif (alias.asname or alias.name) == name:
                found = self.find(f"{source}.{alias.name}") or (module, node)  # from outside the folder
            else:
                continue
            if found is not None:
                return found
        return None

    def _name(self, module: Path) -> list[str]:
        path = module.parent if module.name == "__init__.py" else module.with_suffix("")
        return list(path.relative_to(self.folder).parts)

    def _parameters_fault(self, interface: Interface, found: Place) -> str | None:
        if not (interface.first or interface.accepts):
            return None
        module, definition = found
        parameters = self._parameters(*found)
        if parameters is None:
            return f"{interface.name} is not a function"
        positional, named, anything = parameters
        if tuple(positional[: len(interface.first)]) != interface.first:
            return f"{interface.name}({', '.join(interface.first)}), which has ({', '.join(positional)})"
        lost = [name for name in interface.accepts if name not in (*positional, *named)]
        if lost and not anything:
            return f"{interface.name}(..., {', '.join(lost)}), which has ({', '.join((*positional, *named))})"
        return None

    def _parameters(self, module: Path, definition: ast.AST) -> tuple[list[str], list[str], bool] | None:
        """Positional and keyword-only parameters, and whether any other is accepted; None if nothing can be called.

        Those of a class are its constructor's, or the fields of a dataclass.
        """
        if isinstance(definition, ast.ClassDef):
            constructor = self._member(module, definition, "__init__")
            if constructor is None:
                fields = [node for node in definition.body if isinstance(node, ast.AnnAssign)]
                return [field.target.id for field in fields if isinstance(field.target, ast.Name)], [], False
            definition = constructor[1]
        if not isinstance(definition, ast.FunctionDef | ast.AsyncFunctionDef):
            return None
        arguments = definition.args
        positional = [each.arg for each in (*arguments.posonlyargs, *arguments.args)]
        named = [each.arg for each in arguments.kwonlyargs]
        return [name for name in positional if name not in ("self", "cls")], named, arguments.kwarg is not None


def _parsed(path: Path) -> ast.Module:
    return _parsed_once(path.resolve())


@cache
def _parsed_once(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def _texts(path: Path) -> frozenset[str]:
    """Strings, keyword arguments and parameters of a file."""
    found = set()
    for node in ast.walk(_parsed(path)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)
        elif isinstance(node, ast.keyword | ast.arg):
            found.add(node.arg)
    return frozenset(found)


def _statements(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements of a module or class, also those under if, try, with and loops, but not inside functions."""
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try | ast.With | ast.For | ast.While):
            for inner in ("body", "orelse", "finalbody"):
                yield from _statements(getattr(node, inner, ()))
            for handler in getattr(node, "handlers", ()):
                yield from _statements(handler.body)


def _bound(node: ast.stmt) -> set[str]:
    """Names that a definition or an assignment binds."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return {each.id for target in targets for each in ast.walk(target) if isinstance(each, ast.Name)}


def _sets(node: ast.AST, name: str, owner: str) -> bool:
    """Whether a node sets an attribute of the object at hand, or of its class."""
    return (
        isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and node.attr == name
        and isinstance(node.value, ast.Name)
        and node.value.id in ("self", "cls", owner)
    )
