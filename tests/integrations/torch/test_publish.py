"""``Optimizer.publish``: the module as it is after a step, parameters and buffers, for whoever reads or follows."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn

import headwater
from headwater.client import Client
from headwater.types import Async, Bulk, Stale, Sync
from tests.patience import PATIENCE


class Net(nn.Module):
    """Tied weights, batch statistics, a frozen parameter and a buffer that is not kept."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6)
        self.last = nn.Linear(6, 6, bias=False)
        self.last.weight = self.first.weight
        self.frozen = nn.Parameter(torch.ones(6), requires_grad=False)
        self.register_buffer("cache", torch.zeros(2), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.last(self.norm(self.first(x)).relu()) * self.frozen
        return found


def published(client: Client, address: str, sync: Sync, steps: int = 3) -> dict[str, dict[str, torch.Tensor]]:
    """Trains and publishes at every step; by version, what the module was then on this worker."""
    torch.manual_seed(7)
    model = Net()
    opt = headwater.Optimizer(model, torch.optim.AdamW, lr=0.01, client=client, sync=sync)
    states = {}
    for step in range(steps):
        generator = torch.Generator().manual_seed(100 * step + client.rank)
        model(torch.randn(8, 6, generator=generator)).square().sum().backward()
        opt.step()
        opt.zero_grad()
        if client.rank == 0:
            info = opt.publish(f"step-{opt.clock}", {"step": str(step)}, keep=9, tags=["newest"]).wait()
            assert info.step == step + 1
            model.eval()
            with torch.no_grad():
                model(torch.zeros(1, 6))  # fresh values
            model.train()
            states[info.name] = {name: value.clone() for name, value in model.state_dict().items()}
    client.barrier()
    if client.rank == 0:
        with headwater.reader("model", address, timeout=PATIENCE) as reader:
            check(reader, states)
    client.barrier("read")
    opt.close()
    return states


def check(reader: Any, states: dict[str, dict[str, torch.Tensor]]) -> None:
    for name, state in states.items():
        with reader.lease(name) as weights:
            assert set(weights) == {
                "first.weight", "first.bias", "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var",
                "norm.num_batches_tracked",
            }  # fmt: skip
            for key in weights:
                assert torch.equal(weights[key], state[key]), f"{key} in {name}"
    module = Net().eval()
    with reader.follow(module, "newest") as follower:
        reference = Net().eval()
        reference.load_state_dict(states[follower.version.name])
        x = torch.randn(5, 6)
        assert torch.equal(module(x), reference(x))
        assert module.last.weight is module.first.weight


@pytest.mark.parametrize("count", [1, 2])
def test_a_version_is_the_module_after_the_step(count: int) -> None:
    address = f"inproc://publish-bulk-{count}"

    def life(rank: int) -> dict[str, dict[str, torch.Tensor]]:
        with headwater.connect(address, rank=rank, world=count, servers=2, timeout=PATIENCE) as client:
            return published(client, address, Bulk())

    with ThreadPoolExecutor(count) as pool:
        first, *_ = pool.map(life, range(count), timeout=PATIENCE)
    assert list(first) == ["step-1", "step-2", "step-3"]


@pytest.mark.parametrize("sync", [Stale(1), Async()])
def test_without_lockstep_a_lone_worker_publishes_what_it_has(sync: Sync) -> None:
    torch.manual_seed(3)
    model = nn.Linear(4, 3)
    with headwater.connect(f"inproc://publish-{type(sync).__name__}", servers=2, timeout=PATIENCE) as client:
        opt = headwater.Optimizer(model, torch.optim.SGD, lr=0.5, client=client, sync=sync)
        model(torch.ones(2, 4)).sum().backward()
        opt.step()
        opt.publish("v1").wait()
        opt.zero_grad()
        model(torch.ones(2, 4)).sum().backward()  # with fresh values
        wanted = {name: value.detach().clone() for name, value in model.named_parameters()}
        address = f"inproc://publish-{type(sync).__name__}"
        with headwater.reader("model", address, timeout=PATIENCE) as reader, reader.lease() as weights:
            assert all(torch.equal(weights[name], wanted[name]) for name in wanted)
        opt.close()


def test_the_step_of_a_version_is_what_the_publisher_says() -> None:
    model = nn.Linear(4, 3)
    with headwater.connect("inproc://publish-step", servers=2, timeout=PATIENCE) as client:
        opt = headwater.Optimizer(model, torch.optim.SGD, lr=0.5, client=client)
        assert opt.publish("v0").wait().step == 0
        model(torch.ones(2, 4)).sum().backward()
        opt.step()
        assert opt.publish("v1").wait().step == 1
        assert opt.publish("step-41", step=41).wait().step == 41
        with headwater.reader("model", "inproc://publish-step", timeout=PATIENCE) as reader, reader.lease() as weights:
            assert (weights.version.name, weights.version.step) == ("step-41", 41)
        for wrong in (-1, 1.5, 1 << 64):
            with pytest.raises(headwater.UsageError, match="nothing was published"):
                opt.publish("v2", step=wrong)  # type: ignore[arg-type]
        opt.close()
