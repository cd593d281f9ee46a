"""The help pages: parts that every page has, pictures that are there, and messages that the pack really gives."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest
from PIL import Image

PACK = Path(__file__).resolve().parents[2]
DOCS = PACK / "web" / "docs"
PAGES = sorted(DOCS.glob("*.md"))
PICTURE = re.compile(r"!\[([^\]]*)\]\(([^)]+)\)")


def names(paths):
    return [path.stem.removeprefix("StoryLoom_") for path in paths]


def section(page, title):
    """What stands below a heading of a page's text."""
    match = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", page, re.M | re.S)
    assert match, f"there is no section {title}"
    return match[1]


@pytest.mark.parametrize("path", PAGES, ids=names(PAGES))
def test_a_page_says_what_the_node_does_when_to_use_it_and_what_goes_wrong(path):
    page = path.read_text(encoding="utf-8")
    title, first, *_ = page.split("\n\n")
    assert title.startswith("# ") and first.endswith(".") and len(first) < 320
    before_inputs = page.split("\n## ")[0]
    assert re.search(r"\b(Use it|Connect it|Put it|Put this)\b", before_inputs), "when to use it"
    for part in ("Inputs", "Outputs?", "Works with", "Troubleshooting"):
        assert section(page, part).strip()
    assert section(page, "Troubleshooting").count("\n* **") + section(page, "Troubleshooting").startswith("* **") >= 1


@pytest.mark.parametrize("path", PAGES, ids=names(PAGES))
def test_a_page_has_a_small_picture_with_a_caption(path):
    page = path.read_text(encoding="utf-8")
    pictures = PICTURE.findall(page)
    assert pictures
    for words, link in pictures:
        file = DOCS / link
        assert words and re.fullmatch(r"images/\w+\.png", link), "the front end looks for it beside the page"
        assert file.stat().st_size <= 60_000
        with Image.open(file) as image:
            assert image.format == "PNG" and 200 <= image.width <= 800
    assert len(re.findall(r"\)\n\n\*[^*]", page)) >= len(pictures), "a picture is followed by its caption in italics"


def test_every_picture_is_in_a_page():
    linked = {link for path in PAGES for _, link in PICTURE.findall(path.read_text(encoding="utf-8"))}
    assert {f"images/{path.name}" for path in (DOCS / "images").iterdir()} == linked


# ---- messages --------------------------------------------------------------------------------------------------------

FILLED_IN = re.compile(r"""\d[\d.]*|CUDA|\[\w+\]|\([^)]*\)|"[^"]*"|\.\.\.|…""")
"""What the page puts where the code puts something of the run: numbers, names, what is quoted, dots of omission."""
LEFT_OUT = re.compile(r"\.\.\.|…")


@cache
def texts():
    """Every text in the pack's code, cut where something is filled in; no docstrings."""
    pieces = set()
    for folder in ("attention", "measures", "models", "nodes", "pages", "prompts", "runtime"):
        for path in (PACK / folder).rglob("*.py"):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            alone = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
            for node in ast.walk(tree):
                if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in alone:
                    pieces.update(words(part) for part in re.split(r"%(?:\.\d)?[sdgf]", node.value))
    return pieces


def words(text):
    """The words of a text in small letters, with a blank around each and no signs; what is counted in singular."""
    counted = re.sub(r"\b(token|image|frame)s\b", r"\1", text)
    plain = re.findall(r"[^\s.,:;()\"]+", counted.lower())
    return f" {' '.join(plain)} "


@cache
def has(piece):
    """Whether these words stand in a row in the code: as a whole text, or two at least as a part of one."""
    return piece in texts() or piece.count(" ") > 2 and any(piece in text for text in texts())


def exists(message):
    """Whether the code has the texts from which a message is put together."""
    return any(all(put_together(words(part).split()) for part in cut.split(message)) for cut in (FILLED_IN, LEFT_OUT))


def put_together(quoted_words):
    return not quoted_words or any(
        has(f" {' '.join(quoted_words[:count])} ") and put_together(quoted_words[count:])
        for count in range(len(quoted_words), 0, -1)
    )


def quoted():
    """(page, message) of every message that a page quotes in bold in Troubleshooting."""
    for path in PAGES:
        text = " ".join(section(path.read_text(encoding="utf-8"), "Troubleshooting").split())
        for bold in re.findall(r"\*\*(.+?)\*\*(?=[ .,]|$)", text):
            for message in re.findall(r'(?<!\S)"(.+?)"(?=[,.]?(?: or| \*|$)|$|\.)', bold):
                yield path.stem.removeprefix("StoryLoom_"), message


def test_quoted_messages_are_those_of_the_code():
    messages = list(quoted())
    assert len(messages) > 50
    unknown = [f"{page}: {message}" for page, message in messages if not exists(message)]
    assert not unknown, "\n".join(unknown)


def test_a_message_that_nobody_gives_is_found():
    assert exists("A batch of 2 images with 2 anchors has no room for other frames.")
    assert not exists("A batch of 2 images has too much room for its anchors.")
    assert not exists("start_percent 0.8 is after end_percent 0.5, so the node would never act.")
