"""Servers, coordinators and workers that die or do not come: a typed error in time, and the others go on."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import headwater
from headwater.client import Client, Dense, Ticket
from headwater.errors import (
    ClusterError,
    DeadlineExceeded,
    LinkBroken,
    LinkError,
    UnknownTable,
    Unreachable,
    WorkerLost,
)
from headwater.launch import Launcher
from headwater.types import Async, Bulk, Sync
from headwater.wire import messages as m
from tests.client.conftest import Connect
from tests.launch.support import wait_for_end
from tests.patience import PATIENCE

NOBODY = r"server \d is dead and shard \d has no other copy.*not acknowledged may or may not be applied"
LARGE = 1 << 20  # elements: a part on every server


@contextlib.contextmanager
def prompt() -> Iterator[None]:
    """Before the client's own timeout."""
    begun = time.monotonic()
    yield
    assert time.monotonic() - begun < PATIENCE


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> Iterator[Launcher]:
    """A cluster of its own, to be broken."""
    with Launcher(2, advertise=False) as launcher:
        for key, value in launcher.environment().items():
            monkeypatch.setenv(key, value)
        yield launcher


def hang_up(client: Client) -> None:
    """What the others see of a worker that is killed: its connections end, without a word."""
    client.__exit__(RuntimeError, RuntimeError("killed"), None)


# ---- servers and coordinators -------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["local", "tcp"])
def test_a_stopped_server_is_waited_for_and_a_killed_one_breaks_every_wait(
    job: Launcher, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEADWATER_TRANSPORT", way)
    with headwater.connect(rank=0, world=1, timeout=PATIENCE) as client:
        policies: tuple[Sync, ...] = (Async(), Bulk())
        tables = [client.dense(f"w{i}", (LARGE,), lr=1.0, sync=s) for i, s in enumerate(policies)]
        os.kill(job.servers[1].pid, signal.SIGSTOP)
        tickets = [w.push(torch.ones(LARGE)) for w in tables]  # of Bulk, the other server waits for this one
        for ticket in tickets:
            with pytest.raises(DeadlineExceeded, match="may still be applied"):
                ticket.wait(timeout=0.1)
            assert not ticket.done()
        os.kill(job.servers[1].pid, signal.SIGCONT)
        assert all(ticket.wait().applied for ticket in tickets)
        assert all(w.pull().eq(-1).all() for w in tables)

        monkeypatch.setattr("headwater.client.shards.UNSERVED", 0.2)
        os.kill(job.servers[1].pid, signal.SIGSTOP)
        tickets = [tables[0].table.pull(), tables[1].push(torch.ones(LARGE))]
        threading.Timer(0.2, os.kill, (job.servers[1].pid, signal.SIGKILL)).start()
        for ticket in tickets:
            with prompt(), pytest.raises(LinkBroken, match=NOBODY):
                ticket.wait()
        for w in tables:
            check_broken(w)
        with prompt(), pytest.raises(ClusterError):
            client.dense("new", (LARGE,))
        assert sorted(s.state for s in client.status().servers) == ["alive", "dead"]
        with pytest.raises(ClusterError, match=r"server \d is dead"):
            headwater.connect(rank=1, world=1)
        with prompt():
            client.close()


def check_broken(w: Dense) -> None:
    attempts: list[Callable[[], object]] = [
        lambda: w.push(torch.ones(LARGE)).wait(),
        lambda: w.assign(torch.ones(LARGE)),
        w.table.slots,
    ]
    for attempt in attempts:
        with prompt(), pytest.raises(LinkBroken):
            attempt()


def test_without_the_coordinator_servers_end_and_clients_are_told(job: Launcher) -> None:
    with headwater.connect(rank=0, world=1, timeout=PATIENCE) as client:
        w = client.dense("w", (LARGE,), lr=1.0)
        assert job.coordinator is not None
        os.kill(job.coordinator.pid, signal.SIGKILL)
        for server in job.servers:
            wait_for_end(server.pid)
        with prompt():
            with pytest.raises(LinkError):
                client.status()
            with pytest.raises(LinkError):
                w.push(torch.ones(LARGE)).wait()
            client.close()
    with pytest.raises(Unreachable, match="is the cluster running"):
        headwater.connect(rank=0, world=1)


# ---- other workers ------------------------------------------------------------------------------------


def test_a_worker_that_never_comes_exceeds_the_deadline(connect: Connect, name: str) -> None:
    client = connect(rank=0, world=2)
    w = client.dense(name, (LARGE,), lr=1.0, sync=Bulk())
    ticket = w.push(torch.ones(LARGE))
    with prompt():
        with pytest.raises(DeadlineExceeded):
            ticket.wait(timeout=0.05)
        with pytest.raises(DeadlineExceeded):
            client.barrier(timeout=0.05)
    late = connect(rank=1, world=2)
    late.dense(name, (LARGE,), lr=1.0, sync=Bulk()).push(torch.full((LARGE,), 3.0)).wait()
    assert ticket.wait().applied, "what was pushed still counts"
    assert w.pull().eq(-2).all()


@pytest.mark.parametrize("ended", [False, True])
def test_survivors_of_a_death_push_again_by_themselves_and_go_on_as_if_they_were_all(
    connect: Connect, name: str, ended: bool
) -> None:
    clients = [connect(rank=rank, world=3) for rank in range(3)]
    tables = [client.dense(name, (LARGE,), lr=1.0, sync=Bulk()) for client in clients]
    with ThreadPoolExecutor(3) as pool:
        for result in [pool.submit(w.push(torch.ones(LARGE)).wait) for w in tables]:
            result.result(PATIENCE)
    tickets = [tables[0].push(torch.ones(LARGE))]
    members = clients[0].members
    if ended:
        tables[2].push(torch.full((LARGE,), 99.0))
    else:
        tables[2].table.gradients[name].fill_(99.0)
        tables[2].table.push([name])
    hang_up(clients[2])
    while clients[0].members == members:  # until it has heard of the death
        with pytest.raises(DeadlineExceeded):
            tickets[0].wait(timeout=0.05)
    for _ in range(3):  # of these pushes some come before the news of the death, some after
        tables[1].table.push([name])
    tickets.append(tables[1].push(torch.full((LARGE,), 4.0)))
    step_and_check(tables[:2], tickets, 2, -3.5)
    step_and_check(tables[:2], [w.push(torch.ones(LARGE)) for w in tables[:2]], 3, -4.5)


def test_a_death_undoes_steps_of_two_tables_and_who_waits_for_one_pushes_both_again(
    connect: Connect, name: str
) -> None:
    """Else two who wait for different tables wait for one another: a chaos run found it, with a worker that was new."""
    clients = [connect(rank=rank, world=3) for rank in range(3)]
    tables = [[c.dense(f"{name}-{which}", (LARGE,), lr=1.0, sync=Bulk()) for which in "ab"] for c in clients]
    with ThreadPoolExecutor(3) as pool:
        for result in [pool.submit(a.push(torch.ones(LARGE)).wait) for a, _ in tables]:
            result.result(PATIENCE)  # the first table is a step ahead
    both = [table.push(torch.ones(LARGE)) for table in tables[0]]
    second = tables[1][1].push(torch.ones(LARGE))
    members = clients[0].members
    hang_up(clients[2])
    deadline = time.monotonic() + PATIENCE
    while clients[0].members == members and time.monotonic() < deadline:
        with contextlib.suppress(DeadlineExceeded):
            both[0].wait(timeout=0.05)

    def other() -> None:
        second.wait(PATIENCE)
        tables[1][0].push(torch.ones(LARGE)).wait(PATIENCE)

    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(lambda: [ticket.wait(PATIENCE) for ticket in both]), pool.submit(other)]
        for each in waiting:
            each.result(PATIENCE)
    for mine in tables[:2]:
        assert [w.pull().unique().tolist() for w in mine] == [[-2.0], [-1.0]]


def step_and_check(tables: list[Dense], tickets: list[Ticket], clock: int, value: float) -> None:
    with ThreadPoolExecutor(2) as pool:
        results = [future.result(PATIENCE) for future in [pool.submit(ticket.wait) for ticket in tickets]]
        assert [(r.clock, r.applied) for r in results] == [(clock, True)] * len(tables)
    for w in tables:
        assert w.pull().eq(value).all(), "as one process with those who are there"


def test_a_death_is_told_to_those_at_a_barrier(connect: Connect) -> None:
    clients = [connect(rank=rank, world=3) for rank in range(3)]
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(client.barrier) for client in clients[:2]]
        hang_up(clients[2])
        lost = [future.exception(PATIENCE) for future in waiting]
        assert any(isinstance(error, WorkerLost) for error in lost)
        assert all(error is None or isinstance(error, WorkerLost) for error in lost)


def test_a_worker_that_leaves_lets_the_others_finish_without_it(connect: Connect, name: str) -> None:
    first, second = (connect(rank=rank, world=2) for rank in range(2))
    w = first.dense(name, (LARGE,), lr=1.0, sync=Bulk())
    v = second.dense(name, (LARGE,), lr=1.0, sync=Bulk())
    ticket = v.push(torch.full((LARGE,), 2.0))
    w.push(torch.full((LARGE,), 4.0))
    first.close()
    assert ticket.wait().applied
    v.push(torch.full((LARGE,), 2.0)).wait()
    assert v.pull().eq(-5).all()


def test_closing_in_the_middle_of_a_step_does_not_hold_the_others_up(connect: Connect, name: str) -> None:
    first, second = (connect(rank=rank, world=2) for rank in range(2))
    w = first.dense(name, (LARGE,), lr=1.0, sync=Bulk())
    v = second.dense(name, (LARGE,), lr=1.0, sync=Bulk())
    w.gradient.fill_(99.0)
    w.table.push([name])
    with prompt():
        first.close()
        first.close()
    v.push(torch.ones(LARGE)).wait(timeout=PATIENCE)
    assert v.pull().eq(-1).all()


def test_every_call_on_a_closed_client_says_that_it_is_closed(connect: Connect, name: str) -> None:
    client = connect(rank=0, world=1)
    w = client.dense(name, (3,), lr=1.0)
    client.close()
    calls: list[Callable[[], object]] = [
        lambda: w.push(torch.ones(3)).wait(),
        w.pull,
        w.table.slots,
        client.status,
        client.barrier,
        lambda: client.dense(f"{name}-other", (3,)),
    ]
    for call in calls:
        with prompt(), pytest.raises(LinkBroken, match="closed"):
            call()


# ---- what is left behind -----------------------------------------------------------------------------

WORKER = """
import headwater, torch
client = headwater.connect(rank=0, world=1)
w = client.dense("w", (1 << 20,), lr=1.0, sync=headwater.Bulk())
w.push(torch.ones(1 << 20)).wait()
print("ready", flush=True)
import signal; signal.pause()
"""


def held(pid: int) -> list[str]:
    """What of ours a server holds: shared memory of clients, and sockets."""
    maps = Path(f"/proc/{pid}/maps").read_text(encoding="utf-8")
    found = ["gradients"] * maps.count("memfd:headwater:gradients")
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            target = str(fd.readlink())
            if target.startswith(("socket:", "/memfd:")):
                found.append(target.split("[")[0])
    return sorted(found)


def test_a_killed_worker_leaves_no_memory_and_no_socket_behind(
    processes: Launcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in processes.environment().items():
        monkeypatch.setenv(key, value)
    with headwater.connect(role="reader") as watcher:
        before = None
        for session in watcher.shards.sessions.values():
            watcher.shards.reach(session)
        for _ in range(2):  # the second time, the table is there already
            with subprocess.Popen([sys.executable, "-c", WORKER], stdout=subprocess.PIPE, text=True) as worker:
                assert worker.stdout is not None
                assert worker.stdout.readline() == "ready\n"
                during = [held(server.pid) for server in processes.servers]
                worker.kill()
            gone = time.monotonic() + PATIENCE
            while any(w.role == "worker" for w in watcher.status().workers):
                assert time.monotonic() < gone
            for session in watcher.shards.sessions.values():  # one thread serves all: it has seen the end of the other
                with pytest.raises(UnknownTable):
                    session.request(m.Slots(999), PATIENCE)
            after = [held(server.pid) for server in processes.servers]
            assert all("gradients" in what for what in during)
            assert not any("gradients" in what for what in after)
            assert before in (None, after)
            before = after
