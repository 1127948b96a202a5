"""The regression guard: the counts are those in the repository, and one more call per frame is seen."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from headwater_bench.guard import compare
from tests.patience import PATIENCE

KEPT = json.loads(compare.FIGURES.read_text(encoding="utf-8"))
KNOWN = KEPT["figures"].get(compare.VERSION)
TOLERANCE = KEPT["tolerance"]

SLOWER = """
from headwater.wire import frames

encode = frames.encode
frames.encode = lambda frame: encode(frame)

from headwater_bench.guard.compare import main

main(["--count"])
"""
"""One more function is called for each frame that is sent."""


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *command], check=False, capture_output=True, text=True, timeout=PATIENCE, env=environment
    )


@pytest.mark.skipif(KNOWN is None, reason="no figures for this version of Python; make bench-guard UPDATE=1 adds them")
def test_nothing_takes_more_calls_or_memory_than_before() -> None:
    found = _run("-m", "headwater_bench.guard")
    assert found.returncode == 0, f"\n{found.stdout}\n{found.stderr}\nSee CONTRIBUTING.md, `make bench-guard`."
    for workload in KNOWN:
        assert f"{workload}: " in found.stdout


def test_one_more_call_per_frame_is_seen() -> None:
    """Against this code's own counts, so that it holds whatever the figures are."""
    before = json.loads(_run("-m", "headwater_bench.guard", "--count").stdout)
    after = json.loads(_run("-c", SLOWER).stdout)
    more = compare.worse(after, before, TOLERANCE)
    assert [line.split(",")[0] for line in more] == [f"small push: {after['small push']['functions']} functions"]
    assert compare.worse(before, before, TOLERANCE) == []


def test_what_is_worse_and_what_is_better() -> None:
    tolerance = {"functions": 0.01, "sockets": 0.0}
    known = {"push": {"functions": 200, "sockets": 5}}
    same = {"push": {"functions": 202, "sockets": 5}}
    assert compare.worse(same, known, tolerance) == compare.better(same, known, tolerance) == []
    assert compare.worse({"push": {"functions": 203, "sockets": 4}}, known, tolerance) == [
        "push: 203 functions, 200 in the repository"
    ]
    assert compare.better({"push": {"functions": 203, "sockets": 4}}, known, tolerance) == [
        "push: 4 sockets, 5 in the repository"
    ]
    assert compare.worse({"pull": {"functions": 1}}, known, tolerance) == ["pull: no figure for functions (1)"]


def test_new_figures_are_of_this_version_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "guard.json"
    other = {"push": {"functions": 1}}
    path.write_text(json.dumps({"tolerance": {"functions": 0.0}, "figures": {"2.7": other}}))
    monkeypatch.setattr(compare, "FIGURES", path)
    assert compare._judge({"push": {"functions": 2}}, update=False) == 2
    assert compare._judge({"push": {"functions": 2}}, update=True) == 0
    assert json.loads(path.read_text())["figures"] == {"2.7": other, compare.VERSION: {"push": {"functions": 2}}}
    assert compare._judge({"push": {"functions": 3}}, update=False) == 1
