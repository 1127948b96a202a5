"""``headwater.shard``: the order of one process, dealt out batch by batch; each sample once per epoch."""

from __future__ import annotations

import contextlib
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    TensorDataset,
    WeightedRandomSampler,
)

import headwater
from headwater.client import Client
from headwater.errors import DataError, UsageError
from headwater.integrations.base.dealing import deal, rounds
from headwater.integrations.torch.loader import Crew, ShareSampler
from tests.integrations.torch.support import workers
from tests.patience import PATIENCE


class Numbers(Dataset[int]):
    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> int:
        return index


class Stream(IterableDataset[int]):
    def __init__(self, n: int, shuffled: bool = False) -> None:
        self.n = n
        self.shuffled = shuffled

    def __iter__(self) -> Iterator[int]:
        info = torch.utils.data.get_worker_info()
        every = list(range(self.n) if info is None else range(info.id, self.n, info.num_workers))
        if self.shuffled:
            random.shuffle(every)
        yield from every


class Lengthy(Stream):
    def __len__(self) -> int:
        return self.n


class Shuffled(Sampler[int]):
    """Draws from where many draw."""

    def __init__(self, n: int, kind: str) -> None:
        self.n = n
        self.kind = kind

    def __len__(self) -> int:
        return self.n

    def __iter__(self) -> Iterator[int]:
        order = list(range(self.n))
        if self.kind == "python":
            random.shuffle(order)
        elif self.kind == "numpy":
            np.random.shuffle(order)  # noqa: NPY002
        else:  # bit by bit
            for i in range(self.n):
                j = int(torch.randint(i, self.n, ()))
                order[i], order[j] = order[j], order[i]
                yield order[i]
            return
        yield from order


class Fixed:
    """A client of whom nothing is asked."""

    declared = True

    def __init__(self, rank: int, world: int) -> None:
        self.rank, self.world = rank, world

    def gather(self, name: str, value: bytes, timeout: float | None = None) -> dict[int, bytes]:
        return dict.fromkeys(range(self.world), value)


def epoch(loader: Any) -> list[list[int]]:
    return [batch.tolist() for batch in loader]


def shares(world: int, make: Any, epochs: int = 1) -> list[list[list[list[int]]]]:
    """By rank, by epoch, the batches; every rank has the same seed."""
    found = []
    for rank in range(world):
        torch.manual_seed(5)
        random.seed(5)
        np.random.seed(5)  # noqa: NPY002
        loader = headwater.shard(make(), client=Fixed(rank, world))  # type: ignore[arg-type]
        given_ = [epoch(loader) for _ in range(epochs)]
        with contextlib.suppress(TypeError):  # of a stream without a length
            assert {len(batches) for batches in given_} == {len(loader)}
        found.append(given_)
    return found


def one_process(make: Any, epochs: int = 1) -> list[list[list[int]]]:
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002
    loader = make()
    return [epoch(loader) for _ in range(epochs)]


# ---- one order -----------------------------------------------------------------------------------

N, B = 24, 2
LOADERS: dict[str, Any] = {
    "in order": lambda: DataLoader(Numbers(N), B),
    "shuffle": lambda: DataLoader(Numbers(N), B, shuffle=True),
    "drop_last": lambda: DataLoader(Numbers(N + 1), B, shuffle=True, drop_last=True),
    "generator": lambda: DataLoader(Numbers(N), B, shuffle=True, generator=torch.Generator().manual_seed(3)),
    "sampler": lambda: DataLoader(Numbers(N), B, sampler=WeightedRandomSampler([1.0, 2.0] * 12, N)),
    "batch_sampler": lambda: DataLoader(
        Numbers(N), batch_sampler=BatchSampler(RandomSampler(range(N)), B, drop_last=False)
    ),
    "python": lambda: DataLoader(Numbers(N), B, sampler=Shuffled(N, "python")),
    "numpy": lambda: DataLoader(Numbers(N), B, sampler=Shuffled(N, "numpy")),
    "stepwise": lambda: DataLoader(Numbers(N), B, sampler=Shuffled(N, "torch")),
    "stream": lambda: DataLoader(Stream(N), B),
    "shuffled stream": lambda: DataLoader(Lengthy(N, shuffled=True), B),
}


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("kind", LOADERS)
def test_w_workers_together_go_through_the_order_of_one_process(kind: str, world: int) -> None:
    whole = one_process(LOADERS[kind], epochs=3)
    found = shares(world, LOADERS[kind], epochs=3)
    for number, batches in enumerate(whole):
        for rank in range(world):
            assert found[rank][number] == batches[rank::world]


def test_loading_processes_change_nothing() -> None:
    def make() -> DataLoader[int]:
        return DataLoader(Numbers(N), B, shuffle=True, num_workers=2, persistent_workers=True)

    (whole,) = one_process(make)
    for rank, (batches,) in enumerate(shares(2, make)):
        assert batches == whole[rank::2]
    streams = shares(2, lambda: DataLoader(Stream(23, shuffled=True), B, num_workers=2))
    assert sorted(x for (batches,) in streams for batch in batches for x in batch) == list(range(23))


def test_one_worker_has_the_loader_itself() -> None:
    loader = DataLoader(Numbers(5), 2)
    assert headwater.shard(loader, client=Fixed(0, 1)) is loader  # type: ignore[arg-type]
    alone = headwater.shard(loader)  # nobody there, and nothing said
    assert epoch(alone) == epoch(loader)
    assert len(alone) == 3


# ---- unequal ends --------------------------------------------------------------------------------


@given(st.integers(0, 60), st.integers(1, 7), st.integers(2, 5), st.booleans(), st.booleans())
def test_each_sample_once_and_equal_numbers_of_batches(
    n: int, size: int, world: int, drop_last: bool, stream: bool
) -> None:
    data: Any = Lengthy(n) if stream else Numbers(n)
    found = [each for (each,) in shares(world, lambda: DataLoader(data, size, drop_last=drop_last))]
    seen = Counter(x for batches in found for batch in batches for x in batch)
    assert not seen or max(seen.values()) == 1
    counts = {len(batches) for batches in found}
    if drop_last:
        assert len(seen) == n - n % (size * world)
        assert {len(batch) for batches in found for batch in batches} <= {size}
        assert len(counts) == 1
    else:
        assert len(seen) == n
        assert len(counts) == 1 or n < world
        assert all(len(batch) <= size + 1 for batches in found for batch in batches)


def test_what_is_left_is_dealt_out() -> None:
    assert shares(2, lambda: DataLoader(Numbers(10), 4))[0][0] == [[0, 1, 2, 3], [8]]
    assert shares(2, lambda: DataLoader(Numbers(9), 4))[0][0] == [[0, 1, 2, 3, 8]]
    assert shares(2, lambda: DataLoader(Numbers(9), 4))[1][0] == [[4, 5, 6, 7]]
    assert list(rounds(iter([[1, 2], [3, 4], [5, 6]]), 2, True)) == [[[1, 2], [3, 4]]]
    assert deal([1, 2, 3], 2) == [[1, 2], [3]]
    assert deal([1], 3) == [[1]]


def test_batches_that_cannot_be_cut_are_dealt_out_whole() -> None:
    for data in (Lengthy(5), Numbers(5)):
        found = shares(2, lambda data=data: DataLoader(data, batch_size=None, collate_fn=torch.tensor))
        single: Any = [batches for (batches,) in found]
        assert single == [[0, 2, 4], [1, 3]]


def test_batch_samplers_of_ones_own() -> None:
    class Buckets(Sampler[list[int]]):
        drop_last = False

        def __iter__(self) -> Iterator[list[int]]:
            yield from [[0], [1, 2, 3], [4, 5], [6, 7, 8, 9]]

        def __len__(self) -> int:
            return 4

    found = shares(3, lambda: DataLoader(Numbers(10), batch_sampler=Buckets()))
    assert [batches for (batches,) in found] == [[[0], [6, 7]], [[1, 2, 3], [8]], [[4, 5], [9]]]


# ---- agreement -----------------------------------------------------------------------------------


class Recorded(Fixed):
    """Rank 0 first, alone; then others, to whom it says what it said. ``heard`` is what rank 0 has said."""

    def __init__(self, rank: int, world: int, heard: list[bytes]) -> None:
        super().__init__(rank, world)
        self.heard = heard
        self.turn = 0

    def gather(self, name: str, value: bytes, timeout: float | None = None) -> dict[int, bytes]:
        if self.rank == 0:
            self.heard.append(value)
        self.turn += 1
        return {0: self.heard[self.turn - 1], 1: value}


def seed(number: int) -> None:
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number)  # noqa: NPY002


def chance() -> list[float]:
    return [torch.rand(()).item(), random.random(), np.random.rand()]  # noqa: NPY002


@pytest.mark.parametrize("kind", ["shuffle", "python", "numpy", "sampler", "generator", "shuffled stream"])
def test_workers_of_different_seeds_take_over_the_lowest_rank_s_order(kind: str) -> None:
    """And their own chance goes on as if the sampler had drawn nothing."""
    heard: list[bytes] = []
    found = []
    for rank in range(2):
        seed(rank)
        made = LOADERS[kind]()
        if made.generator is not None:
            made.generator.manual_seed(rank)
        loader = headwater.shard(made, client=Recorded(rank, 2, heard))  # type: ignore[arg-type]
        own, given_ = [], []
        for number in range(2):
            batches = iter(loader)
            given_.append([next(batches).tolist()])
            own.append(chance())  # between two batches, as dropout would
            given_[number] += [batch.tolist() for batch in batches]
        found.append(given_)
        if rank == 1 and kind != "generator":
            seed(rank)
            for number in range(2):
                torch.empty((), dtype=torch.int64).random_()  # what the loader itself draws
                assert own[number] == chance()
    seed(0)
    whole = LOADERS[kind]()
    if whole.generator is not None:
        whole.generator.manual_seed(0)
    for number in range(2):
        batches = iter(whole)
        every = [next(batches).tolist()]
        chance()
        every += [batch.tolist() for batch in batches]
        assert [found[0][number], found[1][number]] == [every[::2], every[1::2]]


def test_what_is_drawn_between_two_batches_parts_nobody_s_order() -> None:
    heard: list[bytes] = []
    seen: list[list[int]] = [[], []]
    for rank in range(2):
        seed(7)
        loader = headwater.shard(LOADERS["stepwise"](), client=Recorded(rank, 2, heard))  # type: ignore[arg-type]
        for number in range(2):
            for batch in loader:
                seen[number] += batch.tolist()
                torch.rand(1 + rank)
    assert sorted(seen[0]) == sorted(seen[1]) == list(range(N))


def test_orders_that_differ_all_the_same_are_told() -> None:
    def life(client: Client) -> None:
        loader = headwater.shard(DataLoader(Numbers(12 + 2 * client.rank), 2, shuffle=True), client=client)
        epoch(loader)
        with pytest.raises(DataError, match="different orders"):
            epoch(loader)

    workers(2, life)


def test_an_epoch_that_one_worker_broke_off_is_no_other_order() -> None:
    def life(client: Client) -> int:
        generator = torch.Generator().manual_seed(0)
        loader = headwater.shard(DataLoader(Numbers(12), 2, shuffle=True, generator=generator), client=client)
        for number, _ in enumerate(loader):
            if number == client.rank:
                break
        return sum(len(batch) for batch in epoch(loader))

    assert workers(2, life) == [6, 6]


def test_a_worker_that_left_is_not_dealt_in() -> None:
    def life(client: Client) -> list[list[int]]:
        client.barrier("all are there")
        if client.rank == 0:
            client.close()
            return []
        generator = torch.Generator().manual_seed(0)
        loader = headwater.shard(DataLoader(Numbers(12), 2, shuffle=True, generator=generator), client=client)
        return epoch(loader)

    nothing, *others = workers(3, life)
    assert nothing == []
    assert sorted(x for batches in others for batch in batches for x in batch) == list(range(12))


def test_before_there_is_a_client_the_environment_says_who_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADWATER_WORLD_SIZE", "2")
    found = []
    for rank in range(2):
        monkeypatch.setenv("HEADWATER_RANK", str(rank))
        torch.manual_seed(rank)
        found += epoch(headwater.shard(DataLoader(Numbers(12), 2, shuffle=True)))
    assert sorted(x for batch in found for x in batch) == list(range(12))


# ---- what is left alone --------------------------------------------------------------------------


def test_a_loader_that_shares_already_is_left_alone_and_that_is_said() -> None:
    distributed: Any = DistributedSampler(Numbers(8), num_replicas=2, rank=1)
    loader = DataLoader(Numbers(8), 2, sampler=distributed)
    with pytest.warns(UserWarning, match="its DistributedSampler shares the data"):
        assert headwater.shard(loader, client=Fixed(1, 2)) is loader  # type: ignore[arg-type]
    plan: Any = headwater.data.shards(8)
    with pytest.warns(UserWarning, match="its ShardSampler shares the data"):
        headwater.shard(DataLoader(Numbers(8), 2, sampler=plan), client=Fixed(1, 2))  # type: ignore[arg-type]
    once = headwater.shard(DataLoader(Numbers(8), 2), client=Fixed(1, 2))  # type: ignore[arg-type]
    assert headwater.shard(once, client=Fixed(1, 2)) is once  # type: ignore[arg-type]
    of_one: Any = DistributedSampler(Numbers(8), num_replicas=1, rank=0, shuffle=False)
    loader = headwater.shard(DataLoader(Numbers(8), 2, sampler=of_one), client=Fixed(1, 2))  # type: ignore[arg-type]
    assert epoch(loader) == [[2, 3], [6, 7]]


def test_what_is_no_loader_is_refused() -> None:
    for given_ in ([1, 2], Numbers(3), iter([1])):
        with pytest.raises(UsageError, match="takes a torch DataLoader"):
            headwater.shard(given_)  # type: ignore[type-var]


def test_the_rest_of_a_loader_stays() -> None:
    class Mine(DataLoader[int]):
        extra = 3

    class Epochs(RandomSampler):
        epoch = 0

        def set_epoch(self, number: int) -> None:
            self.epoch = number

    sampler = Epochs(Numbers(8))
    loader = Mine(Numbers(8), 2, sampler=sampler, collate_fn=lambda batch: torch.tensor(batch) * 10)
    shared = headwater.shard(loader, client=Fixed(0, 2))  # type: ignore[arg-type]
    assert type(shared) is Mine
    assert (shared.extra, shared.batch_size, shared.dataset is loader.dataset) == (3, 2, True)
    shared.sampler.set_epoch(4)  # type: ignore[attr-defined]
    assert sampler.epoch == 4
    assert isinstance(shared.batch_sampler, ShareSampler)
    assert shared.batch_sampler.batch_size == 2
    assert all(x % 10 == 0 for batch in epoch(shared) for x in batch)
    assert len(loader.batch_sampler) == 4, "the one that was given is as it was"  # type: ignore[arg-type]
    assert type(SequentialSampler(Numbers(2))) is SequentialSampler
    assert Crew(None).here() == (0, 1)


# ---- training ------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3])
def test_training_on_shares_equals_one_process_that_accumulates(count: int) -> None:
    torch.manual_seed(1)
    data = TensorDataset(torch.randn(24, 3), torch.randn(24, 1))

    def made() -> tuple[nn.Linear, DataLoader[Any]]:
        model = nn.Linear(3, 1)
        with torch.no_grad():
            model.weight.fill_(0.1)
            model.bias.zero_()
        generator = torch.Generator().manual_seed(2)
        return model, DataLoader(data, 4, shuffle=True, generator=generator)

    def life(client: Client) -> torch.Tensor:
        model, loader = made()
        opt = headwater.Optimizer(model, torch.optim.SGD, lr=0.1, client=client)
        for _ in range(2):
            for x, y in headwater.shard(loader, client=client):
                nn.functional.mse_loss(model(x), y).backward()  # type: ignore[no-untyped-call]
                opt.step()
                opt.zero_grad()
        opt.close()
        return model.weight.detach()

    model, loader = made()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        for number, (x, y) in enumerate(loader, 1):
            nn.functional.mse_loss(model(x), y).backward()  # type: ignore[no-untyped-call]
            if number % count == 0:
                for p in model.parameters():
                    p.grad /= count  # type: ignore[assignment, operator]
                opt.step()
                opt.zero_grad()
    assert all(torch.equal(found, model.weight) for found in workers(count, life))


SCRIPT = """
import headwater, torch, warnings
data = torch.utils.data.TensorDataset(torch.arange(18.)[:, None])   # nobody sets a seed
loader = headwater.shard(torch.utils.data.DataLoader(data, batch_size=4, shuffle=True, num_workers=NUMBER))
model = torch.nn.Linear(1, 1)
opt = headwater.Optimizer(model, torch.optim.SGD, lr=0.0)
for epoch in range(2):
    for (x,) in loader:
        print("seen", epoch, *x.int().flatten().tolist())
        model(x).mean().backward(); opt.step(); opt.zero_grad()
"""


@pytest.mark.parametrize("loading", [0, 1])
def test_processes_share_each_epoch(tmp_path: Path, loading: int) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.replace("NUMBER", str(loading)))
    command = [sys.executable, "-m", "headwater", "run", "--servers", "1", "--workers", "2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    seen: dict[str, list[int]] = {"0": [], "1": []}
    for line in done.stdout.splitlines():
        if " seen " in line:
            number, *samples = line.split(" seen ")[1].split()
            seen[number] += map(int, samples)
    assert sorted(seen["0"]) == sorted(seen["1"]) == list(range(18))
    assert seen["0"] != seen["1"]
    assert "same samples" not in done.stdout + done.stderr
