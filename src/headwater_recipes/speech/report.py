"""After training: figures on speakers held out, and pictures of these."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from headwater_recipes.common.task import Ended
from headwater_recipes.sound import baselines, report
from headwater_recipes.sound.examples import Examples

PEOPLE = "sounds of speakers held out"


def figures(folder: Path, examples: Examples, ended: Ended) -> dict[str, Any]:
    """For ``report.json``, and the pictures."""
    sets = {PEOPLE: report.judge(folder, examples)}
    found = report.figures(examples, ended, sets, (baselines.LOGISTIC, baselines.logistic))
    return {**found, "pictures": report.draw(folder, examples.facts.names, sets)}
