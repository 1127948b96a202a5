"""Where the numbers come from: made, measured, or in a CSV file of one's own."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import numpy as np
from rich.console import Console

from headwater_recipes.common.stages import say, stage
from headwater_recipes.data import cache
from headwater_recipes.linear.settings import DIABETES, GENERATED, LinearSettings
from headwater_recipes.tables.table import Numbers, divide, read_csv


def prepare(wanted: LinearSettings, console: Console) -> Callable[[Path], None]:
    """See ``Task.prepare``."""
    with stage(console, "reading the table"):
        table = read(wanted)
        split = divide(table, wanted.seed, wanted.workers)

    def fill(folder: Path) -> None:
        split.save(folder)
        say(
            console,
            f"table: {wanted.data[0]}, {table.x.shape[1]} columns; {len(split.training.y):,} rows to train on, "
            f"{len(split.held_out.y):,} held out",
        )

    return fill


def read(wanted: LinearSettings) -> Numbers:
    """The table that ``--data`` names. Raises ``DataError``."""
    source = wanted.data[0]
    if source == GENERATED:
        return generated(wanted.rows, wanted.features, wanted.noise, wanted.seed)
    return diabetes() if source == DIABETES else read_csv(Path(source))


def generated(rows: int, features: int, noise: float, seed: int) -> Numbers:
    """x of a standard normal distribution, neighbours of which share half their variance; β too; y = βx + 3 + noise."""
    random = np.random.default_rng(seed)
    drawn = random.standard_normal((rows, features + 1))
    x, truth = (drawn[:, 1:] + drawn[:, :-1]) / np.sqrt(2), random.standard_normal(features)
    y = x @ truth + 3.0 + noise * random.standard_normal(rows)
    return Numbers(x, y, tuple(f"x{i + 1}" for i in range(features)), "y", truth)


def diabetes() -> Numbers:
    """The ten measures of 442 patients as they were taken. Raises ``DataMissing``, with the command that fetches it."""
    place = cache.folder(DIABETES) / "data"
    with gzip.open(place / "diabetes_data_raw.csv.gz", "rt", encoding="utf-8") as opened:
        x = np.loadtxt(opened, dtype=np.float64)
    with gzip.open(place / "diabetes_target.csv.gz", "rt", encoding="utf-8") as opened:
        y = np.loadtxt(opened, dtype=np.float64)
    return Numbers(x, y, ("age", "sex", "bmi", "bp", "s1", "s2", "s3", "s4", "s5", "s6"), "progression")
