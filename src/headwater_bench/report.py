"""What a benchmark says: figures with their ceilings and targets, as one JSON object or one table."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import msgspec
from rich.table import Table

from headwater_bench.targets import TARGETS


class Figure(msgspec.Struct, frozen=True):
    """One measured value.

    ``ceiling`` is the best this machine allows, measured in the same run and in the same unit as
    ``value``; ``None`` if the figure is a ceiling or a baseline itself. ``target`` and ``met`` are
    ``None`` where none is set.
    """

    name: str
    value: float
    unit: str
    ceiling: float | None = None
    target: str | None = None
    met: bool | None = None


class Machine(msgspec.Struct, frozen=True):
    """Where it was measured. ``load`` is the one-minute load average when the run began: other people's work."""

    cpu: str
    cores: int
    memory_gb: float
    kernel: str
    python: str
    torch: str
    load: float

    def __str__(self) -> str:
        software = f"{self.kernel}, Python {self.python}, torch {self.torch}"
        return f"{self.cpu}, {self.cores} cores, {self.memory_gb:g} GB, {software}, load {self.load} at the start"


class Report(msgspec.Struct, frozen=True):
    """The object that ``--json`` prints."""

    bench: str
    machine: Machine
    figures: list[Figure]


def figure(bench: str, name: str, value: float, unit: str, ceiling: float | None = None) -> Figure:
    """A figure with the target that ``targets.py`` sets for ``bench: name``, if it sets one."""
    target = TARGETS.get(f"{bench}: {name}")
    if target is None:
        return Figure(name, value, unit, ceiling)
    return Figure(name, value, unit, ceiling, str(target), target.met(value))


def machine() -> Machine:
    """This machine, without its name or anyone's path."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Machine(
        cpu=_cpu(),
        cores=len(os.sched_getaffinity(0)),
        memory_gb=round(memory / 2**30, 1),
        kernel=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        torch=metadata.version("torch"),
        load=round(os.getloadavg()[0], 2),
    )


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def to_json(report: Report) -> str:
    """The report as one line of JSON: keys ``bench``, ``machine``, ``figures``."""
    return msgspec.json.encode(report).decode()


def number(value: float | None) -> str:
    """Three significant digits, and no exponent."""
    if value is None:
        return ""
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:,.{digits}f}" if abs(value) >= 0.1 or value == 0 else f"{value:.2g}"


def cells(figures: Sequence[Figure]) -> list[tuple[str, str, str, str, str, str]]:
    """The table's body: figure, value, unit, ceiling, target, met."""
    verdict = {True: "yes", False: "NO", None: ""}
    return [(f.name, number(f.value), f.unit, number(f.ceiling), f.target or "", verdict[f.met]) for f in figures]


HEAD = ("figure", "value", "unit", "ceiling", "target", "met")


def to_table(report: Report) -> Table:
    """The report for a terminal."""
    table = Table(title=f"headwater bench {report.bench}", caption=str(report.machine))
    for column in HEAD:
        table.add_column(column, justify="right" if column in ("value", "ceiling") else "left")
    for row in cells(report.figures):
        table.add_row(*row, style={"yes": "green", "NO": "bold red"}.get(row[-1]))
    return table


def to_markdown(figures: Sequence[Figure]) -> str:
    """The same table for a page under ``benchmarks/``."""
    lines = ["| " + " | ".join(HEAD) + " |", "|---|---:|---|---:|---|---|"]
    lines += ["| " + " | ".join(row) + " |" for row in cells(figures)]
    return "\n".join(lines) + "\n"
