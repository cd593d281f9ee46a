"""The methods that `effect.py` measures: their names in tables, their settings, and which are compared."""

from __future__ import annotations

from typing import Any

from ..prompts.svr import NPRSettings, SVRSettings

METHODS = {
    "frames": "frame prompts",
    "none": "concatenation",
    "npr": "NPR",
    "svr": "SVR",
    "svr-eot": "SVR, end of text scaled",
    "svr+ipca": "SVR + IPCA",
    "ipca": "IPCA on frame prompts",
    "csa": "CSA on frame prompts",
    "csa+svr+ipca": "CSA + SVR + IPCA",
    "csa-full": "CSA at its fullest",
    "csa-full+svr+ipca": "CSA at its fullest + SVR + IPCA",
}
COMPARED = (
    ("svr", "none"),
    ("svr", "npr"),
    ("svr", "frames"),
    ("svr-eot", "svr"),
    ("svr+ipca", "svr"),
    ("svr+ipca", "frames"),
    ("ipca", "frames"),
    ("csa", "frames"),
    ("csa+svr+ipca", "svr+ipca"),
    ("csa+svr+ipca", "frames"),
    ("csa-full+svr+ipca", "svr+ipca"),
)

ABLATIONS = {
    "svr": METHODS["svr"],
    "svr-joint": "SVR, others suppressed jointly",
    "svr-eot-kept": "SVR, end of text kept",
    "svr-identity": "SVR, identity enhanced too",
    "npr": METHODS["npr"],
    "npr-plus": "NPR+ (only enhances)",
    "npr-minus": "NPR- (only suppresses)",
}
"""The ablations of One-Prompt-One-Story (figures 11 to 14), beside what they are compared with."""
ABLATIONS_COMPARED = (
    ("svr-joint", "svr"),
    ("svr-eot-kept", "svr"),
    ("svr-identity", "svr"),
    ("npr-plus", "npr"),
    ("npr-minus", "npr"),
)

TITLES = METHODS | ABLATIONS
PART_SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "csa-full": ("csa", {"sampling_rate": 1.0, "skip_first_steps": 0, "sharing_blocks": "all"}),
    "svr-joint": ("svr", {"svr": SVRSettings(suppress="jointly")}),
    "svr-eot-kept": ("svr", {"svr": SVRSettings(eot="keep")}),
    "svr-identity": ("svr", {"svr": SVRSettings(enhance_identity=True)}),
    "npr-plus": ("npr", {"npr": NPRSettings(suppress=1.0)}),
    "npr-minus": ("npr", {"npr": NPRSettings(express=1.0)}),
}
"""Part of a name above -> part of a method of StoryPipeline, and its settings.

"CSA at its fullest": every frame sees all tokens of all others, in all blocks and steps.
"""


def settings_of(method: str) -> dict[str, Any]:
    """Settings for StoryPipeline. method: a key of METHODS or ABLATIONS, or its parts joined in another way by +."""
    settings, parts = {}, []
    for part in method.split("+"):
        part, changes = PART_SETTINGS.get(part, (part, {}))
        parts.append(part)
        settings |= changes
    return settings | {"method": "+".join(parts)}


def title(method: str) -> str:
    """A method's name in tables; its own name if it is not listed."""
    return TITLES.get(method, method)
