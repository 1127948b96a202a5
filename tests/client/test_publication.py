"""Publishing: the version is the state after the step, bit for bit, while others go on; what is refused; deaths."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

import headwater
from headwater.client import Client, Dense
from headwater.client.publication import Publication
from headwater.errors import ClusterError, UnknownTable, UnknownVersion, UsageError, VersionExists, VersionExpired
from headwater.types import Async, Bulk, Stale, Sync
from tests.client.conftest import Connect
from tests.patience import PATIENCE

SHAPE = (700, 300)  # on both servers


def reads(ps: Client, model: str, name: str, request: pytest.FixtureRequest) -> dict[str, torch.Tensor]:
    """What a reader gets, in memory of its own."""
    address = (
        None
        if request.getfixturevalue("transport") != "inproc"
        else f"inproc://client-{request.getfixturevalue('name')}"
    )
    with headwater.reader(model, address, timeout=PATIENCE) as reader, reader.lease(name) as weights:
        return weights.state_dict(copy=True)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


@pytest.mark.parametrize("sync", [Bulk(), Stale(2), Async()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_version_is_the_state_after_the_last_step(
    connect: Connect, name: str, sync: Sync, dtype: torch.dtype, request: pytest.FixtureRequest
) -> None:
    ps = connect()
    w = ps.dense(name, SHAPE, dtype=dtype, sync=sync, optimizer="Adam", lr=0.1)
    for step in range(3):
        w.push(torch.randn(SHAPE).to(dtype))
        publication = ps.publish([w], f"v{step}")
        wanted = w.pull().clone()
        w.push(torch.randn(SHAPE).to(dtype))  # not in it
        info = publication.wait()
        assert (info.number, info.name, info.tables) == (publication.number, f"v{step}", (name,))
        assert info.step == 2 * step + 1
        assert same(reads(ps, name, f"v{step}", request)[name], wanted)
    assert publication.pause >= 0
    w.table.wait()


@pytest.fixture
def two(connect: Connect, transport: str, name: str) -> tuple[Client, Client, Dense, Dense]:
    """Two workers with one bulk table."""
    clients: list[Client] = [connect(rank=0, world=2), connect(rank=1, world=2)]
    tables: list[Dense] = []

    def declare(client: Client) -> None:
        tables.append(client.dense(name, SHAPE, sync=Bulk(), lr=1.0, optimizer="SGD"))

    threads = [threading.Thread(target=declare, args=(client,)) for client in clients]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    by_rank = sorted(tables, key=lambda table: table._rank)
    return clients[0], clients[1], by_rank[0], by_rank[1]


def test_another_worker_pushes_on_meanwhile(
    two: tuple[Client, Client, Dense, Dense], name: str, request: pytest.FixtureRequest
) -> None:
    ps, _other, mine, theirs = two
    wanted: dict[str, torch.Tensor] = {}
    failed: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(6):
                theirs.push(torch.randn(SHAPE))
            theirs.table.wait()
        except BaseException as error:  # noqa: BLE001 - it is looked at in the test's own thread
            failed.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    publications = []
    for step in range(1, 7):
        mine.push(torch.randn(SHAPE))
        if step % 2 == 0:
            publications.append(ps.publish([mine], f"v{step}", keep=9))
            wanted[f"v{step}"] = mine.pull().clone()
    mine.table.wait()
    thread.join(PATIENCE)
    assert not failed
    for publication in publications:
        info = publication.wait()
        assert info.name == f"v{info.step}"
        assert same(reads(ps, name, info.name, request)[name], wanted[info.name])


def test_two_workers_that_publish_the_same_step_make_one_version(two: tuple[Client, Client, Dense, Dense]) -> None:
    first, second, mine, theirs = two
    tickets = [mine.push(torch.ones(SHAPE)), theirs.push(torch.ones(SHAPE))]
    for ticket in tickets:
        ticket.wait()
    one, other = first.publish([mine], "v1"), second.publish([theirs], "v1", metadata={"by": "the other"})
    assert one.wait() == other.wait()
    assert one.wait().step == 1
    tickets = [mine.push(torch.ones(SHAPE)), theirs.push(torch.ones(SHAPE))]
    for ticket in tickets:
        ticket.wait()
    with pytest.raises(VersionExists):
        second.publish([theirs], "v1")


@pytest.mark.parametrize("transport", ["tcp"], indirect=True)
def test_a_worker_that_dies_right_after_publishing(
    two: tuple[Client, Client, Dense, Dense], name: str, request: pytest.FixtureRequest
) -> None:
    ps, other, mine, theirs = two
    tickets = [mine.push(torch.ones(SHAPE)), theirs.push(torch.ones(SHAPE))]
    for ticket in tickets:
        ticket.wait()
    wanted = mine.pull().clone()
    other.publish([theirs], "v1")
    other._stop()
    other._hang_up()  # without a goodbye
    with headwater.reader(name, timeout=PATIENCE) as reader:
        assert reader.wait(name="v1").step == 1
    assert same(reads(ps, name, "v1", request)[name], wanted)


def test_several_tables_and_tables_of_others(connect: Connect, name: str, request: pytest.FixtureRequest) -> None:
    ps = connect()
    a, b = ps.dense(f"{name}.a", SHAPE), ps.dense(f"{name}.b", (3,), dtype=torch.bfloat16)
    a.push(torch.ones(SHAPE)).wait()
    info = ps.publish([a, b.table], "v1", model=name, tags=["prod"], metadata={"loss": "1.5"}).wait()
    assert (info.tables, info.metadata, info.parent) == ((f"{name}.a", f"{name}.b"), {"loss": "1.5"}, 0)
    found = reads(ps, name, "prod", request)
    assert same(found[f"{name}.a"], a.pull())
    assert found[f"{name}.b"].dtype == torch.bfloat16
    observer = connect(role="reader")
    assert observer.publish([f"{name}.a"], "v2", model=name).wait().parent == info.number
    assert [status.info.name for status in ps.versions(name)] == ["v1", "v2"]
    with pytest.raises(UnknownTable, match=rf"no table '{name}\.c'"):
        observer.publish([f"{name}.c"], "v3")
    observer.rollback(name, "prod", "v2")
    observer.untag(name, "prod")
    ps.retire(name, "v1")
    assert [status.info.name for status in observer.versions(name)] == ["v2"]


@pytest.mark.parametrize(
    ("wrong", "error", "why"),
    [
        ({"name": "v1"}, VersionExists, "has a version 'v1' already"),
        ({"name": "prod"}, UsageError, "is a tag"),
        ({"name": "latest"}, UsageError, "is a tag"),
        ({"name": ""}, UsageError, "1 to 200 printable characters"),
        ({"name": "a\nb"}, UsageError, "1 to 200 printable characters"),
        ({"name": 7}, UsageError, "name and model are text"),
        ({"model": 7}, UsageError, "name and model are text"),
        ({"keep": 0}, UsageError, "keep 1 or more"),
        ({"keep": "3"}, UsageError, "keep a whole number"),
        ({"keep": 1 << 70}, UsageError, "keep a whole number"),
        ({"age": "1"}, UsageError, "age a number of seconds"),
        ({"age": float("nan")}, UsageError, "for more than 0 s"),
        ({"tags": "prod"}, UsageError, "tags a list of text"),
        ({"tags": [7]}, UsageError, "tags a list of text"),
        ({"tags": ["v1"]}, UsageError, "is a version"),
        ({"metadata": {"a": 1}}, UsageError, "is not of text"),
        ({"metadata": {1: "a"}}, UsageError, "is not of text"),
        ({"metadata": {"a": "x" * (20 << 20)}}, UsageError, "over the bound of 65536"),
        ({"tables": []}, UsageError, "one table or more"),
        ({"tables": ["x", "x"]}, UsageError, "each named once"),
        ({"tables": ["nope"]}, UnknownTable, "has no table 'nope'"),
    ],
)
@pytest.mark.parametrize("transport", ["inproc"], indirect=True)
def test_what_cannot_be_published_is_refused_at_once(
    connect: Connect, name: str, wrong: dict[str, Any], error: type[Exception], why: str
) -> None:
    ps = connect()
    x = ps.dense("x", (4,))
    ps.publish([x], "v1", tags=["prod"]).wait()
    with pytest.raises(error, match=why):
        ps.publish(**{"tables": [x], "name": "new", **wrong})
    assert [status.info.name for status in ps.versions("x")] == ["v1"]
    ps.publish([x], "v2").wait()


def test_what_became_of_a_publication_that_is_gone(connect: Connect, name: str) -> None:
    ps = connect()
    w = ps.dense(name, (4,))
    number = ps.publish([w], "v1", keep=1).wait().number
    ps.publish([w], "v2", keep=1, tags=["prod"]).wait()
    with pytest.raises(UnknownVersion, match="is not on its way"):
        Publication(ps.ask, number).wait()
    with pytest.raises(VersionExpired, match="is gone: it was retired"):
        ps.rollback(name, "prod")
    with pytest.raises(ClusterError):
        ps.retire(name, "v9")
