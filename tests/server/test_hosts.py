"""A coordinator's host carries out its effects in their order: what is durable first, then jobs, then frames."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from headwater.cluster.coordinator import Coordinator, Rules
from headwater.cluster.effects import Effects, Job, MakeFolder, Outcome
from headwater.cluster.store.memory import MemoryStore
from headwater.errors import ClusterError
from headwater.server.hosts import CoordinatorHost, Halt
from headwater.testing import FakeClock
from headwater.wire import messages as m
from headwater.wire.frames import Frame, Kind
from headwater.wire.outgoing import Outgoing


class Recording(Coordinator):
    """One whose next ``tick`` has effects of all kinds."""

    def tick(self, now: float) -> Effects:
        self.outbox.put(Outgoing(7, Frame(Kind.NOTICE, body=m.pack(m.Drop(1)))))
        self.outbox.do(MakeFolder())
        self.outbox.save("key", b"value")
        return self.outbox.take()


class Disk(MemoryStore):
    def __init__(self, log: list[str]) -> None:
        super().__init__()
        self.log = log
        self.full = False

    def put(self, changes: Mapping[str, bytes | None]) -> None:
        if self.full:
            raise ClusterError("the disk is full")
        super().put(changes)
        self.log.append(f"durable {sorted(changes)}")


class Files:
    """What ``Keeper`` is to a host. Nothing is ever finished."""

    def __init__(self, log: list[str]) -> None:
        self.log = log

    def do(self, job: Job) -> None:
        self.log.append(type(job).__name__)

    def poll(self) -> Outcome | None:
        return None


def host(log: list[str]) -> tuple[CoordinatorHost, Disk]:
    disk = Disk(log)
    return CoordinatorHost(Recording(Rules(1)), disk, FakeClock(1.0), Files(log)), disk  # type: ignore[arg-type]


def test_a_new_cluster_is_durable_before_anybody_joins() -> None:
    log: list[str] = []
    _, disk = host(log)
    assert log == ["durable ['cluster']"]
    assert set(disk.items()) == {"cluster"}


def test_effects_are_carried_out_in_the_order_of_their_fields() -> None:
    log: list[str] = []
    coordinator, _ = host(log)
    log.clear()
    (out,) = coordinator.tick(2.0)
    assert isinstance(out, Outgoing)
    assert out.peer == 7
    assert log == ["durable ['key']", "MakeFolder"]


def test_what_cannot_be_kept_is_neither_begun_nor_sent() -> None:
    log: list[str] = []
    coordinator, disk = host(log)
    log.clear()
    disk.full = True
    with pytest.raises(Halt, match="the disk is full"):
        coordinator.tick(2.0)
    assert log == []
