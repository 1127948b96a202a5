"""After training: figures on voices held out and on a person's recordings, and pictures of these."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from headwater_recipes.commands.data import RECORDED
from headwater_recipes.common.task import Ended
from headwater_recipes.sound import baselines, report
from headwater_recipes.sound.examples import Examples

VOICES = "sounds of speakers held out"
PEOPLE = "recordings of a person"


def figures(folder: Path, examples: Examples, ended: Ended) -> dict[str, Any]:
    """For ``report.json``, and the pictures."""
    sets = {VOICES: report.judge(folder, examples)}
    if (folder / RECORDED).is_dir():
        sets[PEOPLE] = report.judge(folder, Examples.load(folder / RECORDED))
    found = report.figures(examples, ended, sets, (baselines.CENTROID, baselines.centroid))
    return {**found, "pictures": report.draw(folder, examples.facts.names, sets)}
