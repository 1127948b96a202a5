"""A tiny corpus and a tiny run, prepared once."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from headwater_recipes.common import job
from headwater_recipes.lm.settings import RECIPE, LmSettings

TINY: dict[str, Any] = {
    "preset": "tiny",
    "vocabulary": 300,
    "workers": 1,
    "servers": 1,
    "batch": 2,
    "seq": 16,
    "lr": 1e-2,
    "warmup": 2,
    "steps": 6,
    "log_every": 2,
    "save_every": 100,
    "validate_every": 100,
    "precision": "float32",
}


def write_corpus(folder: Path, files: int = 3) -> Path:
    """Text with enough repetition to be learnt from."""
    words = ["alpha", "beta", "gamma", "delta", "(x)", "= 1", "\n"]
    folder.mkdir()
    for i in range(files):
        text = " ".join(random.Random(i).choices(words, k=900))
        (folder / f"text{i}.txt").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder that is ready to train in; copy it before you do."""
    place = tmp_path_factory.mktemp("recipe")
    corpus = write_corpus(place / "corpus")
    settings = LmSettings(data=(str(corpus),), **TINY)
    return job.prepare(RECIPE, settings, place / "run", Console(quiet=True))


@pytest.fixture
def run(prepared: Path, tmp_path: Path) -> Path:
    """A copy of the prepared run folder."""
    return Path(shutil.copytree(prepared, tmp_path / "run"))
