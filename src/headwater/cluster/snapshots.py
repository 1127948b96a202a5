"""The coordinator's part in a snapshot.

One snapshot at a time: *wanted* → *starting* (the host makes a folder) → *preparing* (every primary makes memory ready)
→ *cutting* (every primary makes its part) → *publishing* (the host writes the manifest) → done, and whoever asked is
answered. If a shard gets another primary before its part is there, or fails, all is begun anew under the next number, a
few times. The host does the file work (``server.snapshots.keeper``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from headwater.cluster.dataplan import DataPlans
from headwater.cluster.effects import DeleteFolder, FolderMade, MakeFolder, ManifestWritten, Outcome, WriteManifest
from headwater.cluster.outbox import Outbox
from headwater.cluster.tables import Tables
from headwater.errors import ClusterError, DeadlineExceeded, HeadwaterError, UsageError
from headwater.types import TableSpec
from headwater.wire import messages as m
from headwater.wire.outgoing import Asker

TRIES = 6
AGAIN = 0.1  # seconds until the second attempt, doubled for each further one
PATIENCE = 600.0  # seconds for all parts of one snapshot
CALM = 1.0  # seconds after a failed one before the next that nobody asked for

Step = Literal["idle", "wanted", "starting", "preparing", "cutting", "publishing"]


class Snapshots:
    """``every``: seconds between two of them, 0 for none but on demand. ``here``: whether there is a folder."""

    def __init__(
        self, outbox: Outbox, tables: Tables, plans: DataPlans, here: bool, every: float = 0.0, now: float = 0.0
    ) -> None:
        self.step: Step = "idle"
        self.number = 0
        self.error = ""  # of the last attempt
        self._outbox = outbox
        self._tables = tables
        self._plans = plans
        self._here = here
        self._every = every
        self._due = now + every
        self._deadline = 0.0
        self._began = now
        self._tries = 0
        self._retry = 0.0
        self._folder = ""
        self._askers: list[Asker] = []
        self._next: list[Asker] = []  # who asked after the moment of the one that is on its way
        self._missing: set[int] = set()
        self._parts: dict[int, m.CutDone] = {}
        self._specs: Mapping[int, TableSpec] = {}  # of the tables that it will hold
        self._clock = 0  # of the last step that it will hold
        self._plan: bytes | None = None  # the data plans at the moment of the cut; None: they are written at the end

    # ---- wishes ----------------------------------------------------------------------------------

    def ask(self, asker: Asker, now: float) -> None:
        """Somebody wants a snapshot of now, so one whose moment has been is not it. ``tick`` begins it.

        Raises ``UsageError`` without a folder.
        """
        if not self._here:
            raise UsageError("this cluster has no folder for snapshots: start it with --snapshots DIR")
        if self.step in ("cutting", "publishing"):
            self._next.append(asker)
            return
        self._askers.append(asker)
        if self.step == "idle":
            self._want(now)

    def disconnected(self, peer: int) -> None:
        """Whoever asked over this connection is not there any more."""
        self._askers = [asker for asker in self._askers if asker.peer != peer]
        self._next = [asker for asker in self._next if asker.peer != peer]

    def tick(self, now: float, served: bool) -> None:
        """Time has passed. ``served``: every shard has a primary, and nothing is being made or assigned."""
        if self.step == "idle" and self._here and self._every and now >= self._due:
            self._want(now)
        if self.step == "wanted" and served and now >= self._retry:
            self.step = "starting"
            self._outbox.do(MakeFolder())
        elif self.step in ("wanted", "preparing", "cutting") and now >= self._deadline:
            waits = "no primary" if self.step == "wanted" else f"no part from shards {sorted(self._missing)}"
            self._failed(DeadlineExceeded(f"snapshot {self.number}: {waits} in {PATIENCE:.0f} s"), now)

    def _want(self, now: float) -> None:
        self.step, self._tries, self._retry = "wanted", 0, now
        self._began, self._deadline = now, now + PATIENCE

    def settled(self, committed: int) -> int:
        """Of the steps up to ``committed``, those that a snapshot under way holds as well."""
        return min(committed, self._clock) if self.step == "cutting" else committed

    # ---- on its way ------------------------------------------------------------------------------

    def finished(self, outcome: Outcome, now: float) -> None:
        """What became of the host's work on files."""
        match outcome:
            case FolderMade():
                self.step, self.number, self._folder = "preparing", outcome.number, outcome.folder
                self._ask_shards(prepare=True)
            case ManifestWritten():
                self._written(outcome, now)
            case _:
                self._failed(outcome, now)

    def part(self, done: m.CutDone, now: float) -> None:
        """A shard has written its part, or could not."""
        wanted = "preparing" if done.prepared else "cutting"
        if self.step not in (wanted, "preparing") or done.snapshot != self.number or done.shard not in self._missing:
            return
        if done.error:
            self._again(ClusterError(f"snapshot {self.number}: {done.error}"), now)
            return
        self._missing.discard(done.shard)
        if not done.prepared:
            self._parts[done.shard] = done
        if not self._missing and done.prepared:
            self._cut()
        elif not self._missing:
            self._publish()

    def _cut(self) -> None:
        """Now: what has been decided until here is in the snapshot, what will be decided is not."""
        ready = {t.number: t for t in self._tables.by_number.values() if t.state == "ready"}
        clocks = [(t.number, t.clock) for t in ready.values() if t.spec.sync.collective and len(t.participants) > 1]
        together = all(t.spec.sync.collective for t in ready.values())
        self._clock, self._plan = self._tables.committed(), None if together else self._plans.snapshot()
        self.step, self._parts = "cutting", {}
        self._specs = {number: table.spec for number, table in ready.items()}
        self._ask_shards(tuple(sorted(clocks)))

    def _publish(self) -> None:
        self.step = "publishing"
        parts = tuple(self._parts[shard] for shard in sorted(self._parts))
        last = max((clock for part in parts for _, clock in part.clocks), default=0)
        plan = self._plans.snapshot(last) if self._plan is None else self._plan
        self._outbox.do(WriteManifest(self.number, parts, self._specs, plan))

    def _ask_shards(self, clocks: tuple[tuple[int, int], ...] = (), *, prepare: bool = False) -> None:
        """``clocks``: the last committed step of each bulk table that the coordinator commits."""
        self._missing = set(range(self._tables.shards))
        for shard in range(self._tables.shards):
            self._outbox.tell(shard, m.Cut(self.number, shard, self._folder, clocks, prepare))

    def moved(self, shard: int, now: float) -> None:
        """A shard has another primary, or none: it knows nothing of the cut."""
        if self.step == "preparing" or (self.step == "cutting" and shard in self._missing):
            self._again(ClusterError(f"snapshot {self.number}: shard {shard} changed its primary"), now)

    def _again(self, error: HeadwaterError, now: float) -> None:
        self._tries += 1
        if self._tries >= TRIES:
            self._failed(error, now)
            return
        self._forget()
        self.step, self._retry = "wanted", now + AGAIN * 2**self._tries

    def _forget(self) -> None:
        """The shards give back the memory that they keep for it, and what is on disk is deleted."""
        if self.step not in ("preparing", "cutting"):
            return
        for shard in range(self._tables.shards):
            self._outbox.tell(shard, m.Cut(self.number, shard, "", ()))
        self._outbox.do(DeleteFolder(self.number))

    def _written(self, made: ManifestWritten, now: float) -> None:
        """It exists."""
        nbytes = sum(part.nbytes for part in self._parts.values())
        pause = max((part.pause for part in self._parts.values()), default=0.0)
        self.error = ""
        self._end(m.SnapshotTaken(made.path, nbytes, now - self._began, pause), now, now + self._every)

    def _failed(self, error: HeadwaterError, now: float) -> None:
        """It will not exist; the ones before are as they were."""
        self.error = str(error)
        self._forget()
        self._end(error, now, now + max(CALM, self._every))

    def _end(self, outcome: m.SnapshotTaken | HeadwaterError, now: float, due: float) -> None:
        self.step, self._due = "idle", due
        askers, self._askers, self._next = self._askers, self._next, []
        if self._askers:
            self._want(now)
        for asker in askers:
            if isinstance(outcome, m.SnapshotTaken):
                self._outbox.reply(asker, outcome)
            else:
                self._outbox.fail(asker, outcome)
