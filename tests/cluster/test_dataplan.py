"""The data plan: each sample once per epoch, whoever dies, whatever is asked twice, wherever a snapshot is taken."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headwater.cluster.dataplan import ALL, DataPlan, DataPlans, Ranges
from headwater.errors import ClusterError, SessionExpired, StateCorrupt, UsageError
from headwater.wire.data_plan import PlanChunk, PlanNext

SPEC = PlanNext("data", n=10, epochs=2, seed=0, chunk=4, overlap=False, turn=0)


def ask(plan: DataPlan, session: int, turn: int, *finished: tuple[int, int], settled: int = ALL) -> PlanChunk:
    return plan.ask(session, msgspec.structs.replace(plan.spec, turn=turn, finished=finished), settled)


def report(plan: DataPlan, session: int, *finished: tuple[int, int], settled: int = ALL) -> PlanChunk:
    return plan.ask(session, msgspec.structs.replace(plan.spec, finished=finished, want=False), settled)


# ---- one thing at a time -------------------------------------------------------------------------


def test_chunks_are_given_in_order_and_the_last_is_shorter() -> None:
    plan = DataPlan(SPEC)
    assert ask(plan, 1, 1) == PlanChunk(0, 0, 0, 4)
    assert ask(plan, 2, 1) == PlanChunk(0, 1, 4, 8)
    assert ask(plan, 1, 2, (0, 0)) == PlanChunk(0, 2, 8, 10)


def test_asking_again_gives_the_same_chunk() -> None:
    plan = DataPlan(SPEC)
    first = ask(plan, 1, 1)
    revision = plan.revision
    assert [ask(plan, 1, 1), ask(plan, 1, 1)] == [first, first]
    assert plan.revision == revision
    assert ask(plan, 1, 2, (0, 0)) == ask(plan, 1, 2, (0, 0))


def test_who_is_early_waits_until_the_epoch_is_done() -> None:
    plan = DataPlan(SPEC)
    for session in (1, 2, 3):
        ask(plan, session, 1)
    assert ask(plan, 1, 2, (0, 0)) == PlanChunk(0, wait=True, left=8)
    report(plan, 2, (1, 0))
    assert ask(plan, 1, 2).wait
    report(plan, 3, (2, 0))
    assert ask(plan, 1, 2) == PlanChunk(1, 3, 0, 4)


def test_with_overlap_one_epoch_may_begin_early_and_no_more() -> None:
    plan = DataPlan(msgspec.structs.replace(SPEC, overlap=True, epochs=3))
    slow = ask(plan, 9, 1)
    given = [ask(plan, 1, turn) for turn in range(1, 6)]
    assert [c.epoch for c in given] == [0, 0, 1, 1, 1]
    assert ask(plan, 2, 1) == PlanChunk(0, wait=True, left=12)
    report(plan, 1, *((c.chunk, 0) for c in given[:-1]))
    assert ask(plan, 2, 1).wait
    report(plan, 9, (slow.chunk, 0))  # epoch 0 is finished: only epoch 1 is open beside the next
    assert ask(plan, 2, 1) == PlanChunk(2, 6, 0, 4)


def test_it_is_over_when_all_is_done_and_not_before() -> None:
    plan = DataPlan(msgspec.structs.replace(SPEC, epochs=1))
    chunks = [ask(plan, 1, turn).chunk for turn in (1, 2, 3)]
    assert ask(plan, 1, 4, (chunks[0], 0), (chunks[1], 0)).wait
    assert ask(plan, 1, 4, (chunks[2], 0)).over
    assert ask(plan, 2, 1).over


def test_what_a_lost_worker_held_goes_to_the_next_who_asks() -> None:
    plan = DataPlan(SPEC)
    held = [ask(plan, 1, 1), ask(plan, 1, 2)]
    plan.forget(1)
    assert [ask(plan, 2, 1), ask(plan, 2, 2)] == held
    with pytest.raises(SessionExpired, match="given to others"):
        ask(plan, 1, 3, (0, 0))
    assert report(plan, 1, (0, 0)).left == 12  # it is another's now


def test_what_a_worker_says_after_it_was_given_up_is_passed_over() -> None:
    """The step that used the chunk may have been dropped with its worker."""
    plan = DataPlan(SPEC)
    ask(plan, 1, 1)
    report(plan, 1, (0, 7), settled=6)
    plan.forget(1, committed=6)
    report(plan, 1, (0, 7), settled=7)
    assert ask(plan, 2, 1).chunk == 0


def test_finishing_twice_or_for_others_changes_nothing() -> None:
    plan = DataPlan(SPEC)
    ask(plan, 1, 1)
    ask(plan, 2, 1)
    report(plan, 1, (0, 0))
    revision = plan.revision
    report(plan, 1, (0, 0), (1, 0), (7, 0), (10**9, 0))
    assert plan.revision == revision


def test_a_step_that_was_never_committed_takes_its_chunk_back() -> None:
    plan = DataPlan(SPEC)
    ask(plan, 1, 1)
    ask(plan, 1, 2)
    report(plan, 1, (0, 6), (1, 7), settled=5)
    plan.forget(1, committed=6)
    assert ask(plan, 2, 1, settled=6).chunk == 1
    assert ask(plan, 2, 2, settled=6).chunk == 2


def test_it_is_not_over_while_its_last_step_may_be_lost() -> None:
    plan = DataPlan(msgspec.structs.replace(SPEC, epochs=1, chunk=10))
    ask(plan, 1, 1)
    report(plan, 1, (0, 9), settled=8)
    assert ask(plan, 2, 1, settled=8) == PlanChunk(0, wait=True, left=10)
    assert ask(plan, 2, 1, settled=9).over


def test_a_snapshot_counts_only_what_its_values_contain() -> None:
    plan = DataPlan(SPEC)
    for session in (1, 2, 3):
        ask(plan, session, 1)
    report(plan, 1, (0, 5), settled=4)
    report(plan, 2, (1, 6), settled=4)
    at_5, at_6 = DataPlan.load(plan.snapshot(5)), DataPlan.load(plan.snapshot(6))
    assert [ask(at_5, 8, 1).chunk, ask(at_5, 8, 2).chunk, ask(at_5, 8, 3).wait] == [1, 2, True]
    assert [ask(at_6, 8, 1).chunk, ask(at_6, 8, 2).wait] == [2, True]


@pytest.mark.parametrize("change", [{"n": 11}, {"seed": 1}, {"chunk": 5}, {"overlap": True}, {"epochs": 3}])
def test_two_plans_under_one_name_are_refused(change: dict[str, int]) -> None:
    plan = DataPlan(SPEC)
    ask(plan, 1, 1)
    revision = plan.revision
    (name,) = change
    with pytest.raises(UsageError, match=f"'data' exists with {name}="):
        plan.ask(2, msgspec.structs.replace(SPEC, turn=1, **change))
    assert plan.revision == revision


def test_a_run_may_go_on_for_longer_than_was_planned() -> None:
    plan = DataPlan(msgspec.structs.replace(SPEC, epochs=1, chunk=10))
    ask(plan, 1, 1)
    assert ask(plan, 1, 2, (0, 0)).over
    again = DataPlan.load(plan.snapshot())
    assert again.ask(7, msgspec.structs.replace(again.spec, epochs=2, turn=1)).epoch == 1
    with pytest.raises(UsageError, match="exists with epochs=2"):
        again.ask(8, msgspec.structs.replace(again.spec, epochs=3, turn=1))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"n": 0}, "n=0 must be between 1 and"),
        ({"n": 1 << 49}, "n=562949953421312 must"),
        ({"epochs": 0}, "epochs=0 must"),
        ({"chunk": 0}, "chunk=0 must"),
        ({"chunk": -3}, "chunk=-3 must"),
        ({"seed": 1 << 63}, "fit into 64 bits"),
        ({"name": ""}, "between 1 and 200 characters"),
        ({"name": "x" * 201}, "between 1 and 200 characters"),
    ],
)
def test_numbers_that_make_no_plan_are_refused(change: dict[str, int], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        DataPlans().ask(1, msgspec.structs.replace(SPEC, turn=1, **change))


# ---- ranges --------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 40), unique=True))
def test_ranges_are_a_set(numbers: list[int]) -> None:
    ranges = Ranges()
    for number in numbers:
        ranges.add(number)
    assert [i for i in range(42) if i in ranges] == sorted(numbers)
    spans = ranges.dump()
    assert all(a[1] < b[0] for a, b in pairwise(spans))


# ---- any history ---------------------------------------------------------------------------------


@dataclass
class _Worker:
    session: int
    turn: int = 0
    holds: list[PlanChunk] = field(default_factory=list)
    said: list[PlanNext] = field(default_factory=list)  # what may come a second time


@dataclass
class _Entry:
    """Samples that were trained on and reported."""

    session: int
    clock: int
    epoch: int
    start: int
    stop: int


class _History:
    """Workers that ask, finish, repeat themselves and die at random; what was trained on goes into a ledger."""

    def __init__(self, spec: PlanNext, seed: int) -> None:
        self.random = random.Random(seed)
        self.plan = DataPlan(spec)
        self.workers: dict[int, _Worker] = {}
        self.ledger: list[_Entry] = []
        self.clock = 0
        self.sessions = 0
        self.snapshot: tuple[int, bytes, list[_Entry]] | None = None

    def run(self, events: int) -> None:
        actions = [self._join, self._ask, self._ask, self._ask, self._ask, self._finish, self._finish, self._finish,
                   self._repeat, self._die, self._restart, self._commit, self._snap]  # fmt: skip
        for _ in range(events):
            self.random.choice(actions)()
            self.plan.validate()
            held = [c.chunk for worker in self.workers.values() for c in worker.holds]
            assert len(held) == len(set(held)), "two workers hold one chunk"

    def _one(self) -> _Worker:
        if not self.workers:
            self._join()
        return self.random.choice(list(self.workers.values()))

    def _join(self) -> None:
        if len(self.workers) < 4:
            self.sessions += 1
            self.workers[self.sessions] = _Worker(self.sessions)

    def _send(self, worker: _Worker, request: PlanNext) -> PlanChunk:
        worker.said.append(request)
        return self.plan.ask(worker.session, request, self.clock)

    def _ask(self) -> None:
        worker = self._one()
        request = msgspec.structs.replace(self.plan.spec, turn=worker.turn + 1)
        answer = self._send(worker, request)
        if self.random.random() < 0.3:  # the answer was lost on the way
            assert self._send(worker, request) == answer
        if answer.chunk >= 0:
            worker.turn += 1
            worker.holds.append(answer)

    def _finish(self) -> None:
        worker = self._one()
        if not worker.holds:
            return
        chunk = worker.holds.pop(self.random.randrange(len(worker.holds)))
        clock = self.clock + self.random.randrange(3)
        self.ledger.append(_Entry(worker.session, clock, chunk.epoch, chunk.start, chunk.stop))
        for _ in range(self.random.choice((1, 1, 2))):
            self._send(worker, msgspec.structs.replace(self.plan.spec, finished=((chunk.chunk, clock),), want=False))

    def _repeat(self) -> None:
        """An old request arrives once more; its answer reaches nobody."""
        worker = self._one()
        old = [r for r in worker.said if not r.want or r.turn == worker.turn]
        if old:
            self.plan.ask(worker.session, self.random.choice(old), self.clock)

    def _die(self) -> None:
        worker = self._one()
        del self.workers[worker.session]
        self.plan.forget(worker.session, self.clock)
        self.ledger = [e for e in self.ledger if e.session != worker.session or e.clock <= self.clock]
        late = [r for r in worker.said if not r.want]
        if late and self.random.random() < 0.3:  # and something of it was still on the way
            request = self.random.choice(late)
            if all(clock <= self.clock for _, clock in request.finished):
                self.plan.ask(worker.session, request, self.clock)

    def _restart(self) -> None:
        """The coordinator died, and begins again from what it had kept."""
        self.plan = DataPlan.load(self.plan.dump())

    def _commit(self) -> None:
        self.clock += 1

    def _snap(self) -> None:
        if self.snapshot is None:
            kept = [e for e in self.ledger if e.clock <= self.clock]
            self.snapshot = self.clock, self.plan.snapshot(self.clock), kept

    def drain(self) -> None:
        """One worker that lives does what is left; all others die."""
        while self.workers:
            self._die()
        _drain(self.plan, self.ledger)


def _drain(plan: DataPlan, ledger: list[_Entry]) -> None:
    session, turn = 10**6, 0
    while True:
        answer = ask(plan, session, turn + 1)
        if answer.over:
            return
        assert not answer.wait, "nobody else is there, and yet there is nothing to do"
        turn += 1
        ledger.append(_Entry(session, 0, answer.epoch, answer.start, answer.stop))
        report(plan, session, (answer.chunk, 0))


def _check_once(spec: PlanNext, ledger: list[_Entry]) -> None:
    counts = Counter((e.epoch, place) for e in ledger for place in range(e.start, e.stop))
    assert set(counts) == {(epoch, place) for epoch in range(spec.epochs) for place in range(spec.n)}
    assert set(counts.values()) == {1}


_specs = st.builds(
    PlanNext, st.just("p"), st.integers(1, 40), st.integers(1, 4), st.just(0), st.integers(1, 12), st.booleans(),
    st.just(0),
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(_specs, st.integers(0, 2**32), st.integers(0, 250))
def test_each_sample_once_per_epoch_in_any_history(spec: PlanNext, seed: int, events: int) -> None:
    history = _History(spec, seed)
    history.run(events)
    history.drain()
    _check_once(spec, history.ledger)
    if history.snapshot is not None:
        _clock, data, kept = history.snapshot
        _drain(DataPlan.load(data), kept)
        _check_once(spec, kept)


# ---- state ---------------------------------------------------------------------------------------


def test_a_long_epoch_is_a_small_state() -> None:
    plan = DataPlan(msgspec.structs.replace(SPEC, n=10**9, chunk=100, epochs=1))
    for turn in range(1, 5001):
        given = ask(plan, turn % 8, (turn + 7) // 8)
        report(plan, turn % 8, (given.chunk, 0))
    assert len(plan.dump()) < 500


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60), st.integers(0, 10**6), st.integers(0, 2**32))
def test_a_damaged_state_is_refused_or_is_a_plan(noise: bytes, place: int, seed: int) -> None:
    history = _History(msgspec.structs.replace(SPEC, n=30, chunk=3), seed)
    history.run(30)
    data = bytearray(history.plan.dump())
    at = place % len(data)
    data[at : at + len(noise)] = noise
    try:
        plan = DataPlan.load(bytes(data))
    except StateCorrupt:
        return
    plan.validate()


def test_plans_give_their_changes_once_and_begin_from_them() -> None:
    plans, kept = DataPlans(), {"view/0": b"not a plan"}
    one = msgspec.structs.replace(SPEC, turn=1)
    first = plans.ask(5, one)
    plans.ask(5, msgspec.structs.replace(one, name="other"))
    changes = plans.changes()
    assert sorted(changes) == ["plan/data", "plan/other"]
    assert plans.changes() == {}
    plans.ask(5, one)  # again: nothing has changed
    assert plans.changes() == {}
    kept.update(changes)
    again = DataPlans(kept)
    assert again.changes() == {}
    assert again.ask(5, one) == first
    again.forget(5)
    assert sorted(again.changes()) == ["plan/data", "plan/other"]
    assert again.ask(6, one) == first


def test_plans_are_restored_from_a_snapshot() -> None:
    plans = DataPlans()
    plans.ask(5, msgspec.structs.replace(SPEC, turn=1))
    plans.ask(5, msgspec.structs.replace(SPEC, turn=2, finished=((0, 3),)), settled=2)
    for clock, first in ((3, 1), (2, 0)):
        fresh = DataPlans()
        fresh.restore(plans.snapshot(clock))
        assert sorted(fresh.changes()) == ["plan/data"]
        assert fresh.ask(6, msgspec.structs.replace(SPEC, turn=1)).chunk == first
    plans.settle(3)
    with pytest.raises(StateCorrupt):
        fresh.restore(b"\x93 no plans")


def test_plans_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headwater.cluster.dataplan.MOST_PLANS", 1)
    plans = DataPlans()
    plans.ask(5, msgspec.structs.replace(SPEC, turn=1))
    with pytest.raises(ClusterError, match="which is the most"):
        plans.ask(5, msgspec.structs.replace(SPEC, name="b", turn=1))
