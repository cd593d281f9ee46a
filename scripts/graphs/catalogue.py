"""Every file of the templates and blueprints, as text."""

from __future__ import annotations

import json
from pathlib import Path

from .blueprints import blueprints
from .model import Workflow, api_form, ui_form
from .subgraphs import subgraph_form
from .templates import (
    change_the_outfit,
    character_from_photo,
    consistent,
    long_story,
    one_prompt,
    photomaker_story,
    two_characters,
    two_people,
    with_and_without,
)

ROOT = Path(__file__).absolute().parents[2]
WORKFLOWS, BLUEPRINTS = ROOT / "workflows", ROOT / "subgraphs"
TEMPLATES = (
    one_prompt,
    consistent,
    two_characters,
    long_story,
    character_from_photo,
    two_people,
    change_the_outfit,
    photomaker_story,
    with_and_without,
)


def workflows() -> list[Workflow]:
    """Every template."""
    return [workflow for template in TEMPLATES for workflow in template.workflows()]


def texts(schemas: dict) -> dict[Path, str]:
    """Path -> text of every template and blueprint. schemas: the answer of `/object_info`."""
    forms = {}
    for workflow in workflows():
        forms[WORKFLOWS / f"{workflow.name}.json"] = ui_form(workflow, schemas)
        forms[WORKFLOWS / "api" / f"{workflow.name}.json"] = api_form(workflow, schemas)
    for blueprint in blueprints():
        forms[BLUEPRINTS / f"{blueprint.graph.name}.json"] = subgraph_form(blueprint, schemas)
    return {path: json.dumps(form, indent=2, ensure_ascii=False) + "\n" for path, form in forms.items()}
