"""Logs on disks: what was acknowledged comes back after everything was killed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import torch

import headwater
from headwater.errors import Halt, StateCorrupt, StateInUse
from headwater.server.node import Setting
from headwater.server.replication import disk
from headwater.server.replication.disk import Folder, Identity, frames_of
from headwater.server.server import Server
from headwater.types import Async, Bulk, Stale, Sync
from headwater.wire import messages as m
from headwater.wire import versions as v
from headwater.wire.frames import Flag, Kind
from tests.server.ring import Ring, Worker, spec


class Dry(Ring):
    """A ring whose servers keep logs; while ``held``, no turn of their loops ends."""

    def __init__(self, folder: Path, servers: int = 1) -> None:
        super().__init__(servers)
        self.held: set[int] = set()
        self.servers = [back(folder, n) for n in range(servers)]

    def run(self) -> None:
        while True:
            super().run()
            moved = [(n, s.sync()) for n, s in enumerate(self.servers) if n not in self.held | self.down]
            for number, instructions in moved:
                self._do(number, instructions)
            if not any(instructions for _, instructions in moved):
                return


def back(folder: Path, number: int = 0) -> Server:
    """A server that starts with what is in its folder."""
    data = folder / f"s{number}"
    data.mkdir(exist_ok=True)
    server = Server(Setting(number, 1, threads=False, data=data))
    server.replay([int(path.stem[6:]) for path in data.glob("shard-*.log")])
    return server


def log_of(folder: Path, number: int = 0) -> Path:
    return folder / f"s{number}" / "shard-00000.log"


def primary(folder: Path, sync: Sync | None = None, optimizer: str = "SGD", servers: int = 1) -> tuple[Dry, Worker]:
    ring = Dry(folder, servers)
    ring.adopt(0, backups=list(range(1, servers)))
    ring.begin(spec(sync, optimizer))
    worker = Worker(ring)
    worker.open(0)
    return ring, worker


@pytest.mark.parametrize("sync", [Bulk(), Stale(1), Async()])
@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_a_replay_gives_the_same_bits(tmp_path: Path, sync: Sync, optimizer: str) -> None:
    ring, worker = primary(tmp_path, sync, optimizer, servers=2)
    for seed in range(3):
        worker.push(seed)
    assert worker.acks() == [1, 2, 3]
    for number in range(2):
        shard = back(tmp_path, number).nodes[0].shard
        assert (shard.lsn, shard.replica.digest()) == ring.digest(number)
        assert shard.reign == 1


@pytest.mark.parametrize("late", [0, 1])
def test_nothing_is_acknowledged_before_every_disk_has_it(tmp_path: Path, late: int) -> None:
    ring, worker = primary(tmp_path, servers=2)
    ring.held = {late}
    worker.push(1)
    assert worker.acks() == []
    ring.held = set()
    ring.run()
    assert worker.acks() == [1]


def test_versions_are_not_made_again_when_a_log_is_read_back(tmp_path: Path) -> None:
    """They live in memory: hundreds of them would have to fit at once, and most are retired."""
    ring, worker = primary(tmp_path)
    for number in range(1, 6):
        worker.push(number)
        ring.tell(0, v.CutVersion(number, 0, (1,)))
        ring.run()
    assert len(ring.servers[0].setting.part_store.parts) == 5
    again = back(tmp_path)
    assert again.nodes[0].shard.replica.digest() == ring.node(0).shard.replica.digest()
    assert not again.setting.part_store.parts
    assert not again.setting.part_store.outbox.reports


def test_one_sync_serves_all_records_of_a_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ring, worker = primary(tmp_path)
    ring.held = {0}
    for seed in range(8):
        worker.push(seed)
    calls = []
    monkeypatch.setattr(disk.os, "fdatasync", lambda fd: calls.append(fd))
    ring.held = set()
    ring.run()
    assert worker.acks() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert len(calls) == 1


def test_a_tail_torn_at_any_byte_ends_the_replay_before_it(tmp_path: Path) -> None:
    ring, worker = primary(tmp_path)
    worker.push(1)
    expected, data = ring.digest(0), log_of(tmp_path).read_bytes()
    ring.tell(0, m.Members(2, (0,), 0, "", (70,)))  # a record without a payload: short
    ring.run()
    longer = log_of(tmp_path).read_bytes()
    assert longer.startswith(data)
    for size in range(len(data), len(longer)):
        log_of(tmp_path).write_bytes(longer[:size])
        shard = back(tmp_path).nodes[0].shard
        assert (shard.lsn, shard.replica.digest()) == expected
        assert log_of(tmp_path).read_bytes() == data, "what is appended next follows a sound frame"
    for at in range(len(data), len(longer)):
        damaged = bytearray(longer)
        damaged[at] ^= 0x10
        log_of(tmp_path).write_bytes(damaged)
        assert back(tmp_path).nodes[0].shard.lsn == expected[0]
    last = list(frames_of(memoryview(data)))[-1]
    for at in range(last[0], last[1], 997):  # in the payload of the last push
        log_of(tmp_path).write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        assert back(tmp_path).nodes[0].shard.lsn == expected[0] - 1


def test_a_log_that_grows_is_written_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "LEAST", 400_000)
    monkeypatch.setattr(disk, "TIMES", 0)
    ring, worker = primary(tmp_path, servers=2)
    sizes = []
    for seed in range(40):
        worker.push(seed)
        sizes.append(log_of(tmp_path).stat().st_size)
        shard = back(tmp_path).nodes[0].shard
        assert (shard.lsn, shard.replica.digest()) == ring.digest(0)
    assert max(sizes) < 900_000
    assert sizes[-1] < sum(sizes)


class Crash(Exception):
    """The power fails."""


@pytest.mark.parametrize("when", range(12))
def test_a_crash_while_the_log_is_written_anew(tmp_path: Path, when: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ring, worker = primary(tmp_path)
    worker.push(1)
    expected = ring.digest(0)
    left = [when]

    def failing(act: Callable[..., object]) -> Callable[..., object]:
        def do(*given: object) -> object:
            left[0] -= 1
            if left[0] < 0:
                raise Crash
            return act(*given)

        return do

    log = ring.node(0).disk
    assert log is not None
    for name in ("writev", "fdatasync", "fsync"):
        monkeypatch.setattr(disk.os, name, failing(getattr(os, name)))
    monkeypatch.setattr(disk.Path, "rename", failing(Path.rename))
    with contextlib.suppress(Crash):
        log.begin()
    monkeypatch.undo()
    shard = back(tmp_path).nodes[0].shard
    assert (shard.lsn, shard.replica.digest()) == expected


def test_a_full_disk_ends_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, worker = primary(tmp_path)

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(disk.os, "fdatasync", full)
    with pytest.raises(Halt, match="No space left"):
        worker.push(1)
    assert worker.acks() == []


def test_records_that_another_primary_voided_do_not_come_back(tmp_path: Path) -> None:
    ring, worker = primary(tmp_path, servers=2)
    worker.push(1)
    ring.muted = {(0, 1)}
    worker.push(2)  # on the disk of server 0 only
    ring.muted = set()
    ring._queue.clear()
    ring.adopt(1, backups=[0])
    ring.run()
    assert ring.digest(0) == ring.digest(1)
    shard = back(tmp_path, 0).nodes[0].shard
    assert (shard.lsn, shard.replica.digest()) == ring.digest(1)


def test_a_folder_is_one_servers(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    assert folder.identity() is None
    welcome = m.Welcome(3, 2, 2, 1, "disk", 0.1)
    folder.claim(Identity(77, welcome))
    (tmp_path / "shard-00001.log").write_bytes(b"old")
    with pytest.raises(StateInUse):
        Folder(tmp_path)
    assert folder.identity() == Identity(77, welcome)
    folder.claim(Identity(78, welcome))
    assert folder.shards() == []
    assert (tmp_path / "before" / "shard-00001.log").read_bytes() == b"old"
    folder.close()
    again = Folder(tmp_path)
    assert again.identity() == Identity(78, welcome)
    again.close()


@pytest.mark.parametrize("said", [{}, {"format": 1}, {"format": 3}])
def test_a_folder_of_another_format_is_refused_with_what_to_do(tmp_path: Path, said: dict[str, int]) -> None:
    """The first format did not say which it was; its log would look torn at its first frame, and so empty."""
    identity = msgspec.msgpack.encode({"session": 77, "welcome": m.Welcome(3, 2, 2, 1, "disk", 0.1)} | said)
    (tmp_path / "identity").write_bytes(identity)
    (tmp_path / "shard-00001.log").write_bytes(b"old")
    folder = Folder(tmp_path)
    with pytest.raises(StateCorrupt, match=r"this Headwater reads format 2; it was left as it is\. Go on with"):
        folder.identity()
    assert (tmp_path / "identity").read_bytes() == identity
    assert folder.shards() == [1]
    folder.close()


# ---- processes ---------------------------------------------------------------------------------------


def start(role: str, *words: str) -> tuple[subprocess.Popen[bytes], int]:
    reading, writing = os.pipe()
    parent = str(os.getpid())
    words = ("--role", role, *words, "--ready-fd", str(writing), "--parent", parent)
    process = subprocess.Popen([sys.executable, "-m", "headwater.server", *words], pass_fds=(writing,))
    os.close(writing)
    return process, reading


def ready(reading: int) -> str:
    with os.fdopen(reading) as pipe:
        return str(json.loads(pipe.readline())["address"])


def cluster(folder: Path, address: str = "tcp://127.0.0.1:0") -> tuple[list[subprocess.Popen[bytes]], str]:
    """A coordinator and two servers, with two copies."""
    words = ("--servers", "2", "--replicas", "2", "--ack", "disk", "--state", str(folder / "state"))
    coordinator, pipe = start("coordinator", "--listen", address, *words)
    address = ready(pipe)
    servers = [start("server", "--coordinator", address, "--data", str(folder / f"s{n}")) for n in range(2)]
    for _, pipe in servers:
        ready(pipe)
    return [coordinator, *(server for server, _ in servers)], address


def test_all_are_killed_at_once_and_nothing_acknowledged_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processes, address = cluster(tmp_path)
    monkeypatch.setenv("HEADWATER_ADDRESS", address)
    declared = {"optimizer": torch.optim.SGD, "lr": 1.0, "sync": headwater.Async()}
    try:
        with headwater.connect() as ps:
            w = ps.dense("w", (1000,), **declared)
            for _ in range(20):
                w.push(torch.full((1000,), -1.0)).wait()
            unknown = [w.push(torch.full((1000,), -1.0)) for _ in range(5)]
            for process in processes:
                process.send_signal(signal.SIGKILL)
            for process in processes:
                process.wait()
            processes, _ = cluster(tmp_path, address)
            with headwater.connect(role="reader") as reader:
                seen = reader.dense("w", (1000,), **declared).pull()
            assert 20 <= float(seen.min()) == float(seen.max()) <= 25
            for ticket in unknown:  # the client says again what nobody had acknowledged
                ticket.wait()
            assert torch.equal(w.pull(), torch.full((1000,), 25.0))
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_a_server_without_a_folder_is_refused(tmp_path: Path) -> None:
    words = ("--ack", "disk", "--state", str(tmp_path / "state"))
    coordinator, pipe = start("coordinator", *words)
    try:
        command = [sys.executable, "-m", "headwater.server", "--role", "server", "--coordinator", ready(pipe)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert "UsageError" in done.stderr
        assert "--data" in done.stderr
    finally:
        coordinator.kill()
        coordinator.wait()


def test_a_payload_in_a_log_is_always_checked(tmp_path: Path) -> None:
    _, worker = primary(tmp_path)
    worker.push(1)
    frames = [frame for _, _, frame in frames_of(memoryview(log_of(tmp_path).read_bytes()))]
    assert frames[0].kind == Kind.REPLY
    assert all(frame.flags & Flag.CHECKED for frame in frames if frame.payload_length)
    assert frames[-1].kind == Kind.RECORD
