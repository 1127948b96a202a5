"""One process is one client: who gets it, and when it leaves."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator

import pytest
import torch

import headwater
from headwater.client import Client, connecting
from headwater.errors import LinkBroken, UsageError
from headwater.launch import Launcher
from tests.patience import PATIENCE


class User:
    """Somebody who uses the process's client; an optimizer, say."""


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No client of another test."""
    with monkeypatch.context() as patched:
        patched.setattr(connecting, "_clients", type(connecting._clients)())
        patched.setattr(connecting, "_shared", {})
        yield
        connecting.leave_all()


@pytest.fixture
def worker(processes: Launcher, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment of worker 0 of 1."""
    for key, value in processes.environment().items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("HEADWATER_RANK", "0")
    monkeypatch.setenv("HEADWATER_WORLD_SIZE", "1")


def ranks(client: Client) -> list[int]:
    return [worker.rank for worker in client.status().workers if worker.role == "worker"]


def works(client: Client, name: str) -> bool:
    w = client.dense(name, (3,), lr=1.0)
    w.push(torch.ones(3)).wait()
    return bool(w.pull().eq(-1).all())


# ---- a cluster that others use too -----------------------------------------------------------------------


@pytest.mark.usefixtures("worker")
def test_it_stays_when_its_last_user_has_closed(name: str) -> None:
    first, second = User(), User()
    client = connecting.shared(first)
    assert connecting.shared(second) is client
    for user in (first, second, first):
        connecting.release(user)
    assert ranks(client) == [0]
    assert connecting.shared(User()) is client
    assert works(client, name)


@pytest.mark.usefixtures("worker")
def test_who_connects_gets_it_and_does_not_take_it_away(name: str) -> None:
    client = connecting.shared(User())
    with headwater.connect(timeout=PATIENCE) as mine:
        assert mine is client
        assert client.timeout == PATIENCE
    mine.close()
    with pytest.raises(KeyError), headwater.connect(rank=0):
        raise KeyError
    assert works(client, name)
    with pytest.raises(UsageError, match="worker 0 of 1 already"):
        headwater.connect(world=2)


@pytest.mark.usefixtures("worker")
def test_the_one_that_the_script_has_opened_is_used_and_stays_its_own(name: str) -> None:
    with headwater.connect() as mine:
        user = User()
        assert connecting.shared(user) is mine
        connecting.release(user)
        assert works(mine, name)
    assert mine.closed


@pytest.mark.usefixtures("worker")
def test_a_process_that_is_a_worker_already_gets_its_client_again(name: str) -> None:
    with headwater.connect() as outer:
        with headwater.connect() as inner:
            assert inner is outer
        assert works(outer, name)
        with pytest.raises(KeyError), headwater.connect():
            raise KeyError
        assert not outer.closed
    assert outer.closed
    with headwater.connect() as again:
        assert again is not outer


@pytest.mark.usefixtures("worker")
def test_a_reader_is_a_client_of_its_own() -> None:
    client = connecting.shared(User())
    with headwater.connect(role="reader") as reader:
        assert reader is not client
        assert connecting.current() is client
    assert not client.closed


@pytest.mark.usefixtures("worker")
def test_at_the_end_the_last_step_is_finished_and_all_leave(name: str) -> None:
    client = connecting.shared(User())
    ticket = client.dense(name, (3,), lr=1.0, sync=headwater.Bulk()).push(torch.ones(3))
    connecting.leave_all()
    assert client.closed
    assert ticket.wait().applied
    with headwater.connect(role="reader") as reader:
        assert ranks(reader) == []


# ---- a cluster of one's own -------------------------------------------------------------------------------


def test_one_of_its_own_goes_with_its_last_user(name: str) -> None:
    first, second = User(), User()
    client = connecting.shared(first)
    assert connecting.shared(second) is client
    connecting.release(first)
    assert works(client, name)
    connecting.release(second)
    assert client.closed
    assert connecting.shared(User()) is not client


def test_users_that_are_garbage_do_not_keep_it() -> None:
    client = connecting.shared(User())
    gc.collect()
    assert connecting.shared(User()) is not client
    assert client.closed


def test_who_has_connected_keeps_it(name: str) -> None:
    user = User()
    client = connecting.shared(user)
    mine = headwater.connect()
    assert mine is client
    connecting.release(user)
    assert works(mine, name)
    mine.close()
    assert client.closed


def test_clusters_of_ones_own_are_separate_where_that_is_asked_for() -> None:
    client = connecting.shared(User())
    with headwater.connect("inproc://") as other, headwater.connect(servers=2) as larger:
        assert len({client, other, larger}) == 3


def test_with_several_clients_it_must_be_said_which() -> None:
    several = pytest.raises(UsageError, match=r"2 clients are open in this process.*client=")
    with headwater.connect("inproc://"), headwater.connect("inproc://"), several:
        connecting.shared(User())


def test_threads_that_are_workers_have_their_own(name: str) -> None:
    clients = [headwater.connect(f"inproc://{name}", rank=rank, world=2) for rank in (0, 1)]
    found: list[Client] = []

    def life(rank: int) -> None:
        with headwater.connect(f"inproc://{name}-threads", rank=rank, world=2) as mine:
            found.append(connecting.shared(User()))
            assert found[-1] is mine

    for rank in (0, 1):
        thread = threading.Thread(target=life, args=(rank,))
        thread.start()
        thread.join(PATIENCE)
    assert len(found) == 2
    for client in clients:
        client.close()


def test_a_closed_client_is_nobodys(name: str) -> None:
    client = headwater.connect()
    w = client.dense(name, (3,))
    client.close()
    with pytest.raises(LinkBroken, match="closed"):
        w.pull()
    assert connecting.shared(User()) is not client
