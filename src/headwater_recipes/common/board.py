"""What all workers said, put together: the rows of ``metrics.jsonl`` and the figures of the display."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from statistics import fmean
from typing import Any

from headwater_recipes.common.reports import (
    Doing,
    Figures,
    Finished,
    Glanced,
    Published,
    Report,
    Saved,
    Started,
    Stepped,
    Validated,
)
from headwater_recipes.common.task import Sums, Task, add


class Board:
    """Pure: reports in, rows out. A row of a training step needs the report of every rank that is there; one of
    held-out data, of which each rank has a share, that of every rank.

    Attributes: ``latest`` the last figures of each rank; ``doing`` what the rank that spoke last does beside training
    ("" if it trains); ``rows`` the metrics so far, oldest first; ``saved`` the
    step of the last checkpoint; ``published`` the last version's name; ``finished`` by rank; ``final`` the sums of all
    held-out data.
    """

    def __init__(self, task: type[Task[Any]], world: int, rows: list[dict[str, Any]] | None = None) -> None:
        self._task, self._world = task, world
        self._since: dict[int, int] = dict.fromkeys(range(world), -1)  # the step after which each rank reports
        self._steps: dict[int, dict[int, Stepped]] = {}
        self._validations: dict[int, dict[int, Validated]] = {}
        self._finals: dict[int, Validated] = {}
        self.started: dict[int, Started] = {}
        self.latest: dict[int, Figures] = {}
        self.doing = ""
        self.finished: dict[int, Finished] = {}
        self.saved: int | None = None
        self.published: str | None = None
        self.final: Sums | None = None
        self.rows: list[dict[str, Any]] = list(rows or [])

    def hear(self, report: Report) -> dict[str, Any] | None:
        """Take a report in; the row that it completes, if it does."""
        row = None
        match report:
            case Started():
                if report.rank in self.started or report.rank not in self._since:  # in the place of one that died
                    self._since[report.rank] = report.step
                self.started[report.rank] = report
                self.doing = ""
            case Doing():
                self.doing = report.what
            case Glanced():
                self.latest[report.rank] = report
                self.doing = ""
            case Stepped():
                self.latest[report.rank] = report
                self.doing = ""
                row = self._step(report)
            case Validated():
                row = self._validation(report)
            case Saved():
                self.saved = report.step
            case Published():
                self.published = report.name
            case Finished():
                self.finished[report.rank] = report
        if row is not None:
            self.rows.append(row)
        return row

    def lost(self, rank: int) -> list[dict[str, Any]]:
        """A rank died; the rows that waited for it alone. It is there again when it has ``Started``."""
        self._since.pop(rank, None)
        rows = [row for step in sorted(self._steps) if (row := self._whole_step(step)) is not None]
        self.rows += rows
        return rows

    def _all(self, step: int, ranks: Collection[int]) -> bool:
        """Whether these are all that report of a step."""
        return all(rank in ranks for rank, since in self._since.items() if since < step)

    def _step(self, report: Stepped) -> dict[str, Any] | None:
        self._steps.setdefault(report.step, {})[report.rank] = report
        return self._whole_step(report.step)

    def _whole_step(self, step: int) -> dict[str, Any] | None:
        if not self._all(step, self._steps[step]):
            return None
        parts = self._steps.pop(step)
        return self._row([parts[rank] for rank in sorted(parts)])

    def _validation(self, report: Validated) -> dict[str, Any] | None:
        parts = self._finals if report.final else self._validations.setdefault(report.step, {})
        parts[report.rank] = report
        if len(parts) < self._world or (report.final and self.final is not None):
            return None
        sums = add(each.sums for each in parts.values())
        if report.final:
            self.final = sums
        else:
            del self._validations[report.step]
        return {
            "kind": "final" if report.final else "validation",
            "step": report.step,
            **self._task.metrics(sums),
            "elapsed": report.elapsed,
        }

    @property
    def last(self) -> dict[str, Any] | None:
        """The newest row of a training step."""
        return next((row for row in reversed(self.rows) if row["kind"] == "step"), None)

    @property
    def now(self) -> dict[str, Any] | None:
        """As a row, how it stands: the newest row, or what the ranks have said since."""
        row = self.last
        if len(self.latest) < self._world:
            return row
        said = [self.latest[rank] for rank in sorted(self.latest)]
        return row if row is not None and row["step"] >= said[0].step else self._row(said)

    @property
    def validated(self) -> dict[str, Any] | None:
        """The newest row of a validation."""
        return next((row for row in reversed(self.rows) if row["kind"] != "step"), None)

    @property
    def seconds_left(self) -> float | None:
        """Of training, at the pace so far."""
        row = self.now
        if row is None or row["progress"] <= 0:
            return None
        return float(row["elapsed"] / row["progress"] * (1 - row["progress"]))

    def _row(self, said: Sequence[Figures]) -> dict[str, Any]:
        """The row of a training step, of what each rank said."""
        return {
            "kind": "step",
            "step": said[0].step,
            "loss": fmean(each.loss for each in said),
            "lr": said[0].lr,
            f"{self._task.recipe.wording.unit}_per_second": sum(each.units_per_second for each in said),
            "pushed_bytes_per_second": sum(each.pushed_per_second for each in said),
            "pulled_bytes_per_second": sum(each.pulled_per_second for each in said),
            "staleness": max(each.staleness for each in said),
            "grad_norm": said[0].grad_norm,
            "elapsed": said[0].elapsed,
            "progress": said[0].progress,
        }
