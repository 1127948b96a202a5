"""Every recipe's folder has the same form (``headwater_recipes/README.md``), and what all share knows none of them."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import headwater_recipes
from headwater_recipes.common.options import fields
from headwater_recipes.common.recipe import Recipe
from headwater_recipes.finetune import settings as finetune
from headwater_recipes.lm import settings as lm

ROOT = Path(headwater_recipes.__file__).parent
SHARED = {"common", "data", "images", "sound", "tables", "text"}
RECIPES = sorted(path.parent.name for path in ROOT.glob("*/__init__.py") if path.parent.name not in SHARED)
FILES = {"__init__.py", "commands.py", "settings.py", "data.py", "model.py", "task.py", "report.py"}
TEXT = re.compile(r"\b(tokens?|tokenizers?|nats|perplexity|transformers|bits_per_byte)\b")


def _reached(folder: str) -> set[str]:
    """The folders beside it that a folder's modules import from."""
    found = set()
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("headwater_recipes."):
                found.add(node.module.split(".")[1])
    return found - {folder}


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_has_the_same_files_and_knows_no_other(name: str) -> None:
    assert {path.name for path in (ROOT / name).glob("*.py")} >= FILES
    assert _reached(name) <= SHARED


def test_what_all_share_knows_no_recipe_and_no_text() -> None:
    assert _reached("common") == set()
    assert _reached("text") == {"common"}
    told = {
        f"{path.name}: {found[0]}"
        for path in (ROOT / "common").glob("*.py")
        if (found := TEXT.search(path.read_text(encoding="utf-8")))
    }
    assert told == set()


def test_the_readme_names_the_files() -> None:
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(\w+\.py)` \|", page, re.MULTILINE)) == FILES
    assert all(f"| `{name}/` |" in page for name in RECIPES)


@pytest.mark.parametrize(
    ("recipe", "fixed"),
    [
        (lm.RECIPE, {"data", "preset", "vocabulary", "seq", "seed"}),
        (finetune.RECIPE, {"model", "data", "seq", "seed", "lora", "lora_alpha", "lora_targets"}),
    ],
)
def test_what_prepared_data_hang_on_cannot_change(recipe: Recipe[lm.LmSettings], fixed: set[str]) -> None:
    assert {field.name for field in fields(recipe.settings) if field.option.fixed} == fixed
