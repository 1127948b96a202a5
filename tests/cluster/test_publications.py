"""Versions at a whole coordinator: over frames, beside commits, views, members and restarts."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from headwater.errors import ClusterError, ProtocolError
from headwater.types import Async
from headwater.versions.leases import LEASE
from headwater.wire import messages as m
from headwater.wire import versions as v
from tests.cluster.fake_peers import READER, SERVER, WORKER, FakePeers, spec

SIZE = 1 << 20


def cluster(**rules: Any) -> FakePeers:
    """Two servers, one worker, table 1 (bulk) on both."""
    s = FakePeers(**rules)
    s.join(0, world=1)
    s.ask(WORKER, m.Declare(spec()))
    s.create()
    s.heard.clear()
    return s


def step(s: FakePeers, clock: int) -> None:
    """A bulk step is ready on both shards, and so committed."""
    members = s.coordinator.membership.epoch
    for shard in range(2):
        s.tell(SERVER + shard, m.Ready(1, shard, clock, members, (), skip=False))


def held(s: FakePeers, number: int, *, server: int, shard: int | None = None) -> None:
    """A server has its part."""
    shard = server if shard is None else shard
    parts = (v.PartDigest(1, SIZE, 7 + shard),)
    s.tell(SERVER + server, v.PartDone(number, shard, server, parts, ((1, s.coordinator.tables.get(1).clock),)))


def publish(s: FakePeers, name: str, **changes: object) -> int:
    """A version that is ready."""
    s.ask(WORKER, msgspec.structs.replace(v.Publish("m", name, (1,)), **changes))
    number = max(s.coordinator.publications.catalogue.entries)
    for server in range(2):
        held(s, number, server=server)
    return number


def enter(s: FakePeers, reader: int, session: int) -> int:
    s.ask(READER + reader, m.Join("reader", session))
    s.last(READER + reader, m.Joined)
    return READER + reader


def test_a_version_is_cut_behind_its_step_and_before_the_next() -> None:
    s = cluster()
    s.ask(WORKER, v.Publish("m", "v1", (1,), ((1, 1),)))
    assert not [x for x in s.take(SERVER) if isinstance(x, v.CutVersion)]
    step(s, 1)
    step(s, 2)
    for server in (SERVER, SERVER + 1):
        told = [x for x in s.take(server) if isinstance(x, m.Commit | v.CutVersion)]
        assert [(type(x).__name__, getattr(x, "clock", None)) for x in told] == [
            ("Commit", 1), ("CutVersion", None), ("Commit", 2)
        ]  # fmt: skip


def test_nobody_publishes_leases_or_watches_without_joining() -> None:
    s = cluster()
    publish(s, "v1")
    questions = (v.Publish("m", "v2", (1,)), v.Lease("m", "v1"), v.Watch("m", "v1"), v.SetTag("m", "t", "v1"))
    for message in (*questions, v.Retire("m", "v1")):
        s.ask(999, message)
        assert isinstance(s.error(999), ClusterError)
    s.ask(WORKER, v.Fetch(1, 0, 1))
    assert isinstance(s.error(WORKER), ProtocolError)
    for notice in (v.CutVersion(1, 0, (1,)), v.DropVersion((1,)), v.Unmap(1, 0, 1)):
        s.tell(WORKER, notice)
        assert isinstance(s.error(WORKER), ProtocolError)
    assert len(s.coordinator.publications.catalogue.entries) == 1


def test_only_a_server_speaks_for_its_parts() -> None:
    s = cluster()
    s.ask(WORKER, v.Publish("m", "v1", (1,)))
    for peer in (WORKER, SERVER + 1, 999):
        s.tell(peer, v.PartDone(1, 0, 0, error="it lies"))
        assert isinstance(s.error(peer), ProtocolError)
    assert len(s.coordinator.publications.catalogue.entries) == 1


def test_a_reader_whose_new_connection_comes_before_the_old_one_ends_keeps_its_leases() -> None:
    s = cluster(worker_silence=1e9)
    publish(s, "v1", keep=1)
    old = enter(s, 0, 70)
    s.ask(old, v.Lease("m", "v1", turn=1))
    s.last(old, v.Leased)
    new = enter(s, 1, 70)
    s.hang_up(old)
    publish(s, "v2", keep=1)
    s.pass_time(2 * LEASE, alive=(SERVER, SERVER + 1))
    assert 1 in s.coordinator.publications.catalogue.entries
    s.hang_up(new)
    s.pass_time(LEASE + 1, alive=(SERVER, SERVER + 1))
    assert 1 not in s.coordinator.publications.catalogue.entries


def test_a_reader_that_was_silent_is_told_and_comes_back() -> None:
    s = cluster(worker_silence=3.0)
    publish(s, "v1", keep=1)
    reader = enter(s, 0, 70)
    s.ask(reader, v.Lease("m", "v1", turn=1))
    publish(s, "v2", keep=1)
    s.pass_time(5, alive=(SERVER, SERVER + 1, WORKER))
    assert "may join again" in str(s.error(reader))
    again = enter(s, 1, 70)
    s.tell(again, v.Holding(((1, 1),), 1))
    for _ in range(15):
        s.pass_time(1, alive=(SERVER, SERVER + 1, WORKER, again))
    assert 1 in s.coordinator.publications.catalogue.entries
    s.ask(again, m.Leave())
    assert 1 not in s.coordinator.publications.catalogue.entries


def test_another_primary_goes_on_with_what_the_one_before_was_told() -> None:
    s = cluster(replicas=2, silence=1.0, worker_silence=1e9)
    s.ask(WORKER, v.Publish("m", "v1", (1,)))
    held(s, 1, server=1)
    s.heard.clear()
    s.hang_up(SERVER)
    (cut,) = [x for x in s.take(SERVER + 1) if isinstance(x, v.CutVersion)]
    assert (cut.shard, cut.late) == (0, False)
    held(s, 1, server=1, shard=0)
    assert s.last(WORKER, v.Publishing).number == 1
    s.ask(WORKER, v.Await(1))
    assert s.last(WORKER, v.Found).info.name == "v1"
    reader = enter(s, 0, 70)
    s.ask(reader, v.Lease("m", "latest"))
    assert {h.address for part in s.last(reader, v.Leased).parts for h in part.holders} == {"tcp://127.0.0.1:1"}


def test_after_a_restart_versions_tags_and_numbers_are_those_of_before() -> None:
    s = FakePeers(durable=True, worker_silence=1e9)
    s.join(0, world=1)
    s.ask(WORKER, m.Declare(spec(sync=Async())))
    s.create()
    publish(s, "v1", tags=("prod",))
    s.ask(WORKER, v.Publish("m", "v2", (1,)))  # on its way
    s.restart(s.state)
    catalogue = s.coordinator.publications.catalogue
    assert {key: entry.state for key, entry in catalogue.entries.items()} == {1: "lost"}
    for server in range(2):
        s.ask(
            SERVER + server, m.Join("server", server, address=f"tcp://127.0.0.1:{server}", resume=True, server=server)
        )
        held(s, 1, server=server)
        held(s, 2, server=server)  # what was on its way is dropped there
    assert catalogue.resolve("m", "prod").state == "ready"
    assert any(x == v.DropVersion((2,)) for x in s.take(SERVER))
    s.pass_time(1)
    s.ask(WORKER, m.Join("worker", 0, "host", 4000, 0, 1, resume=True))
    assert publish(s, "v3") > 2


@pytest.mark.parametrize("reads", [True, False])
def test_who_only_reads_may_publish_what_others_train(reads: bool) -> None:
    """An operator's command: the versions are of tables that are there."""
    s = cluster()
    peer = enter(s, 0, 70) if reads else WORKER
    s.ask(peer, v.Publish("m", "v1", (1,)))
    for server in range(2):
        held(s, 1, server=server)
    assert s.last(peer, v.Publishing).number == 1


def test_a_server_that_alone_holds_a_version_is_not_drained() -> None:
    s = cluster()
    s.start(2)
    publish(s, "v1")
    s.ask(WORKER, m.Drain(0))
    view = s.coordinator.fleet.views[0]
    s.tell(SERVER, m.Synced(0, view.epoch, 2, 5))
    s.pass_time(1, alive=(SERVER, SERVER + 1, SERVER + 2, WORKER))
    assert s.coordinator.fleet.empty(0)
    assert m.Done() not in s.take(WORKER), "the part of shard 0 has no other holder yet"
    held(s, 1, server=2, shard=0)
    s.pass_time(1, alive=(SERVER, SERVER + 1, SERVER + 2, WORKER))
    assert m.Done() in s.take(WORKER)
