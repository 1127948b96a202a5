"""The coordinator's part in a snapshot, as a state machine: what happened in, what is to be done out.

One snapshot at a time: *wanted* → *starting* (the host makes a folder) → *preparing* (every primary makes memory ready)
→ *cutting* (every primary makes its part) → *publishing* (the host writes the manifest) → done, and whoever asked is
answered. If a shard gets another primary before its part is there, or fails, all is begun anew under the next number, a
few times. The host does the file work (``server.snapshots.keeper``), the coordinator sends each ``Cut``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

from headwater.errors import ClusterError, DeadlineExceeded, HeadwaterError, UsageError
from headwater.types import TableSpec
from headwater.wire import messages as m
from headwater.wire.outgoing import Asker

TRIES = 6
AGAIN = 0.1  # seconds until the second attempt, doubled for each further one
PATIENCE = 600.0  # seconds for all parts of one snapshot
CALM = 1.0  # seconds after a failed one before the next that nobody asked for


class Start(NamedTuple):
    """To the host: make a folder; then ``started`` or ``failed``."""


class Publish(NamedTuple):
    """To the host: all parts are on disk, make it a snapshot; then ``published`` or ``failed``.

    ``plan``: the data plans' state; the coordinator puts it in.
    """

    number: int
    parts: tuple[m.CutDone, ...]
    tables: Mapping[int, TableSpec]
    plan: bytes = b""


class Discard(NamedTuple):
    """To the host: this one was given up, delete what there is of it. There is no answer."""

    number: int


class Started(NamedTuple):
    """The host has made a folder."""

    number: int
    folder: str


class Published(NamedTuple):
    """The host has made it a snapshot."""

    path: str


Outcome = Started | Published | HeadwaterError


class Kept(NamedTuple):
    """A table of a snapshot that a cluster begins with. ``clock``: its last bulk step."""

    number: int
    spec: TableSpec
    clock: int


class Restored(NamedTuple):
    """A snapshot that a cluster begins with; ``folder`` is where the servers find it."""

    folder: str
    tables: tuple[Kept, ...]
    plan: bytes


class Moment(NamedTuple):
    """To the coordinator: all shards are ready; now ``cut``."""


class Send(NamedTuple):
    """To the coordinator: this to the shard's primary."""

    shard: int
    cut: m.Cut


class Answer(NamedTuple):
    """To the coordinator: someone who asked hears what became of it."""

    asker: Asker
    reply: m.SnapshotTaken | HeadwaterError


Action = Start | Moment | Publish | Send | Answer
Step = Literal["idle", "wanted", "starting", "preparing", "cutting", "publishing"]


class Snapshots:
    """``every``: seconds between two of them, 0 for none but on demand. ``here``: whether there is a folder."""

    def __init__(self, here: bool, every: float = 0.0, now: float = 0.0) -> None:
        self.step: Step = "idle"
        self.number = 0
        self.error = ""  # of the last attempt
        self._here = here
        self._every = every
        self._due = now + every
        self._deadline = 0.0
        self._began = now
        self._tries = 0
        self._retry = 0.0
        self._folder = ""
        self._shards = 0
        self._tables: Mapping[int, TableSpec] = {}
        self._askers: list[Asker] = []
        self._next: list[Asker] = []  # who asked after the moment of the one that is on its way
        self._missing: set[int] = set()
        self._parts: dict[int, m.CutDone] = {}

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

    def gone(self, peer: int) -> None:
        """Whoever asked over this connection is not there any more."""
        self._askers = [asker for asker in self._askers if asker.peer != peer]
        self._next = [asker for asker in self._next if asker.peer != peer]

    def tick(self, now: float, served: bool) -> list[Action]:
        """Time has passed. ``served``: every shard has a primary, and nothing is being made or assigned."""
        if self.step == "idle" and self._here and self._every and now >= self._due:
            self._want(now)
        if self.step == "wanted" and served and now >= self._retry:
            self.step = "starting"
            return [Start()]
        if self.step in ("wanted", "preparing", "cutting") and now >= self._deadline:
            waits = "no primary" if self.step == "wanted" else f"no part from shards {sorted(self._missing)}"
            return self.failed(DeadlineExceeded(f"snapshot {self.number}: {waits} in {PATIENCE:.0f} s"), now)
        return []

    def _want(self, now: float) -> None:
        self.step, self._tries, self._retry = "wanted", 0, now
        self._began, self._deadline = now, now + PATIENCE

    # ---- on its way ------------------------------------------------------------------------------

    def started(self, made: Started, shards: int) -> list[Action]:
        """There is a folder."""
        self.step, self.number, self._folder, self._shards = "preparing", made.number, made.folder, shards
        return self._send(prepare=True)

    def cut(self, clocks: Iterable[tuple[int, int]], tables: Mapping[int, TableSpec]) -> list[Action]:
        """The moment. ``clocks``: the last step of each bulk table that the coordinator has committed.

        The cuts that this returns must be sent before any later commit. ``tables``: what the snapshot will hold.
        """
        self.step, self._tables, self._parts = "cutting", tables, {}
        return self._send(tuple(sorted(clocks)))

    def _send(self, clocks: tuple[tuple[int, int], ...] = (), *, prepare: bool = False) -> list[Action]:
        self._missing = set(range(self._shards))
        return [Send(shard, m.Cut(self.number, shard, self._folder, clocks, prepare)) for shard in range(self._shards)]

    def part(self, done: m.CutDone, now: float) -> list[Action]:
        """A shard has written its part, or could not."""
        wanted = "preparing" if done.prepared else "cutting"
        if self.step not in (wanted, "preparing") or done.snapshot != self.number or done.shard not in self._missing:
            return []
        if done.error:
            return self._again(ClusterError(f"snapshot {self.number}: {done.error}"), now)
        self._missing.discard(done.shard)
        if done.prepared:
            return [] if self._missing else [Moment()]
        self._parts[done.shard] = done
        if self._missing:
            return []
        self.step = "publishing"
        return [Publish(self.number, tuple(self._parts[shard] for shard in sorted(self._parts)), self._tables)]

    def moved(self, shard: int, now: float) -> list[Action]:
        """A shard has another primary, or none: it knows nothing of the cut."""
        if self.step != "preparing" and (self.step != "cutting" or shard not in self._missing):
            return []
        return self._again(ClusterError(f"snapshot {self.number}: shard {shard} changed its primary"), now)

    def _again(self, error: HeadwaterError, now: float) -> list[Action]:
        self._tries += 1
        if self._tries >= TRIES:
            return self.failed(error, now)
        forget = self._forget()
        self.step, self._retry = "wanted", now + AGAIN * 2**self._tries
        return forget

    def _forget(self) -> list[Action]:
        """The shards give back the memory that they keep for it."""
        if self.step not in ("preparing", "cutting"):
            return []
        return [Send(shard, m.Cut(self.number, shard, "", ())) for shard in range(self._shards)]

    def published(self, made: Published, now: float) -> list[Action]:
        """It exists."""
        nbytes = sum(part.nbytes for part in self._parts.values())
        pause = max((part.pause for part in self._parts.values()), default=0.0)
        taken = m.SnapshotTaken(made.path, nbytes, now - self._began, pause)
        self.error = ""
        return self._end(taken, now, now + self._every)

    def failed(self, error: HeadwaterError, now: float) -> list[Action]:
        """It will not exist; the ones before are as they were."""
        self.error = str(error)
        return self._forget() + self._end(error, now, now + max(CALM, self._every))

    def _end(self, outcome: m.SnapshotTaken | HeadwaterError, now: float, due: float) -> list[Action]:
        self.step, self._due = "idle", due
        askers, self._askers, self._next = self._askers, self._next, []
        if self._askers:
            self._want(now)
        return [Answer(asker, outcome) for asker in askers]
