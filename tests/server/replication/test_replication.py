"""Two or three servers, one shard: what is acknowledged is on all of its copies, whoever fails."""

from __future__ import annotations

import pytest

from headwater.errors import StaleEpoch
from headwater.types import Async, Bulk, Stale, Sync
from headwater.wire import messages as m
from headwater.wire.frames import Kind
from tests.server.ring import MEMBERS, Ring, Worker, spec

LARGE = ((1_300_000,), (30, 40))  # more than one block


def pair(sync: Sync | None = None, optimizer: str = "SGD", *shapes: tuple[int, ...]) -> tuple[Ring, Worker]:
    """Server 0 leads, server 1 is its backup, a worker is connected."""
    ring = Ring(2)
    ring.adopt(0, backups=[1])
    ring.begin(spec(sync, optimizer, *shapes))
    worker = Worker(ring)
    worker.open(0)
    return ring, worker


# ---- records -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sync", [Bulk(), Stale(1), Async(), Async(2)])
@pytest.mark.parametrize("optimizer", ["SGD", "AdamW", "Adafactor"])
def test_a_backup_has_the_same_bits_at_the_same_lsn(sync: Sync, optimizer: str) -> None:
    ring, worker = pair(sync, optimizer)
    seen = set()
    for seed in range(4):
        worker.push(seed)
        assert ring.digest(0) == ring.digest(1)
        seen.add(ring.digest(0))
    assert len(seen) == 4
    assert worker.acks() == [1, 2, 3, 4]


@pytest.mark.parametrize("sync", [Bulk(), Async()])
def test_nothing_is_acknowledged_before_the_backup_has_it(sync: Sync) -> None:
    ring, worker = pair(sync)
    before = ring.digest(0)
    ring.muted = {(1, 0)}
    worker.push(1)
    assert worker.acks() == []
    assert ring.digest(0) == before, "nor applied: a read must not show what could be lost"
    ring.muted = set()
    ring.run()
    assert worker.acks() == [1]
    assert ring.digest(0) == ring.digest(1)


def test_a_record_that_never_reached_the_backup_was_not_acknowledged_and_comes_again() -> None:
    ring, worker = pair()
    worker.push(1)
    ring.muted = {(0, 1)}
    lost = worker.push(2)
    assert worker.acks() == [1]
    ring.kill(0)
    ring.adopt(1)
    assert worker.open(1, base=2).seq == 1
    worker.again(lost)
    assert worker.acks() == [2]
    reference, other = pair()
    for seed in (1, 2):
        other.push(seed)
    assert ring.digest(1)[1] == reference.digest(0)[1]


@pytest.mark.parametrize("joins", ["before", "after"])
def test_a_new_primary_knows_who_waits_and_is_not_waited_for(joins: str) -> None:
    ring = Ring(2)
    ring.adopt(0, backups=[1] if joins == "before" else [])
    ring.begin(spec(Stale(0)), ranks=(0, 1))
    workers = [Worker(ring, rank) for rank in (0, 1)]
    for worker in workers:
        worker.open(0)
    workers[1].ask(m.PauseTable(1, True))
    if joins == "after":
        ring.adopt(0, learners=[1])
        ring.adopt(0, backups=[1])
    assert ring.digest(0) == ring.digest(1)
    ring.kill(0)
    ring.adopt(1)
    workers[0].open(1)
    workers[0].push(1)
    workers[0].pull()
    assert workers[0].take(Kind.DATA)
    workers[1].open(1)
    workers[1].ask(m.PauseTable(1, False))
    workers[0].push(2)
    workers[0].pull()
    assert not workers[0].take(Kind.DATA)


# ---- newcomers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("optimizer", "shapes"),
    [
        ("SGD", LARGE),
        ("AdamW", LARGE),
        ("Adafactor", ((600, 500), (700, 900), (64, 32))),
        ("Muon", ((300, 200), (64, 32))),
    ],
)
@pytest.mark.parametrize("pace", [1, 3])
def test_a_newcomer_gets_the_state_while_pushes_go_on(
    optimizer: str, shapes: tuple[tuple[int, ...], ...], pace: int
) -> None:
    ring = Ring(2)
    ring.adopt(0)
    ring.begin(spec(Async(), optimizer, *shapes))
    worker = Worker(ring)
    worker.open(0)
    worker.push(0)
    ring.muted = {(1, 0)}  # it says nothing yet
    ring.adopt(0, learners=[1])
    ring.muted = set()
    pushed = 0
    while not ring.heard(m.Synced):
        pushed += 1
        worker.push(pushed, deliver=False)
        for _ in range(pace * 3):
            ring.step()
    assert pushed > 1, "everything came before the pushes, so they tested nothing"
    ring.run()
    ring.adopt(0, backups=[1])
    worker.push(99)
    assert ring.digest(0) == ring.digest(1)
    assert worker.acks()[-1] == worker.seq
    before = ring.digest(0)[1]
    ring.kill(0)
    ring.adopt(1)
    assert ring.digest(1)[1] == before
    assert worker.open(1, base=worker.seq + 1).seq == worker.seq


@pytest.mark.parametrize("wrote", [False, True])
@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_a_newcomer_gets_a_step_that_waits_for_its_verdict(optimizer: str, wrote: bool) -> None:
    ring = Ring(2, shards=2)
    ring.adopt(0)
    ring.begin(spec(Bulk(), optimizer, (200_000,), (3,)), ranks=(0, 1))
    workers = [Worker(ring, rank) for rank in (0, 1)]
    for worker in workers:
        worker.open(0)
        worker.push(worker.rank, wrote=wrote)
    (ready,) = ring.heard(m.Ready)
    ring.adopt(0, learners=[1])
    assert ring.heard(m.Synced)
    ring.adopt(0, backups=[1])
    ring.kill(0)
    ring.adopt(1)
    assert ring.heard(m.Ready) == [ready]
    ring.tell(1, m.Commit(1, 1, MEMBERS, False))
    reference = Ring(1, shards=2)
    reference.adopt(0)
    reference.begin(spec(Bulk(), optimizer, (200_000,), (3,)), ranks=(0, 1))
    for rank in (0, 1):
        other = Worker(reference, rank)
        other.open(0)
        other.push(rank, wrote=wrote)
    reference.tell(0, m.Commit(1, 1, MEMBERS, False))
    assert ring.digest(1)[1] == reference.digest(0)[1]


def test_a_learner_whose_connection_breaks_midway_begins_anew() -> None:
    ring = Ring(2)
    ring.adopt(0)
    ring.begin(spec(Async(), "AdamW", *LARGE))
    worker = Worker(ring)
    worker.open(0)
    worker.push(0)
    ring.muted = {(1, 0)}
    ring.adopt(0, learners=[1])
    ring.muted = set()
    for _ in range(4):
        ring.step()
    for end in [end for end, other in ring._ends.items() if (end[0], other[0]) == (0, 1)]:
        ring._do(0, ring.servers[0].closed(end[1]))
        ring._cut(end)
    ring.run()
    assert ring.heard(m.Synced) == [], "half of the state is no state"
    ring.tick(0.5)
    assert ring.heard(m.Synced)
    ring.adopt(0, backups=[1])
    worker.push(1)
    assert ring.digest(0) == ring.digest(1)


# ---- three servers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("heir", [1, 2])
def test_with_three_copies_all_must_have_it_and_either_backup_may_lead(heir: int) -> None:
    ring = Ring(3)
    ring.adopt(0, backups=[1, 2])
    ring.begin(spec())
    worker = Worker(ring)
    worker.open(0)
    ring.muted = {(2, 0)}
    worker.push(1)
    assert worker.acks() == [], "one of two is not all"
    ring.muted = set()
    ring.run()
    assert worker.acks() == [1]
    ring.muted = {(0, 2)}
    last = worker.push(2)  # only server 1 has this one
    ring.kill(0)
    ring.muted = set()
    other = 3 - heir
    ring.adopt(heir, backups=[other])
    ring.tick(0.5)
    if ring.heard(m.Suspect):  # it knows more than its new primary: what it has is no point of this log
        ring.adopt(heir, learners=[other])
        ring.tick(0.5)
        assert ring.heard(m.Synced)
        ring.adopt(heir, backups=[other])
    done = worker.open(heir, base=2).seq
    assert done == (2 if heir == 1 else 1)
    worker.again(last)
    assert worker.acks() == [2]
    worker.push(3)
    assert worker.acks() == [3]
    assert ring.digest(heir) == ring.digest(other)
    reference, others = pair()
    for seed in (1, 2, 3):
        others.push(seed)
    assert ring.digest(heir)[1] == reference.digest(0)[1], "each push once"


# ---- a primary dies ----------------------------------------------------------------------------------


@pytest.mark.parametrize("sync", [Bulk(), Stale(1), Async()])
def test_duplicates_after_a_failover_are_acknowledged_and_not_applied(sync: Sync) -> None:
    ring, worker = pair(sync)
    first = [worker.push(seed) for seed in range(3)]
    worker.acks()
    ring.kill(0)
    ring.adopt(1)
    before = ring.digest(1)[1]
    assert worker.open(1).seq == 3
    for frames in first:
        worker.again(frames)
    assert worker.acks() == [1, 2, 3]
    assert ring.digest(1)[1] == before
    worker.push(4)
    assert worker.acks() == [4]
    assert ring.digest(1)[1] != before


@pytest.mark.parametrize("wrote", [False, True])
@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_a_prepared_step_survives_the_primary(optimizer: str, wrote: bool) -> None:
    """READY is a promise: the verdict may come when the server that gave it is dead."""
    outcomes = []
    for dies in (False, True):
        ring = Ring(2, shards=2)
        ring.adopt(0, backups=[1])
        ring.begin(spec(Bulk(), optimizer, (200_000,)), ranks=(0, 1))
        workers = [Worker(ring, rank) for rank in (0, 1)]
        for worker in workers:
            worker.open(0)
        frames = [worker.push(worker.rank, wrote=wrote) for worker in workers]
        (ready,) = ring.heard(m.Ready)
        assert isinstance(ready, m.Ready)
        assert [worker.acks() for worker in workers] == [[], []]
        leader = 0
        if dies:
            leader = 1
            ring.kill(0)
            ring.adopt(1)
            assert ring.heard(m.Ready) == [ready], "the new primary says it again"
            for worker, sent in zip(workers, frames, strict=True):
                assert worker.open(1).seq == 0
                worker.again(sent)
        ring.tell(leader, m.Commit(1, 1, MEMBERS, False))
        ring.run()
        last = frames[0][-1].seq
        assert [worker.acks()[-1] for worker in workers] == [last, last]
        outcomes.append(ring.digest(leader)[1])
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("muted", [set(), {(0, 1)}, {(1, 0)}])
@pytest.mark.parametrize("ended", [False, True])
def test_what_a_worker_wrote_is_the_state_of_the_step_whoever_fails_in_between(
    muted: set[tuple[int, int]], ended: bool
) -> None:
    outcomes = []
    for dies in (False, True):
        ring, worker = pair(Bulk(), "AdamW")
        worker.push(1)
        ring.muted = muted if dies else set()
        sent = worker.push(2, deliver=False, wrote=True)
        if dies and not ended:
            ring._queue.pop()
        ring.run()
        if dies:
            ring.kill(0)
            ring.adopt(1)
            done = worker.open(1, base=sent[0].seq).seq
            worker.again([frame for frame in sent if frame.seq > done])
        worker.push(3)
        assert worker.acks()[-1] == worker.seq
        outcomes.append(ring.digest(1)[1])
    assert outcomes[0] == outcomes[1]


def test_a_primary_that_was_replaced_serves_nobody() -> None:
    ring, worker = pair()
    ring.muted = {(1, 0), (0, 1)}  # it is cut off from the others, and does not know it
    worker.push(1)
    assert worker.acks() == []
    ring.adopt(1)
    ring.run()
    errors = [m.read_error(frame.body) for frame in worker.take(Kind.ERROR)]
    assert any(isinstance(error, StaleEpoch) for error in errors)
    assert worker.acks() == []
    assert worker.open(1).seq == 0


def test_a_push_to_an_earlier_reign_is_refused() -> None:
    ring, worker = pair()
    ring.kill(0)
    ring.adopt(1)
    worker.open(1)
    frames = worker.push(1, deliver=False)
    ring._queue.clear()
    ring.send(worker._peer, frames[0].__class__(**{**_fields(frames[0]), "epoch": 1}))
    ring.run()
    (error,) = [m.read_error(frame.body) for frame in worker.take(Kind.ERROR)]
    assert isinstance(error, StaleEpoch)
    assert worker.acks() == []


def _fields(frame: object) -> dict[str, object]:
    return {name: getattr(frame, name) for name in frame.__slots__}  # type: ignore[attr-defined]


# ---- too few copies, and followers that say nothing --------------------------------------------------


def test_with_fewer_copies_than_asked_for_nothing_is_acknowledged_until_there_are_enough() -> None:
    ring = Ring(2, min_copies=2)
    ring.adopt(0, backups=[1])
    ring.begin(spec())
    worker = Worker(ring)
    worker.open(0)
    worker.push(1)
    assert worker.acks() == [1]
    ring.kill(1)
    ring.adopt(0)
    before = ring.digest(0)
    worker.push(2)
    assert worker.acks() == []
    assert ring.digest(0) == before
    ring.servers[1] = Ring(2, min_copies=2).servers[1]
    ring.down = set()
    ring.adopt(0, learners=[1])
    assert ring.heard(m.Synced)
    ring.adopt(0, backups=[1])
    assert worker.acks() == [2]
    assert ring.digest(0) == ring.digest(1)


def test_a_silent_backup_is_suspected_and_goes_only_with_the_coordinators_consent() -> None:
    ring, worker = pair()
    ring.muted = {(1, 0)}
    worker.push(1)
    ring.tick(0.8)
    assert ring.heard(m.Suspect) == []
    ring.tick(1.0)
    suspicions = ring.heard(m.Suspect)
    assert suspicions
    assert isinstance(suspicions[0], m.Suspect)
    assert (suspicions[0].server, suspicions[0].epoch) == (1, 1)
    assert worker.acks() == [], "it may be the next primary, and has not said that it has this"
    ring.adopt(0)
    assert worker.acks() == [1]


def test_a_backup_whose_connection_ended_is_waited_for_and_catches_up_without_the_whole_state() -> None:
    ring, worker = pair()
    worker.push(1)
    for end in [end for end, other in ring._ends.items() if (end[0], other[0]) == (1, 0)]:
        ring._do(1, ring.servers[1].closed(end[1]))
        ring._cut(end)
    worker.push(2)
    assert worker.acks() == [1]
    states = []
    ring.node(1).shard.replica.begin_anew = lambda *_: states.append(1)  # type: ignore[method-assign,assignment,misc]
    ring.tick(0.5)
    assert worker.acks() == [2]
    assert states == []
    assert ring.heard(m.Suspect) == []
    assert ring.digest(0) == ring.digest(1)


def test_a_silent_learner_is_let_go_at_once_and_holds_nobody_up() -> None:
    ring = Ring(2)
    ring.adopt(0)
    ring.begin(spec(Async(), "SGD", *LARGE))
    worker = Worker(ring)
    worker.open(0)
    ring.muted = {(1, 0)}
    ring.adopt(0, learners=[1])
    ring.muted = set()
    ring.step()  # it asks, and is silent from then on
    ring.muted = {(1, 0)}
    worker.push(1)
    ring.tick(2.0)
    assert ring.heard(m.Suspect)
    assert worker.acks() != []


# ---- hand-over ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("sync", [Bulk(), Async()])
def test_a_planned_hand_over_loses_nothing_and_the_old_primary_follows(sync: Sync) -> None:
    ring, worker = pair(sync)
    first = worker.push(1)
    worker.acks()
    states = []
    ring.node(0).shard.replica.begin_anew = lambda *_: states.append(1)  # type: ignore[method-assign,assignment,misc]
    ring.adopt(1, backups=[0])
    assert [type(m.read_error(frame.body)) for frame in worker.take(Kind.ERROR)] == [StaleEpoch]
    assert worker.open(1, base=1).seq == 1
    worker.again(first)
    worker.push(2)
    assert worker.acks() == [1, 2]
    ring.tick(0.5)
    assert states == [], "it was in sync, and still is"
    assert ring.digest(0) == ring.digest(1)
    assert ring.node(0).role == "backup"


def test_after_a_failover_a_workers_own_steps_do_not_count_as_staleness() -> None:
    """Reads are in no record, so a backup does not know that the worker has read after each of its steps."""
    ring, worker = pair(Async())
    for seed in range(3):
        worker.push(seed)
        worker.pull()
    ring.kill(0)
    ring.adopt(1)
    worker.open(1, base=4)
    worker.take(Kind.ACK)
    worker.push(3)
    (ack,) = worker.take(Kind.ACK)
    assert (ack.seq, ack.start) == (4, 0)


def test_a_chain_of_primaries_keeps_every_push() -> None:
    ring, worker = pair(Async(), "AdamW")
    reference, other = pair(Async(), "AdamW")
    for seed in range(6):
        worker.push(seed)
        other.push(seed)
        leader = 1 - seed % 2
        ring.adopt(leader, backups=[1 - leader])
        assert worker.open(leader, base=worker.seq + 1).seq == worker.seq
        ring.tick(0.3)
    assert worker.acks() == [1, 2, 3, 4, 5, 6]
    assert ring.digest(0)[1] == ring.digest(1)[1] == reference.digest(0)[1]
