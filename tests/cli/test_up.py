"""``headwater up`` and ``headwater status`` as a user meets them: processes, files, signals."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from headwater.cli.up import read_token
from headwater.errors import UsageError
from headwater.launch.registry import running
from tests.patience import PATIENCE

Command = Callable[..., Any]


@pytest.fixture
def cluster() -> Iterator[subprocess.Popen[str]]:
    """``headwater up --servers 2`` in the foreground of another process, past its banner."""
    command = [sys.executable, "-m", "headwater", "up", "--servers", "2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            banner = [process.stdout.readline()]
            while banner[-1] and "Ctrl-C" not in banner[-1]:
                banner.append(process.stdout.readline())
            process.banner = "".join(banner)  # type: ignore[attr-defined]
            yield process
        finally:
            process.terminate()


def test_a_cluster_is_seen_and_ends_with_ctrl_c(
    cluster: subprocess.Popen[str], headwater_command: Command, tmp_path: Path
) -> None:
    banner: str = cluster.banner  # type: ignore[attr-defined]
    (record,) = running()
    assert record.address in banner
    assert record.token not in banner
    (token_file,) = (tmp_path / "headwater").glob("*.token")
    assert str(token_file) in banner
    assert stat.S_IMODE(token_file.stat().st_mode) == 0o600
    assert token_file.read_text(encoding="utf-8").strip() == record.token

    seen = json.loads(headwater_command("status", "--json").out)
    assert [server["server"] for server in seen["servers"]] == [0, 1]
    assert seen["workers"] == []
    assert "2 servers, 2 shards, 0 tables, 0 workers" in headwater_command("status").out

    cluster.send_signal(signal.SIGINT)
    out, err = cluster.communicate(timeout=PATIENCE)
    assert (cluster.returncode, out, err) == (0, "The cluster has ended.\n", "")
    for server in seen["servers"]:
        assert not Path(f"/proc/{server['pid']}").exists()
    assert not token_file.exists()
    answer = headwater_command("status")
    assert answer.code == 1
    assert "no cluster of yours runs here" in answer.err


@pytest.mark.parametrize("runtime", ["missing", "a file"])
def test_without_a_runtime_folder_up_and_status_meet_elsewhere(
    headwater_command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runtime: str
) -> None:
    if runtime == "a file":
        (tmp_path / "runtime").touch()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "runtime"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    answer = headwater_command("status", "--address", "tcp://127.0.0.1:1", "--timeout", "1")
    assert (answer.code, answer.err.count("Traceback")) == (1, 0)
    command = [sys.executable, "-m", "headwater", "up"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as up:
        assert up.stdout
        assert up.stderr
        lines = iter(up.stdout.readline, "")
        address = next(line.split()[-1] for line in lines if line.startswith("  address"))
        assert headwater_command("status", "--address", address).code == 0  # with the token of the record
        up.send_signal(signal.SIGTERM)
        assert up.wait(PATIENCE) == 0
        said = up.stderr.read()
    assert f"XDG_RUNTIME_DIR={tmp_path / 'runtime'} cannot be used" in said
    assert str(tmp_path / f"headwater-{os.getuid()}") in said
    assert said.count("\n") == 1
    assert list((tmp_path / f"headwater-{os.getuid()}").iterdir()) == []


def test_a_wrong_token_is_refused_by_name(
    cluster: subprocess.Popen[str], headwater_command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    del cluster
    monkeypatch.setenv("HEADWATER_TOKEN", "not it")
    answer = headwater_command("status", "--timeout", str(PATIENCE))
    assert answer.code == 1
    assert answer.err.startswith("headwater: AuthenticationFailed:")
    assert "Traceback" not in answer.err


def test_a_port_in_use(headwater_command: Command) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        answer = headwater_command("up", "--listen", address)
    assert answer.code == 1
    assert answer.err.startswith(f"headwater: AddressInUse: {address}")
    assert len(answer.err.splitlines()) == 1


def test_beyond_this_machine_needs_a_token(headwater_command: Command) -> None:
    answer = headwater_command("up", "--listen", "tcp://192.0.2.1:0")
    assert answer.code == 1
    assert "HEADWATER_TOKEN" in answer.err
    assert "nothing was started" in answer.err


def test_nobody_at_the_address(headwater_command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADWATER_TOKEN", "any")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    answer = headwater_command("status", "--address", f"tcp://127.0.0.1:{port}", "--timeout", "1")
    assert answer.code == 1
    assert answer.err.startswith("headwater: Unreachable:")


def test_a_token_file_is_made_once(tmp_path: Path) -> None:
    path = tmp_path / "token"
    token = read_token(path)
    assert len(token) == 64
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert read_token(path) == token


def test_a_token_file_that_others_can_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text("secret", encoding="utf-8")
    path.chmod(0o644)
    with pytest.raises(UsageError, match="chmod 600"):
        read_token(path)


def test_a_token_file_that_is_empty_or_out_of_reach(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.touch(mode=0o600)
    with pytest.raises(UsageError, match="empty"):
        read_token(path)
    with pytest.raises(UsageError, match="cannot be made"):
        read_token(tmp_path / "nowhere" / "token")
    assert not os.path.exists(tmp_path / "nowhere")  # noqa: PTH110
