"""What chaos starts ends when it is told to, and with whoever started it."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from headwater.errors import InternalError
from headwater.wire import messages as m
from headwater_bench.rig.forkserver import ForkReply, ForkRequest, ForkServer, check, environment
from headwater_bench.rig.monitor import Sight
from tests.patience import PATIENCE


def _until(found: Callable[[], list[ForkReply]]) -> ForkReply:
    """The first end that is reported, within a deadline."""
    pause = threading.Event()
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        words = found()
        if words:
            return words[0]
        pause.wait(0.01)
    raise AssertionError("nothing ended within 60 s")


def test_a_forked_module_runs_as_from_a_shell(tmp_path: Path) -> None:
    forkserver = ForkServer(tmp_path / "forkserver.log")
    try:
        log, given = tmp_path / "child.log", environment({"GIVEN": "this"})
        code = "import os; print(os.environ['GIVEN'])"
        pid = forkserver.start(ForkRequest("timeit", ["-n", "1", "-r", "1", code], given, str(log)))
        assert _until(forkserver.ended) == ForkReply(pid, 0)
        assert log.read_text().startswith("this")
        pid = forkserver.start(ForkRequest("json.tool", [], given, str(log)))  # nothing comes on its standard input
        assert _until(forkserver.ended) == ForkReply(pid, 1)
        pid = forkserver.start(ForkRequest("http.server", ["0", "--bind", "127.0.0.1"], given, str(log)))
        os.kill(pid, signal.SIGKILL)
        assert _until(forkserver.ended) == ForkReply(pid, -signal.SIGKILL)
    finally:
        forkserver.close()


def test_its_environment_is_not_that_of_another_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADWATER_ADDRESS", "tcp://127.0.0.1:1")
    found = environment({"HEADWATER_TOKEN": "t"})
    assert "HEADWATER_ADDRESS" not in found
    assert found["HEADWATER_TOKEN"] == "t"


def test_the_parent_must_be_named() -> None:
    assert check(["forkserver", "12"]) == 12
    with pytest.raises(InternalError):
        check(["forkserver"])


def _sight(servers: list[m.ServerStatus], shards: list[m.ShardStatus]) -> Sight:
    return Sight(0.0, m.ClusterStatus(1.0, 1, 2, 1, tuple(servers), tuple(shards), (), ()))


def _server(number: int, pid: int, state: str = "alive") -> m.ServerStatus:
    return m.ServerStatus(number, "tcp://127.0.0.1:1", pid, state, (), (), (), 0, 0, 0, 0, 1.0)


def _shard(primary: int, backups: tuple[int, ...], copies: int) -> m.ShardStatus:
    return m.ShardStatus(0, 1, primary, backups, (), 5, 0, copies, 2)


@pytest.mark.parametrize(
    ("servers", "shard", "whole"),
    [
        ([_server(0, 10), _server(1, 11)], _shard(0, (1,), 2), True),
        ([_server(0, 10), _server(1, 11)], _shard(0, (), 1), False),
        ([_server(0, 10), _server(1, 11)], _shard(-1, (1,), 2), False),
        ([_server(0, 10), _server(1, 11, "dead")], _shard(0, (1,), 2), False),
        ([_server(0, 10), _server(1, 99)], _shard(0, (1,), 2), False),  # a process that is not there any more
    ],
)
def test_when_a_cluster_is_whole(servers: list[m.ServerStatus], shard: m.ShardStatus, whole: bool) -> None:
    assert _sight(servers, [shard]).redundant({10, 11}) is whole
    assert not _sight(servers, []).redundant({10, 11})
