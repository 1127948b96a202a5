"""What a worker is told: learning rates that differ, steps skipped for another's sake, data that nobody shared."""

from __future__ import annotations

import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn

import headwater
from headwater.client import Client
from headwater.client.tickets import Alike
from headwater.integrations.base import notices
from headwater.integrations.base.notices import SameSamples
from tests.integrations.torch.support import workers
from tests.patience import PATIENCE


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """What was said in each thread; ``warnings`` has one list for all."""
    found: dict[str, list[str]] = {}
    monkeypatch.setattr(
        notices, "warn", lambda text: found.setdefault(threading.current_thread().name, []).append(text)
    )
    return found


def step(model: nn.Module, opt: headwater.Optimizer, x: float) -> None:
    model(torch.tensor([[float(x)]])).sum().backward()
    opt.step()
    opt.zero_grad()
    opt.synchronize()


def linear() -> nn.Linear:
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    return model


# ---- learning rates ------------------------------------------------------------------------------


@pytest.mark.parametrize("servers", [1, 2])
def test_the_lowest_rank_s_learning_rate_is_the_step_s_and_the_others_are_told_once(
    said: dict[str, list[str]], servers: int
) -> None:
    def life(client: Client) -> tuple[list[float], list[str]]:
        threading.current_thread().name = f"rank {client.rank}"
        model = linear()
        opt = headwater.Optimizer(model, torch.optim.SGD, lr=1.0, client=client)
        weights = []
        for number in range(5):
            if client.rank == 1 and number >= 1:
                opt.param_groups[0]["lr"] = 0.125 / number
            if number >= 3:
                opt.param_groups[0]["lr"] = 0.5
            step(model, opt, client.rank + number)
            weights.append(model.weight.item())
        opt.close()
        return weights, said.get(f"rank {client.rank}", [])

    first, second, third = workers(3, life, servers)
    expected, weight = [], 0.0
    for number in range(5):
        weight -= (1.0 if number < 3 else 0.5) * (number + 1)
        expected.append(weight)
    assert first == (expected, [])
    assert third == (expected, [])
    assert second[0] == expected
    (text,) = second[1]
    assert "lr of parameter group 0 is 0.125 on rank 1, and step 2 of 'model' was taken with 1.0" in text


def test_each_group_and_hyperparameter_is_named(said: dict[str, list[str]]) -> None:
    def life(client: Client) -> list[str]:
        threading.current_thread().name = f"rank {client.rank}"
        model = nn.Linear(2, 2)
        groups = [{"params": [model.weight]}, {"params": [model.bias], "lr": 0.5}]
        opt = headwater.Optimizer(model, torch.optim.SGD, groups, lr=1.0, momentum=0.5, client=client)
        if client.rank == 1:
            opt.param_groups[1]["lr"] = 0.25
            opt.param_groups[0]["weight_decay"] = 0.1
        model(torch.full((1, 2), client.rank + 1.0)).sum().backward()
        opt.step()
        opt.close()
        return said.get(f"rank {client.rank}", [])

    first, second = workers(2, life)
    assert first == []
    assert [text.split(",")[0] for text in sorted(second)] == [
        "lr of parameter group 1 is 0.25 on rank 1",
        "weight_decay of parameter group 0 is 0.1 on rank 1",
    ]


def test_a_warning_is_said_of_the_script_s_line() -> None:
    with pytest.warns(UserWarning, match="Said once") as caught:
        notices.warn("This. Said once")
    assert caught[0].filename == __file__


def test_when_the_lowest_rank_leaves_the_next_one_s_learning_rate_counts(said: dict[str, list[str]]) -> None:
    def life(client: Client) -> float:
        model = linear()
        opt = headwater.Optimizer(model, torch.optim.SGD, lr=1.0, client=client)
        opt.param_groups[0]["lr"] = 0.25 if client.rank else 1.0
        step(model, opt, client.rank + 1.0)
        client.barrier("one step")
        if client.rank > 0:
            step(model, opt, client.rank + 1.0)
        opt.close()
        return model.weight.item()

    address = "inproc://lowest-leaves"

    def run(rank: int) -> float:
        with headwater.connect(address, rank=rank, world=3, timeout=PATIENCE) as client:
            return life(client)

    with ThreadPoolExecutor(3) as pool:
        found = [job.result(PATIENCE) for job in [pool.submit(run, rank) for rank in range(3)]]
    assert found[0] == -2.0
    assert found[1:] == [-2.0 - 0.25 * 2.5] * 2


def test_a_learning_rate_that_comes_with_a_skipped_step_counts_for_the_next(said: dict[str, list[str]]) -> None:
    def life(client: Client) -> float:
        model = linear()
        opt = headwater.Optimizer(model, torch.optim.SGD, lr=1.0, client=client, nonfinite="skip")
        step(model, opt, client.rank + 1.0)
        opt.param_groups[0]["lr"] = 0.5
        step(model, opt, float("inf") if client.rank else 1.0)
        step(model, opt, client.rank + 1.0)
        opt.close()
        return model.weight.item()

    assert workers(2, life) == [-1.5 - 0.75] * 2


@pytest.mark.parametrize("sync", [headwater.Async(), headwater.Stale(3), headwater.Async(max_staleness=3)])
def test_asynchronous_pushes_are_taken_each_with_its_own(sync: Any) -> None:
    """Learning rates are sent once, before the first push; nobody's becomes another's."""

    def life(client: Client) -> float:
        model = linear()
        opt = headwater.Optimizer(model, torch.optim.SGD, lr=1.0, client=client, sync=sync)
        opt.param_groups[0]["lr"] = 0.125 if client.rank else 1.0
        for _ in range(2):
            for rank in range(2):
                if rank == client.rank:
                    step(model, opt, 1.0)
                client.barrier("turn")
        table = client.tables["model"]
        table.pull().wait()
        value = table.values["weight"].item()
        opt.close()
        return value

    assert workers(2, life) == [-2.25] * 2


# ---- skips ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["alike", "other factors", "one of them only"])
def test_who_changes_the_mean_in_other_ways_than_the_lowest_rank_is_told_once(
    said: dict[str, list[str]], case: str
) -> None:
    def life(client: Client) -> tuple[float, list[str]]:
        threading.current_thread().name = f"rank {client.rank}"
        model = linear()
        opt = headwater.Optimizer(model, torch.optim.SGD, lr=0.1, client=client)
        for number in range(3):
            model(torch.tensor([[1.0 + number + client.rank]])).sum().backward()
            if case != "one of them only" or client.rank == 0:
                model.weight.grad.mul_(0.5 if case == "alike" else 0.5 + client.rank)  # type: ignore[union-attr]
            else:
                assert model.weight.grad.item() == 1.5 + number  # type: ignore[union-attr]
            opt.step()
            opt.zero_grad()
        opt.close()
        return model.weight.item(), said.get(f"rank {client.rank}", [])

    found = workers(2, life, servers=2)
    assert found[0][0] == found[1][0]
    assert [len(texts) for _, texts in found] == ([0, 0] if case == "alike" else [1, 1])
    assert all("in different ways" in text for _, texts in found for text in texts)


def test_a_skip_names_the_rank_on_every_rank(caplog: pytest.LogCaptureFixture) -> None:
    def life(client: Client) -> list[tuple[bool, tuple[int, ...]]]:
        model = linear()
        opt = headwater.Optimizer(model, torch.optim.SGD, lr=1.0, client=client, nonfinite="skip")
        found = []
        for number in range(3):
            step(model, opt, float("nan") if number == client.rank == 1 else 1.0 + client.rank)
            assert opt.last_step is not None
            found.append((opt.last_step.applied, opt.last_step.skipped_by))
        opt.close()
        return found

    with caplog.at_level(logging.WARNING, "headwater"):
        found = workers(3, life, servers=2)
    assert found == [[(True, ()), (False, (1,)), (True, ())]] * 3
    lines = [record.getMessage() for record in caplog.records]
    assert sorted(line.split(":")[0] for line in lines) == ["rank 0", "rank 1", "rank 2"]
    assert all("step 2 of 'model' was skipped on all workers for the sake of rank 1" in line for line in lines)


def test_a_closure_is_called_once_and_its_loss_returned() -> None:
    def life(client: Client) -> list[float]:
        model = linear()
        opt = headwater.Optimizer(model, torch.optim.SGD, lr=1.0, client=client)
        calls = []

        def closure() -> torch.Tensor:
            calls.append(torch.is_grad_enabled())
            opt.zero_grad()
            loss: torch.Tensor = model(torch.full((1, 1), client.rank + 1.0)).sum()
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        losses = []
        for _ in range(2):
            with torch.no_grad():
                losses.append(float(opt.step(closure)))
        assert calls == [True, True]
        opt.close()
        return [*losses, model.weight.item()]

    assert workers(2, life) == [[0.0, -1.5 * (rank + 1), -3.0] for rank in range(2)]


# ---- the same samples ----------------------------------------------------------------------------


def train(client: Client, said: dict[str, list[str]], data: Any, epochs: int = 1, **options: Any) -> list[str]:
    threading.current_thread().name = f"rank {client.rank}"
    model = nn.Linear(1, 1)
    nn.init.zeros_(model.weight)
    opt = headwater.Optimizer(model, torch.optim.SGD, lr=0.0, client=client, **options)
    for _ in range(epochs):
        for x in data:
            model(x).mean().backward()
            opt.step()
            opt.zero_grad()
    opt.close()
    return said.get(f"rank {client.rank}", [])


@pytest.mark.parametrize("servers", [1, 2])
def test_workers_on_the_same_samples_are_told_once(said: dict[str, list[str]], servers: int) -> None:
    data = torch.randperm(16, generator=torch.Generator().manual_seed(0)).float().view(4, 4, 1)
    first, *others = workers(3, lambda client: train(client, said, data, epochs=3), servers)
    assert others == [[], []]
    (text,) = first
    assert "ranks 0, 1 and 2 contributed the same gradients" in text
    assert "3 times the work" in text
    assert "loader = headwater.shard(loader)" in text


def test_two_of_three_on_the_same_samples_are_told(said: dict[str, list[str]]) -> None:
    data = torch.randn(3, 4, 4, 1, generator=torch.Generator().manual_seed(0))
    found = workers(3, lambda client: train(client, said, data[max(client.rank, 1)]))
    assert [len(texts) for texts in found] == [0, 1, 0] or [len(texts) for texts in found] == [1, 0, 0]
    assert "ranks 0 and 1" in found[0][0]


@pytest.mark.parametrize("case", ["shares", "constant", "signs", "twice", "late"])
def test_nobody_is_told_without_need(said: dict[str, list[str]], case: str) -> None:
    def life(client: Client) -> list[str]:
        generator = torch.Generator().manual_seed(0)
        data: Any = torch.randn(8, 4, 1, generator=generator)
        match case:
            case "shares":
                data = data[client.rank :: 2]
            case "constant":
                data = torch.ones(20, 1, 1)
            case "signs":  # two values only, alike by chance for a while
                data = torch.tensor([1.0, -1, 1, 1, -1, 1 if client.rank else -1, 1, 1]).view(8, 1, 1)
            case "twice":
                data = data[:2]
            case "late":
                data = torch.cat([data[:2], torch.randn(6, 4, 1, generator=generator.manual_seed(client.rank))])
        return train(client, said, data)

    assert workers(2, life) == [[], []]


def test_one_worker_is_never_told(said: dict[str, list[str]]) -> None:
    assert workers(1, lambda client: train(client, said, torch.randn(8, 4, 1))) == [[]]


def test_what_it_takes_to_be_sure() -> None:
    same = SameSamples(0)
    assert not same.hear(Alike(frozenset({1, 2}), (1,)), 1)
    assert not same.hear(Alike(frozenset({1}), (2,)), 2)
    assert "ranks 0 and 1" in same.hear(Alike(frozenset({1}), (3,)), 3)
    signs = SameSamples(0)
    told = [bool(signs.hear(Alike(frozenset({1}), (number % 2,)), number)) for number in range(8)]
    assert told == [False] * 7 + [True]
    assert not SameSamples(0).hear(None, 1)
    other = SameSamples(1)
    assert not any(other.hear(Alike(frozenset({0}), (number,)), number) for number in range(9)), "the lowest says it"
