"""The command group: one JSON object and nothing else on stdout."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from headwater_bench import commands as bench
from headwater_bench.options import Options
from headwater_bench.report import Figure, figure

runner = CliRunner()


@pytest.fixture(autouse=True)
def instant(monkeypatch: pytest.MonkeyPatch) -> list[Options]:
    """Every bench answers at once with its own options noted."""
    asked: list[Options] = []

    def measure(options: Options) -> list[Figure]:
        asked.append(options)
        options.note("measuring")
        return [figure("small", "local p50 / raw socket", 2.0, "×", 1.0)]

    monkeypatch.setattr(bench, "load", lambda name: measure)
    return asked


@pytest.mark.parametrize("name", bench.BENCHES)
def test_each_bench_prints_one_object(name: str) -> None:
    result = runner.invoke(bench.app, [name, "--json"])
    assert result.exit_code == 0
    decoded = json.loads(result.stdout)
    assert (decoded["bench"], len(decoded["figures"])) == (name, 1)
    assert "measuring" in result.stderr


@pytest.mark.parametrize("arguments", [["all", "--json"], ["--json"]])
def test_all_is_the_default(arguments: list[str]) -> None:
    decoded = json.loads(runner.invoke(bench.app, arguments).stdout)
    assert decoded["bench"] == "all"
    assert [f["name"].split(":")[0] for f in decoded["figures"]] == list(bench.BENCHES)


def test_the_options_reach_the_bench(instant: list[Options]) -> None:
    runner.invoke(bench.app, ["dense", "--transport", "tcp", "--size", "8", "--rounds", "3", "--servers", "1"])
    (options,) = instant
    assert (options.transports(), options.size, options.rounds_or(30), options.servers) == (("tcp",), 8, 3, 1)


def test_the_table_is_the_default_form() -> None:
    result = runner.invoke(bench.app, ["small"])
    assert "raw socket" in result.stdout
    assert not result.stdout.startswith("{")


def test_an_unknown_transport_is_refused() -> None:
    assert runner.invoke(bench.app, ["dense", "--transport", "pigeon"]).exit_code == 2


def test_the_group_loads_without_torch() -> None:
    code = "import sys, headwater_bench; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", bench.BENCHES)
def test_every_bench_can_be_loaded(name: str) -> None:
    assert callable(importlib.import_module(f"headwater_bench.{name}").measure)
