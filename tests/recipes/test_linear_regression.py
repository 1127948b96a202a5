"""examples/linear_regression.py, which the README shows: alone, and with three workers."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from headwater.launch import Process, launch

EXAMPLE = Path(__file__).parents[2] / "examples" / "linear_regression.py"


def test_alone_it_finds_the_closed_form(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLE))  # it asserts that itself
    assert "β5" in capsys.readouterr().out


def test_with_three_workers_it_finds_the_closed_form() -> None:
    lines = []

    def hear(process: Process, stream: str, line: str) -> None:
        lines.append(line)

    outcome = launch([sys.executable, str(EXAMPLE)], servers=2, workers=3, on_line=hear)
    assert outcome.code == 0, outcome
    assert sum(line.startswith("β") for line in lines) == 6
