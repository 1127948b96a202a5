"""Data that nothing can be learnt from, given to every recipe: a typed error before there is a run, or a treatment."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from rich.console import Console

from headwater.errors import DataError, UsageError
from headwater_recipes.common import claim, job
from tests.recipes import tiny
from tests.recipes.test_every_recipe import EVERY, RECIPES

QUIET = Console(quiet=True)


def _missing(place: Path) -> Path:
    return place / "missing"


def _no_file(place: Path) -> Path:
    (place / "empty").mkdir()
    return place / "empty"


def _empty(place: Path) -> Path:
    (place / "empty.csv").touch()
    return place / "empty.csv"


def _strange(place: Path) -> Path:
    """A file of no kind."""
    (place / "strange.bin").write_bytes(bytes(range(256)) * 8)
    return place / "strange.bin"


def _damaged(place: Path) -> Path:
    """Files of the right names in folders of the right form, which hold none of what their names say."""
    for name in ("a", "b"):
        (place / "damaged" / name).mkdir(parents=True)
        for ending in ("png", "wav", "csv", "txt", "jsonl", "json"):
            for number in range(4):
                path = place / "damaged" / name / f"who{number}_1.{ending}"
                path.write_bytes(bytes(range(128, 256)) + b"\0" * 64)
    return place / "damaged"


@EVERY
@pytest.mark.parametrize("make", [_missing, _no_file, _empty, _strange, _damaged])
def test_nothing_is_begun_with_data_that_cannot_be_used(
    name: str, make: Callable[[Path], Path], tmp_path: Path
) -> None:
    recipe = RECIPES[name]
    settings = tiny.settings(recipe, tmp_path / "data")
    given = make(tmp_path)
    settings = msgspec.structs.replace(settings, data=(str(given),))
    with pytest.raises((DataError, UsageError)) as caught:
        job.prepare(recipe, settings, tmp_path / "run", QUIET)
    assert given.name in str(caught.value) or str(given) in str(caught.value), caught.value
    assert not (tmp_path / "run").exists()


@EVERY
def test_more_workers_than_samples(name: str, tmp_path: Path) -> None:
    """An error, or every worker has something to learn from (samples are drawn, or dealt out again)."""
    recipe = RECIPES[name]
    settings = tiny.settings(recipe, tmp_path / "data", workers=100_000)
    said = ""
    try:
        claim.release(run := job.prepare(recipe, settings, tmp_path / "run", QUIET))
    except (DataError, UsageError) as error:
        said = str(error)
    if said:
        assert "worker" in said
        assert not (tmp_path / "run").exists()
        return
    task: Any = recipe.load()(settings, run, 99_999, 100_000)
    assert sum(batch.learnt for batch in task.batches(0)) > 0
    list(task.held_out(True))
