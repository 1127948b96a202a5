"""A cluster with two copies of every shard, seen from the shell: kill, look, add, drain, snapshot. Real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from headwater.launch.registry import running
from tests.patience import PATIENCE

Command = Callable[..., Any]

TRAIN = """
import os, signal, sys, headwater, torch
torch.set_num_threads(1)
with headwater.connect() as ps:
    w = ps.dense("w", (10_000,), optimizer=torch.optim.SGD, lr=1.0, sync=headwater.Bulk("sum"))
    for step in range(int(sys.argv[1])):
        found = w.push_pull(torch.full((10_000,), -1.0))
        if step == 20 and ps.rank == 0:
            print("server", ps.status().servers[0].pid, flush=True)
        if step == 20 and os.environ.get("DIES") == str(ps.rank):
            os.kill(os.getpid(), signal.SIGKILL)
    print("sum", float(found.min()), float(found.max()), flush=True)
"""


@contextmanager
def _started(*words: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "headwater", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.terminate()


def _line(process: subprocess.Popen[str], stream: str, word: str) -> str:
    """The next line that holds ``word``; pytest's timeout is the deadline."""
    pipe = getattr(process, stream)
    for line in pipe:
        if word in line:
            return str(line)
    raise AssertionError(f"ended without {word!r}")


@pytest.fixture
def cluster() -> Iterator[subprocess.Popen[str]]:
    with _started("up", "--servers", "3", "--replicas", "2") as process:
        _line(process, "stdout", "Ctrl-C")
        yield process


def _seen(command: Command) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(command("status", "--json").out)
    return found


def _redundant(seen: dict[str, Any]) -> bool:
    return all(shard["copies"] == shard["wanted"] == 2 for shard in seen["shards"])


def test_a_killed_server_is_replaced_and_the_copies_are_whole_again(
    cluster: subprocess.Popen[str], headwater_command: Command
) -> None:
    before = _seen(headwater_command)
    assert _redundant(before)
    assert "every shard has its 2 copies" in headwater_command("status").out
    os.kill(before["servers"][1]["pid"], signal.SIGKILL)
    assert "server s1 was killed by SIGKILL; its shards go on elsewhere" in _line(cluster, "stderr", "SIGKILL")
    assert "server s3 has taken the place of s1" in _line(cluster, "stderr", "restart 1")
    while not _redundant(seen := _seen(headwater_command)):
        pass
    alive = {server["server"] for server in seen["servers"] if server["state"] == "alive"}
    assert alive == {0, 2, 3}
    assert {shard["primary"] for shard in seen["shards"]} <= alive


def test_servers_join_are_drained_and_leave(cluster: subprocess.Popen[str], headwater_command: Command) -> None:
    with _started("add-server") as more:
        assert "has joined the cluster" in _line(more, "stdout", "joined")
        answer = headwater_command("drain", "0")
        assert answer.code == 0, answer.err
        assert "server s0 has left the cluster" in _line(cluster, "stderr", "left")
        seen = _seen(headwater_command)
        assert _redundant(seen)
        assert {server["server"] for server in seen["servers"] if server["state"] == "alive"} == {1, 2, 3}
        more.send_signal(signal.SIGINT)
        out, _ = more.communicate(timeout=PATIENCE)
        assert more.returncode == 0
        assert "Its shards are on other servers now." in out
    assert _redundant(_seen(headwater_command))


def test_a_job_outlives_its_server_and_loses_nothing(headwater_command: Command, tmp_path: Path) -> None:
    del headwater_command
    script = tmp_path / "train.py"
    script.write_text(TRAIN, encoding="utf-8")
    with _started("run", "-s", "2", "-r", "2", "-w", "2", str(script), "400") as job:
        pid = int(_line(job, "stdout", "server").split()[-1])
        os.kill(pid, signal.SIGKILL)
        out, err = job.communicate(timeout=PATIENCE)
    assert job.returncode == 0, err
    assert sorted(out.splitlines()) == ["[w0] sum 800.0 800.0", "[w1] sum 800.0 800.0"]
    assert "was killed by SIGKILL; its shards go on elsewhere" in err


def test_an_elastic_job_outlives_a_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "train.py"
    script.write_text(TRAIN, encoding="utf-8")
    monkeypatch.setenv("DIES", "1")
    with _started("run", "-s", "2", "-w", "3", "--elastic", str(script), "40") as job:
        out, err = job.communicate(timeout=PATIENCE)
    assert job.returncode == 0, err
    assert "w1 was killed by SIGKILL" in err
    # 21 steps of three workers, 19 of two
    assert sorted(line for line in out.splitlines() if "sum" in line) == [
        "[w0] sum 101.0 101.0",
        "[w2] sum 101.0 101.0",
    ]


ADD = """
import headwater, torch
torch.set_num_threads(1)
with headwater.connect() as ps:
    w = ps.dense("w", (10_000,), optimizer=torch.optim.SGD, lr=1.0)
    w.push(torch.full((10_000,), -1.0)).wait()
    print(w.pull().unique().tolist(), flush=True)
"""


def test_a_snapshot_begins_a_cluster_of_another_size(headwater_command: Command, tmp_path: Path) -> None:
    script, snapshots = tmp_path / "add.py", tmp_path / "snapshots"
    script.write_text(ADD, encoding="utf-8")

    def add() -> str:
        (record,) = running()
        return str(headwater_command("run", "--address", record.address, str(script)).out)

    with _started("up", "-s", "2", "--snapshots", str(snapshots)) as process:
        _line(process, "stdout", "Ctrl-C")
        assert add() == "[w0] [1.0]\n"
        taken = json.loads(headwater_command("snapshot", "--json").out)
        assert Path(taken["path"]).parent == snapshots
        assert add() == "[w0] [2.0]\n"  # after the snapshot: not in it
    with _started("up", "-s", "3", "-r", "2", "--restore", str(snapshots)) as process:
        _line(process, "stdout", "Ctrl-C")
        assert add() == "[w0] [2.0]\n"
