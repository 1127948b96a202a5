"""The coordinator's file work: what is left behind by failures, kills and others in the same folder."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from headwater.cluster.effects import DeleteFolder, FolderMade, MakeFolder, WriteManifest
from headwater.errors import HeadwaterError
from headwater.server.snapshots import disk, manifest
from headwater.server.snapshots.keeper import Keeper
from headwater.wire import messages as m
from tests.server.snapshots import scene

HOLDER = """
import sys
from pathlib import Path
from headwater.cluster.effects import MakeFolder
from headwater.server.snapshots.keeper import Keeper
keeper = Keeper(Path(sys.argv[1]), threads=False)
keeper.do(MakeFolder())
print(keeper.poll().folder, flush=True)
sys.stdin.read()
"""


def _started(keeper: Keeper) -> Path:
    keeper.do(MakeFolder())
    found = keeper.poll()
    assert isinstance(found, FolderMade)
    return Path(found.folder)


def _half(folder: Path) -> None:
    (folder / "shard-00000.safetensors").write_bytes(b"whole")
    (folder / "shard-00001.safetensors.part").write_bytes(b"half")


def test_one_that_was_given_up_is_deleted_and_its_number_is_not_used_again(tmp_path: Path) -> None:
    keeper = Keeper(tmp_path, threads=False)
    folder = _started(keeper)
    _half(folder)
    keeper.do(DeleteFolder(1))
    assert keeper.poll() is None
    assert not folder.exists()
    assert _started(keeper).name == "00000002"


def test_what_a_late_writer_leaves_of_one_that_was_given_up_goes_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeper = Keeper(tmp_path, threads=False)
    folder = _started(keeper)
    delete = manifest._delete

    def late(folder: Path, disk: disk.Disk) -> None:
        _half(folder)
        raise OSError("Directory not empty")

    monkeypatch.setattr(manifest, "_delete", late)
    keeper.do(DeleteFolder(1))
    assert folder.exists()
    monkeypatch.setattr(manifest, "_delete", delete)
    assert _started(keeper).name == "00000002"
    assert not folder.exists()


def test_one_that_cannot_be_published_is_deleted(tmp_path: Path) -> None:
    keeper = Keeper(tmp_path, threads=False)
    folder = _started(keeper)
    _half(folder)
    no_such_file = m.CutDone(1, 0, "shard-00000.safetensors", 9, "ab")
    keeper.do(WriteManifest(1, (no_such_file,), {}, b""))
    assert isinstance(keeper.poll(), HeadwaterError)
    assert not folder.exists()
    assert _started(keeper).name == "00000002"


def test_a_keeper_that_begins_deletes_what_nobody_has_finished_or_holds(tmp_path: Path) -> None:
    scene.small(tmp_path, 1.0, 1)
    left = tmp_path / "00000002"
    left.mkdir()
    _half(left)
    (tmp_path / "notes").mkdir()
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout
        theirs = Path(other.stdout.readline().strip())
        _half(theirs)
        keeper = Keeper(tmp_path, threads=False)
        keeper.sweep()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["00000001", theirs.name, "notes"]
        assert _started(keeper).name == "00000004"
        scene.small(tmp_path, 2.0, 2)  # number 5: finished, and newer than theirs
        manifest.prune(tmp_path)
        assert theirs.exists()
        other.kill()
        other.wait()
    Keeper(tmp_path, threads=False).sweep()
    assert not theirs.exists()
    assert manifest.finished(tmp_path) == [1, 5]


def test_two_keepers_of_one_folder_never_have_the_same_number(tmp_path: Path) -> None:
    found: list[str] = []

    def work() -> None:
        keeper = Keeper(tmp_path, threads=False)
        found.extend(_started(keeper).name for _ in range(10))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 40


def test_a_file_has_one_writer(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    half = tmp_path / "model.safetensors.part"
    half.write_bytes(b"of a writer that was killed, and longer than what comes now")
    with disk.whole(disk.DISK, path) as file:
        file.write(b"mine")
        with pytest.raises(OSError, match="another process writes it"), disk.whole(disk.DISK, path):
            pytest.fail("there are two")
        assert disk.held(half) is True
    assert path.read_bytes() == b"mine"
    assert disk.held(path) is False
    assert not half.exists()
