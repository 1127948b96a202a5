"""``headwater.Optimizer`` over memory that server processes own: what in-process clusters cannot show."""

from __future__ import annotations

import copy
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import pytest
import torch

import headwater
from headwater.client import Client
from headwater.errors import UsageError
from headwater.launch import Launcher, Shape
from headwater.types import Sync
from tests.integrations.torch.support import Zoo, digest, zoo
from tests.patience import PATIENCE

T = TypeVar("T")


@pytest.fixture(scope="module")
def environment() -> Iterator[dict[str, str]]:
    with Launcher(2, advertise=False) as job:
        yield job.environment()


@pytest.fixture(autouse=True)
def _cluster(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in environment.items():
        monkeypatch.setenv(key, value)


def _reference(steps: int, count: int) -> Zoo:
    model = zoo()
    trained = [p for p in model.parameters() if p.requires_grad]
    opt = torch.optim.AdamW(trained, lr=0.01, fused=True)
    for step in range(steps):
        for rank in range(count):
            model.loss(rank, step).backward()
        for p in trained:
            if p.grad is not None:
                p.grad /= count
        opt.step()
        opt.zero_grad()
    return model


def _step(model: Zoo, opt: torch.optim.Optimizer, rank: int, step: int) -> None:
    model.loss(rank, step).backward()
    opt.step()
    opt.zero_grad()


@pytest.mark.parametrize("transport", ["local", "tcp"])
@pytest.mark.parametrize("sync", [headwater.Bulk(), headwater.Stale(1), headwater.Async()])
def test_one_worker_is_exact(transport: str, sync: Sync, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADWATER_TRANSPORT", transport)
    model = zoo()
    with headwater.connect(rank=0, world=1, timeout=PATIENCE) as client:
        opt = headwater.Optimizer(
            model, torch.optim.AdamW, lr=0.01, client=client, sync=sync, name=f"{transport}-{sync}", bucket_bytes=70_000
        )
        assert client.tables[f"{transport}-{sync}"].live == (transport == "local" and isinstance(sync, headwater.Bulk))
        for step in range(4):
            _step(model, opt, 0, step)
        opt.close()
    assert digest(model) == digest(_reference(4, 1))


# ---- what a script writes into parameters ------------------------------------------------------------


@pytest.fixture(params=["local", "tcp"])
def transport(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("HEADWATER_TRANSPORT", request.param)
    return str(request.param)


def _both(life: Callable[[Client], T]) -> list[T]:
    """What ``life`` returned on two ranks of the cluster in the environment."""

    def run(rank: int) -> T:
        with headwater.connect(rank=rank, world=2, timeout=PATIENCE) as client:
            return life(client)

    with ThreadPoolExecutor(2) as pool:
        return [each.result(PATIENCE) for each in [pool.submit(run, rank) for rank in range(2)]]


def _made(client: Client, name: str) -> tuple[Zoo, headwater.Optimizer]:
    model = zoo()
    opt = headwater.Optimizer(model, torch.optim.AdamW, lr=0.01, client=client, name=name)
    assert client.tables[name].live == (os.environ["HEADWATER_TRANSPORT"] == "local")
    return model, opt


def _fill(model: Zoo) -> None:
    with torch.no_grad():
        model.wide.weight.fill_(0.5)


def _clamp(model: Zoo) -> None:
    for p in model.parameters():
        p.data.clamp_(-0.2, 0.2)


class _Plain:
    """One process that does the work of two ranks, in plain torch."""

    def __init__(self) -> None:
        self.model = zoo()
        self._trained = [p for p in self.model.parameters() if p.requires_grad]
        self._opt = torch.optim.AdamW(self._trained, lr=0.01, fused=True)

    def step(self, step: int, seen: Zoo | None = None) -> str:
        """``seen``: the model that rank 1's gradient is of."""
        self.model.loss(0, step).backward()
        other = [p for p in (seen or self.model).parameters() if p.requires_grad]
        (seen or self.model).loss(1, step).backward()
        for p, q in zip(self._trained, other, strict=True):
            if p is not q and q.grad is not None:
                p.grad = q.grad if p.grad is None else p.grad + q.grad
            if p.grad is not None:
                p.grad /= 2
        self._opt.step()
        self._opt.zero_grad()
        return digest(self.model)


def _once(writes: tuple[int, ...]) -> list[str]:
    """Digests of three steps; between the first and the second the weight is written on these ranks."""
    plain = _Plain()
    digests = [plain.step(0)]
    seen = copy.deepcopy(plain.model)
    _fill(plain.model)
    digests.append(plain.step(1, None if 1 in writes else seen))
    return [*digests, plain.step(2)]


@pytest.mark.parametrize("writes", [(0,), (0, 1)])
def test_what_the_lowest_rank_writes_is_what_the_next_step_starts_from(transport: str, writes: tuple[int, ...]) -> None:
    def life(client: Client) -> list[str]:
        model, opt = _made(client, f"written {transport} {writes}")
        _step(model, opt, client.rank, 0)
        digests = [digest(model)]
        client.barrier("trained")
        if client.rank in writes:
            _fill(model)
        client.barrier("written")
        assert model.wide.weight.eq(0.5).all() == (client.rank in writes), "nobody else sees it before the step"
        client.barrier("looked")
        for step in (1, 2):
            _step(model, opt, client.rank, step)
            digests.append(digest(model))
        opt.close()
        return digests

    assert _both(life) == [_once(writes)] * 2


def test_what_a_higher_rank_writes_alone_is_refused_on_all_and_can_be_undone(transport: str) -> None:
    def life(client: Client) -> list[str]:
        model, opt = _made(client, f"refused {transport}")
        _step(model, opt, client.rank, 0)
        before, held = digest(model), model.wide.weight.detach().clone()
        client.barrier("trained")
        model.loss(client.rank, 1).backward()
        if client.rank == 1:
            _fill(model)
        for _ in range(2):  # the first time and again: nothing is left of a refused step
            with pytest.raises(UsageError, match="worker 1 wrote into its parameters and worker 0 did not"):
                opt.step()
        assert (digest(model) == before) == (client.rank == 0), "nothing was applied, and the write is still there"
        with torch.no_grad():
            model.wide.weight.copy_(held)
        opt.step()
        opt.zero_grad()
        digests = [before, digest(model)]
        _step(model, opt, client.rank, 2)
        opt.close()
        return [*digests, digest(model)]

    plain = _Plain()
    assert _both(life) == [[plain.step(step) for step in range(3)]] * 2


def test_weights_that_all_clamp_after_each_step_are_those_of_one_process(transport: str) -> None:
    """As the critic of a Wasserstein GAN."""

    def life(client: Client) -> list[str]:
        model, opt = _made(client, f"clamped {transport}")
        digests = []
        for step in range(4):
            _step(model, opt, client.rank, step)
            _clamp(model)
            digests.append(digest(model))
        opt.close()
        return [*digests, digest(model)]

    plain, expected = _Plain(), []
    for step in range(4):
        plain.step(step)
        _clamp(plain.model)
        expected.append(digest(plain.model))
    assert _both(life) == [[*expected, expected[-1]]] * 2


def test_what_was_written_survives_a_server(transport: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with Launcher(Shape(2, replicas=2), advertise=False) as job:
        for key, value in job.environment().items():
            monkeypatch.setenv(key, value)

        def life(client: Client) -> list[str]:
            model, opt = _made(client, "survives")
            _step(model, opt, client.rank, 0)
            digests = [digest(model)]
            client.barrier("trained")
            if client.rank == 0:
                _fill(model)
                os.kill(job.servers[0].pid, signal.SIGKILL)
            client.barrier("killed")
            for step in (1, 2):
                _step(model, opt, client.rank, step)
                digests.append(digest(model))
            opt.close()
            return digests

        assert _both(life) == [_once((0,))] * 2
