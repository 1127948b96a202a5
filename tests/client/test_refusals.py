"""What a client may not do: a typed error, nothing sent, and everything goes on."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest
import torch

import headwater
from headwater.client import Client
from headwater.errors import (
    ClusterError,
    NonFiniteGradient,
    NotEnoughMemory,
    RankTaken,
    ShapeMismatch,
    TableConflict,
    UnknownOptimizer,
    UsageError,
)
from headwater.types import Async, Bulk, DenseSpec, Init, OptimizerSpec, ParameterSpec, Stale
from tests.client.conftest import Connect

VALUES = Init("values")


@pytest.fixture
def client(connect: Connect) -> Client:
    return connect(rank=0, world=1)


@pytest.mark.parametrize(
    "wrong",
    [
        torch.zeros(3, 5),
        torch.zeros(20),
        torch.zeros(4, 5, dtype=torch.float64),
        torch.zeros(4, 5, dtype=torch.int64),
        torch.zeros(4, 5, device="meta"),
        torch.zeros(4, 5).to_sparse(),
        torch.zeros(()),
    ],
    ids=["shape", "flat", "float64", "int64", "meta", "sparse", "scalar"],
)
def test_a_tensor_that_does_not_fit_is_refused_with_what_differs(
    client: Client, name: str, wrong: torch.Tensor
) -> None:
    w = client.dense(name, (4, 5), lr=1.0)
    for attempt in (w.push, w.push_pull, w.assign, lambda t: w.pull(out=t)):
        with pytest.raises(ShapeMismatch, match=rf"'{name}' is float32 of shape \(4, 5\), strided, on the cpu"):
            attempt(wrong)
    w.push(torch.ones(4, 5)).wait()
    assert w.pull().eq(-1).all()
    assert client.statistics().steps == 1


def test_a_tensor_in_another_order_arrives_in_the_right_one(client: Client, name: str) -> None:
    w = client.dense(name, (40, 40), lr=1.0)
    gradient = torch.randn(40, 40)
    w.push(gradient.t()).wait()
    assert w.pull().equal(-gradient.t())
    w.push_pull(torch.zeros(40, 80)[:, ::2])
    w.gradient.copy_(gradient)
    w.push(w.gradient.t()).wait()
    assert w.pull().equal(-2 * gradient.t()), "the same memory, read in another order"
    out = torch.zeros(40, 40).t()
    assert w.pull(out=out) is out
    assert out.equal(-2 * gradient.t())
    w.assign(gradient.t())
    assert w.pull().equal(gradient.t())


def test_a_gradient_with_a_history_leaves_none_behind(client: Client, name: str) -> None:
    w = client.dense(name, (3,), lr=1.0)
    w.push(torch.ones(3, requires_grad=True) * 2).wait()
    assert not w.gradient.requires_grad


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_gradient_that_is_not_finite_is_an_error_by_default(client: Client, name: str, bad: float) -> None:
    w = client.dense(name, (4, 5), lr=1.0)
    gradient = torch.ones(4, 5)
    gradient[2, 3] = bad
    for attempt in (w.push, w.push_pull):
        with pytest.raises(NonFiniteGradient, match=f"{name}' from worker 0 holds NaN or Inf; nothing was sent"):
            attempt(gradient)
    assert w.pull().eq(0).all()


@pytest.mark.parametrize("sync", [Async(), Stale(0), Bulk(), Async(1)])
def test_or_it_is_skipped_or_allowed(client: Client, name: str, sync: headwater.Bulk) -> None:
    bad = torch.full((3,), float("nan"))
    w = client.dense(name, (3,), lr=1.0, sync=sync, nonfinite="skip")
    assert not w.push(bad).wait().applied
    assert w.push(torch.ones(3)).wait().applied
    w.push_pull(bad)
    assert w.pull().eq(-1).all()
    v = client.dense(f"{name}-allowed", (3,), lr=1.0, sync=sync, nonfinite="allow")
    assert v.push(bad).wait().applied
    assert v.pull().isnan().all()


def test_large_and_finite_is_not_infinite(client: Client, name: str) -> None:
    w = client.dense(name, (1000,), lr=1e-38)
    w.push(torch.full((1000,), 3e38)).wait()
    assert w.pull().isfinite().all()


def test_unknown_names_are_refused(client: Client, name: str) -> None:
    with pytest.raises(UnknownOptimizer, match="LBFGS"):
        client.dense(name, (3,), optimizer=torch.optim.LBFGS)
    with pytest.raises(UnknownOptimizer, match="Did you mean momentum"):
        client.dense(name, (3,), momentun=0.1)
    with pytest.raises(UsageError, match="nonfinite='ignore'"):
        client.dense(name, (3,), nonfinite="ignore")
    with pytest.raises(UsageError, match="holds no elements"):
        client.dense(name, (3, 0))
    with pytest.raises(ShapeMismatch, match=r"cannot hold torch\.complex64"):
        client.dense(name, (3,), dtype=torch.complex64)
    table = client.dense(name, (3,)).table
    attempts: list[Callable[[], object]] = [
        lambda: table.push(["nobody"]),
        lambda: table.assign({"nobody": torch.zeros(3)}),
    ]
    for attempt in attempts:
        with pytest.raises(UsageError, match="has no parameter 'nobody'; nothing was sent"):
            attempt()


def test_a_table_declared_otherwise_is_a_conflict(client: Client, name: str) -> None:
    client.dense(name, (3,), lr=0.1)
    for wrong in ({"shape": (4,)}, {"lr": 0.2}, {"sync": Bulk()}, {"optimizer": torch.optim.Adam}, {"seed": 4}):
        with pytest.raises(TableConflict, match="nothing was changed"):
            client.dense(name, **{"shape": (3,), "lr": 0.1, **wrong})  # type: ignore[arg-type]
    assert client.dense(name, (3,), lr=0.1).pull().eq(0).all()


def test_a_table_that_is_too_large_is_refused_and_its_name_is_free(client: Client, name: str) -> None:
    if client.shards.sessions[0].link is not None and not hasattr(client.shards.sessions[0].link, "_channel"):
        with pytest.raises(NotEnoughMemory, match="over the bound"):
            client.dense(name, (1 << 40,))
    else:
        with pytest.raises(NotEnoughMemory, match="it was not created"):
            client.dense(name, (1 << 36,))
    assert client.dense(name, (3,)).pull().eq(0).all()


def test_bad_hyperparameters_are_refused_and_the_step_may_be_done_again(client: Client, name: str) -> None:
    for sync in (Bulk(), Async()):
        w = client.dense(f"{name}-{sync}", (3,), lr=1.0, sync=sync).table
        w.gradients[f"{name}-{sync}"].fill_(1.0)
        w.push([f"{name}-{sync}"])
        with pytest.raises(UnknownOptimizer, match="lr"):
            w.step(groups=[{"lr": -1.0}]).wait()
        w.push([f"{name}-{sync}"])
        assert w.step(groups=[{"lr": 0.5}]).wait().applied


def test_two_workers_cannot_have_one_rank(connect: Connect) -> None:
    connect(rank=0, world=2)
    with pytest.raises(RankTaken, match=r"this process \(process \d+ on .+\) is worker 0 of this cluster already"):
        connect(rank=0, world=2)
    with pytest.raises(UsageError, match="world size 3"):
        connect(rank=1, world=3)
    connect(rank=1, world=2)


def test_a_reader_reads_and_nothing_else(client: Client, connect: Connect, name: str) -> None:
    w = client.dense(name, (3,), lr=1.0)
    w.push(torch.ones(3)).wait()
    reader = connect(role="reader")
    r = reader.dense(name, (3,), lr=1.0)
    assert reader.rank == -1
    assert r.pull().eq(-1).all()
    with pytest.raises(ClusterError, match="a reader cannot push"):
        r.push(torch.ones(3)).wait()
    with pytest.raises(ClusterError, match="a reader cannot assign"):
        r.assign(torch.ones(3))
    with pytest.raises(ClusterError, match="only a worker"):
        reader.barrier()
    assert r.pull().eq(-1).all()


def test_values_that_do_not_fit_are_refused_before_the_table_is_declared(client: Client, name: str) -> None:
    spec = DenseSpec(name, (ParameterSpec("a", (3,), init=VALUES),), OptimizerSpec("SGD", ({},)))
    with pytest.raises(UsageError, match="no values were given for 'a'"):
        client.table(spec)
    with pytest.raises(ShapeMismatch, match="'a' is float32"):
        client.table(spec, {"a": torch.zeros(4)})
    assert client.table(spec, {"a": torch.arange(3.0)}).values["a"].tolist() == [0, 1, 2]
    other = msgspec.structs.replace(spec, name=f"{name}-2")
    assert client.table(other, {"a": torch.ones(3)}).values["a"].tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    "variables",
    [
        {"HEADWATER_RANK": "one"},
        {"HEADWATER_ADDRESS": "http://x"},
        {"HEADWATER_TRANSPORT": "rdma", "HEADWATER_ADDRESS": "tcp://127.0.0.1:1"},
    ],
)
def test_a_wrong_environment_is_named(variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in variables.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(UsageError, match=next(iter(variables.values()))):
        headwater.connect()
    with pytest.raises(UsageError, match="role 'boss'"):
        headwater.connect("inproc://", role="boss")
