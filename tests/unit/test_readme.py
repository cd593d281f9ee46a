"""README and its neighbours: links lead somewhere, and the tables name what is there."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "benchmarks" / "README.md"]
PAGES += sorted((ROOT / "docs").glob("*.md"))


def section(title):
    return re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", README.read_text(encoding="utf-8"), re.M | re.S)[1]


def anchors(path):
    """Headings of a page as its host names them in links."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=[path.relative_to(ROOT).as_posix() for path in PAGES])
def test_every_relative_link_leads_to_a_file_or_heading(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:", link):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.is_file() and target.is_relative_to(ROOT), link
        assert not anchor or anchor in anchors(target), link


def display_names():
    """The names of all nodes, read from their schemas' source."""
    for path in (ROOT / "nodes").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "Schema":
                (name,) = [word.value for word in node.keywords if word.arg == "display_name"]
                yield ast.literal_eval(name)


def test_the_table_of_nodes_names_every_node_once():
    last_cells = re.findall(r"^\|.*\|([^|]+)\|$", section("Which node do I need?"), re.M)
    named = [name for cell in last_cells for name in re.findall(r"\*\*(.+?)\*\*", cell)]
    assert sorted(named) == sorted(display_names())


def test_the_table_of_templates_names_every_template():
    rows = re.findall(r"^\| ([^|]+?) \|.*\| ([^|]*?) ?\|$", section("Your first story"), re.M)[1:]
    files = {path.stem for path in (ROOT / "workflows").glob("*.json")}
    demos = {f"Demo - {name}" for name, demo in rows if demo.startswith("yes")}
    assert {name for name, _ in rows} | demos == files - {"Demo - With and Without"}
    assert "*Demo - With and Without*" in " ".join(section("Your first story").split())


def test_the_blueprints_and_every_template_named_in_italics_exist():
    text = " ".join(README.read_text(encoding="utf-8").split())
    boxes = {path.stem for path in (ROOT / "subgraphs").glob("*.json")}
    assert boxes and all(f"*{name}*" in text for name in boxes)
    known = {path.stem for path in (ROOT / "workflows").glob("*.json")}
    for names in re.findall(r"Workflows?: (.+?)\.(?: |$)", text):
        assert set(re.findall(r"\*([^*]+)\*", names)) <= known
