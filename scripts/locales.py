"""Writes the English texts for ComfyUI's front end, from the schemas, to locales/en/.

nodeDefs.json contains the nodes' names and tooltips, main.json the names of their categories in the menu.

    python scripts/locales.py

Needs a ComfyUI to import the nodes. It is found in the same way as by `make test`; COMFYUI_PATH names another.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).absolute().parent.parent / "locales" / "en"
FILE, MAIN = FOLDER / "nodeDefs.json", FOLDER / "main.json"

SYNTAX = re.compile(r"[{}@|]")
"""Characters that vue-i18n reads as its own syntax.

Some versions of the front end parse a tooltip as a message and others show it verbatim, so no escape works in all of
them. A text with such a character is left out; the front end then shows the schema's text, which is the same.
"""


def definitions(nodes: Iterable[type]) -> dict[str, Any]:
    """Texts of V3 node classes in ComfyUI's format for node translations."""
    schemas = sorted((node.GET_SCHEMA() for node in nodes), key=lambda schema: schema.node_id)
    return {_key(schema.node_id): _node(schema) for schema in schemas}


def categories(nodes: Iterable[type]) -> dict[str, Any]:
    """Category names of V3 node classes in ComfyUI's format, which has one entry for each part of a path."""
    parts = {part for node in nodes for part in node.GET_SCHEMA().category.split("/")}
    return {"nodeCategories": {_key(part): part for part in sorted(parts)}}


def written(texts: dict[str, Any]) -> str:
    """Text of a file."""
    return json.dumps(texts, indent=2, ensure_ascii=False) + "\n"


def _node(schema) -> dict[str, Any]:
    inputs = {
        _key(entry.id): _texts(name=entry.display_name or entry.id, tooltip=entry.tooltip) | _options(entry)
        for entry in schema.inputs
    }
    outputs = {
        str(number): _texts(name=entry.display_name, tooltip=entry.tooltip)
        for number, entry in enumerate(schema.outputs)
    }
    texts = _texts(display_name=schema.display_name, description=schema.description)
    return texts | {key: entries for key, entries in (("inputs", inputs), ("outputs", outputs)) if entries}


def _options(entry) -> dict[str, dict[str, str]]:
    options = getattr(entry, "options", None) or ()
    return {"options": {_key(str(option)): str(option) for option in options}} if options else {}


def _texts(**texts: str | None) -> dict[str, str]:
    return {key: text for key, text in texts.items() if text and not SYNTAX.search(text)}


def _key(name: str) -> str:
    """A name as the front end looks it up: a dot would mean nesting."""
    return name.replace(".", "_")


def main() -> None:
    from comfyui import ComfyUIError, find_comfyui

    try:
        sys.path.insert(0, str(find_comfyui()))
    except ComfyUIError as error:
        raise SystemExit(str(error)) from None
    sys.argv = sys.argv[:1]
    from comfy.cli_args import args

    args.cpu = True
    import storyloom

    async def catalogue():
        return await (await storyloom.comfy_entrypoint()).get_node_list()

    nodes = asyncio.run(catalogue())
    FOLDER.mkdir(parents=True, exist_ok=True)
    for file, texts in ((FILE, definitions(nodes)), (MAIN, categories(nodes))):
        file.write_text(written(texts), encoding="utf-8")
        print(file)


if __name__ == "__main__":
    main()
