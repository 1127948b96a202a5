from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from headwater.errors import DataError
from headwater_recipes.lm import commands

APP = typer.Typer()
APP.command()(commands.train)
APP.command()(commands.generate)


@pytest.mark.parametrize("command", ["train", "generate"])
def test_the_help_says_how(command: str) -> None:
    result = CliRunner().invoke(APP, [command, "--help"])
    assert result.exit_code == 0
    assert "--run" in result.output


def test_a_folder_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    result = CliRunner().invoke(APP, ["train", "--run", str(tmp_path)])
    assert isinstance(result.exception, DataError)
    assert "--resume" in str(result.exception)


def test_generating_without_a_model_is_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(APP, ["generate", "--run", str(tmp_path)])
    assert isinstance(result.exception, DataError)


def test_threads_that_wait_sleep_when_text_is_generated(tmp_path: Path) -> None:
    """The library of OpenMP says what it was told when it was loaded."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))}
    environment["OMP_DISPLAY_ENV"] = "VERBOSE"
    command = [sys.executable, "-m", "headwater", "generate", "--run", str(tmp_path)]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=False).stderr
    assert "GOMP_SPINCOUNT = '0'" in said
    kept = environment | {"OMP_WAIT_POLICY": "active"}
    said = subprocess.run(command, env=kept, capture_output=True, text=True, check=False).stderr
    assert "OMP_WAIT_POLICY = 'ACTIVE'" in said
