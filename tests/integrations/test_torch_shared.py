"""``headwater.Optimizer`` over memory that server processes own: what in-process clusters cannot show."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import headwater
from headwater.client import Client
from headwater.errors import ParameterModified
from headwater.launch import Launcher
from headwater.types import Sync
from tests.integrations.support import Zoo, digest, zoo
from tests.patience import PATIENCE


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


def _writer(client: Client) -> list[str]:
    """Both workers train; then rank 0 writes into a parameter, which no one else sees until it is assigned."""
    model = zoo()
    opt = headwater.Optimizer(model, torch.optim.AdamW, lr=0.01, client=client, name="written")
    assert client.tables["written"].live
    digests = []
    for step in range(2):
        _step(model, opt, client.rank, step)
        opt.synchronize()
        digests.append(digest(model))
    client.barrier("trained")
    if client.rank == 0:
        with torch.no_grad():
            model.wide.weight.fill_(0.5)
        with pytest.raises(ParameterModified, match=r"'wide\.weight'"):
            opt.step()
    client.barrier("written")
    if client.rank == 1:
        assert not model.wide.weight.eq(0.5).any()
    client.barrier("looked")
    if client.rank == 0:
        opt.assign({"wide.weight": torch.full((131, 130), 0.25)})
    client.barrier("assigned")
    assert model.wide.weight.eq(0.25).all()
    client.barrier("looked again")
    for step in range(2, 4):
        _step(model, opt, client.rank, step)
    opt.close()
    digests.append(digest(model))
    return digests


def test_a_stray_write_stays_in_its_process_until_it_is_assigned() -> None:
    def run(rank: int) -> list[str]:
        with headwater.connect(rank=rank, world=2, timeout=PATIENCE) as client:
            return _writer(client)

    with ThreadPoolExecutor(2) as pool:
        first, second = (life.result(PATIENCE) for life in [pool.submit(run, rank) for rank in range(2)])
    assert first == second
    assert first[:2] == [digest(_reference(steps, 2)) for steps in (1, 2)]
