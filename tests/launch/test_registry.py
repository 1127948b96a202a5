"""The private records by which `headwater status` finds a cluster."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from headwater.launch import registry
from tests.patience import PATIENCE

LAUNCHER = """
import select, sys
from headwater.launch import registry
print(registry.advertise("tcp://127.0.0.1:7", "secret", "headwater up"), registry.keep_token("secret"),
      registry.private_state(), flush=True)
select.select([], [], [])
"""


def _launcher() -> tuple[subprocess.Popen[str], list[Path]]:
    """Another process, and what it has left."""
    other = subprocess.Popen([sys.executable, "-c", LAUNCHER], stdout=subprocess.PIPE, text=True)
    assert other.stdout
    return other, [Path(word) for word in other.stdout.readline().split()]


def test_a_record_is_private_and_found() -> None:
    path = registry.advertise("tcp://127.0.0.1:7", "secret", "headwater up")
    assert path
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    (record,) = registry.running()
    assert (record.address, record.token, record.pid) == ("tcp://127.0.0.1:7", "secret", os.getpid())
    registry.withdraw(path)
    registry.withdraw(path)
    assert registry.running() == []
    assert list(path.parent.iterdir()) == []


def test_what_a_launcher_that_lives_has_left_stays_and_of_one_that_was_killed_goes() -> None:
    other, left = _launcher()
    with other:
        (record,) = registry.running()
        assert record.pid == other.pid
        assert [path.suffix for path in left] == [".json", ".token", ".state"]
        mine = registry.private_state()  # removes what nobody holds
        assert all(path.exists() for path in left)
        other.send_signal(signal.SIGKILL)
        other.wait(PATIENCE)
        assert registry.running() == []
    assert not any(path.exists() for path in left)
    assert mine.is_dir()


def test_a_process_number_that_is_used_again_is_not_the_launcher() -> None:
    """In a container everything is process 1."""
    other, (path, *_) = _launcher()
    with other:
        other.kill()
    record = msgspec.json.decode(path.read_bytes(), type=registry.Record)
    mine = path.with_name(f"{os.getpid()}-{path.name.partition('-')[2]}")
    mine.write_bytes(msgspec.json.encode(msgspec.structs.replace(record, pid=os.getpid())))
    mine.chmod(0o600)
    assert registry.running() == []
    assert not mine.exists()


def test_two_launchers_of_one_process_number_do_not_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getpid", lambda: 1)
    paths = [registry.advertise("tcp://127.0.0.1:7", "secret"), registry.advertise("tcp://127.0.0.1:8", "secret")]
    tokens = [registry.keep_token("one"), registry.keep_token("two")]
    assert len({*paths, *tokens}) == 4
    assert [record.address for record in registry.running()] == ["tcp://127.0.0.1:7", "tcp://127.0.0.1:8"]
    assert [path.read_text(encoding="utf-8") for path in tokens] == ["one\n", "two\n"]


def test_a_forked_child_that_lives_longer_does_not_keep_the_record() -> None:
    code = LAUNCHER.replace(
        "select.select", "import os\nif os.fork(): os.wait()\nprint('child', flush=True)\nselect.select"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, process_group=0) as other:
        assert other.stdout
        assert other.stdout.readline()
        assert other.stdout.readline() == b"child\n"
        os.kill(other.pid, signal.SIGKILL)
        os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)
        assert registry.running() == []
        os.killpg(other.pid, signal.SIGKILL)


def test_what_is_not_a_record_is_passed_over() -> None:
    (registry.folder() / "1-7.json").write_text("{", encoding="utf-8")
    assert registry.running() == []


def test_a_command_that_is_no_text_is_recorded_all_the_same() -> None:
    assert registry.advertise("tcp://127.0.0.1:7", "secret", "run caf\udce9.py")
    (record,) = registry.running()
    assert record.command == r"run caf\udce9.py"


def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files is this one."""
    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(place))
    monkeypatch.setattr("headwater.launch.registry._shared", lambda: [str(place)])
    return place / f"headwater-{os.getuid()}"


def _missing(path: Path) -> None:
    del path


def _a_file(path: Path) -> None:
    path.write_text("", encoding="utf-8")


def _open_to_all(path: Path) -> None:
    (path / "headwater").mkdir(parents=True)
    (path / "headwater").chmod(0o755)


def _of_another(path: Path) -> None:
    path.mkdir()
    if os.getuid():
        pytest.skip("only root can give a folder away")
    os.chown(path, 4321, 4321)


@pytest.mark.parametrize("spoil", [_missing, _a_file, _open_to_all, _of_another])
def test_a_runtime_folder_that_cannot_be_used_gives_way_to_one_that_all_of_this_users_find(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: object
) -> None:
    spoil(tmp_path / "runtime")  # type: ignore[operator]
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "runtime"))
    expected = _elsewhere(tmp_path, monkeypatch)
    path = registry.advertise("tcp://127.0.0.1:7", "secret")
    assert path
    assert path.parent == expected
    assert registry.folder() == expected
    assert stat.S_IMODE(expected.stat().st_mode) == 0o700
    assert f"XDG_RUNTIME_DIR={tmp_path / 'runtime'} cannot be used" in registry.complaint()
    assert "runtime" in registry.complaint()
    assert [record.pid for record in registry.running()] == [os.getpid()]
    monkeypatch.delenv("XDG_RUNTIME_DIR")  # as in another shell
    assert [record.pid for record in registry.running()] == [os.getpid()]
    assert registry.complaint() == ""
    registry.withdraw(path)


def test_where_no_private_folder_can_be_had_there_is_no_record_and_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "runtime"))
    place = _elsewhere(tmp_path, monkeypatch)
    place.mkdir(mode=0o755)
    assert registry.advertise("tcp://127.0.0.1:7", "secret") is None
    assert registry.running() == []
    assert "needs --address and the token" in registry.complaint()
    token = registry.keep_token("secret")
    assert token.read_text(encoding="utf-8") == "secret\n"
    assert stat.S_IMODE(token.parent.stat().st_mode) == 0o700
    registry.withdraw(token)


def test_a_private_file_is_never_written_into_an_existing_one(tmp_path: Path) -> None:
    target = tmp_path / "token"
    target.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError):
        registry.write_private(target, "secret")
    assert not (tmp_path / "elsewhere").exists()
