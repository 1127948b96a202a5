"""Tables of numbers: from a CSV file to rows to train on and rows held out, as the run folder keeps them."""

from __future__ import annotations

import csv
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import msgspec
import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file

from headwater.errors import DataError
from headwater_recipes.common import checkpoint

Array = npt.NDArray[np.float64]

HELD_OUT = 0.2
"""Share of the rows."""

_PARTS = ("training", "held_out")


@dataclass(frozen=True)
class Numbers:
    """``x`` (N, F), ``y`` (N,), float64; ``names`` of the F columns, ``target`` that of ``y``; ``truth`` (F,): the
    coefficients that y was made by, if they are known.
    """

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

    def save(self, folder: Path) -> None:
        """``table.safetensors`` and ``columns.json``."""
        parts = {part: getattr(self, part) for part in _PARTS}
        arrays = {f"{part}.{name}": getattr(each, name) for part, each in parts.items() for name in ("x", "y")}
        if self.training.truth is not None:
            arrays["truth"] = self.training.truth
        save_file(arrays, folder / "table.safetensors")
        checkpoint.write_json(folder / "columns.json", {"names": self.training.names, "target": self.training.target})

    @classmethod
    def load(cls, folder: Path) -> Self:
        """What ``save`` wrote."""
        columns: dict[str, Any] = msgspec.json.decode((folder / "columns.json").read_bytes())
        arrays = load_file(folder / "table.safetensors")
        names, target, truth = tuple(columns["names"]), columns["target"], arrays.get("truth")
        return cls(*(Numbers(arrays[f"{part}.x"], arrays[f"{part}.y"], names, target, truth) for part in _PARTS))


def read_csv(path: Path, target: str = "") -> Numbers:
    """A row of names, then rows of numbers.

    Args:
        path: a CSV file in UTF-8.
        target: the column to predict; the last one if it is "".

    Raises:
        DataError: it cannot be read, has no such column, or a cell that is no number, by its row and column.
    """
    lines: list[tuple[int, list[str]]] = []
    number = 0
    try:
        with path.open(encoding="utf-8-sig", newline="") as opened:
            for number, row in enumerate(csv.reader(opened, strict=True), 1):
                lines += [(number, row)] if row else []
    except csv.Error as error:
        raise DataError(f"{path}, row {number + 1}: {error} (as CSV, see its quotes); nothing was started") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as a table ({error}); nothing was started") from error
    if len(lines) < 2 or len(lines[0][1]) < 2:
        raise DataError(f"{path}: needs a row of names, two columns or more, and rows of numbers; nothing was started")
    names = [name.strip() for name in lines[0][1]]
    if all(_number(name) is not None for name in names):
        raise DataError(f"{path}, row 1: must be the names of the columns; it holds numbers; nothing was started")
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise DataError(f"{path}, row 1: two columns are called {twice[0]!r}; nothing was started")
    if target and target not in names:
        raise DataError(f"{path}: no column {target!r}, but {', '.join(names)[:200]}; nothing was started")
    table = np.array([_numbers(path, number, row, names) for number, row in lines[1:]], np.float64)
    aim = names.index(target) if target else len(names) - 1
    return Numbers(np.delete(table, aim, 1), table[:, aim], tuple(names[:aim] + names[aim + 1 :]), names[aim])


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
