"""Pages that name things of the code name all of them."""

from __future__ import annotations

import ast
import os
import re
from pathlib import Path

import pytest

import headwater

ROOT = Path(headwater.__file__).parents[2]


def test_every_environment_variable_is_documented() -> None:
    page = (ROOT / "docs" / "environment.md").read_text(encoding="utf-8")
    code = [path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py")]
    used = {name for text in code for name in re.findall(r"\bHEADWATER_[A-Z_]*[A-Z]\b", text)}
    assert used <= set(re.findall(r"HEADWATER_[A-Z_]+", page))


def _methods() -> dict[str, dict[str, set[str]]]:
    """By file below ``src/headwater`` and class: what it defines."""
    source = ROOT / "src" / "headwater"
    found: dict[str, dict[str, set[str]]] = {}
    for path in source.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found[str(path.relative_to(source))] = {
            node.name: {each.name for each in node.body if isinstance(each, ast.FunctionDef)}
            for node in tree.body
            if isinstance(node, ast.ClassDef)
        }
    return found


@pytest.mark.parametrize(
    ("page", "title"),
    [("design.md", "The way of a push"), ("reliability.md", "A primary dies between READY and COMMIT")],
)
def test_what_a_story_names_is_there(page: str, title: str) -> None:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    section = text.split(f"## {title}\n", 1)[1].split("\n## ", 1)[0]
    methods = _methods()
    for file, kind, name in re.findall(r"^\| `([\w/]+\.py)` \| `(\w+)\.(\w+)`", section, re.MULTILINE):
        assert name in methods.get(file, {}).get(kind, set()), f"{file} has no {kind}.{name}"
    for file in re.findall(r"`([\w/]+\.py)`", section):
        assert file in methods or (ROOT / file).exists(), f"there is no {file}"
    for kind, name in re.findall(r"`([A-Z]\w+)\.(\w+)`", section):
        assert any(name in classes.get(kind, set()) for classes in methods.values()), f"there is no {kind}.{name}"


def test_links_to_runs_of_the_protocol_lead_somewhere_and_none_is_left_out() -> None:
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    linked = set(re.findall(r"\(\.\./tests/protocol/(\w+\.txt)\)", page))
    assert linked == {path.name for path in (ROOT / "tests" / "protocol").glob("*.txt")}


def test_pages_name_files_that_are_there() -> None:
    pages = [
        *ROOT.glob("*.md"),
        *(path for place in ("docs", "benchmarks", "src") for path in (ROOT / place).rglob("*.md")),
    ]
    code = [path for place in ("src", "tests") for path in (ROOT / place).rglob("*.py")]
    missing = []
    for path in (*pages, *code):
        text = path.read_text(encoding="utf-8")
        named = {ROOT / name for name in re.findall(r"`((?:src|tests|docs|benchmarks)/[\w./*-]+)`", text)}
        if path.suffix == ".md":
            named |= {path.parent / name for name in re.findall(r"\]\(([\w./-]+)\)", text)}
        missing += [
            f"{path.relative_to(ROOT)}: {os.path.relpath(name, ROOT)}"
            for name in named
            if not any(ROOT.glob(os.path.relpath(name, ROOT)))
        ]
    assert not missing, "\n".join(missing)
