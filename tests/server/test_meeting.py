"""Bulk steps that workers look into before their end: means that are asked for, changed gradients, written values."""

from __future__ import annotations

import pytest
import torch

from headwater.server import events as e
from headwater.server.replication import records as r
from headwater.types import Bulk
from headwater.wire.frames import Flag
from headwater.wire.messages import Commit
from tests.server.stage import TABLE, Stage, spec


def ask(stage: Stage, rank: int, *, past: bool = False, number: int | None = None, members: int | None = None) -> None:
    """Ask all shards (or one) for the mean of the pending step, as a client does: behind an empty push."""
    for n in range(len(stage.shards)) if number is None else [number]:
        stage.push(rank, number=n, flags=0, span=(0, 0), members=members)
        epoch = stage.epoch if members is None else members
        seq = stage.seq[10 + rank, n]
        stage.event(n, e.AskMean(10 + rank, seq, epoch, TABLE, stage.clock[rank] + 1, past))


def write(stage: Stage, rank: int, value: float) -> None:
    """Assign ``value`` everywhere, as a part of the pending step."""
    clock = stage.clock[rank] + 1
    for n, shard in enumerate(stage.shards):
        for segment in shard.tables[TABLE].store.segments:
            data = torch.full(((segment.end - segment.offset) // 4,), value).view(torch.uint8)
            seq = stage.seq[10 + rank, n] = stage.seq.get((10 + rank, n), 0) + 1
            stage.event(n, e.Assign(10 + rank, seq, TABLE, segment.offset, data, False, clock, stage.epoch))


def means(stage: Stage) -> dict[int, set[float]]:
    """By session, the values of the means that it was sent: one, if all elements on all shards are alike."""
    found: dict[int, set[float]] = {}
    for answer in stage.take(e.SendMean):
        for start, stop in answer.ranges:
            found.setdefault(answer.session, set()).update(answer.mean[start:stop].view(torch.float32)[:9].tolist())
        if not answer.ranges:
            found.setdefault(answer.session, set())
    return found


def refused(stage: Stage) -> dict[int, set[str]]:
    found: dict[int, set[str]] = {}
    for fail in stage.take(e.Fail):
        found.setdefault(fail.session, set()).add(f"{fail.code}: {fail.message}")
    return found


# ---- anew ------------------------------------------------------------------------------------------


def test_what_is_pushed_anew_takes_the_place_of_what_was_pushed() -> None:
    """A gradient that was pushed too early and set to None afterwards is no part of the step."""
    stage = Stage(spec(numel=200_000), shards=2)
    stage.push(0, 7.0, flags=0)
    for n in (0, 1):
        stage.push(0, number=n, flags=Flag.ANEW | Flag.END, span=(0, 0), clock=1)
    stage.push(1, 4.0)
    stage.decide()
    assert stage.value(0) == stage.value(1) == -2.0, "half of rank 1's"


def test_anew_forgets_nobody_else_s() -> None:
    stage = Stage()
    stage.push(1, 4.0, flags=0)
    stage.push(0, 7.0, flags=0)
    stage.push(0, 2.0, flags=Flag.ANEW | Flag.END)
    stage.push(1, number=0, span=(0, 0))
    stage.decide()
    assert stage.value() == -3.0


# ---- means -----------------------------------------------------------------------------------------


def test_who_asks_sees_the_mean_when_everybody_has_contributed_and_nothing_is_applied() -> None:
    stage = Stage(spec(numel=200_000), shards=2)
    stage.push(0, 2.0, flags=0)
    ask(stage, 0)
    stage.push(1, 4.0, flags=0)
    assert means(stage) == {}, "rank 1 may push more"
    ask(stage, 1)
    assert means(stage) == {10: {3.0}, 11: {3.0}}
    assert stage.value(0) == stage.value(1) == 0.0
    for rank in (0, 1):
        for n in (0, 1):
            stage.push(rank, number=n, span=(0, 0), clock=1)
    stage.decide()
    assert stage.value(0) == stage.value(1) == -3.0


def test_who_asks_sees_what_those_have_contributed_who_have_ended_the_step_already() -> None:
    stage = Stage(ranks=(0, 1, 2))
    for rank, value in ((0, 2.0), (1, 4.0)):
        stage.push(rank, value)
    stage.push(2, 9.0, flags=0)
    ask(stage, 2)
    assert means(stage) == {12: {5.0}}
    stage.push(2, number=0, span=(0, 0))
    stage.decide()
    assert stage.value() == -5.0


def test_who_asks_behind_a_changed_gradient_sees_that_one() -> None:
    stage = Stage()
    for rank, value in ((0, 2.0), (1, 4.0)):
        stage.push(rank, value, flags=0)
        ask(stage, rank)
    assert means(stage) == {10: {3.0}, 11: {3.0}}
    stage.push(0, 0.5, flags=Flag.END | Flag.MERGED)
    ask(stage, 1)
    assert means(stage) == {11: {0.5}}, "it is the step's, undivided"


@pytest.mark.parametrize(("sync", "seen"), [(Bulk("sum"), 6.0), (Bulk("lowest"), 2.0)])
def test_the_aggregate_is_the_policy_s(sync: Bulk, seen: float) -> None:
    stage = Stage(spec(sync))
    for rank, value in ((0, 2.0), (1, 4.0)):
        stage.push(rank, value, flags=0)
        ask(stage, rank)
    assert means(stage) == {10: {seen}, 11: {seen}}


def test_the_mean_of_nothing_covers_nothing() -> None:
    stage = Stage()
    for rank in (0, 1):
        ask(stage, rank)
    assert means(stage) == {10: set(), 11: set()}


def test_a_death_while_the_mean_is_asked_for_tells_those_who_wait_to_push_again() -> None:
    stage = Stage(ranks=(0, 1, 2))
    for rank, value in ((0, 2.0), (1, 4.0)):
        stage.push(rank, value, flags=0)
        ask(stage, rank)
    stage.push(2, 9.0, flags=0)
    stage.close(2)
    stage.members((0, 1), lost="worker 2 died")
    told = refused(stage)
    assert set(told) == {10, 11}
    assert all(text.startswith("WorkerLost") for texts in told.values() for text in texts)
    assert means(stage) == {}
    for rank, value in ((0, 2.0), (1, 4.0)):
        stage.push(rank, value, flags=0)
        ask(stage, rank)
    assert means(stage) == {10: {3.0}, 11: {3.0}}, "of the two that are left"


def test_who_leaves_while_the_mean_is_asked_for_is_not_waited_for() -> None:
    stage = Stage()
    stage.push(0, 2.0, flags=0)
    ask(stage, 0)
    assert means(stage) == {}
    stage.close(1)
    stage.members((0,))
    assert means(stage) == {10: {2.0}}


def test_a_worker_that_has_ended_its_step_cannot_ask_for_its_mean() -> None:
    stage = Stage()
    stage.push(0, 2.0)
    stage.event(0, e.AskMean(10, 1, stage.epoch, TABLE, 1))
    assert "which it has ended" in str(refused(stage)[10])
    ask(stage, 1)
    assert means(stage) == {11: {1.0}}, "as it would be applied: rank 1 has contributed nothing"


def test_the_mean_of_the_step_before_is_that_of_what_all_push_again() -> None:
    stage = Stage()
    for rank, value in ((0, 2.0), (1, 4.0)):
        stage.push(rank, value)
    stage.decide()
    for rank, value in ((0, 2.0), (1, 4.0)):
        stage.push(rank, value, flags=Flag.ANEW)
        ask(stage, rank, past=True)
    assert means(stage) == {10: {3.0}, 11: {3.0}}
    for rank in (0, 1):
        stage.push(rank, 1.0, flags=Flag.ANEW | Flag.END)
    stage.decide()
    assert stage.value() == -4.0, "what was looked at is no part of the next step"


@pytest.mark.parametrize("other", ["asks", "ended"])
def test_the_mean_of_the_step_before_is_refused_where_not_all_ask_for_it(other: str) -> None:
    stage = Stage()
    for rank, value in ((0, 2.0), (1, 4.0)):
        stage.push(rank, value)
    stage.decide()
    stage.push(0, 2.0, flags=Flag.ANEW)
    ask(stage, 0, past=True)
    stage.push(1, 8.0, flags=Flag.END if other == "ended" else 0)
    if other == "asks":
        ask(stage, 1)
    told = refused(stage)
    assert set(told) == {10}
    assert "was looked at after that step, and not on every worker" in str(told[10])
    assert means(stage) == {}, "the other's is not there yet"
    stage.push(0, 6.0, flags=Flag.ANEW | Flag.END)
    if other == "asks":
        assert means(stage) == {11: {7.0}}
        stage.push(1, number=0, span=(0, 0))
    stage.decide()
    assert stage.value() == -3.0 - 7.0


# ---- gradients that are all workers' already ---------------------------------------------------------


@pytest.mark.parametrize("sync", [Bulk(), Bulk("sum")])
def test_the_lowest_rank_s_changed_gradient_is_taken_undivided(sync: Bulk) -> None:
    stage = Stage(spec(sync, numel=200_000), shards=2)
    stage.push(1, 0.75, flags=Flag.END | Flag.MERGED)
    stage.push(0, 0.5, flags=Flag.END | Flag.MERGED)
    stage.decide()
    assert stage.value(0) == stage.value(1) == -0.5


def test_it_is_taken_if_only_the_lowest_rank_changed_it() -> None:
    stage = Stage()
    stage.push(1, 4.0)
    stage.push(0, 0.5, flags=Flag.END | Flag.MERGED)
    stage.decide()
    assert stage.value() == -0.5


@pytest.mark.parametrize("flag", [Flag.MERGED, Flag.WROTE])
@pytest.mark.parametrize("shards", [1, 2])
def test_what_a_higher_rank_did_alone_is_refused_on_all_and_all_may_push_again(flag: int, shards: int) -> None:
    stage = Stage(spec(numel=200_000), shards=shards)
    stage.push(0, 2.0)
    if flag == Flag.WROTE:
        write(stage, 1, 5.0)
    stage.push(1, 4.0, flags=Flag.END | flag)
    told = refused(stage)
    assert set(told) == {10, 11}
    for texts in told.values():
        (text,) = texts
        assert text.startswith("UsageError: worker 1 ")
        assert "and worker 0 did not; step 1 was not applied" in text
    assert stage.decide() is None
    assert stage.value() == 0.0
    stage.clock = {0: 0, 1: 0}
    for rank, value in ((0, 2.0), (1, 4.0)):
        stage.push(rank, value)
    stage.decide()
    assert stage.value() == -3.0, "nothing of the refused step is left"


# ---- values that were written --------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 2])
def test_the_step_starts_from_what_the_lowest_rank_wrote(shards: int) -> None:
    stage = Stage(spec(numel=200_000), shards=shards)
    for rank, value in ((1, 50.0), (0, 5.0)):
        write(stage, rank, value)
        stage.push(rank, 1.0, flags=Flag.END | Flag.WROTE)
    stage.decide()
    assert [stage.value(n) for n in range(len(stage.shards))] == [4.0] * len(stage.shards)
    expected = {(10 + rank, stage.seq[10 + rank, n]) for rank in (0, 1) for n in range(shards)}
    assert {(ack.session, ack.seq) for ack in stage.take(e.Ack)} == expected
    for rank in (0, 1):
        stage.push(rank, 1.0)
    stage.decide()
    assert stage.value() == 3.0, "written once"


def test_nobody_sees_what_was_written_before_the_step_is_committed_everywhere() -> None:
    """Shard 0 has heard of all; shard 1 has not. Then the one who wrote dies, and wrote nothing on either."""
    stage = Stage(spec(numel=200_000), shards=2)
    write(stage, 0, 5.0)
    stage.push(0, 1.0, flags=Flag.END | Flag.WROTE)
    stage.push(1, 2.0, number=0)
    assert stage.value(0) == 0.0
    stage.close(0)
    stage.members((1,), lost="worker 0 died")
    assert [stage.value(0), stage.value(1)] == [0.0, 0.0]
    stage.clock[1] = 0
    stage.push(1, 2.0)
    stage.decide()
    assert [stage.value(0), stage.value(1)] == [-2.0, -2.0], "as if nobody had written"


def test_a_step_that_is_skipped_keeps_what_was_written() -> None:
    """As in torch: a scaler that skips a step takes back nothing else."""
    stage = Stage()
    write(stage, 0, 5.0)
    stage.push(0, 1.0, flags=Flag.END | Flag.WROTE)
    stage.push(1, 1.0, flags=Flag.END | Flag.SKIP)
    stage.decide()
    assert stage.value() == 5.0


def test_written_values_that_are_sent_twice_count_once() -> None:
    stage = Stage()
    write(stage, 0, 5.0)
    stage.seq[10, 0] = 0
    write(stage, 0, 5.0)
    for rank in (0, 1):
        stage.push(rank, 1.0, flags=Flag.END | (0 if rank else Flag.WROTE))
    stage.decide()
    assert stage.value() == 4.0
    stage.event(0, Commit(TABLE, 1, stage.epoch, False))
    assert stage.value() == 4.0


def test_what_a_primary_had_sent_of_a_step_when_it_died_is_void_in_the_next_try() -> None:
    """Of its records only the written values came through; the worker has undone them meanwhile."""
    stage = Stage()
    (segment,) = stage.shards[0].tables[TABLE].store.segments
    data = torch.full(((segment.end - segment.offset) // 4,), 9.0).view(torch.uint8)
    left = r.Values(TABLE, 0, 0, segment.offset, len(data), last=False, clock=1, members=stage.epoch)
    stage.shards[0].proposals.propose(left, data, segment.offset)
    for rank in (0, 1):
        stage.push(rank, 1.0)
    stage.decide()
    assert stage.value() == -1.0
