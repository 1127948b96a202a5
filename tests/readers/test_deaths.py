"""Readers when processes die: another copy serves, a coordinator comes back, or the last version stays."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import headwater
from headwater.errors import HeadwaterError, LinkError
from headwater.launch import Launcher, Shape
from tests.patience import PATIENCE

SHAPE = (600, 500)


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Launcher]:
    """Three servers, two copies of each shard, and a coordinator that comes back."""
    with Launcher(Shape(3, replicas=2, state=tmp_path / "state"), advertise=False, on_note=lambda line: None) as made:
        for key, value in made.environment().items():
            monkeypatch.setenv(key, value)
        yield made


def until(job: Launcher, done: Callable[[], bool], what: str, seconds: float = PATIENCE) -> None:
    """Until it is so; the launcher looks after its processes meanwhile."""
    deadline = time.monotonic() + seconds
    while True:
        job.poll(0.02)
        try:
            if done():
                return
        except HeadwaterError:
            pass
        assert time.monotonic() < deadline, what


@pytest.mark.parametrize("way", ["local", "tcp"])
def test_a_version_outlives_a_server_and_its_leases_the_coordinator(
    job: Launcher, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEADWATER_TRANSPORT", way)
    with headwater.connect(timeout=PATIENCE) as ps, headwater.reader("w", timeout=PATIENCE) as reader:
        w = ps.dense("w", SHAPE)
        w.push(torch.randn(SHAPE)).wait()
        first = ps.publish([w], "v1", keep=1, tags=["prod"]).wait()
        wanted = w.pull().clone()
        until(job, lambda: reader.versions()[0].copies == 2, "there are not two copies")
        held = reader.lease("v1")
        tensor = held["w"]
        os.kill(job.servers[0].pid, signal.SIGKILL)
        with headwater.reader("w", timeout=PATIENCE) as late, late.lease("prod") as weights:
            assert torch.equal(weights["w"], wanted)
        assert torch.equal(tensor, wanted)
        w.push(torch.randn(SHAPE)).wait()
        second = ps.publish([w], "v2", keep=1).wait()
        newest = w.pull().clone()
        with reader.lease() as weights:
            assert torch.equal(weights["w"], newest)

        assert job.coordinator is not None
        os.kill(job.coordinator.pid, signal.SIGKILL)
        # A short wait each time: only the launcher, which is looked after in between, starts a coordinator again.
        until(job, lambda: reader.lease("v2", timeout=1).version == second, "version 2 did not come back")
        until(job, lambda: [s.state for s in reader.versions()] == ["ready", "ready"], "versions are lost")
        until(job, lambda: reader.versions()[0].leases == 1, "a lease was forgotten")
        assert reader.statistics().connected
        reader.untag("prod")
        third = ps.publish([w], "v3", keep=1).wait()
        assert third.number > second.number > first.number
        until(job, lambda: next(s.info.name for s in reader.versions()) == "v1", "it went under its lease")
        assert torch.equal(reader.lease("v1")["w"], wanted)
        held.release()
        until(job, lambda: [s.info.name for s in reader.versions()] == ["v3"], "nobody holds them any more")
        assert torch.equal(tensor, wanted)


def test_without_its_cluster_a_reader_keeps_what_it_has_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with Launcher(1, advertise=False) as job:
        for key, value in job.environment().items():
            monkeypatch.setenv(key, value)
        with headwater.connect(timeout=PATIENCE) as ps:
            w = ps.dense("w", SHAPE)
            w.push(torch.ones(SHAPE)).wait()
            ps.publish([w], "v1").wait()
            wanted = w.pull().clone()
        reader = headwater.reader("w", timeout=PATIENCE)
        weights = reader.lease()
        assert reader.statistics().connected
        assert job.coordinator is not None
        for process in (job.coordinator, *job.servers):
            os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(LinkError):
            reader.wait(after=1, timeout=PATIENCE)
        stats = reader.statistics()
        assert (stats.connected, stats.version) == (False, weights.version)
        assert stats.age > 0
        assert stats.error
        assert torch.equal(weights["w"], wanted)
        with pytest.raises(LinkError):
            reader.lease()
        weights.release()
        reader.close()
