"""Prompt sets: a file in the published format of ConsiStory+, or stories of the demo model's world."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

DEMO = "demo"
DEMO_STORIES = 50
KEYS = ("concept_token", "settings", "style", "subject")


class PromptFileError(ValueError):
    """A file without valid prompt sets; the message names the place and what is needed there."""


@dataclass(frozen=True)
class PromptSet:
    """A character and its frames. number: position in the file, from 1. settings: one text per frame. seed: None for
    the run's.
    """

    number: int
    superclass: str
    concept_token: str
    style: str
    subject: str
    settings: tuple[str, ...]
    seed: int | None = None

    @property
    def name(self) -> str:
        """Name of the set's folder, the same in every run: "017-animals-horse"."""
        return "-".join([f"{self.number:03}", *filter(None, map(slug, (self.superclass, self.concept_token)))])

    @property
    def identity(self) -> str:
        return f"{self.style} {self.subject}".strip()

    @property
    def prompts(self) -> list[str]:
        """The full prompt of each frame, which is the published name of its picture."""
        return [f"{self.identity} {setting}" for setting in self.settings]


def slug(text: str) -> str:
    """A text as part of a file name on any system."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40]


def read_prompts(path: Path) -> list[PromptSet]:
    """The sets of a YAML file {superclass: [{concept_token, settings, style, subject}, ...]}, texts unchanged.

    Raises PromptFileError for an invalid file, ImportError without PyYAML.
    """
    try:
        import yaml
    except ImportError:
        raise ImportError('Prompt files need PyYAML: pip install pyyaml, or "storyloom[benchmark]".') from None
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PromptFileError(f"{path} cannot be read ({error.strerror}); give a prompt file, or demo.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise PromptFileError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict) or not content:
        raise PromptFileError(f"{path} contains no prompt sets; it needs superclass: [{{{', '.join(KEYS)}}}, ...].")
    sets: list[PromptSet] = []
    for superclass, entries in content.items():
        if not isinstance(entries, list):
            raise PromptFileError(f'{path}: "{superclass}" needs a list of sets, got {type(entries).__name__}.')
        for position, entry in enumerate(entries, start=1):
            sets.append(_prompt_set(len(sets) + 1, str(superclass), entry, f'{path}: "{superclass}", set {position}'))
    return sets


def _prompt_set(number: int, superclass: str, entry: object, where: str) -> PromptSet:
    missing = [key for key in KEYS if not isinstance(entry, dict) or key not in entry]
    if missing:
        raise PromptFileError(f"{where} has no {', '.join(missing)}.")
    settings = entry["settings"]
    if not isinstance(settings, list) or not settings:
        raise PromptFileError(f"{where}: settings needs a list with one text per frame.")
    texts = {key: entry[key] for key in KEYS if key != "settings"}
    texts |= {f"settings {position}": text for position, text in enumerate(settings, start=1)}
    for name, text in texts.items():
        if not isinstance(text, str):
            raise PromptFileError(f"{where}: {name} is {text!r}, which is not text; put it in quotes.")
        if not text.strip() and name != "style":
            raise PromptFileError(f"{where}: {name} is empty.")
    plain = {name: " ".join(text.split()) for name, text in texts.items()}
    head = {key: plain.pop(key) for key in KEYS if key != "settings"}
    return PromptSet(number, superclass, **head, settings=tuple(plain.values()))


def demo_sets(count: int = DEMO_STORIES) -> list[PromptSet]:
    """The first `count` stories of docs/effect.md, with their seeds."""
    from ...world.stories import random_story
    from ..effect import FIRST_SEED, FIRST_STORY

    sets = []
    for number in range(count):
        story = random_story(FIRST_STORY + number)
        subject, settings = story.identity_text(), tuple(story.frames_text().splitlines())
        species = story.identities[0].species
        sets.append(PromptSet(number + 1, DEMO, species, "", subject, settings, FIRST_SEED + number))
    return sets


def chosen(sets: Sequence[PromptSet], superclasses: Sequence[str], limit: int | None) -> list[PromptSet]:
    """The first `limit` sets of these superclasses, by default of all. Raises PromptFileError for an unknown one."""
    known = list(dict.fromkeys(one.superclass for one in sets))
    for superclass in superclasses:
        if superclass not in known:
            raise PromptFileError(f'There is no superclass "{superclass}". Known: {", ".join(known)}.')
    return [one for one in sets if not superclasses or one.superclass in superclasses][:limit]
