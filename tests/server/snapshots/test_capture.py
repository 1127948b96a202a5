"""A shard's part of a snapshot, taken while the shard goes on."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from headwater.errors import InternalError
from headwater.server.snapshots import manifest
from headwater.server.snapshots.capture import Capture
from headwater.server.snapshots.disk import Disk, Sink
from headwater.server.snapshots.format import Mark, SessionMark
from headwater.versions import copying
from tests.patience import PATIENCE
from tests.server.snapshots import scene
from tests.server.tables.dense.tools import Sharded, table


def step(tables: Sharded, stepper: scene.Stepper, capture: Capture) -> None:
    """As the shard's loop does it."""
    for dense in tables.shards:
        capture.before_write(0, 0, dense.size)
    stepper.step(tables)


@pytest.mark.parametrize("optimizer", ["AdamW", "RMSprop", "Muon", "Adafactor"])
@pytest.mark.parametrize("before", [0, 1, 1000])
@pytest.mark.parametrize("threads", [True, False])
def test_steps_that_follow_are_not_in_it(
    optimizer: str, before: int, threads: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copying, "BLOCK", 1 << 14)
    spec = table(optimizer, [(100, 1000), (3, 1), (70, 31)])
    old, now = scene.filled(spec, 1), scene.filled(spec, 1)
    stepper, twin = scene.Stepper(), scene.Stepper()
    for _ in range(2):
        stepper.step(now)
        twin.step(old)
    number, folder = manifest.start(tmp_path)
    landed = threading.Event()
    capture = Capture(folder, number, 0, threads=threads, landed=landed.set)
    capture.prepare(0, now.shards[0])
    capture.begin(Mark(0, 2), now.shards[0])
    assert capture.has(0)
    if not threads:
        capture.advance(before)
    step(now, stepper, capture)
    capture.seal(5, (SessionMark(1, 0, ((0, 2),)),))
    step(now, stepper, capture)
    if not threads:
        while not capture.advance():
            assert not capture.error
    assert landed.wait(PATIENCE)
    assert not capture.error
    written = capture.result()
    assert written is not None
    assert capture.pause > 0
    manifest.publish(tmp_path, number, [written], {0: spec}, 1)
    scene.assert_same(scene.back(tmp_path, spec, 2), old)


def test_a_table_that_was_dropped_before_its_moment(tmp_path: Path) -> None:
    spec = table("SGD", [(10,)])
    gone, kept = scene.filled(spec, 1), scene.filled(spec, 1)
    number, folder = manifest.start(tmp_path)
    capture = Capture(folder, number, 0, threads=False)
    capture.prepare(0, gone.shards[0])
    capture.prepare(1, kept.shards[0])
    capture.begin(Mark(1), kept.shards[0])
    capture.seal(1, ())
    assert capture.advance()
    written = capture.result()
    assert written is not None
    made = manifest.publish(tmp_path, number, [written], {1: spec}, 1)
    assert [entry.table for entry in made.tables] == [1]


def test_a_moment_comes_once(tmp_path: Path) -> None:
    dense = scene.filled(table("SGD", [(10,)]), 1).shards[0]
    capture = Capture(tmp_path, 1, 0, threads=False)
    capture.begin(Mark(0), dense)
    with pytest.raises(InternalError, match="cut twice"):
        capture.begin(Mark(0), dense)


class Full(Disk):
    """A disk without room."""

    def create(self, path: Path) -> Sink:  # type: ignore[override]
        raise OSError(28, "No space left on device", str(path))


@pytest.mark.parametrize("threads", [True, False])
def test_a_full_disk_is_told(threads: bool, tmp_path: Path) -> None:
    dense = scene.filled(table("SGD", [(10,)]), 1).shards[0]
    landed = threading.Event()
    capture = Capture(tmp_path, 1, 3, threads=threads, disk=Full(), landed=landed.set)
    capture.begin(Mark(0), dense)
    capture.seal(1, ())
    assert not capture.advance(10) or threads
    assert landed.wait(PATIENCE)
    assert "shard 3 could not write its part" in capture.error
    assert "No space left" in capture.error
    assert capture.result() is None
    capture.drop()


class NearlyFull(Disk):
    """A disk with room for so many bytes."""

    def __init__(self, room: int) -> None:
        self.room = room

    @contextlib.contextmanager
    def create(self, path: Path) -> Iterator[Sink]:
        with super().create(path) as file:
            yield _Last(self, file)


class _Last:
    def __init__(self, disk: NearlyFull, file: Sink) -> None:
        self._disk, self._file = disk, file

    def write(self, data: memoryview | bytes) -> None:
        self._disk.room -= len(data)
        if self._disk.room < 0:
            raise OSError(28, "No space left on device")
        self._file.write(data)

    def sync(self) -> None:
        self._file.sync()


@pytest.mark.parametrize("room", [0, 100, 400_000])
def test_a_disk_that_fills_up_is_given_back_what_was_taken(room: int, tmp_path: Path) -> None:
    dense = scene.filled(table("SGD", [(200_000,)]), 1).shards[0]
    capture = Capture(tmp_path, 1, 3, threads=False, disk=NearlyFull(room))
    capture.begin(Mark(0), dense)
    capture.seal(1, ())
    assert not capture.advance(100)
    assert "No space left" in capture.error
    assert list(tmp_path.iterdir()) == []


def test_one_that_is_given_up_while_it_is_written_leaves_no_file(tmp_path: Path) -> None:
    class Slow(NearlyFull):
        """Somebody gives the snapshot up in the middle of the second write."""

        @contextlib.contextmanager
        def create(self, path: Path) -> Iterator[Sink]:
            with super().create(path) as file:
                yield file
                pytest.fail("the file came to its end")

    dense = scene.filled(table("SGD", [(200_000,)]), 1).shards[0]
    capture = Capture(tmp_path, 1, 3, threads=False, disk=Slow(1 << 30))
    written = _Last.write

    def give_up(self: _Last, data: memoryview | bytes) -> None:
        written(self, data)
        capture._dropped = True

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(_Last, "write", give_up)
        capture.begin(Mark(0), dense)
        capture.seal(1, ())
        assert not capture.advance(100)
    assert "it was given up" in capture.error
    assert list(tmp_path.iterdir()) == []


def test_one_that_is_dropped_before_it_is_copied_ends_its_threads(tmp_path: Path) -> None:
    dense = scene.filled(table("AdamW", [(1 << 20,)]), 1).shards[0]
    landed = threading.Event()
    capture = Capture(tmp_path, 1, 0, landed=landed.set)
    capture.begin(Mark(0), dense)
    capture.drop()
    capture.seal(1, ())
    assert landed.wait(PATIENCE)
    assert list(tmp_path.iterdir()) == []


def test_one_that_is_given_up_does_not_hold_the_shard(tmp_path: Path) -> None:
    dense = scene.filled(table("AdamW", [(1 << 20,)]), 1).shards[0]
    capture = Capture(tmp_path, 1, 0)
    capture.begin(Mark(0), dense)
    capture.drop()
    capture.before_write(0, 0, dense.size)
    dense.regions()["value"].fill_(1)
    assert capture.result() is None


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    dense = scene.filled(table("SGD", [(10,)]), 1).shards[0]
    capture = Capture(tmp_path / "x", 1, 0, threads=False)
    capture.begin(Mark(0), dense)
    capture.seal(1, ())
    assert not capture.advance(10)
    assert "No such file" in capture.error
