"""``drain`` and ``snapshot``: what they ask of the cluster, and what they say. The cluster is a stand-in."""

from __future__ import annotations

import json
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import pytest

import headwater
from headwater.cli.drain import find_server, holdings
from headwater.errors import UsageError
from headwater.wire import messages as m
from tests.cli.test_status import SERVER, STATUS

Command = Callable[..., Any]


class Cluster:
    """A client that answers by itself."""

    def __init__(self) -> None:
        self.asked: list[object] = []
        self.answer: object = m.Done()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | TracebackType | BaseException | None) -> None:
        pass

    def status(self) -> m.ClusterStatus:
        return STATUS

    def ask(self, request: object, timeout: float | None = None) -> object:
        del timeout
        self.asked.append(request)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    found = Cluster()
    monkeypatch.setattr(headwater, "connect", lambda address, **_: found)
    monkeypatch.setenv("HEADWATER_ADDRESS", "tcp://127.0.0.1:7")
    return found


def test_drain_says_what_moves_and_what_to_do_then(cluster: Cluster, headwater_command: Command) -> None:
    answer = headwater_command("drain", "0")
    assert answer.code == 0
    assert cluster.asked == [m.Drain(0)]
    assert "server 0 is the primary of 4 shards and a backup of 0 shards" in answer.err
    assert answer.out == "server 0 (127.0.0.1:4001) holds nothing any more and has left the cluster\n"


def test_drain_of_a_server_that_is_not_there(cluster: Cluster, headwater_command: Command) -> None:
    answer = headwater_command("drain", "3")
    assert answer.code == 1
    assert answer.err == "headwater: UsageError: there is no server 3; the cluster has 0; nothing was moved\n"
    assert cluster.asked == []
    assert headwater_command("drain", "s1").code == 2


def test_the_clusters_refusal_is_passed_on(cluster: Cluster, headwater_command: Command) -> None:
    cluster.answer = headwater.ClusterError("the last server cannot be drained")
    answer = headwater_command("drain", "0")
    assert answer.code == 1
    assert answer.err.endswith("headwater: ClusterError: the last server cannot be drained\n")


def test_a_dead_server_cannot_be_drained() -> None:
    dead = m.ClusterStatus(1.0, 1, 1, 1, (m.ServerStatus(4, "", 1, "dead", (), (), (), 0, 0, 0, 0, 0.0),), (), (), ())
    with pytest.raises(UsageError, match="no server 4"):
        find_server(dead, 4)
    assert holdings(SERVER).startswith("server 0 is the primary of 4 shards")


def test_snapshot_says_where_it_is(cluster: Cluster, headwater_command: Command) -> None:
    cluster.answer = m.SnapshotTaken("/data/snapshots/12", 500_000_000, 2.0, 0.0213)
    answer = headwater_command("snapshot")
    assert answer.code == 0
    assert answer.out.splitlines() == ["/data/snapshots/12", "500 MB in 2.0 s, 250 MB/s; training paused for 21 ms"]
    assert cluster.asked == [m.TakeSnapshot()]
    seen = json.loads(headwater_command("snapshot", "--json").out)
    assert seen["path"] == "/data/snapshots/12"
    assert seen["nbytes"] == 500_000_000


def test_an_answer_that_makes_no_sense_is_a_bug(cluster: Cluster, headwater_command: Command) -> None:
    cluster.answer = m.Done()
    answer = headwater_command("snapshot")
    assert answer.code == 1
    assert "InternalError" in answer.err
