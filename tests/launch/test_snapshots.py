"""Snapshots of a cluster of real processes: taken while it trains, and begun with by another cluster."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import headwater
from headwater.errors import ClusterError, HeadwaterError, UsageError
from headwater.launch import Launcher, Shape
from headwater.server.snapshots import manifest
from headwater.server.snapshots.restore import newest
from headwater.wire import messages as m
from headwater.wire.data_plan import PlanChunk, PlanNext
from tests.patience import PATIENCE

SIZE = 30_000


@contextmanager
def cluster(monkeypatch: pytest.MonkeyPatch, servers: int, **options: object) -> Iterator[Launcher]:
    with Launcher(Shape(servers, **options)) as launcher:  # type: ignore[arg-type]
        for name, value in launcher.environment().items():
            monkeypatch.setenv(name, value)
        yield launcher


def train(ps: headwater.Client, first: int, last: int) -> torch.Tensor:
    """Steps ``first`` to ``last`` of the one run that all of this is about; the values then."""
    w = ps.dense("w", (SIZE,), init=headwater.init.normal(0.1), optimizer=torch.optim.AdamW, lr=0.01,
                 sync=headwater.Bulk())  # fmt: skip
    for step in range(first, last + 1):
        values = w.push_pull(torch.randn(SIZE, generator=torch.Generator().manual_seed(step)))
    return values.clone()


def plan(ps: headwater.Client, turn: int, *finished: tuple[int, int]) -> int:
    """The next chunk of a data plan of four."""
    answer = ps.ask(PlanNext("data", n=40, epochs=1, seed=0, chunk=10, overlap=False, turn=turn, finished=finished))
    assert isinstance(answer, PlanChunk)
    return answer.chunk


def take(ps: headwater.Client) -> Path:
    taken = ps.ask(m.TakeSnapshot())
    assert isinstance(taken, m.SnapshotTaken)
    assert taken.nbytes > 4 * SIZE
    return Path(taken.path)


def test_another_cluster_goes_on_to_the_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "snapshots"
    with cluster(monkeypatch, 2, snapshots=folder), headwater.connect() as ps:
        with pytest.raises(ClusterError, match="no table yet"):
            take(ps)
        train(ps, 1, 3)
        first = plan(ps, 1)
        assert plan(ps, 2, (first, 3)) != first
        assert take(ps) == folder / "00000001"
        expected = train(ps, 4, 6)
        assert take(ps) == folder / "00000002"

    victim = folder / "00000002" / "shard-00001.safetensors"
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)  # so the one before is used

    with cluster(monkeypatch, 3, replicas=2, restore=folder) as launcher, headwater.connect() as ps:
        assert sorted(plan(ps, turn) for turn in (1, 2, 3)) == sorted({0, 1, 2, 3} - {first})
        train(ps, 4, 4)
        os.kill(launcher.servers[1].pid, signal.SIGKILL)  # its copies began with the snapshot too
        assert torch.equal(train(ps, 5, 6), expected)
        assert ps.tables["w"].clock == 6
        with pytest.raises(UsageError, match="--snapshots DIR"):
            take(ps)


def test_the_period(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "snapshots"
    with (
        cluster(monkeypatch, 1, snapshots=folder, snapshot_every=0.1) as launcher,
        headwater.connect() as ps,
    ):
        train(ps, 1, 1)
        while max(manifest.finished(folder), default=0) < 4:
            assert launcher.poll(0.05)
        ps.status()
    assert len(manifest.finished(folder)) == 2


def test_a_cluster_that_cannot_begin_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(HeadwaterError, match="holds no finished snapshot"), cluster(monkeypatch, 1, restore=tmp_path):
        pytest.fail("it has begun")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB, where mounting is allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(folder)]
    if os.geteuid() != 0 or shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def _contents(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_disk_that_was_full_has_its_room_back(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two servers: the part of one fits, that of the other does not. Neither stays."""
    left = small_disk / "00000001"
    left.mkdir()
    (left / "shard-00000.safetensors.part").write_bytes(bytes(200_000))  # of a cluster that was killed
    with cluster(monkeypatch, 2, snapshots=small_disk) as launcher, headwater.connect() as ps:
        assert not left.exists()
        train(ps, 1, 1)
        first = take(ps)
        sound = _contents(small_disk)
        hog = small_disk / "hog"
        free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
        hog.write_bytes(bytes(free - 250_000))
        with pytest.raises(ClusterError, match="No space left on device"):
            take(ps)
        hog.unlink()
        deadline = time.monotonic() + PATIENCE
        while _contents(small_disk) != sound:  # the last attempt's files go in the background
            assert time.monotonic() < deadline, _contents(small_disk)
            launcher.poll(0.05)
        assert _contents(first.parent) == sound
        assert take(ps).is_dir()


def test_servers_and_coordinators_that_die_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Snapshots go on after each of them, and what is there at any time is sound."""
    folder = tmp_path / "snapshots"
    options = {"replicas": 2, "state": tmp_path / "state", "snapshots": folder, "snapshot_every": 0.1}
    with cluster(monkeypatch, 2, **options) as launcher, headwater.connect() as ps:
        train(ps, 1, 1)
        for victim in ("server", "coordinator"):
            before = max(manifest.finished(folder), default=0)
            process = launcher.servers[0] if victim == "server" else launcher.coordinator
            assert process is not None
            os.kill(process.pid, signal.SIGKILL)
            while max(manifest.finished(folder), default=0) < before + 3:
                assert launcher.poll(0.05), launcher.outcome
        expected = train(ps, 2, 3)
        number = max(manifest.finished(folder))
        while max(manifest.finished(folder)) < number + 2:
            assert launcher.poll(0.05), launcher.outcome
    found = newest(folder)
    with found.snapshot as snapshot:
        assert not found.refused
        assert torch.equal(snapshot.read("w", 0, "value", 0, SIZE), expected)
