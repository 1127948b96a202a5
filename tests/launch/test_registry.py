"""The private records by which `headwater status` finds a cluster."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from headwater.launch import registry


def test_a_record_is_private_and_found() -> None:
    path = registry.advertise("tcp://127.0.0.1:7", "secret", "headwater up")
    assert path
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    (record,) = registry.running()
    assert (record.address, record.token, record.pid) == ("tcp://127.0.0.1:7", "secret", os.getpid())


def test_the_record_of_a_launcher_that_was_killed_is_removed() -> None:
    path = registry.advertise("tcp://127.0.0.1:7", "secret")
    assert path
    gone = subprocess.run(
        [sys.executable, "-S", "-c", "import os; print(os.getpid())"], capture_output=True, check=True
    )
    record = msgspec.json.decode(path.read_bytes(), type=registry.Record)
    path.write_bytes(msgspec.json.encode(msgspec.structs.replace(record, pid=int(gone.stdout))))
    assert registry.running() == []
    assert not path.exists()


def test_what_is_not_a_record_is_passed_over() -> None:
    (registry.folder() / "1-7.json").write_text("{", encoding="utf-8")
    assert registry.running() == []


def test_a_folder_that_others_can_read_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "headwater").mkdir()
    (tmp_path / "headwater").chmod(0o755)
    with pytest.raises(PermissionError):
        registry.folder()
    assert registry.advertise("tcp://127.0.0.1:7", "secret") is None
    assert registry.running() == []


def test_a_private_file_is_never_written_into_an_existing_one(tmp_path: Path) -> None:
    target = tmp_path / "token"
    target.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError):
        registry.write_private(target, "secret")
    assert not (tmp_path / "elsewhere").exists()
