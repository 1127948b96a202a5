"""A few seconds of chaos per policy, with real processes; `make chaos` runs minutes of it.

The seeds are those whose first faults are kills of servers, of workers and of the coordinator, and broken connections.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.patience import PATIENCE


@pytest.mark.parametrize(("mode", "seed"), [("bulk", 372), ("stale", 546), ("async", 14)])
def test_nothing_acknowledged_is_lost(mode: str, seed: int) -> None:
    command = [sys.executable, "-m", "headwater", "chaos", "--mode", mode, "--seconds", "5", "--seed", str(seed)]
    found = subprocess.run([*command, "--json"], capture_output=True, text=True, check=False, timeout=PATIENCE)
    said = f"\n{found.stderr}\n{found.stdout}"
    assert found.returncode == 0, said
    report = json.loads(found.stdout)
    assert {"faults", "acknowledged", "lost", "doubled", "recovery", "throughput"} <= set(report)
    assert (report["lost"], report["doubled"], report["failures"]) == (0, 0, []), said
    assert report["faults"], said
    assert report["acknowledged"] > 0, said
    assert report["equal_steps"] == report["steps"], said
    assert "FAILED" not in found.stderr
