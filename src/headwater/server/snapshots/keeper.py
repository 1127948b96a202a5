"""The coordinator's file work for snapshots, in a thread: commits do not wait for a disk."""

from __future__ import annotations

import contextlib
import fcntl
import os
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path

from headwater.cluster.effects import DeleteFolder, FolderMade, Job, MakeFolder, ManifestWritten, Outcome, WriteManifest
from headwater.cluster.recovery import Restored, RestoredTable
from headwater.errors import ClusterError, HeadwaterError, SnapshotCorrupt
from headwater.server.snapshots import manifest
from headwater.server.snapshots.disk import DISK, Disk
from headwater.server.snapshots.format import Written
from headwater.server.snapshots.opened import newest


class Keeper:
    """``root``: the folder of snapshots. Each call is answered by one outcome of ``poll``, in their order.

    From its start to its end a snapshot's folder is under a lock, which goes with the process: another cluster with the
    same ``root`` takes another number, and a keeper that begins deletes what nobody holds and nobody has finished.

    ``threads=False``: the work is done at once, in the call; for the simulator.
    """

    def __init__(
        self,
        root: Path,
        *,
        landed: Callable[[], None] | None = None,
        wall: Callable[[], float] = time.time,
        disk: Disk = DISK,
        threads: bool = True,
    ) -> None:
        self._root = root.absolute()
        self._landed = landed
        self._wall = wall
        self._disk = disk
        self._threads = threads
        self._done: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
        self._turn = threading.Lock()  # one piece of work after the other
        self._held: dict[int, int] = {}  # snapshot -> its folder's lock
        self._given_up: set[int] = set()
        self._last = 0
        with contextlib.suppress(OSError):  # said when the folder is needed
            self._last = max(manifest.numbers(self._root), default=0)

    def sweep(self) -> None:
        """Delete what earlier clusters have not finished."""
        with contextlib.suppress(OSError):
            manifest.sweep(self._root, self._disk)

    def do(self, job: Job) -> None:
        """Make a folder for a new snapshot; or a snapshot of parts that are on disk, and delete the oldest; or delete
        what there is of one that was given up, of which there is no outcome."""
        match job:
            case WriteManifest():
                self._do(lambda: self._publish(job))
            case DeleteFolder():
                self._do(lambda: self._discard(job.number))
            case MakeFolder():
                self._do(self._start)

    def poll(self) -> Outcome | None:
        """What has become of a call."""
        try:
            return self._done.get_nowait()
        except queue.Empty:
            return None

    def _do(self, act: Callable[[], Outcome | None]) -> None:
        if self._threads:
            threading.Thread(target=self._guard, args=(act,), name="headwater-keeper", daemon=True).start()
        else:
            self._guard(act)

    def _guard(self, act: Callable[[], Outcome | None]) -> None:
        try:
            with self._turn:
                outcome = act()
        except HeadwaterError as error:
            outcome = error
        except Exception as error:  # noqa: BLE001 - a disk's error becomes the asker's answer
            outcome = ClusterError(f"the folder of snapshots {self._root} cannot be written: {error}")
        if outcome is None:
            return
        self._done.put(outcome)
        if self._landed is not None:
            self._landed()

    def _start(self) -> Outcome:
        for number in sorted(self._given_up):  # somebody may have been writing it still
            self._discard(number)
        while True:
            self._last, folder = manifest.start(self._root, self._disk, self._last)
            if self._hold(self._last, folder):
                return FolderMade(self._last, str(folder))

    def _hold(self, number: int, folder: Path) -> bool:
        """Whether the folder is ours: another cluster may have made it in the same moment."""
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return False
        except OSError:  # a disk without locks
            pass
        self._held[number] = fd
        return True

    def _let_go(self, number: int) -> None:
        fd = self._held.pop(number, -1)
        if fd >= 0:
            os.close(fd)

    def _discard(self, number: int) -> None:
        if manifest.discard(self._root, number, self._disk):
            self._given_up.discard(number)
            self._let_go(number)
        else:
            self._given_up.add(number)

    def _publish(self, wanted: WriteManifest) -> Outcome:
        try:
            return self._make(wanted)
        except BaseException:
            self._discard(wanted.number)
            raise
        finally:
            self._let_go(wanted.number)

    def _make(self, wanted: WriteManifest) -> Outcome:
        files = [Written(part.file, part.nbytes, part.sha256) for part in wanted.parts]
        manifest.publish(
            self._root, wanted.number, files, wanted.tables, len(files),
            plan=wanted.plan, now=self._wall(), disk=self._disk,
        )  # fmt: skip
        manifest.prune(self._root, disk=self._disk)
        return ManifestWritten(str(manifest.folder_of(self._root, wanted.number)))


def restored(path: Path) -> tuple[Restored, list[SnapshotCorrupt]]:
    """What a cluster begins with: the newest sound snapshot of a folder, or the named one; and what was refused.

    Raises ``SnapshotCorrupt`` or ``UsageError``.
    """
    found = newest(path)
    with found.snapshot as snapshot:
        tables = tuple(RestoredTable(t.table, t.spec, t.mark.clock) for t in snapshot.manifest.tables)
        return Restored(str(snapshot.folder.absolute()), tables, snapshot.manifest.plan), list(found.refused)
