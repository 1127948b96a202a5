"""A crash at any byte leaves the old snapshot or the new one, never neither."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from headwater.errors import SnapshotCorrupt, UsageError
from headwater.server.snapshots import manifest, restore
from headwater.server.snapshots.format import SessionMark
from headwater.types import Bulk
from tests.server.snapshots import scene
from tests.server.snapshots.crashes import Crash, Recorder, crashes
from tests.server.tables.dense.tools import table

RUNS = 4


def record(root: Path, skip: tuple[str, ...] = ()) -> Recorder:
    """Snapshots one after the other, each with its deletions."""
    disk = Recorder(root, skip)
    for number in range(1, RUNS + 1):
        scene.small(root, float(number), number, disk)
        disk.done()
        manifest.prune(root, disk=disk)
    return disk


def check(crash: Crash) -> int:
    """The newest sound snapshot is the last that was finished, or the one in hand; whole. Its number."""
    try:
        found = restore.newest(crash.folder)
    except UsageError:
        assert crash.least == 0, crash.what
        return 0
    with found.snapshot as snapshot:
        assert snapshot.number in (crash.least, crash.least + 1), crash.what
        assert scene.values_of(snapshot) == {float(snapshot.number)}, crash.what
        assert snapshot.sessions(0) == (SessionMark(7, 0, ((0, snapshot.number),)),), crash.what
        assert not found.refused, crash.what
        return snapshot.number


def check_all(disk: Recorder, tmp_path: Path) -> None:
    for crash in crashes(disk.ops, tmp_path / "room"):
        check(crash)


@pytest.mark.parametrize("seed", range(3))
def test_old_or_new_never_neither(seed: int, tmp_path: Path) -> None:
    disk = record(tmp_path / "run")
    for index, crash in enumerate(crashes(disk.ops, tmp_path / "room", seed)):
        found = check(crash)
        if index % 10 == seed:  # and the next one works
            made = scene.small(crash.folder, found + 100.0, 1)
            manifest.prune(crash.folder)
            with restore.newest(crash.folder).snapshot as snapshot:
                assert snapshot.number == made.number > found
                assert scene.values_of(snapshot) == {found + 100.0}
            kept = manifest.numbers(crash.folder)
            assert kept == manifest.finished(crash.folder)
            assert len(kept) <= 2
        shutil.rmtree(crash.folder)


@pytest.mark.parametrize("skip", ["sync", "sync_folder"])
def test_a_writer_that_does_not_sync_is_caught(skip: str, tmp_path: Path) -> None:
    disk = record(tmp_path / "run", (skip,))
    with pytest.raises((AssertionError, SnapshotCorrupt)):
        check_all(disk, tmp_path)


def test_a_writer_that_deletes_first_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The seeded bug: the old snapshot goes before the new one is there."""
    publish = manifest.publish

    def deletes_first(root: Path, number: int, *args: object, disk: Recorder, **kwargs: object) -> object:
        for old in manifest.finished(root):
            manifest._delete(manifest.folder_of(root, old), disk)
        return publish(root, number, *args, disk=disk, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(manifest, "publish", deletes_first)
    disk = record(tmp_path / "run")
    with pytest.raises(AssertionError):
        check_all(disk, tmp_path)


def test_two_are_kept_and_what_was_given_up_goes(tmp_path: Path) -> None:
    scene.small(tmp_path, 1.0, 1)
    manifest.start(tmp_path)  # a snapshot that nobody finished
    for number in (3.0, 4.0):
        scene.small(tmp_path, number, 1)
    _, open_folder = manifest.start(tmp_path)  # one that is being written
    (open_folder / "shard-00000.safetensors.part").write_bytes(b"x")
    (tmp_path / "notes").mkdir()  # not ours
    manifest.prune(tmp_path)
    assert manifest.finished(tmp_path) == [3, 4]
    assert manifest.numbers(tmp_path) == [3, 4, 5]
    assert (tmp_path / "notes").exists()


def test_what_does_not_fit_together_is_not_published(tmp_path: Path) -> None:
    made = scene.small(tmp_path, 1.0, 1)
    written = [scene.Written(file.name, file.nbytes, file.sha256) for file in made.files]
    tables = {0: scene.SMALL}
    with pytest.raises(SnapshotCorrupt, match="not of all 3"):
        manifest.publish(tmp_path, 1, written, tables, 3)
    with pytest.raises(SnapshotCorrupt, match="not of all 2"):
        manifest.publish(tmp_path, 1, written[:1], tables, 2)
    with pytest.raises(SnapshotCorrupt, match="bytes of snapshot 1"):
        manifest.publish(tmp_path, 1, [scene.Written(written[0].name, 5, ""), written[1]], tables, 2)
    shutil.copytree(tmp_path / "00000001", tmp_path / "00000002")
    with pytest.raises(SnapshotCorrupt, match="of snapshot 1, not"):
        manifest.publish(tmp_path, 2, written, tables, 2)


def test_bulk_tables_are_cut_at_one_clock(tmp_path: Path) -> None:
    marks = [scene.ShardMark(1, shard, 0, (), (scene.Mark(0, 5 + shard),)) for shard in range(2)]
    bulk = table("SGD", [(3,)], sync=Bulk())
    with pytest.raises(SnapshotCorrupt, match=r"cut at clocks \[5, 6\]"):
        manifest.merge(tmp_path, 0, bulk, marks)
    assert manifest.merge(tmp_path, 0, scene.SMALL, marks).clock == 6


SCRIPT = """
import sys
from pathlib import Path
from headwater.server.snapshots import manifest
from tests.server.snapshots import scene
number = 0
while True:
    number += 1
    scene.small(Path(sys.argv[1]), float(number), number)
    manifest.prune(Path(sys.argv[1]))
    print(number, flush=True)
"""


def test_killed_for_real(tmp_path: Path) -> None:
    """SIGKILL at moments that the writer's own progress decides: after so many snapshots, wherever it is then."""
    root = Path(__file__).parents[3]
    environment = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{root / 'src'}"}
    for after in (1, 3, 8):
        folder = tmp_path / str(after)
        with subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(folder)], stdout=subprocess.PIPE, env=environment, cwd=root
        ) as process:
            assert process.stdout is not None
            for _ in range(after):
                process.stdout.readline()
            process.send_signal(signal.SIGKILL)
            rest = process.stdout.read()
        least = after + rest.count(b"\n")
        with contextlib.closing(restore.newest(folder).snapshot) as snapshot:
            assert snapshot.number in (least, least + 1)
            assert scene.values_of(snapshot) == {float(snapshot.number)}
