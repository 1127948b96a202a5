"""The sampler of a data plan, against the real plan and a client without a wire."""

from __future__ import annotations

import contextlib
import importlib
import random
import re
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

import headwater.data
from headwater.cluster.dataplan import ALL, DataPlans
from headwater.errors import DeadlineExceeded, UsageError
from headwater.integrations.torch.sampler import ShardSampler
from headwater.types import Async, Bulk
from headwater.wire.data_plan import PlanChunk, PlanNext


class Cluster:
    """A coordinator's plans, and time that passes only when somebody sleeps."""

    def __init__(self) -> None:
        self.plans = DataPlans()
        self.time = 0.0
        self.asleep: Callable[[], None] = lambda: None  # what the others do while one sleeps
        self.asked: list[PlanNext] = []
        self.settled = ALL

    def now(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        self.time += seconds
        self.asleep()


class FakeClient:
    """As much of a client as a sampler uses."""

    step_timeout = 5.0
    rests = 0

    def __init__(self, cluster: Cluster, session: int = 1) -> None:
        self.runtime = self.cluster = cluster
        self.session = session
        self.tables: dict[str, SimpleNamespace] = {}

    def ask(self, message: PlanNext, timeout: float | None = None) -> PlanChunk:
        self.cluster.asked.append(message)
        return self.cluster.plans.ask(self.session, message, self.cluster.settled)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        self.rests += 1
        yield


def sampler(client: FakeClient, n: int, epochs: int = 1, **options: object) -> ShardSampler:
    made = {"name": "data", "chunk": 4, "overlap": True, "lag": None, **options}
    return ShardSampler(n, epochs, 0, client=client, **made)  # type: ignore[arg-type]


@pytest.fixture
def cluster() -> Cluster:
    return Cluster()


def done(cluster: Cluster, session: int = 99, epochs: int = 1, n: int = 10) -> PlanChunk:
    """What another worker hears that only reports."""
    return cluster.plans.ask(session, PlanNext("data", n, epochs, 0, 4, True, 0, (), False))


# ---- epochs --------------------------------------------------------------------------------------


def test_alone_each_epoch_is_every_sample_in_another_order(cluster: Cluster) -> None:
    mine = sampler(FakeClient(cluster), 50, 3)
    rounds = [(epoch, list(mine)) for epoch in mine.epochs()]
    assert [epoch for epoch, _ in rounds] == [0, 1, 2]
    assert all(sorted(indices) == list(range(50)) for _, indices in rounds)
    assert len({tuple(indices) for _, indices in rounds}) == 3


def test_without_epochs_one_iteration_is_one_epoch(cluster: Cluster) -> None:
    mine = sampler(FakeClient(cluster), 10, 2)
    assert [sorted(mine), sorted(mine), list(mine)] == [list(range(10)), list(range(10)), []]


def test_two_workers_share_an_epoch(cluster: Cluster) -> None:
    a, b = (sampler(FakeClient(cluster, session), 24) for session in (1, 2))
    first, second = iter(a), iter(b)
    shares: list[list[int]] = [[], []]
    for _ in range(12):
        shares[0].append(next(first))
        shares[1].append(next(second))
    assert sorted(shares[0] + shares[1]) == list(range(24))
    assert list(first) == list(second) == []


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("commits", [True, False])
@pytest.mark.parametrize("drop_last", [True, False])
def test_a_loader_trains_on_each_sample_once(cluster: Cluster, workers: int, commits: bool, drop_last: bool) -> None:
    mine = sampler(FakeClient(cluster), 45, 2, lag=None if commits else 8 * (1 + 2 * workers))
    data = TensorDataset(torch.arange(45))
    loader = DataLoader(data, 8, sampler=mine, num_workers=workers, drop_last=drop_last)
    seen: Counter[int] = Counter()
    for _epoch in mine.epochs():
        for (batch,) in loader:
            seen.update(batch.tolist())
            if commits:
                mine.commit(len(batch))
    assert done(cluster, epochs=2, n=45).over
    if not drop_last:
        assert seen == Counter(dict.fromkeys(range(45), 2))
    elif commits:  # what one epoch leaves goes into the next: only the last tail is dropped
        assert seen.total() == 88
    else:
        assert seen.total() == 80


# ---- what counts as trained on -------------------------------------------------------------------


def test_a_chunk_is_finished_when_it_is_committed(cluster: Cluster) -> None:
    mine = sampler(FakeClient(cluster), 10)
    indices = iter(mine)
    for _ in range(6):
        next(indices)
    mine.commit(3)
    assert done(cluster).left == 12  # whole chunks are counted
    mine.commit(3)
    assert done(cluster).left == 8
    list(indices)
    mine.commit(4)
    assert done(cluster).over


def test_without_commit_a_chunk_is_finished_once_lag_more_were_handed_out(cluster: Cluster) -> None:
    mine = sampler(FakeClient(cluster), 40, lag=5)
    indices = iter(mine)
    for _ in range(9):  # the question for the third chunk: 8 were handed out, 5 of them may not be used
        next(indices)
    assert done(cluster, n=40).left == 40
    for _ in range(4):
        next(indices)
    assert done(cluster, n=40).left == 36
    list(indices)
    mine.finish()
    assert done(cluster, n=40).over


def test_the_clock_of_the_step_travels_with_the_chunk(cluster: Cluster) -> None:
    client = FakeClient(cluster)
    client.tables = {
        "a": SimpleNamespace(clock=7, spec=SimpleNamespace(sync=Bulk())),
        "b": SimpleNamespace(clock=9, spec=SimpleNamespace(sync=Bulk())),
    }
    mine = sampler(client, 10)
    list(mine)
    mine.commit(10)
    assert cluster.asked[-1].finished == ((0, 9), (1, 9), (2, 9))


def test_a_chunk_is_reported_when_its_step_is_acknowledged(cluster: Cluster) -> None:
    """Else a worker that dies could leave out what was still on its way to the servers."""
    client, order = FakeClient(cluster), []
    client.tables = {
        "c": SimpleNamespace(
            clock=50, spec=SimpleNamespace(sync=Async()), settle=lambda: order.append(len(cluster.asked))
        )
    }
    mine = sampler(client, 10)
    list(mine)
    asked = len(cluster.asked)
    assert order == []
    mine.commit(10)
    assert order == [asked]
    assert cluster.asked[-1].finished == ((0, 0), (1, 0), (2, 0))


def test_more_than_was_handed_out_cannot_be_committed(cluster: Cluster) -> None:
    mine = sampler(FakeClient(cluster), 10)
    indices = iter(mine)
    next(indices)
    with pytest.raises(UsageError, match="1 samples are handed out"):
        mine.commit(2)
    with pytest.raises(UsageError, match="handed out"):
        mine.commit(-1)


@pytest.mark.parametrize("commits", [True, False])
def test_an_iteration_that_was_broken_off_goes_on(cluster: Cluster, commits: bool) -> None:
    """With commit where the steps stopped; without it where the handing out stopped."""
    mine = sampler(FakeClient(cluster), 10)
    indices = iter(mine)
    first = [next(indices) for _ in range(6)]
    if commits:
        mine.commit(3)
    second = list(mine)
    assert sorted(first[: 3 if commits else 6] + second) == list(range(10))
    with pytest.raises(UsageError, match="a newer iteration"):
        next(indices)


def test_commit_and_lag_exclude_each_other(cluster: Cluster) -> None:
    mine = sampler(FakeClient(cluster), 10, lag=4)
    next(iter(mine))
    with pytest.raises(UsageError, match="exclude each other"):
        mine.commit(1)


def test_without_commit_and_lag_a_round_counts_when_the_next_begins(cluster: Cluster) -> None:
    mine = sampler(FakeClient(cluster), 10, 2)
    list(mine)
    assert done(cluster, epochs=2).left == 12
    next(iter(mine))
    assert done(cluster, epochs=2).epoch == 1


def test_a_loop_over_epochs_that_takes_nothing_is_told(cluster: Cluster) -> None:
    mine = sampler(FakeClient(cluster), 10)
    with pytest.raises(UsageError, match="took nothing from the sampler"):
        list(mine.epochs())


# ---- others --------------------------------------------------------------------------------------


def _other(cluster: Cluster, n: int = 10, epochs: int = 1, overlap: bool = True) -> PlanNext:
    """Another worker has taken a chunk; what it would say when it has finished it."""
    request = PlanNext("data", n, epochs, 0, 4, overlap, 1)
    taken = cluster.plans.ask(2, request)
    return PlanNext("data", n, epochs, 0, 4, overlap, 1, ((taken.chunk, 0),), False)


def test_epochs_wait_for_what_others_hold(cluster: Cluster) -> None:
    finish = _other(cluster)
    mine = sampler(FakeClient(cluster), 10)
    cluster.asleep = lambda: cluster.time > 1 and cluster.plans.ask(2, finish)  # type: ignore[assignment]
    assert [len(list(mine)) for _ in mine.epochs()] == [6]
    assert cluster.time > 1


def test_epochs_give_a_number_again_for_what_a_dead_worker_left(cluster: Cluster) -> None:
    _other(cluster, epochs=2, overlap=False)
    mine = sampler(FakeClient(cluster), 10, 2, overlap=False)
    cluster.asleep = lambda: cluster.plans.forget(2)
    assert [(epoch, len(list(mine))) for epoch in mine.epochs()] == [(0, 6), (0, 4), (1, 10)]


def test_a_dead_workers_samples_may_come_while_the_next_epoch_runs(cluster: Cluster) -> None:
    _other(cluster, epochs=2)
    mine = sampler(FakeClient(cluster), 10, 2)
    rounds = []
    for epoch in mine.epochs():
        indices = iter(mine)
        taken = [next(indices)]
        if epoch == 1:
            cluster.plans.forget(2)
        rounds.append((epoch, len(taken + list(indices))))
    assert rounds == [(0, 6), (1, 14)]


def test_a_wait_in_which_nobody_gets_on_ends(cluster: Cluster) -> None:
    _other(cluster)
    mine = sampler(FakeClient(cluster), 10)
    rounds = (list(mine) for _ in mine.epochs())
    assert len(next(rounds)) == 6
    with pytest.raises(DeadlineExceeded, match="other workers hold the last 4 samples of epoch 0"):
        next(rounds)
    assert 5 < cluster.time < 6


def test_as_long_as_others_get_on_the_wait_goes_on(cluster: Cluster) -> None:
    plans, finished = cluster.plans, []
    for turn in (1, 2):
        taken = plans.ask(2, PlanNext("data", 10, 1, 0, 4, True, turn))
        finished.append(PlanNext("data", 10, 1, 0, 4, True, turn, ((taken.chunk, 0),), False))

    def others() -> None:
        if finished and cluster.time > 4 * (3 - len(finished)):
            plans.ask(2, finished.pop())

    cluster.asleep = others
    mine = sampler(FakeClient(cluster), 10)
    assert [len(list(mine)) for _ in mine.epochs()] == [2]
    assert cluster.time > 8


def test_under_bulk_a_worker_that_waits_is_not_waited_for(cluster: Cluster) -> None:
    finish = _other(cluster)
    client = FakeClient(cluster)
    client.tables = {"a": SimpleNamespace(clock=0, spec=SimpleNamespace(sync=Bulk()))}
    mine = sampler(client, 10)
    cluster.asleep = lambda: cluster.plans.ask(2, finish)  # type: ignore[assignment]
    assert [len(list(mine)) for _ in mine.epochs()] == [6]
    assert client.rests == 1


# ---- one process ---------------------------------------------------------------------------------


def test_samplers_of_one_client_and_name_share_their_place(cluster: Cluster) -> None:
    client = FakeClient(cluster)
    first, second = sampler(client, 10, 2), sampler(client, 10, 2)
    assert sorted(first) == sorted(second) == list(range(10))
    with pytest.raises(UsageError, match="another data plan 'data'"):
        list(sampler(client, 11))
    assert sorted(sampler(client, 11, name="other")) == list(range(11))


def test_without_a_client_it_is_the_one_that_is_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("headwater.client.connecting"), "_clients", weakref.WeakSet())
    mine = headwater.data.shards(10)
    with pytest.raises(UsageError, match="0 clients are open"):
        list(mine)
    with headwater.connect("inproc://"):
        assert sorted(mine) == list(range(10))
        with headwater.connect("inproc://"), pytest.raises(UsageError, match="2 clients are open"):
            list(headwater.data.shards(10))


@pytest.mark.parametrize(("n", "chunk"), [(1, 1), (255, 1), (3000, 11), (60_000, 234), (10**9, 1024)])
def test_chunks_are_a_256th_of_an_epoch_and_not_too_large(n: int, chunk: int) -> None:
    assert headwater.data.shards(n).spec.chunk == chunk


@pytest.mark.parametrize("bad", [{"n": 0}, {"n": 5, "epochs": 0}, {"n": 5, "chunk": 0}, {"n": 5, "lag": -1}])
def test_numbers_that_make_no_plan_are_refused_at_once(bad: dict[str, int]) -> None:
    with pytest.raises(UsageError):
        headwater.data.shards(**bad)  # type: ignore[arg-type]


# ---- any schedule --------------------------------------------------------------------------------


class _Crowd:
    """Workers in turns, as generators that yield between batches. Who sleeps lets another go on."""

    def __init__(self, seed: int, n: int, epochs: int, chunk: int, overlap: bool, batch: int, commits: bool) -> None:
        self.random = random.Random(seed)
        self.cluster = Cluster()
        self.cluster.asleep = self.step
        self.arguments = {"n": n, "epochs": epochs, "chunk": chunk, "overlap": overlap,
                          "lag": None if commits else batch}  # fmt: skip
        self.batch, self.commits = batch, commits
        self.trained: Counter[int] = Counter()
        self.running: dict[int, Iterator[None]] = {}
        self.sessions = 0
        self.deaths = 0

    def join(self) -> None:
        self.sessions += 1
        self.running[self.sessions] = self._work(self.sessions)

    def _work(self, session: int) -> Iterator[None]:
        mine = sampler(FakeClient(self.cluster, session), **self.arguments)  # type: ignore[arg-type]
        loader = torch.utils.data.BatchSampler(mine, self.batch, drop_last=False)
        for _ in mine.epochs():
            for indices in loader:
                yield
                self.trained.update(indices)
                if self.commits:
                    mine.commit(len(indices))
        del self.running[session]

    def step(self) -> None:
        """One of those who do not sleep trains on a batch, or dies."""
        ready = [s for s, worker in self.running.items() if not worker.gi_running]  # type: ignore[attr-defined]
        if not ready:
            return
        session = self.random.choice(ready)
        if self.random.random() < 0.05 and len(self.running) > 1 and self.deaths < 3:
            self.deaths += 1
            del self.running[session]
            self.cluster.plans.forget(session)
            self.join()
        else:
            next(self.running[session], None)


@settings(max_examples=150)
@given(
    st.integers(0, 2**32), st.integers(1, 40), st.integers(1, 3), st.integers(1, 9), st.booleans(), st.integers(1, 7),
    st.booleans(), st.booleans(),
)  # fmt: skip
def test_each_sample_is_trained_on_whoever_dies(
    seed: int, n: int, epochs: int, chunk: int, overlap: bool, batch: int, commits: bool, deaths: bool
) -> None:
    crowd = _Crowd(seed, n, epochs, chunk, overlap, batch, commits)
    crowd.deaths = 0 if deaths else 3
    for _ in range(3):
        crowd.join()
    while crowd.running:
        crowd.step()
    counts = [crowd.trained[i] for i in range(n)]
    assert sum(counts) == sum(crowd.trained.values())
    assert min(counts) >= epochs
    if not deaths:
        assert max(counts) == epochs


# ---- the page ------------------------------------------------------------------------------------


def test_the_example_of_the_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(headwater.__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    (example,) = [code for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "print(" in code]
    exec(compile(example, "docs/data.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["epoch 0", "epoch 1", "epoch 2"]
    assert float(lines[-1].split()[-1]) < 0.5
