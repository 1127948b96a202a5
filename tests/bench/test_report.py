"""Figures, targets, and the three forms of a report."""

from __future__ import annotations

import io
import json
import math

import pytest
from rich.console import Console

from headwater_bench.commands import BENCHES
from headwater_bench.report import Figure, Report, figure, machine, number, to_json, to_markdown, to_table
from headwater_bench.targets import TARGETS, at_least, at_most


def test_the_bounds_include_themselves() -> None:
    assert at_most(1.25).met(1.25)
    assert not at_most(1.25).met(1.26)
    assert at_least(3).met(3)
    assert not at_least(3).met(2.9)


@pytest.mark.parametrize("target", [at_most(1), at_least(1)])
def test_nan_meets_nothing(target: object) -> None:
    assert not target.met(math.nan)  # type: ignore[attr-defined]


def test_a_figure_finds_its_target() -> None:
    found = figure("dense", "local SGD time / kernel alone", 1.3, "×", 1.0)
    assert (found.target, found.met) == ("<= 1.25", False)
    assert figure("small", "local p50 / raw socket", 2.0, "×", 1.0).met is True


def test_a_figure_without_a_target() -> None:
    assert figure("dense", "local SGD copied in and out", 9.0, "ms", 5.0) == Figure(
        "local SGD copied in and out", 9.0, "ms", 5.0, None, None
    )


def test_the_json_is_one_object_with_these_keys() -> None:
    report = Report("dense", machine(), [figure("dense", "local SGD time / kernel alone", 1.1, "×", 1.0)])
    line = to_json(report)
    assert "\n" not in line
    decoded = json.loads(line)
    assert list(decoded) == ["bench", "machine", "figures"]
    assert list(decoded["figures"][0]) == ["name", "value", "unit", "ceiling", "target", "met"]
    assert decoded["machine"]["cores"] >= 1


def test_the_machine_says_nothing_about_its_owner() -> None:
    assert set(json.loads(to_json(Report("x", machine(), [])))["machine"]) == {
        "cpu",
        "cores",
        "memory_gb",
        "kernel",
        "python",
        "torch",
        "load",
    }


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, ""), (0.0, "0.00"), (1.234, "1.23"), (12.34, "12.3"), (1234.5, "1,234"), (0.0123, "0.012")],
)
def test_numbers_keep_three_digits(value: float | None, text: str) -> None:
    assert number(value) == text


def test_the_table_shows_what_falls_short() -> None:
    report = Report("dense", machine(), [figure("dense", "local SGD time / kernel alone", 1.3, "×", 1.0)])
    out = io.StringIO()
    Console(file=out, width=160).print(to_table(report))
    assert "<= 1.25" in out.getvalue()
    assert "NO" in out.getvalue()


def test_the_markdown_has_a_row_per_figure() -> None:
    text = to_markdown([figure("many", "local time per tensor", 3.0, "µs", 1.0)])
    assert text.splitlines()[0] == "| figure | value | unit | ceiling | target | met |"
    assert text.splitlines()[2] == "| local time per tensor | 3.00 | µs | 1.00 | <= 20 | yes |"


def test_every_target_names_its_bench() -> None:
    assert {key.split(":")[0] for key in TARGETS} == set(BENCHES)
