"""A forked child is no worker: what it does and how it ends is nothing to its parent's cluster."""

from __future__ import annotations

import gc
import os
import select
import sys
import traceback
from collections.abc import Callable

import pytest
import torch

import headwater
from headwater.client import connecting
from headwater.errors import UsageError
from headwater.types import Async, Bulk, Stale, Sync
from tests.client.conftest import Connect

SHAPE = (3000,)  # pages


def in_child(deed: Callable[[], object], meanwhile: Callable[[], object] | None = None) -> str:
    """What ``deed`` printed by its return in a forked child that ends as ``sys.exit()`` ends it; the parent waits."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        code = 1
        try:
            os.write(writer, str(deed()).encode())
            code = 0
        except BaseException:  # noqa: BLE001 - the parent reads it
            os.write(writer, traceback.format_exc().encode())
        finally:
            os._exit(code)
    os.close(writer)
    if meanwhile is not None:
        meanwhile()
    said = b""
    while select.select([reader], [], [], 60)[0] and (more := os.read(reader, 1 << 16)):
        said += more
    os.close(reader)
    assert os.waitpid(child, 0)[1] == 0, said.decode()
    return said.decode()


def refused(deed: Callable[[], object]) -> bool:
    try:
        deed()
    except UsageError as error:
        return "was forked from process" in str(error)
    return False


@pytest.mark.parametrize("sync", [Bulk(), Stale(1), Async()])
def test_a_child_that_ends_leaves_its_parent_in_the_cluster(connect: Connect, name: str, sync: Sync) -> None:
    client = connect(rank=0, world=1)
    w = client.dense(name, SHAPE, lr=1.0, sync=sync)
    w.push(torch.ones(SHAPE)).wait()

    def ends() -> str:
        connecting._leave_at_exit()  # as sys.exit() does
        client.close()
        client.__exit__(KeyError, KeyError(), None)
        del w.table
        gc.collect()
        return str(client.closed)

    assert in_child(ends) == "True"
    w.push(torch.ones(SHAPE)).wait()
    assert w.pull().eq(-2).all()
    assert [worker.rank for worker in client.status().workers] == [0]
    client.barrier()


@pytest.mark.parametrize("sync", [Bulk(), Async()])
def test_a_child_can_send_nothing_and_is_told_so(connect: Connect, name: str, sync: Sync) -> None:
    client = connect(rank=0, world=1)
    w = client.dense(name, SHAPE, lr=1.0, sync=sync)
    w.push(torch.ones(SHAPE)).wait()
    deeds: list[Callable[[], object]] = [
        lambda: w.push(torch.ones(SHAPE)).wait(),
        lambda: w.assign(torch.ones(SHAPE)),
        lambda: client.dense(f"{name}-new", (3,)),
        client.status,
        client.barrier,
        w.table.slots,
    ]
    assert in_child(lambda: [refused(deed) for deed in deeds]) == str([True] * len(deeds))
    w.push(torch.ones(SHAPE)).wait()
    assert w.pull().eq(-2).all()


def test_what_a_child_writes_is_not_what_its_parent_pushes(connect: Connect, name: str) -> None:
    client = connect(rank=0, world=1)
    w = client.dense(name, SHAPE, lr=1.0, sync=Bulk())
    w.gradient.fill_(1.0)
    in_child(lambda: w.gradient.fill_(99.0))
    w.push(w.gradient).wait()
    assert w.pull().eq(-1).all()


@pytest.mark.parametrize("sync", [Bulk(), Stale(1), Async()])
def test_a_child_sees_values_as_they_were_when_it_was_forked(connect: Connect, name: str, sync: Sync) -> None:
    client = connect(rank=0, world=1)
    w = client.dense(name, SHAPE, lr=1.0, sync=sync)
    w.push_pull(torch.ones(SHAPE))
    reader, writer = os.pipe()

    def looks() -> str:
        os.read(reader, 1)  # until the parent has trained on
        return str(w.values.unique().tolist())

    def trains_on() -> None:
        w.push_pull(torch.ones(SHAPE))
        os.write(writer, b"x")

    assert in_child(looks, trains_on) == "[-1.0]"
    assert w.pull().eq(-2).all()
    for end in (reader, writer):
        os.close(end)


def test_a_child_is_not_given_its_parents_place(
    processes: headwater.launch.Launcher, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for key, value in processes.environment().items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("HEADWATER_RANK", "0")
    with headwater.connect(world=1) as client:
        assert in_child(lambda: refused(headwater.connect)) == "True"
        assert in_child(lambda: refused(lambda: connecting.shared(sys))) == "True"
        w = client.dense(name, (3,), lr=1.0)
        w.push(torch.ones(3)).wait()


def test_a_child_may_have_a_cluster_of_its_own(name: str) -> None:
    with headwater.connect() as client:
        w = client.dense(name, (3,), lr=1.0)

        def trains() -> str:
            with headwater.connect() as own:
                v = own.dense(name, (3,), lr=1.0)
                v.push(torch.ones(3)).wait()
                return str(v.pull().tolist())

        assert in_child(trains) == "[-1.0, -1.0, -1.0]"
        assert w.pull().eq(0).all()


def test_workers_of_a_data_loader_copy_nothing(connect: Connect, name: str) -> None:
    client = connect(rank=0, world=1)
    w = client.dense(name, SHAPE, lr=1.0, sync=Bulk())
    w.push_pull(torch.ones(SHAPE))
    loader = torch.utils.data.DataLoader(range(4), num_workers=1, multiprocessing_context="fork")  # type: ignore[arg-type]
    assert [int(x) for x in loader] == [0, 1, 2, 3]
    w.push_pull(torch.ones(SHAPE))
    assert w.pull().eq(-2).all()
