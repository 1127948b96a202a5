"""The shard as a state machine: numbers, ranges, roles, and whole steps or none."""

from __future__ import annotations

import pytest
import torch

from headwater.errors import (
    ClusterError,
    ProtocolError,
    SessionExpired,
    ShapeMismatch,
    UnknownOptimizer,
    UnknownTable,
)
from headwater.server import events as e
from headwater.types import Async, Bulk
from headwater.wire.frames import Flag
from headwater.wire.messages import Commit, Ready, Slot
from tests.server.stage import TABLE, Stage, spec

# ---- exactly once ------------------------------------------------------------------------------------


def test_a_push_sent_twice_is_applied_once_and_acknowledged_twice() -> None:
    stage = Stage(spec(Async()), ranks=(0,))
    stage.push(0, 3.0)
    stage.push(0, 3.0, 0, seq=1)
    assert stage.value() == -3.0
    assert [ack.seq for ack in stage.take(e.Ack)] == [1, 1]


def test_a_pending_bulk_push_sent_twice_counts_once_and_is_answered_at_the_commit() -> None:
    stage = Stage()
    stage.push(0, 2.0)
    stage.push(0, 2.0, 0, seq=1, clock=1)
    assert stage.take(e.Ack) == []
    stage.push(1, 4.0)
    stage.decide()
    assert stage.value() == -3.0
    assert sorted((ack.session, ack.seq) for ack in stage.take(e.Ack)) == [(10, 1), (11, 1)]


def test_a_committed_bulk_push_sent_again_is_acknowledged_and_not_applied_to_the_next_step() -> None:
    stage = Stage()
    for rank in (0, 1):
        stage.push(rank, 2.0)
    stage.decide()
    stage.take(e.Ack)
    stage.push(0, 2.0, 0, seq=1, clock=1)
    assert [ack.seq for ack in stage.take(e.Ack)] == [1]
    assert stage.shards[0].tables[TABLE].gathering.parts == {}
    assert stage.value() == -2.0


def test_a_held_push_sent_again_is_held_once_and_one_of_another_session_with_its_number_is_no_duplicate() -> None:
    stage = Stage(spec(Async(max_staleness=0)))
    stage.pull(1)
    stage.push(0)
    assert stage.take(e.Ack) == [], "worker 1 computes with what it read"
    stage.push(0, seq=1, number=0, clock=1)
    assert stage.take(e.Ack) == []
    assert [push.session for push in stage.shards[0].tables[TABLE].held] == [10]
    stage.push(1)
    assert [(ack.session, ack.seq) for ack in stage.take(e.Ack)] == [(10, 1), (11, 1)]
    stage.push(0, seq=1, number=0, clock=1)
    assert [(ack.session, ack.seq) for ack in stage.take(e.Ack)] == [(10, 1)]
    assert stage.value() == -2.0


@pytest.mark.parametrize("seq", [3, 17, 2**63])
def test_a_gap_is_refused_and_nothing_is_applied(seq: int) -> None:
    stage = Stage(spec(Async()), ranks=(0,))
    stage.push(0)
    (fail,) = stage.push(0, seq=seq, number=0)
    assert isinstance(fail, e.Fail)
    assert (fail.code, fail.seq) == ("ProtocolError", seq)
    assert "one in between is missing" in fail.message
    assert stage.value() == -1.0


def test_an_unknown_session_has_expired() -> None:
    stage = Stage(spec(Async()), ranks=(0,))
    for event in (
        e.Push(99, 1, 1, 1, TABLE, 1, 0, 0, Flag.END, None, 0, None),
        e.Pull(99, 0, TABLE, 0, 0, 64),
    ):
        (fail,) = stage.event(0, event)
        assert isinstance(fail, e.Fail)
        assert fail.code == "SessionExpired"
        assert "may or may not be applied" in fail.message


@pytest.mark.parametrize("epoch", [0, 2])
def test_a_push_to_another_epoch_is_fenced(epoch: int) -> None:
    stage = Stage(spec(Async()), ranks=(0,))
    (fail,) = stage.push(0, number=0, epoch=epoch)
    assert isinstance(fail, e.Fail)
    assert fail.code == "StaleEpoch"
    assert stage.value() == 0.0
    stage.seq[10, 0] = 0
    stage.push(0)
    assert stage.value() == -1.0, "the number was not used up"


def test_every_change_has_its_own_log_sequence_number() -> None:
    stage = Stage(spec(Async()), ranks=(0,))
    numbers = [stage.shards[0].lsn]
    for _ in range(3):
        stage.push(0)
        numbers.append(stage.shards[0].lsn)
    assert numbers == sorted(set(numbers))
    assert [ack.lsn for ack in stage.take(e.Ack)] == numbers[1:]


# ---- ranges and roles ----------------------------------------------------------------------------


@pytest.mark.parametrize("span", [(0, 1 << 20), (4, 65536), (0, 100), (64, 128), (-65536, 0), (1 << 40, (1 << 40) + 4)])
@pytest.mark.parametrize("sync", [Bulk(), Async()])
def test_a_range_must_lie_on_whole_segments(span: tuple[int, int], sync: Bulk | Async) -> None:
    stage = Stage(spec(sync), ranks=(0,))
    start, stop = span
    event = e.Push(10, 1, 1, stage.epoch, TABLE, 1, start, stop - start, Flag.END, torch.zeros(8), 0, None)
    (fail,) = stage.event(0, event)
    assert isinstance(fail, e.Fail)
    assert fail.code == "ProtocolError"
    assert stage.value() == 0.0
    assert stage.shards[0].tables[TABLE].gathering.parts == {}


def test_a_range_may_include_the_padding_behind_it_or_not() -> None:
    stage = Stage(spec(numel=17), ranks=(0,))
    (segment,) = stage.shards[0].tables[TABLE].store.segments
    stage.push(0, span=(0, segment.end), number=0)
    stage.decide()
    stage.push(0, number=0)
    stage.decide()
    assert stage.value() == -2.0
    assert stage.values[0].numel() > segment.end
    assert not stage.values[0][segment.end :].any()


def test_pulls_and_assignments_past_the_end_are_refused() -> None:
    stage = Stage(ranks=(0,))
    size, lsn = stage.values[0].numel(), stage.shards[0].lsn
    (fail,) = stage.event(0, e.Pull(10, 5, TABLE, 0, 64, size))
    assert isinstance(fail, e.Fail)
    assert (fail.code, fail.seq) == ("ProtocolError", 5)
    with pytest.raises(ProtocolError, match="do not lie on whole segments"):
        stage.event(0, e.Assign(10, 1, TABLE, 64, torch.zeros(size, dtype=torch.uint8), True))
    assert stage.shards[0].lsn == lsn


def test_a_reader_pulls_and_changes_nothing() -> None:
    stage = Stage(spec(Async()), ranks=(0,))
    stage.open(-1, session=50)
    size = stage.values[0].numel()
    (fail,) = stage.event(0, e.Push(50, 1, 1, 1, TABLE, 1, 0, size, Flag.END, torch.zeros(size), 0, None))
    assert isinstance(fail, e.Fail)
    assert "a reader cannot push" in fail.message
    (send,) = stage.event(0, e.Pull(50, 0, TABLE, 0, 0, size))
    assert isinstance(send, e.Send)
    for event in (
        e.Assign(50, 0, TABLE, 0, torch.ones(size, dtype=torch.uint8), True),
        e.AssignSlots(50, 0, TABLE, (), True),
    ):
        with pytest.raises(ClusterError, match="a reader cannot assign"):
            stage.event(0, event)
    assert stage.value() == 0.0


def test_an_unknown_table_is_named() -> None:
    stage = Stage(ranks=(0,))
    (fail,) = stage.event(0, e.Push(10, 1, 1, 1, 7, 1, 0, 0, Flag.END, None, 0, None))
    assert isinstance(fail, e.Fail)
    assert fail.code == "UnknownTable"
    with pytest.raises(UnknownTable, match="table 7"):
        stage.event(0, e.Attached(10, 7, None))


def test_bytes_that_never_came_are_refused_and_the_shard_goes_on() -> None:
    """A shared push of a client that shares nothing: there is no memory to read."""
    for sync in (Bulk(), Async(max_staleness=1)):
        stage = Stage(spec(sync), ranks=(0, 1))
        size = stage.values[0].numel()
        (fail,) = stage.event(0, e.Push(11, 1, 1, stage.epoch, TABLE, 1, 0, size, Flag.END, None, 0, None))
        assert isinstance(fail, e.Fail)
        assert "without shared memory" in fail.message


# ---- assignments -----------------------------------------------------------------------------------


def test_an_assignment_overwrites_and_its_last_part_is_acknowledged() -> None:
    stage = Stage(shards=1, ranks=(0,))
    data = torch.full((40_000,), 2.5).view(torch.uint8)
    half = 16384 * 4
    with pytest.raises(ProtocolError):
        stage.event(0, e.Assign(10, 1, TABLE, 0, data[:half], False))
    stage.event(0, e.Assign(10, 1, TABLE, 0, data, True))
    assert stage.value() == 2.5
    assert len(stage.take(e.Ack)) == 1


def test_an_assignment_sent_again_is_acknowledged_and_not_repeated() -> None:
    stage = Stage(spec(Async()), ranks=(0,))
    data = torch.full((40_000,), 2.5).view(torch.uint8)
    stage.event(0, e.Assign(10, 1, TABLE, 0, data, True))
    stage.push(0, 1.0, 0, seq=2)
    stage.take(e.Ack)
    stage.event(0, e.Assign(10, 1, TABLE, 0, data, True))
    assert [ack.seq for ack in stage.take(e.Ack)] == [1]
    assert stage.value() == 1.5
    with pytest.raises(ProtocolError, match="one in between is missing"):
        stage.event(0, e.Assign(10, 4, TABLE, 0, data, True))


@pytest.mark.parametrize(
    "slot",
    [
        Slot(0, "nonsense", 0, (2,), "float32", bytes(8)),
        Slot(0, "momentum_buffer", 0, (2,), "float32", bytes(7)),
        Slot(0, "momentum_buffer", 0, (-1, -2), "float32", bytes(8)),
        Slot(0, "momentum_buffer", 0, (2,), "quux", bytes(8)),
        Slot(0, "momentum_buffer", 0, (1 << 62,), "float32", b""),
    ],
)
def test_a_slot_that_does_not_fit_is_refused(slot: Slot) -> None:
    stage = Stage(ranks=(0,))
    stage.event(0, e.AssignSlots(10, 5, TABLE, (slot,), False))
    (done,) = stage.take(e.Done)
    assert (done.session, done.request) == (10, 5)
    assert isinstance(done.error, UnknownOptimizer | ShapeMismatch)


# ---- bulk steps --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_nothing_is_applied_before_the_commit(shards: int) -> None:
    stage = Stage(spec(numel=200_000), shards=shards)
    for rank, value in ((1, 2.0), (0, 4.0)):
        stage.push(rank, value)
        assert [stage.value(n) for n in range(len(stage.shards))] == [0.0] * len(stage.shards)
    assert stage.decide() is not None
    assert [stage.value(n) for n in range(len(stage.shards))] == [-3.0] * len(stage.shards)


def test_a_commit_for_another_step_or_membership_is_ignored() -> None:
    stage = Stage()
    for rank in (0, 1):
        stage.push(rank)
    for wrong in (Commit(TABLE, 2, stage.epoch, False), Commit(TABLE, 1, stage.epoch - 1, False)):
        stage.event(0, wrong)
        assert stage.value() == 0.0
    stage.decide()
    stage.event(0, Commit(TABLE, 1, stage.epoch, False))
    assert stage.value() == -1.0, "a commit heard twice"


def test_a_membership_that_is_told_again_leaves_a_prepared_step_alone() -> None:
    """A coordinator that comes back, and a new primary's briefing, repeat what may be known already."""
    stage = Stage()
    for rank in (0, 1):
        stage.push(rank)
    known, shard = stage.shards[0].replica.members, stage.shards[0]
    assert shard.tables[TABLE].prepared is not None
    stage.event(0, known)
    assert shard.tables[TABLE].prepared is not None, "the promise behind READY was broken"
    shard.proposals.propose(known)  # nor does it when it is in the log twice
    stage.event(0, Commit(TABLE, 1, stage.epoch, False))
    assert stage.value() == -1.0


def test_a_step_that_one_worker_skips_is_skipped_for_all() -> None:
    stage = Stage(spec(max_grad_norm=1.0, numel=200_000), shards=2)
    stage.push(0, 5.0)
    stage.push(1, 0.0, flags=Flag.END | Flag.SKIP)
    commit = stage.decide()
    assert commit is not None
    assert commit.skip
    assert [stage.value(n) for n in (0, 1)] == [0.0, 0.0]
    assert all(ack.skipped for ack in stage.take(e.Ack))
    for rank in (0, 1):
        stage.push(rank, 0.001)
    stage.decide()
    assert stage.value() != 0.0


def test_the_clip_factor_is_of_the_norm_over_all_shards() -> None:
    stage = Stage(spec(max_grad_norm=1.0, numel=250_000), shards=3)
    for rank in (0, 1):
        stage.push(rank, 2.0)
    commit = stage.decide()
    assert commit is not None
    assert commit.norm == 1000.0
    assert len({stage.value(n) for n in range(3)}) == 1
    assert stage.value() == pytest.approx(-2.0 / 1000.0, rel=1e-6)


def test_a_step_comes_in_parts_of_which_overlaps_count_once() -> None:
    stage = Stage(spec(numel=200_000), shards=2)
    for rank in (0, 1):
        stage.push(rank, 7.0, flags=0)
        stage.push(rank, 1.0)
    stage.decide()
    assert stage.value() == -1.0, "the memory is read once, at the commit"


def test_the_hyperparameters_are_those_of_the_lowest_rank() -> None:
    stage = Stage()
    stage.push(1, 1.0, groups=({"lr": 100.0},))
    stage.push(0, 1.0, groups=({"lr": 10.0},))
    stage.decide()
    assert stage.value() == -10.0
    for rank in (0, 1):
        stage.push(rank)
    stage.decide()
    assert stage.value() == -20.0, "and they stay"


@pytest.mark.parametrize("groups", [({"lr": -1.0},), ({"speed": 3.0},), ({}, {})])
@pytest.mark.parametrize("sync", [Bulk(), Async()])
def test_bad_hyperparameters_are_refused_at_the_push_and_not_at_the_commit(
    groups: tuple[dict[str, float], ...], sync: Bulk | Async
) -> None:
    stage = Stage(spec(sync))
    fails = [f for f in stage.push(0, groups=groups) if isinstance(f, e.Fail)]  # type: ignore[arg-type]
    assert [f.code for f in fails] == ["UnknownOptimizer"]
    stage.clock[0] = 0
    for rank in (0, 1):
        stage.push(rank)
    stage.decide()
    assert stage.value() in (-1.0, -2.0)


@pytest.mark.parametrize("clock", [0, 2, 9])
def test_a_push_to_another_step_is_refused(clock: int) -> None:
    stage = Stage()
    (fail,) = stage.push(0, clock=clock)
    assert isinstance(fail, e.Fail)
    assert "which is at step 0" in fail.message


def test_a_step_that_was_ended_takes_nothing_more() -> None:
    stage = Stage()
    stage.push(0, 1.0, clock=1)
    (fail,) = stage.push(0, 9.0, clock=1)
    assert isinstance(fail, e.Fail)
    assert "which it has ended" in fail.message


# ---- deaths ------------------------------------------------------------------------------------------


def test_a_death_tells_those_who_had_ended_and_those_who_push_later() -> None:
    stage = Stage(spec(numel=200_000), shards=2, ranks=(0, 1, 2))
    before = stage.epoch
    stage.push(0, 9.0)
    stage.close(2)
    stage.members((0, 1), lost="worker 2 died")
    fails = stage.take(e.Fail)
    assert [(f.session, f.code) for f in fails] == [(10, "WorkerLost")] * 2
    assert "step 1 was not applied on any shard" in fails[0].message
    assert "2 workers remain" in fails[0].message
    stage.push(1, 9.0, members=before)
    assert [(f.session, f.code) for f in stage.take(e.Fail)] == [(11, "WorkerLost")] * 2
    assert stage.take(Ready) == []
    stage.clock = {0: 0, 1: 0}
    for rank, value in ((0, 2.0), (1, 4.0)):
        stage.push(rank, value)
    assert stage.decide() is not None
    assert [stage.value(n) for n in (0, 1)] == [-3.0, -3.0], "as one process with the two survivors"


@pytest.mark.parametrize("first_to_hear", [0, 1])
def test_a_worker_that_dies_after_its_push_counts_on_all_shards_or_on_none(first_to_hear: int) -> None:
    """Its connections end before the coordinator knows; then the shards hear of it, and not at the same moment."""
    stage = Stage(spec(numel=200_000), shards=2)
    before = stage.epoch
    stage.push(1, 6.0)
    stage.close(1, first_to_hear)
    news = stage.news((0,), lost="worker 1 died")
    stage.event(first_to_hear, news)
    stage.push(0, 2.0, members=before)
    assert stage.decide() is None, "one shard has dropped the contribution, so none may use it"
    stage.close(1, 1 - first_to_hear)
    stage.event(1 - first_to_hear, news)
    assert stage.value(0) == stage.value(1) == 0.0
    assert [(f.session, f.code) for f in stage.take(e.Fail)] == [(10, "WorkerLost")] * 2
    stage.clock[0] = 0
    stage.push(0, 2.0)
    stage.decide()
    assert stage.value(0) == stage.value(1) == -2.0


def test_a_connection_that_ends_takes_nothing_back() -> None:
    """The worker's session goes on: it may be on its way back over another connection."""
    stage = Stage(spec(numel=200_000), shards=2)
    stage.push(1, 6.0)
    stage.close(1)
    stage.push(0, 2.0)
    stage.decide()
    assert stage.value(0) == stage.value(1) == -4.0
    stage.open(1)
    for rank in (0, 1):
        stage.push(rank, 1.0)
    stage.decide()
    assert stage.value(0) == stage.value(1) == -5.0


def test_a_session_that_has_ended_cannot_be_opened_again() -> None:
    stage = Stage(ranks=(0, 1))
    before = stage.epoch
    stage.members((0,), lost="worker 1 was silent")
    with pytest.raises(SessionExpired, match="may or may not be applied"):
        stage.event(0, e.Opened(11, 1, before))


def test_a_table_on_one_shard_commits_by_itself() -> None:
    stage = Stage(alone=True)
    for rank, value in ((1, 2.0), (0, 4.0)):
        assert stage.value() == 0.0
        stage.push(rank, value)
    assert stage.value() == -3.0
    assert stage.take(Ready) == []
    assert sorted(ack.session for ack in stage.take(e.Ack)) == [10, 11]


def test_a_worker_that_dies_after_ready_was_said_counts_on_all_shards() -> None:
    stage = Stage(spec(numel=200_000), shards=2)
    for rank, value in ((0, 2.0), (1, 6.0)):
        stage.push(rank, value)
    stage.close(1, 0)
    stage.decide()
    assert stage.value(0) == stage.value(1) == -4.0


def test_a_worker_that_leaves_is_no_death() -> None:
    stage = Stage(ranks=(0, 1))
    stage.push(0, 2.0)
    stage.close(1)
    stage.members((0,))
    assert stage.take(e.Fail) == []
    stage.decide()
    assert stage.value() == -2.0, "the step is divided by those who are there"


def test_a_rank_that_comes_back_begins_with_nothing() -> None:
    stage = Stage(ranks=(0, 1))
    stage.push(1, 9.0, flags=0)
    stage.close(1)
    stage.members((0,), lost="worker 1 died")
    stage.members((0, 1))
    stage.open(1, session=77)
    stage.push(0, 2.0)
    stage.push(1, 4.0, number=0, session=77, clock=1)
    stage.decide()
    assert stage.value() == -3.0


def test_a_worker_that_is_no_member_any_more_contributes_nothing() -> None:
    """It was silent for too long, was taken out, and wakes up."""
    stage = Stage(ranks=(0, 1))
    stage.members((0,), lost="worker 1 was silent")
    (fail,) = [f for f in stage.push(1, 9.0) if isinstance(f, e.Fail)]
    assert fail.code == SessionExpired.__name__
    stage.push(0, 2.0)
    stage.decide()
    assert stage.value() == -2.0


def test_a_newcomer_whose_push_is_here_before_the_news_of_it_waits_for_the_next_membership() -> None:
    stage = Stage(ranks=(0,))
    stage.open(1)
    stage.clock[1] = 0
    stage.push(1, 9.0, members=stage.epoch + 1)
    stage.push(0, 2.0)
    stage.decide()
    assert stage.value() == -2.0, "it is neither added nor counted under the old membership"


def test_skipping_and_dying_leave_no_hyperparameters_behind() -> None:
    stage = Stage(ranks=(0, 1))
    stage.push(0, 1.0, groups=({"lr": 50.0},))
    stage.members((0,), lost="worker 1 died")
    stage.clock[0] = 0
    stage.push(0, 1.0)
    stage.decide()
    assert stage.value() == -1.0
