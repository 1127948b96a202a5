"""The coordinator's file work for snapshots, in a thread: commits do not wait for a disk."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path

from headwater.cluster.snapshots import Kept, Outcome, Publish, Published, Restored, Start, Started
from headwater.errors import ClusterError, HeadwaterError, SnapshotCorrupt
from headwater.server.snapshots import manifest
from headwater.server.snapshots.disk import DISK, Disk
from headwater.server.snapshots.format import Written
from headwater.server.snapshots.opened import newest


class Keeper:
    """``root``: the folder of snapshots. Each call is answered by one outcome of ``poll``, in their order.

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

    def do(self, job: Start | Publish) -> None:
        """Make a folder for a new snapshot; or a snapshot of parts that are on disk, and delete the oldest."""
        if isinstance(job, Publish):
            self._do(lambda: self._publish(job))
        else:
            self._do(self._start)

    def poll(self) -> Outcome | None:
        """What has become of a call."""
        try:
            return self._done.get_nowait()
        except queue.Empty:
            return None

    def _do(self, act: Callable[[], Outcome]) -> None:
        if self._threads:
            threading.Thread(target=self._guard, args=(act,), name="headwater-keeper", daemon=True).start()
        else:
            self._guard(act)

    def _guard(self, act: Callable[[], Outcome]) -> None:
        try:
            outcome = act()
        except HeadwaterError as error:
            outcome = error
        except Exception as error:  # noqa: BLE001 - a disk's error becomes the asker's answer
            outcome = ClusterError(f"the folder of snapshots {self._root} cannot be written: {error}")
        self._done.put(outcome)
        if self._landed is not None:
            self._landed()

    def _start(self) -> Outcome:
        number, folder = manifest.start(self._root, self._disk)
        return Started(number, str(folder))

    def _publish(self, wanted: Publish) -> Outcome:
        files = [Written(part.file, part.nbytes, part.sha256) for part in wanted.parts]
        manifest.publish(
            self._root, wanted.number, files, wanted.tables, len(files),
            plan=wanted.plan, now=self._wall(), disk=self._disk,
        )  # fmt: skip
        manifest.prune(self._root, disk=self._disk)
        return Published(str(manifest.folder_of(self._root, wanted.number)))


def restored(path: Path) -> tuple[Restored, list[SnapshotCorrupt]]:
    """What a cluster begins with: the newest sound snapshot of a folder, or the named one; and what was refused.

    Raises ``SnapshotCorrupt`` or ``UsageError``.
    """
    found = newest(path)
    with found.snapshot as snapshot:
        tables = tuple(Kept(t.table, t.spec, t.mark.clock) for t in snapshot.manifest.tables)
        return Restored(str(snapshot.folder.absolute()), tables, snapshot.manifest.plan), list(found.refused)
