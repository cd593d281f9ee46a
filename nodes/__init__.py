"""The nodes of the pack: schemas and thin execute methods, one file per menu group.

Each file is loaded separately, so that a file that cannot be loaded does not affect the others.
"""

import logging
from collections.abc import Iterable
from importlib import import_module

from comfy_api.latest import ComfyExtension, io

log = logging.getLogger(__name__)

CATALOGUE = {
    "story": {"Script": "Story script", "EmptyLatent": "Empty story latent"},
    "conditioning": {
        "EncodeOnePrompt": "Encode story as one prompt (SVR)",
        "EncodePerFrame": "Encode story frame by frame",
    },
    "attention": {
        "IPCA": "Identity-preserving cross-attention",
        "ConsistentSelfAttention": "Consistent self-attention",
        "StoryFreeU": "Story FreeU",
    },
    "batches": {"SplitBatches": "Split a long story", "JoinBatches": "Join story batches"},
    "page": {"Page": "Story page"},
    "save_page": {"SavePage": "Save story page"},
    "demo": {"DemoModel": "Demo model", "DemoStoryMaker": "Demo StoryMaker"},
    "characters": {"LoadFaceAnalysis": "Load face analysis", "Character": "Character from image"},
    "character_files": {
        "BlendCharacters": "Blend characters",
        "SaveCharacter": "Save character",
        "LoadCharacter": "Load character",
    },
    "storymaker": {"LoadStoryMaker": "Load StoryMaker adapter", "ApplyStoryMaker": "Apply StoryMaker (PPR)"},
    "similarity": {"LoadOpenCLIP": "Load OpenCLIP", "DemoSimilarity": "Demo similarity"},
    "consistency": {"StoryConsistency": "Story consistency"},
    "comparison": {"Compare": "Compare stories (A/B)"},
}
"""file -> class -> the node's name in the menu, used in the log if the file cannot be loaded."""


class StoryLoomExtension(ComfyExtension):
    async def on_load(self) -> None:
        try:
            import_module(".routes", __name__).register()
        except Exception as error:
            _log_missing("routes", ["the token counts of Story script"], error)

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [node for file in CATALOGUE for node in nodes_of(file)]


def nodes_of(file: str) -> list[type[io.ComfyNode]]:
    """The usable nodes of one file. Missing nodes are logged with the reason."""
    try:
        module = import_module(f".{file}", __name__)
    except Exception as error:
        _log_missing(file, CATALOGUE[file].values(), error)
        return []
    return [node for name, shown in CATALOGUE[file].items() if (node := _node(module, name, shown)) is not None]


def _node(module, name: str, shown: str) -> type[io.ComfyNode] | None:
    """A node of the module, or None (logged) if ComfyUI could not create its schema."""
    try:
        node = getattr(module, name)
        node.GET_SCHEMA()
    except Exception as error:
        _log_missing(module.__name__.rpartition(".")[2], [shown], error)
        return None
    return node


def _log_missing(file: str, missing: Iterable[str], error: Exception) -> None:
    log.error(
        "StoryLoom runs without %s: nodes/%s.py could not be loaded (%s: %s). Start ComfyUI with --verbose DEBUG for "
        "the full traceback.",
        ", ".join(missing),
        file,
        type(error).__name__,
        error,
    )
    log.debug("Full traceback:", exc_info=error)
