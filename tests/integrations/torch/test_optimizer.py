"""``headwater.Optimizer`` on a real cluster, in this process: what a user's script relies on."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import nn

import headwater
from headwater.client import Client
from headwater.errors import NonFiniteGradient, ShapeMismatch, TableConflict, UsageError
from tests.integrations.torch.support import Zoo, digest, workers, zoo
from tests.patience import PATIENCE


def train(model: Zoo, opt: torch.optim.Optimizer, steps: range, rank: int = 0) -> None:
    for step in steps:
        model.loss(rank, step).backward()
        opt.step()
        opt.zero_grad()


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def connect(**rest: Any) -> Client:
    return headwater.connect("inproc://", rank=0, world=1, **rest)


def test_it_is_a_torch_optimizer_and_connects_by_itself() -> None:
    model = zoo()
    with headwater.Optimizer(model, torch.optim.AdamW, lr=0.01) as opt:
        assert isinstance(opt, torch.optim.Optimizer)
        assert opt.last_step is None
        train(model, opt, range(2))
        opt.synchronize()
        assert opt.last_step is not None
        assert (opt.last_step.clock, opt.last_step.applied) == (2, True)
        assert opt.statistics().steps >= 2
    reference = zoo()
    train(reference, torch.optim.AdamW(trainable(reference), lr=0.01, fused=True), range(2))
    assert digest(model) == digest(reference)


@pytest.mark.parametrize("sync", [headwater.Stale(1), headwater.Async(), headwater.Async(max_staleness=2)])
@pytest.mark.parametrize("max_norm", [None, 0.05])
def test_one_worker_is_exact_under_every_policy(sync: headwater.types.Sync, max_norm: float | None) -> None:
    model, reference = zoo(), zoo()
    plain = torch.optim.SGD(trainable(reference), lr=0.1)
    with connect(servers=2) as client:
        opt = headwater.Optimizer(model, torch.optim.SGD, lr=0.1, sync=sync, max_grad_norm=max_norm, client=client)
        train(model, opt, range(4))
        opt.close()
    for step in range(4):
        reference.loss(0, step).backward()
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(reference.parameters(), max_norm)
        plain.step()
        plain.zero_grad()
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0 if max_norm is None else 1e-5, atol=0 if max_norm is None else 1e-7)


@pytest.mark.parametrize("sync", [headwater.Stale(0), headwater.Stale(2), headwater.Async(), headwater.Async(1)])
def test_workers_learn_together_without_bulk(sync: headwater.types.Sync) -> None:
    def life(client: Client) -> float:
        model = zoo()
        opt = headwater.Optimizer(model, torch.optim.SGD, lr=0.05, sync=sync, client=client, bucket_bytes=50_000)
        with torch.no_grad():
            first = model.loss(9, 1).item()
        client.barrier()
        for _ in range(10):
            model.loss(9, 1).backward()
            opt.step()
            opt.zero_grad()
        client.barrier()
        opt.close()
        return model.loss(9, 1).item() / first

    assert max(workers(2, life, servers=2)) < 0.9


def test_the_norm_is_reported() -> None:
    model, reference = zoo(), zoo()
    with connect(servers=3) as client:
        opt = headwater.Optimizer(model, torch.optim.SGD, lr=0.1, max_grad_norm=0.05, client=client)
        train(model, opt, range(1))
        opt.synchronize()
        assert opt.last_step is not None
        reference.loss(0, 0).backward()
        expected = torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.05)
        assert opt.last_step.grad_norm == pytest.approx(expected.item(), rel=1e-6)
        opt.close()


KINDS = [
    (torch.optim.SGD, {"lr": 0.1}),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    (torch.optim.AdamW, {"lr": 0.01, "amsgrad": True}),
    (torch.optim.Adagrad, {"lr": 0.01}),
    (torch.optim.RMSprop, {"lr": 0.01}),
]


@pytest.mark.parametrize(("cls", "hyper"), KINDS)
def test_state_travels_from_and_to_the_plain_optimizer(cls: type[torch.optim.Optimizer], hyper: dict[str, Any]) -> None:
    fused: dict[str, Any] = {"fused": True} if cls in (torch.optim.AdamW, torch.optim.Adagrad) else {}
    build: Any = cls
    model, reference = zoo(), zoo()
    plain = build(reference.parameters(), **hyper, **fused)
    with connect(servers=2) as client:
        opt = headwater.Optimizer(model, cls, client=client, **hyper)
        train(model, opt, range(3))
        train(reference, plain, range(3))
        ours, theirs = opt.state_dict(), plain.state_dict()
        assert bool(opt.state) == bool(ours["state"])
        _same_state(ours, theirs)

        # Out: the plain optimizer goes on where the servers are.
        copy = zoo()
        copy.load_state_dict(model.state_dict())
        onwards = build(copy.parameters(), **hyper, **fused)
        onwards.load_state_dict(ours)
        for group in onwards.param_groups:
            group.update(fused)  # the servers' kernel, which the state does not name
        # In: the servers go on where the plain optimizer was.
        opt.close()
        again = zoo()
        again.load_state_dict(reference.state_dict())
        second = headwater.Optimizer(again, cls, client=client, name="again", **{**hyper, "lr": 9.0})
        second.load_state_dict(theirs)
        assert second.param_groups[0]["lr"] == hyper["lr"]
        for m, o in ((reference, plain), (copy, onwards), (again, second)):
            train(m, o, range(3, 6))
        second.close()
    assert digest(copy) == digest(reference)
    assert digest(again) == digest(reference)


def _same_state(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    drop = {"fused"}
    for mine, other in zip(ours["param_groups"], theirs["param_groups"], strict=True):
        assert mine.keys() == other.keys()
        assert {k: v for k, v in mine.items() if k not in drop} == {k: v for k, v in other.items() if k not in drop}
    assert {index for index, slots in ours["state"].items() if slots} == {
        index for index, slots in theirs["state"].items() if slots and slots.get("step") != 0
    }, "Adagrad makes state of frozen parameters too"
    for index, slots in ours["state"].items():
        assert slots.keys() == theirs["state"][index].keys()
        for name, value in slots.items():
            assert value.shape == theirs["state"][index][name].shape, name
            assert torch.equal(value, theirs["state"][index][name]), name


def test_loading_replaces_the_whole_state() -> None:
    model = zoo()
    with connect() as client:
        opt = headwater.Optimizer(model, torch.optim.AdamW, lr=0.01, client=client)
        fresh = opt.state_dict()
        assert fresh["state"] == {}
        train(model, opt, range(2))
        assert opt.state_dict()["state"]
        opt.load_state_dict(fresh)
        assert opt.state_dict()["state"] == {}
        opt.close()


def test_state_of_another_shape_is_refused() -> None:
    model = zoo()
    with connect() as client:
        opt = headwater.Optimizer(model, torch.optim.AdamW, lr=0.01, client=client)
        state = opt.state_dict()
        state["param_groups"][0]["params"].pop()
        with pytest.raises(ValueError, match="doesn't match the size"):
            opt.load_state_dict(state)
        opt.close()


def test_schedulers_and_step_hooks_work() -> None:
    model = zoo()
    with connect() as client:
        opt = headwater.Optimizer(model, torch.optim.SGD, lr=1.0, momentum=0.5, client=client)
        seen: list[str] = []
        opt.register_step_post_hook(lambda *_: seen.append("stepped"))
        scheduler = torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=0.1, total_steps=3)
        used = []
        for step in range(2):
            train(model, opt, range(step, step + 1))
            scheduler.step()
            used.append((opt.param_groups[0]["lr"], opt.param_groups[0]["momentum"]))
        assert seen == ["stepped"] * 2
        assert len(set(used)) == 2
        opt.close()


def test_a_second_optimizer_starts_where_others_have_trained_on() -> None:
    def train_once(client: Client, model: Zoo) -> str:
        opt = headwater.Optimizer(model, torch.optim.SGD, lr=0.1, sync=headwater.Async(), client=client)
        train(model, opt, range(1))
        opt.close()
        return digest(model)

    with headwater.connect("inproc://taking-turns", rank=0, world=2) as first:
        train_once(first, zoo())
        with headwater.connect("inproc://taking-turns", rank=1, world=2) as second:
            trained = train_once(second, zoo())
        model = zoo()
        opt = headwater.Optimizer(model, torch.optim.SGD, lr=0.1, sync=headwater.Async(), client=first, resume=True)
        assert digest(model) == trained
        opt.close()


# ---- buffers -------------------------------------------------------------------------------------


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("cache", torch.zeros(2), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.norm(x)
        return out


def batch(rank: int, step: int) -> torch.Tensor:
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(10 * step + rank)) * (rank + 1)


def norm_life(client: Client, mode: Any, steps: int = 2) -> list[dict[str, torch.Tensor]]:
    model = Norm()
    model.cache.fill_(client.rank)
    opt = headwater.Optimizer(model, torch.optim.SGD, lr=0.1, client=client, buffers=mode)
    states = []
    for step in range(steps):
        (model(batch(client.rank, step)) * torch.arange(3)).sum().backward()
        opt.step()
        opt.zero_grad()
        states.append({name: value.clone() for name, value in model.state_dict().items()})
    assert model.cache.eq(client.rank).all()
    assert (
        mode == "local" or client.tables["model.buffers"].values.keys() == dict(model.norm.named_buffers("norm")).keys()
    )
    opt.close()
    return states


def norm_reference(count: int, mode: str) -> list[dict[str, torch.Tensor]]:
    """Every worker's statistics start from the shared ones; then their mean, or rank 0's."""
    models = [nn.BatchNorm1d(3) for _ in range(count)]
    found = []
    for step in range(2):
        for rank, model in enumerate(models):
            model(batch(rank, step))
        mean = sum(m.running_mean for m in models) / count if mode == "mean" else models[0].running_mean.clone()  # type: ignore[union-attr, operator]
        var = sum(m.running_var for m in models) / count if mode == "mean" else models[0].running_var.clone()  # type: ignore[union-attr, operator]
        for model in models:
            model.running_mean.copy_(mean)  # type: ignore[union-attr]
            model.running_var.copy_(var)  # type: ignore[union-attr]
        found.append({"mean": mean.clone(), "var": var.clone()})
    return found


@pytest.mark.parametrize("mode", ["mean", "rank0"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_batch_norm_statistics_are_shared(mode: str, count: int) -> None:
    expected = norm_reference(count, mode)
    for states in workers(count, lambda client: norm_life(client, mode), servers=2):
        for step, state in enumerate(states):
            assert torch.equal(state["norm.running_mean"], expected[step]["mean"])
            assert torch.equal(state["norm.running_var"], expected[step]["var"])
            assert state["norm.num_batches_tracked"] == step + 1


def test_local_statistics_stay_apart() -> None:
    first, second = workers(2, lambda client: norm_life(client, "local"))
    assert not torch.equal(first[0]["norm.running_mean"], second[0]["norm.running_mean"])
    assert torch.equal(first[0]["norm.weight"], second[0]["norm.weight"])


def test_the_next_forward_sees_the_shared_statistics() -> None:
    def life(client: Client) -> torch.Tensor:
        model = Norm()
        opt = headwater.Optimizer(model, torch.optim.SGD, lr=0.0, client=client)
        model(batch(client.rank, 0)).sum().backward()
        opt.step()
        model.eval()
        out = model(torch.zeros(1, 3)).detach()
        opt.close()
        return out

    first, second = workers(2, life)
    assert torch.equal(first, second)


def test_a_module_with_buffers_only_waits_for_them_when_called_alone() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, affine=False))
    with connect() as client:
        opt = headwater.Optimizer(model, torch.optim.SGD, lr=0.1, client=client, overlap=True)
        model(batch(0, 0)).sum().backward()
        opt.step()
        opt.assign({"1.running_mean": torch.zeros(3), "1.running_var": torch.ones(3)})
        model[1](batch(0, 0))
        opt.step()
        contributed = model[1].running_mean.clone()
        model[1].running_mean.fill_(9)  # lost: what was contributed comes back
        model.eval()
        x = torch.ones(1, 3)
        expected = (x - contributed) / (model[1].running_var + 1e-5).sqrt()
        torch.testing.assert_close(model[1](x), expected)
        opt.close()


# ---- what goes wrong -----------------------------------------------------------------------------


def test_one_worker_with_nan_makes_all_skip() -> None:
    def life(client: Client) -> tuple[list[bool], str]:
        model = zoo()
        opt = headwater.Optimizer(model, torch.optim.AdamW, lr=0.01, client=client, nonfinite="skip", bucket_bytes=99)
        applied = []
        before = digest(model)
        for step in range(2):
            factor = float("nan") if step == 0 and client.rank == 1 else 1.0
            (model.loss(client.rank, step) * factor).backward()
            opt.step()
            opt.zero_grad()
            opt.synchronize()
            assert (digest(model) == before) == (step == 0)
            assert opt.last_step is not None
            applied.append(opt.last_step.applied)
        opt.close()
        return applied, digest(model)

    first, second = workers(2, life, servers=2)
    assert first == second
    assert first[0] == [False, True]


def test_a_skipped_step_leaves_the_buffers_too() -> None:
    def life(client: Client) -> dict[str, torch.Tensor]:
        model = Norm()
        opt = headwater.Optimizer(model, torch.optim.SGD, lr=0.1, client=client, nonfinite="skip")
        (model(batch(client.rank, 0)).sum() * (float("nan") if client.rank else 1.0)).backward()
        opt.step()
        state = {name: value.clone() for name, value in model.state_dict().items()}
        opt.close()
        return state

    for state in workers(2, life):
        assert not state["norm.running_mean"].any()
        assert state["norm.num_batches_tracked"] == 0


def test_after_an_error_all_workers_can_skip_the_step() -> None:
    def life(client: Client) -> str:
        model = zoo()
        opt = headwater.Optimizer(model, torch.optim.SGD, lr=0.1, client=client, bucket_bytes=99)
        before = digest(model)
        if client.rank == 1:
            (model.loss(1, 0) * float("inf")).backward()
            with pytest.raises(NonFiniteGradient, match="rank 1"):
                opt.step()
            opt.skip_step()
        else:
            model.loss(0, 0).backward()
            opt.step()
        opt.zero_grad()
        opt.synchronize()
        assert digest(model) == before
        train(model, opt, range(1, 3), client.rank)
        opt.close()
        return digest(model)

    first, second = workers(2, life, servers=2)
    assert first == second
    reference = zoo()
    plain = torch.optim.SGD(trainable(reference), lr=0.1)
    for step in range(1, 3):
        for rank in range(2):
            reference.loss(rank, step).backward()
        for p in trainable(reference):
            if p.grad is not None:
                p.grad /= 2
        plain.step()
        plain.zero_grad()
    assert first == digest(reference)


def test_loaded_weights_are_what_the_next_step_starts_from() -> None:
    def life(client: Client) -> str:
        model = zoo()
        opt = headwater.Optimizer(model, torch.optim.SGD, lr=0.1, client=client)
        train(model, opt, range(1), client.rank)
        state = {name: torch.full_like(value, 0.25) for name, value in model.state_dict().items()}
        model.load_state_dict(state)
        model.loss(client.rank, 1).backward()
        opt.step()
        opt.zero_grad()
        opt.close()
        return digest(model)

    found = workers(2, life, servers=2)
    reference = zoo()
    reference.load_state_dict({n: torch.full_like(v, 0.25) for n, v in reference.state_dict().items()})
    for rank in range(2):
        reference.loss(rank, 1).backward()
    for p in trainable(reference):
        if p.grad is not None:
            p.grad /= 2
    torch.optim.SGD(trainable(reference), lr=0.1).step()
    assert found == [digest(reference)] * 2


def test_assign_takes_some_parameters_and_buffers() -> None:
    model = Norm()
    with connect() as client:
        opt = headwater.Optimizer(model, torch.optim.SGD, lr=0.1, client=client)
        opt.assign({"norm.weight": torch.full((3,), 2.0), "norm.running_mean": torch.full((3,), 3.0)})
        assert model.norm.weight.eq(2).all()
        assert model.norm.running_mean.eq(3).all()  # type: ignore[union-attr]
        assert model.norm.bias.eq(0).all()
        with pytest.raises(UsageError, match=r"'norm\.gamma'"):
            opt.assign({"norm.gamma": torch.ones(3)})
        with pytest.raises(ShapeMismatch, match=r"'norm.weight' is float32 of shape \(3,\)"):
            opt.assign({"norm.weight": torch.ones(4)})
        opt.close()


def test_a_model_on_the_meta_device_is_filled_by_the_servers() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    with connect(servers=2) as client:
        init = {"*.bias": headwater.init.ones(), "*": headwater.init.normal(0.1)}
        opt = headwater.Optimizer(model, torch.optim.SGD, lr=0.1, client=client, init=init, seed=3)
        assert model[0].bias.eq(1).all()
        assert 0 < model[0].weight.std() < 1
        model(torch.ones(1, 3)).sum().backward()
        opt.step()
        opt.synchronize()
        assert model[1].bias.eq(0.9).all()
        opt.close()


def test_buffers_on_the_meta_device_are_refused() -> None:
    with torch.device("meta"):
        model = nn.BatchNorm1d(3)
    with connect() as client, pytest.raises(UsageError, match="buffer 'running_mean' is on the meta device"):
        headwater.Optimizer(model, torch.optim.SGD, lr=0.1, client=client, init=headwater.init.ones())


def test_another_model_under_the_same_name_is_a_conflict() -> None:
    with connect() as client:
        opt = headwater.Optimizer(zoo(), torch.optim.SGD, lr=0.1, client=client, name="one")
        for resume in (False, True):
            with pytest.raises(TableConflict, match="another optimizer of this process trains table 'one'"):
                headwater.Optimizer(zoo(), torch.optim.SGD, lr=0.1, client=client, name="one", resume=resume)
        opt.close()
        with pytest.raises(TableConflict, match="parameters instead of"):
            headwater.Optimizer(nn.Linear(2, 2), torch.optim.SGD, lr=0.1, client=client, name="one", resume=True)


def test_a_second_optimizer_goes_on_with_a_table_where_that_is_said() -> None:
    with connect() as client:
        first = zoo()
        opt = headwater.Optimizer(first, torch.optim.SGD, lr=0.1, client=client)
        train(first, opt, range(2))
        opt.close()
        second = zoo()
        with pytest.raises(TableConflict, match=r"'model' holds what was trained in it earlier .* resume=True"):
            headwater.Optimizer(second, torch.optim.SGD, lr=0.1, client=client, name="model")
        assert digest(second) == digest(zoo()), "a conflict changes nothing"
        opt = headwater.Optimizer(second, torch.optim.SGD, lr=0.1, client=client, resume=True)
        assert digest(second) == digest(first)
        train(second, opt, range(2, 4))
        opt.close()
    reference = zoo()
    train(reference, torch.optim.SGD(trainable(reference), lr=0.1), range(4))
    assert digest(second) == digest(reference)


def test_after_the_loss_of_a_worker_the_rest_step_on_by_themselves_as_one_process() -> None:
    stepped = threading.Event()

    def step(model: Norm, opt: torch.optim.Optimizer, number: int) -> None:
        model(batch(0, number)).square().mean().backward()
        opt.step()
        opt.zero_grad()

    def life(client: Client) -> None:
        plain, model = Norm(), Norm()
        reference = torch.optim.SGD(plain.parameters(), lr=0.1)
        opt = headwater.Optimizer(model, torch.optim.SGD, lr=0.1, client=client, overlap=True)
        client.barrier("ready")
        if client.rank == 1:
            assert stepped.wait(PATIENCE)
            raise RuntimeError("this worker dies")
        for number in range(2):
            step(plain, reference, number)
            step(model, opt, number)
            stepped.set()  # the other has not pushed: the first step waits for it until it is dead
        opt.synchronize()
        assert digest(model) == digest(plain), "a step was lost, or applied twice"
        assert opt.last_step is not None
        assert (opt.last_step.clock, opt.last_step.applied) == (2, True)
        opt.close()

    with pytest.raises(RuntimeError, match="this worker dies"):
        workers(2, life)


class Mine(torch.optim.Optimizer):
    """An optimizer that the servers do not know."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p -= group["lr"] * p.grad


def test_a_step_at_the_worker_that_is_refused_is_taken_back() -> None:
    """Rank 0's leaves its values as they are, rank 1's does not: there is no step that is both workers'."""

    def life(client: Client) -> list[float]:
        model = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(model.weight)
        opt = headwater.Optimizer(model, Mine, lr=1.0, client=client)
        opt.param_groups[0]["lr"] = float(client.rank)
        model(torch.full((1, 1), 1.0 + client.rank)).sum().backward()
        with pytest.raises(UsageError, match="worker 1 wrote into its parameters and worker 0 did not"):
            opt.step()
        found = [model.weight.item()]
        opt.param_groups[0]["lr"] = 1.0
        opt.step()
        found.append(model.weight.item())
        opt.close()
        return found

    assert workers(2, life) == [[0.0, -1.5]] * 2


class Leaping(torch.optim.Optimizer):
    """Moves values so far that ``old - (old - new)`` is not ``new``."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.copy_(p * -3.3 + 0.123)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_without_bulk_the_model_is_what_the_servers_hold(layout: torch.memory_format) -> None:
    with connect() as client:
        torch.manual_seed(0)
        model = nn.Conv2d(3, 4, 3).to(memory_format=layout)
        idle = nn.Parameter(torch.ones(3))
        model.register_parameter("idle", idle)
        opt = headwater.Optimizer(model, Leaping(model.parameters(), {}), sync=headwater.Async(), client=client)
        graph = (idle**2).sum()
        for _ in range(3):
            opt.zero_grad()
            model(torch.ones(1, 3, 4, 4)).sum().backward()
            opt.step()
            table = client.tables["model"]
            assert isinstance(table, headwater.DenseTable)
            for name, p in model.named_parameters():
                assert torch.equal(p, table.truth[name]), name
        graph.backward()  # no step was taken of what it was built on
        assert idle.grad is not None
        assert idle.grad.tolist() == [2.0, 2.0, 2.0]
        opt.close()


def test_all_workers_begin_with_the_same_bits() -> None:
    """Where a parameter is copied, rank 1's −0 becomes rank 0's 0: its sign would come back in ``1 / p``."""

    def life(client: Client) -> bool:
        model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        with torch.no_grad():
            model.weight.fill_(-0.0 if client.rank else 0.0)
        opt = headwater.Optimizer(model, torch.optim.SGD, lr=1.0, client=client)
        signs = bool(torch.signbit(model.weight).any())
        opt.close()
        return signs

    assert workers(2, life) == [False, False]
