"""Whole runs of a recipe, through servers of their own."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from rich.console import Console

from headwater_recipes.common import job
from headwater_recipes.common.recipe import Recipe

SAID = "said.txt"
"""What the user was told, in the run's folder."""


def train(recipe: Recipe[Any], settings: Any, folder: Path) -> Path:
    """Prepare a run and train it to its end; the folder."""
    out = io.StringIO()
    console = Console(file=out, width=150)
    run = job.prepare(recipe, settings, folder, console)
    assert job.Job(recipe, run, console).run() == 0, out.getvalue()
    (run / SAID).write_text(out.getvalue(), encoding="utf-8")
    return run
