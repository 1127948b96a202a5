"""The benches of what survives, with real processes and next to nothing to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from headwater_bench import recovery, replicas, snapshot
from headwater_bench.options import Options
from headwater_bench.tiny import Acks

BRIEF = Options(lambda text: None, rounds=1)


def test_pushes_with_two_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas, "PUSH", 1)
    found = {f.name: f.value for f in replicas._pushes(BRIEF, "local")}
    assert found["local 1 MB push, 2 replicas"] > 0


def test_a_snapshot_is_written_and_read(tmp_path: Path) -> None:
    (taken,) = snapshot._write(BRIEF, tmp_path / "snapshots", elements=100_000, rounds=1, calm=0.3)
    assert taken.nbytes > 3 * 4 * 100_000
    assert snapshot.write_figures([taken])
    assert all(seconds > 0 for found in snapshot._read(tmp_path / "snapshots", 1).values() for seconds in found)
    assert not (tmp_path / "plain").exists()


def test_one_death_of_each_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery.goodput, "measure", lambda options: [])
    found = {f.name: f.value for f in recovery.measure(BRIEF)}
    assert found["primary killed, acknowledges again, p50"] > 0
    assert found["steps lost by workers that were not struck"] == 0


def test_a_growing_file_of_acknowledgements(tmp_path: Path) -> None:
    path = tmp_path / "0"
    acks = Acks(path)
    acks.read()
    path.write_text("A tiny 1 7 1.500000\nA tiny 2 8 1.6")
    acks.read()
    assert acks.found == [(1.5, 7)]
    path.write_text("A tiny 1 7 1.500000\nA tiny 2 8 1.600000\n")
    acks.read()
    assert acks.found == [(1.5, 7), (1.6, 8)]
