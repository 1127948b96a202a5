"""Numbers to a table in the run folder: rows to train on, rows held out, the true coefficients where they are known."""

from __future__ import annotations

import csv
import gzip
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
from rich.console import Console
from safetensors.numpy import load_file, save_file

from headwater.errors import DataError
from headwater_recipes.common import checkpoint
from headwater_recipes.common.stages import say, stage
from headwater_recipes.data import cache
from headwater_recipes.linear.settings import DIABETES, GENERATED, LinearSettings

Array = npt.NDArray[np.float64]

HELD_OUT = 0.2
"""Share of the rows."""


@dataclass(frozen=True)
class Numbers:
    """``x`` (N, F), ``y`` (N,), float64; ``names`` of the F columns and of ``y``; ``truth`` (F,) if it is known."""

    x: Array
    y: Array
    names: tuple[str, ...]
    target: str
    truth: Array | None = None


@dataclass(frozen=True)
class Split:
    """What the run folder holds: rows to train on, and rows that are never trained on."""

    training: Numbers
    held_out: Numbers


def prepare(wanted: LinearSettings, console: Console) -> Callable[[Path], None]:
    """See ``Task.prepare``."""
    with stage(console, "reading the table"):
        table = read(wanted)
        split = divide(table, wanted.seed, wanted.workers)

    def fill(folder: Path) -> None:
        parts = {"training": split.training, "held_out": split.held_out}
        arrays = {f"{part}.{name}": getattr(each, name) for part, each in parts.items() for name in ("x", "y")}
        if table.truth is not None:
            arrays["truth"] = table.truth
        save_file(arrays, folder / "table.safetensors")
        checkpoint.write_json(folder / "columns.json", {"names": table.names, "target": table.target})
        say(
            console,
            f"table: {wanted.data[0]}, {table.x.shape[1]} columns; {len(split.training.y):,} rows to train on, "
            f"{len(split.held_out.y):,} held out",
        )

    return fill


def load(folder: Path) -> Split:
    """What ``prepare`` wrote."""
    columns: dict[str, Any] = msgspec.json.decode((folder / "columns.json").read_bytes())
    arrays = load_file(folder / "table.safetensors")
    names, target, truth = tuple(columns["names"]), columns["target"], arrays.get("truth")
    training, held_out = (
        Numbers(arrays[f"{part}.x"], arrays[f"{part}.y"], names, target, truth) for part in ("training", "held_out")
    )
    return Split(training, held_out)


def read(wanted: LinearSettings) -> Numbers:
    """The table that ``--data`` names. Raises ``DataError``."""
    source = wanted.data[0]
    if source == GENERATED:
        return generated(wanted.rows, wanted.features, wanted.noise, wanted.seed)
    return diabetes() if source == DIABETES else from_csv(Path(source))


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


def from_csv(path: Path) -> Numbers:
    """A row of names, then rows of numbers. Raises ``DataError``, which names the row and the column."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as opened:
            lines = [(number, row) for number, row in enumerate(csv.reader(opened), 1) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read as a table ({error}); nothing was started") from error
    if len(lines) < 2 or len(lines[0][1]) < 2:
        raise DataError(f"{path}: needs a row of names, two columns or more, and rows of numbers; nothing was started")
    names = [name.strip() for name in lines[0][1]]
    if all(_number(name) is not None for name in names):
        raise DataError(f"{path}, row 1: must be the names of the columns; it holds numbers; nothing was started")
    rows = [_numbers(path, number, row, names) for number, row in lines[1:]]
    table = np.array(rows, np.float64)
    return Numbers(table[:, :-1], table[:, -1], tuple(names[:-1]), names[-1])


def _numbers(path: Path, number: int, row: list[str], names: list[str]) -> list[float]:
    if len(row) != len(names):
        raise DataError(f"{path}, row {number}: {len(row)} cells, not {len(names)}; nothing was started")
    found = []
    for name, cell in zip(names, row, strict=True):
        value = _number(cell)
        if value is None:
            raise DataError(f"{path}, row {number}, column {name}: {cell[:40]!r} is no number; nothing was started")
        found.append(value)
    return found


def _number(cell: str) -> float | None:
    try:
        value = float(cell)
    except ValueError:
        return None
    return value if np.isfinite(value) else None


def divide(table: Numbers, seed: int, workers: int) -> Split:
    """Rows to train on and rows held out, drawn by the seed.

    Raises ``DataError``: fewer rows than coefficients or workers; a column that is the same in all rows.
    """
    order = np.random.default_rng(seed).permutation(len(table.y))
    held = max(2, round(HELD_OUT * len(order)))
    least = max(table.x.shape[1] + 2, workers)
    if len(order) - held < least:
        raise DataError(
            f"{len(order)} rows: of these {held} are held out, and {table.x.shape[1]} columns and "
            f"{workers} workers need {least} to train on; nothing was started"
        )
    parts = [
        Numbers(table.x[rows], table.y[rows], table.names, table.target, table.truth)
        for rows in (order[held:], order[:held])
    ]
    same = [name for name, column in zip(table.names, parts[0].x.T, strict=True) if np.ptp(column) == 0]
    same += [table.target] if any(np.ptp(part.y) == 0 for part in parts) else []
    if same:
        raise DataError(
            f"column {', '.join(same)}: the same in all rows, so nothing can be told from it; nothing was started"
        )
    return Split(*parts)
